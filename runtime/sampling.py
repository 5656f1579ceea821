"""Logits -> the next token: penalties, temperature, top-k, top-p, min-p, and one uniform number.

Pure functions of numpy arrays; knows nothing of models, text or random generators. V is the number
of tokens that may be drawn. The order is fixed, so that any language can repeat a draw:

1. penalties (`penalize`), on the logits;
2. temperature: 0 takes the largest logit, the lowest id where several are largest;
3. top-k: the k most likely tokens, lower ids first among equals;
4. top-p: as few of the most likely of these as together hold at least top_p of their probability;
5. min-p: of these, the ones at least min_p times as likely as the most likely token;
6. the inverse of the cumulative distribution of what is left, by descending probability, lower
   ids first among equals, in float64: the first token where the sum exceeds u times the total.

Try: `sample(np.log([0.1, 0.7, 0.2]), 0.75, Sampling(temperature=1.0))` -> 2: 0.7 <= 0.75 < 0.9.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pico_edge.artefact import SAMPLING_DEFAULTS
from pico_edge.errors import PicoEdgeError, UsageError

ContextOverflow = Literal["slide", "stop"]
Logits = npt.NDArray[np.floating[Any]]
Weights = npt.NDArray[np.float64]

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
INFINITY = math.inf
# Looked up once: see Sampler.draw.
less_equal, logical_not, exp, accumulate = np.less_equal, np.logical_not, np.exp, np.add.accumulate
MAX_SEED = (1 << 63) - 1
# Below it logits would overflow; long before, only the largest have any chance.
MIN_TEMPERATURE = 1e-200
# Without top-k, this many of the most likely tokens are sorted first: they nearly always decide.
HEAD = 256
# Candidates looked at for each token wanted: enough that the guess still holds for the next logits.
# Of a trained 6 x 384 model's draws the guess failed 33 % with 2, 20 % with 3, 1 % with 4; of one
# with random weights none with 2, which is 2 us cheaper. So `draw` begins with half of SPARE.
SPARE = 4
TOO_MANY = SPARE * SPARE
MARGIN = 0.1  # of the spread of the candidates: how far below them the next guess goes


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; the defaults are those that a file gets at export.

    max_new_tokens: tokens. temperature: 0 is greedy. top_k: tokens, 0 is off. top_p: 1 is off.
    min_p: 0 is off. repetition_penalty: 1 is off; presence_penalty, frequency_penalty: 0 is off.
    context_overflow: at the end of the context "slide" goes on with its newest half, "stop" ends.
    Raises UsageError (a ValueError) that names the field.
    """

    max_new_tokens: int = SAMPLING_DEFAULTS["max_new_tokens"]
    temperature: float = SAMPLING_DEFAULTS["temperature"]
    top_k: int = SAMPLING_DEFAULTS["top_k"]
    top_p: float = SAMPLING_DEFAULTS["top_p"]
    min_p: float = SAMPLING_DEFAULTS["min_p"]
    repetition_penalty: float = SAMPLING_DEFAULTS["repetition_penalty"]
    presence_penalty: float = SAMPLING_DEFAULTS["presence_penalty"]
    frequency_penalty: float = SAMPLING_DEFAULTS["frequency_penalty"]
    context_overflow: ContextOverflow = SAMPLING_DEFAULTS["context_overflow"]

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k"):
            _check_whole(name, getattr(self, name), "0 or more")
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), "a finite number")
        if _check_number("temperature", self.temperature, "0 or more") < 0:
            raise UsageError(f"temperature is {self.temperature}: expected 0 or more")
        if not 0 < _check_number("top_p", self.top_p, "above 0, at most 1") <= 1:
            raise UsageError(f"top_p is {self.top_p}: expected above 0, at most 1")
        if not 0 <= _check_number("min_p", self.min_p, "0 to 1") <= 1:
            raise UsageError(f"min_p is {self.min_p}: expected 0 to 1")
        if _check_number("repetition_penalty", self.repetition_penalty, "above 0") <= 0:
            raise UsageError(f"repetition_penalty is {self.repetition_penalty}: expected above 0")
        if self.context_overflow not in ("slide", "stop"):
            raise UsageError(
                f"context_overflow is {self.context_overflow!r}: expected 'slide' or 'stop'"
            )

    @property
    def penalizes(self) -> bool:
        """Whether any penalty is on."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


def check_seed(seed: object) -> None:
    """Raises UsageError unless the seed is a whole number of 0 to 2**63 - 1."""
    if _check_whole("seed", seed, f"0 to {MAX_SEED}") > MAX_SEED:
        raise UsageError(f"seed is {seed}: expected 0 to {MAX_SEED}")


class Sampler:
    """Draws the tokens of one text by `sample`.

    Remembers above which logit the likely ones were last time: looking only there takes a third of
    the time of a search. A wrong guess costs that time and never changes a token.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        # An array of no dimensions: numpy compares with it twice as fast as with a Python float.
        self._guess = np.array(math.inf, np.float32)
        self._above = np.empty(0, np.bool_)  # memory of `draw`, of V places from the first on
        self._top_k, self._temperature = sampling.top_k, sampling.temperature
        self._wanted = sampling.top_k * SPARE // 2  # candidates that the guess aims at
        self._usual = (
            sampling.top_k > 1
            and sampling.temperature >= MIN_TEMPERATURE
            and sampling.top_p == 1
            and sampling.min_p == 0
        )

    def draw(self, logits: Logits, u: float) -> int:
        """`sample`, the usual case (top-k alone and a guess that holds) in one piece.

        Between two steps of a model the caches are cold: each function entered and each numpy
        function touched costs 1 to 5 us, more than what they compute.
        """
        if not self._usual or logits.dtype is not FLOAT32:
            return self.sample(logits, u)
        above = self._above
        if above.size != logits.size:
            above = self._above = np.empty(logits.size, np.bool_)
        k, guess = self._top_k, self._guess
        less_equal(logits, guess, above)
        logical_not(above, above)  # not `greater`: so that a NaN is found
        pool = logits[above]
        size = pool.size
        if not k < size <= TOO_MANY * k:
            if size <= k and self._guess < INFINITY:
                self._wanted = SPARE * k
            return self.sample(logits, u)
        pool.sort()
        values = pool[: -k - 1 : -1]  # (k,), descending
        weights = values.astype(FLOAT64)
        highest = weights.item(0)
        if not highest < INFINITY:
            return self.sample(logits, u)  # which says what is wrong
        if size > self._wanted:
            guess[()] = pool[-self._wanted]
        else:
            lowest = pool.item(0)
            guess[()] = lowest - MARGIN * (highest - lowest)
        weights -= highest
        weights /= self._temperature
        exp(weights, weights)
        accumulate(weights, 0, None, weights)
        n = int(weights.searchsorted(u * weights.item(-1), "right"))
        equal = logits == values[n]
        if n and values[n - 1] == values[n]:
            return nth_most_likely(logits, values, n)
        return int(equal.argmax())

    def sample(self, logits: Logits, u: float) -> int:
        """The token that a uniform number u of [0, 1) chooses; the module says by which steps.

        logits: (V,), -inf for a token that must not be drawn. Penalties are left to `penalize`.
        Raises PicoEdgeError for logits that are NaN or +inf, or all of them -inf.
        """
        sampling = self.sampling
        if sampling.temperature == 0 or sampling.top_k == 1:
            best = int(logits.argmax())  # a NaN counts as largest
            _check_finite(float(logits[best]))
            return best
        if logits.dtype == np.float16:
            logits = logits.astype(np.float32)  # numpy has no fast half-precision
        V = logits.size
        k = sampling.top_k if 0 < sampling.top_k < V else V
        if k < V:
            values = self._largest(logits, k)
            weights = _weights(values, sampling.temperature)
            return nth_most_likely(logits, values, _choose(weights, None, u, sampling))
        head, total = min(HEAD, V), None
        while head < V:
            values = self._largest(logits, head)
            weights = _weights(values, sampling.temperature)
            if total is None:
                scaled = logits.astype(np.float64) - values[0]
                total = float(np.exp(scaled / max(sampling.temperature, MIN_TEMPERATURE)).sum())
            chosen = _choose(weights, total, u, sampling)
            if chosen < head:
                return nth_most_likely(logits, values, chosen)
            head *= 8
        values, _ = largest(logits, V)
        weights = _weights(values, sampling.temperature)
        return nth_most_likely(logits, values, _choose(weights, None, u, sampling))

    def _largest(self, logits: Logits, k: int) -> Logits:
        values, self._guess[()] = largest(logits, k, self._guess.item())
        return values


def sample(logits: Logits, u: float, sampling: Sampling) -> int:
    """One draw by itself; see Sampler."""
    return Sampler(sampling).sample(logits, u)


def largest(logits: Logits, k: int, guess: float = math.inf) -> tuple[Logits, float]:
    """The k largest logits (k,), descending, a NaN first; and the guess for logits like these.

    logits: (V,), 1 <= k <= V. guess: a logit that a few more than k others are above; a wrong one
    costs a search of all logits and changes nothing.
    """
    V = logits.size
    wanted = min(SPARE * k, V)
    pool = logits[~(logits <= guess)]  # so that a NaN is found
    if not k <= pool.size <= SPARE * wanted:
        pool = np.partition(logits, V - wanted)[V - wanted :]
    pool.sort()  # a NaN comes last
    values = pool[::-1]
    if values.size > wanted:
        return values[:k], values.item(wanted)
    # There are none to spare: a little lower, since the next logits may all be lower.
    highest, lowest = values.item(0), values.item(-1)
    return values[:k], lowest - MARGIN * (highest - lowest)


def nth_most_likely(logits: Logits, values: Logits, n: int) -> int:
    """The id of the n-th of the largest logits, lower ids first among equals.

    values: the largest, descending. Only the chosen one is looked up: no other id is needed.
    """
    value = values[n]
    before = n - np.count_nonzero(values > value)
    return int((logits == value).nonzero()[0][before])


def _check_finite(highest: float) -> None:
    if not math.isfinite(highest):
        raise PicoEdgeError(
            f"the model's largest logit is {highest}: expected a finite number; the file is "
            "damaged or its numbers overflow: export the checkpoint again"
        )


def penalize(
    logits: Logits, seen: npt.NDArray[np.bool_], counts: npt.NDArray[np.int64], sampling: Sampling
) -> npt.NDArray[np.float64]:
    """A copy of the logits in which tokens of the text so far are less likely.

    logits, seen, counts: (V,). seen: tokens of the prompt or drawn since, whose logit is divided by
    repetition_penalty if positive, else multiplied. counts: how often each was drawn since the
    prompt; frequency_penalty times the count, and presence_penalty once, are then subtracted.
    """
    penalized = logits.astype(np.float64)
    ids = seen.nonzero()[0]
    values = penalized[ids]
    r = sampling.repetition_penalty
    values = np.where(values > 0, values / r, values * r)
    drawn = counts[ids]
    values -= sampling.frequency_penalty * drawn + sampling.presence_penalty * (drawn > 0)
    penalized[ids] = values
    return penalized


def _weights(values: Logits, temperature: float) -> Weights:
    """Probabilities of descending logits up to a factor; that of the first is 1: none overflows."""
    weights = values.astype(FLOAT64)
    highest = weights.item(0)
    _check_finite(highest)
    weights -= highest
    weights /= max(temperature, MIN_TEMPERATURE)
    return exp(weights, weights)


def _choose(weights: Weights, total: float | None, u: float, sampling: Sampling) -> int:
    """The index that u chooses among descending weights after top-p and min-p.

    total: the sum of all weights, if these are only the largest of them; then the result is
    len(weights) when more of them are needed to tell.
    """
    n = kept = weights.size
    cumulative = accumulate(weights)
    mass = cumulative.item(-1) if total is None else total
    # u * mass < mass for every u <= 1 - 2**-53, also in float64: a token of no chance never comes.
    if sampling.top_p == 1 and sampling.min_p == 0:
        return int(cumulative.searchsorted(u * mass, "right"))
    if sampling.top_p < 1:
        kept = min(kept, int(cumulative.searchsorted(sampling.top_p * mass)) + 1)
    if sampling.min_p > 0:
        kept = min(kept, n - int(weights[::-1].searchsorted(sampling.min_p)))
    if kept == n and total is not None:
        return n
    return int(cumulative[:kept].searchsorted(u * cumulative[kept - 1], "right"))


def _check_whole(name: str, value: object, expected: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UsageError(f"{name} is {value!r}: expected a whole number, {expected}")
    if value < 0:
        raise UsageError(f"{name} is {value}: expected {expected}")
    return int(value)


def _check_number(name: str, value: object, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise UsageError(f"{name} is {value!r}: expected {expected}")
    return float(value)
