"""Logits -> the next token: adjustments, temperature, filters, and uniform numbers.

Pure functions of numpy arrays; knows nothing of models, text or random generators. V is the number
of tokens that may be drawn. The order is fixed, so that any language can repeat a draw:

1. penalties (`penalize`): repetition, then frequency and presence;
2. logit bias: added to the logits of single tokens;
3. bans: banned tokens, those that would complete an n-gram that is in the text already
   (no-repeat-ngram), and end-of-text before min_new_tokens: -inf;
4. temperature: 0 takes the largest logit, the lowest id where several are largest;
5. top-k: the k most likely tokens, lower ids first among equals;
6. top-p: as few of the most likely of these as together hold at least top_p of their probability;
7. min-p: of these, the ones at least min_p times as likely as the most likely token;
8. typical-p: as few of these as together hold at least typical_p of what is left, those first whose
   -ln(probability) is nearest to its mean, the entropy; more likely ones first among equals;
9. the inverse of the cumulative distribution of what is left, in float64: the first token where
   the sum of probabilities exceeds u times their total.

With top-k, step 9 adds up by descending probability, lower ids first among equals. Without top-k it
adds up in order of id, so that nothing has to be sorted, and the last filter by mass, typical-p or
else top-p, comes after all others and only looks at the token found. That stays if those before it
in the order of this filter hold less than its share: typical_p of what the other filters leave, or
top_p of all. If not, the next uniform number draws from those before it alone, and so on: so each
token of step 8 has its probability.

Steps 1 to 3 depend on the text so far: `pico_edge.runtime.adjust` applies them to a copy of the
logits. Each is computed in float64 and rounded to float32. A `Sampler` does the rest.

Try: `sample(np.log([0.1, 0.7, 0.2]), 0.75, Sampling(temperature=1.0))` -> 2: 0.7 <= 0.75 < 0.9.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pico_edge.artefact import SAMPLING_DEFAULTS
from pico_edge.errors import PicoEdgeError, UsageError

Logits = npt.NDArray[np.floating[Any]]
Weights = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Again = Callable[[int], float]  # 1, 2, ... -> the further uniform numbers of a draw
ContextOverflow = Literal["slide", "stop"]
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
INFINITY = math.inf
# Looked up once: see Sampler.draw.
less_equal, logical_not, exp, accumulate = np.less_equal, np.logical_not, np.exp, np.add.accumulate
MAX_SEED = (1 << 63) - 1
# Of an adjusted one: its difference to any other is finite in float32, and so are a thousand of it.
MAX_LOGIT = 1e30
# Below it logits would overflow; long before, only the largest have any chance.
MIN_TEMPERATURE = 1e-200
# Temperatures whose inverse float32 can hold.
FLOAT32_TEMPERATURES = 1e-30, 1e30
HALF_UNIT = 2.0**-24  # of the last place in float32, in proportion
# A bound of what is wrong with the comparison of two sums of float32 weights, or with their mean
# exponent, in proportion. An exponent has 3 roundings, is not below -104 where there is a weight,
# and exp is off by two units at most; numpy's sums have 40 roundings: 2 * (3 * 104 + 6 + 40) half
# units.
FLOAT32_ERROR = 1e-4
# Adding one number after the other takes 3 ns each, sums of blocks a tenth of that.
BLOCK = 256
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
    min_p: 0 is off. typical_p: 1 is off. repetition_penalty: 1 is off; presence_penalty,
    frequency_penalty: 0 is off. no_repeat_ngram_size: tokens, 0 is off. min_new_tokens: tokens
    before which neither end-of-text nor a stop ends the text; max_new_tokens does.
    context_overflow: at the end of the context "slide" goes on with its newest third, "stop" ends.
    Raises UsageError (a ValueError) that names the field.
    """

    max_new_tokens: int = SAMPLING_DEFAULTS["max_new_tokens"]
    temperature: float = SAMPLING_DEFAULTS["temperature"]
    top_k: int = SAMPLING_DEFAULTS["top_k"]
    top_p: float = SAMPLING_DEFAULTS["top_p"]
    min_p: float = SAMPLING_DEFAULTS["min_p"]
    typical_p: float = SAMPLING_DEFAULTS["typical_p"]
    repetition_penalty: float = SAMPLING_DEFAULTS["repetition_penalty"]
    presence_penalty: float = SAMPLING_DEFAULTS["presence_penalty"]
    frequency_penalty: float = SAMPLING_DEFAULTS["frequency_penalty"]
    no_repeat_ngram_size: int = SAMPLING_DEFAULTS["no_repeat_ngram_size"]
    min_new_tokens: int = SAMPLING_DEFAULTS["min_new_tokens"]
    context_overflow: ContextOverflow = SAMPLING_DEFAULTS["context_overflow"]

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "no_repeat_ngram_size", "min_new_tokens"):
            self._set(name, _check_whole(name, getattr(self, name), "0 or more"))
        for name, expected, allowed in (
            ("presence_penalty", "a finite number", lambda x: True),
            ("frequency_penalty", "a finite number", lambda x: True),
            ("temperature", "0 or more", lambda x: x >= 0),
            ("top_p", "above 0, at most 1", lambda x: 0 < x <= 1),
            ("typical_p", "above 0, at most 1", lambda x: 0 < x <= 1),
            ("min_p", "0 to 1", lambda x: 0 <= x <= 1),
            ("repetition_penalty", "above 0", lambda x: x > 0),
        ):
            value = check_number(name, getattr(self, name), expected)
            if not allowed(value):
                raise UsageError(f"{name} is {value}: expected {expected}")
            self._set(name, value)
        if self.context_overflow not in ("slide", "stop"):
            raise UsageError(
                f"context_overflow is {self.context_overflow!r}: expected 'slide' or 'stop'"
            )

    def _set(self, name: str, value: float) -> None:
        """Plain numbers, whatever kind of them was given: numpy computes in that of the others."""
        object.__setattr__(self, name, value)  # frozen

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


def no_more(n: int) -> float:
    """For a caller with one number only."""
    raise UsageError(
        "a draw with top_p or typical_p and without top_k may take several uniform numbers: "
        "expected `again`, a function that gives them"
    )


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
            and sampling.typical_p == 1
        )
        self._unsorted: _Unsorted | None = None

    def draw(self, logits: Logits, u: float, again: Again = no_more) -> int:
        """`sample`, the usual case (top-k alone and a guess that holds) in one piece.

        Between two steps of a model the caches are cold: each function entered and each numpy
        function touched costs 1 to 5 us, more than what they compute.
        """
        if not self._usual or logits.dtype is not FLOAT32:
            return self.sample(logits, u, again)
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
            return self.sample(logits, u, again)
        pool.sort()
        values = pool[: -k - 1 : -1]  # (k,), descending
        weights = values.astype(FLOAT64)
        highest = weights.item(0)
        if not highest < INFINITY:
            return self.sample(logits, u, again)  # which says what is wrong
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

    def sample(self, logits: Logits, u: float, again: Again = no_more) -> int:
        """The token that uniform numbers of [0, 1) choose; the module says by which steps.

        logits: (V,), -inf for a token that must not be drawn. Penalties are left to `penalize`. u:
        the first number; again: asked for the n-th further one by top-p and typical-p without
        top-k. Raises PicoEdgeError for logits that are NaN or +inf, or all of them -inf.
        """
        sampling = self.sampling
        if sampling.temperature == 0 or sampling.top_k == 1:
            best = int(logits.argmax())  # a NaN counts as largest
            check_finite(float(logits[best]))
            return best
        if logits.dtype == np.float16:
            logits = logits.astype(np.float32)  # numpy has no fast half-precision
        if sampling.top_k == 0:
            if self._unsorted is None or self._unsorted.size != logits.size:
                self._unsorted = _Unsorted(sampling, logits.size)
            return self._unsorted.draw(logits, u, again)
        k = min(sampling.top_k, logits.size)
        values, self._guess[()] = largest(logits, k, self._guess.item())
        weights = _weights(values, sampling.temperature)
        return nth_most_likely(logits, values, _choose(weights, u, sampling))


def sample(logits: Logits, u: float, sampling: Sampling, again: Again = no_more) -> int:
    """One draw by itself; see Sampler."""
    return Sampler(sampling).sample(logits, u, again)


class _TooClose(Exception):
    """What float32 weights say is so near a border that exact ones may say something else."""


class _Unsorted:
    """Draws from all V tokens, by id; `draw` is Sampler.sample.

    In float32 first, 71 us for 50,304 where float64 takes 95: its errors have bounds, and where
    these could decide, float64 does. So a token is always the one that float64 chooses.
    """

    def __init__(self, sampling: Sampling, size: int) -> None:
        self.size = size
        self._sampling = sampling
        self._temperature = max(sampling.temperature, MIN_TEMPERATURE)
        low, high = FLOAT32_TEMPERATURES
        self._in_float32 = low <= sampling.temperature <= high
        # Memory of our own: the system takes longer to hand out 400 kB than numpy to fill them.
        self._memory = np.empty(size), np.empty(size), np.empty(size)
        self._chosen = np.empty(size, np.bool_)
        self._blocks = np.arange(0, size, BLOCK)

    def draw(self, logits: Logits, u: float, again: Again) -> int:
        float32 = self._in_float32 and logits.dtype == FLOAT32
        # What overflows becomes -inf, and a weight of 0.
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                return self._draw(logits, u, again, FLOAT32 if float32 else FLOAT64)
            except _TooClose:
                return self._draw(logits, u, again, FLOAT64)

    def _draw(self, logits: Logits, u: float, again: Again, dtype: np.dtype[Any]) -> int:
        sampling, chosen, float32 = self._sampling, self._chosen, dtype == FLOAT32
        highest = logits.max()
        check_finite(float(highest))
        exponents, weights, products = (a.view(dtype)[: self.size] for a in self._memory)
        np.subtract(logits, highest, exponents, dtype=dtype)
        exponents *= 1 / self._temperature
        exp(exponents, weights)
        p, total = sampling.top_p, 0.0
        mean: float | None = None
        if sampling.typical_p < 1 and p < 1:
            _mark_nucleus(logits, sampling, chosen)
            weights *= chosen  # 11 us for 50,304; boolean indexing takes 23 to 158
        if sampling.min_p > 0:
            if p < 1:
                total = float(weights.sum())
            np.greater_equal(logits, self._lowest(highest), chosen)
            weights *= chosen
        if sampling.typical_p < 1:
            p, total = sampling.typical_p, float(weights.sum())
            mean = _weighted_sum(weights, exponents, products) / total
        n = 0
        while True:
            token_id, mass = self._find(weights, u)
            if p == 1:
                return token_id
            total = total or mass  # of all tokens, also of those that min-p cut
            if mean is None:
                _mark_likelier(logits, token_id, chosen)
            else:
                _mark_more_typical(logits, exponents, mean, token_id, chosen)
            weights *= chosen
            missing = p * total - float(weights.sum())
            if float32 and abs(missing) <= FLOAT32_ERROR * total:
                raise _TooClose
            if missing > 0:
                return token_id
            if float32 and mean is not None:
                raise _TooClose  # it marked some more
            n += 1
            u = again(n)

    def _find(self, weights: npt.NDArray[Any], u: float) -> tuple[int, float]:
        """The first token where the sum of weights exceeds u times that of all, and this one."""
        sums = accumulate(np.add.reduceat(weights, self._blocks, dtype=FLOAT64))
        total = sums.item(-1)
        # u * total < total for every u <= 1 - 2**-53, also in float64: there is such a block.
        block = int(sums.searchsorted(u * total, "right"))
        rest = u * total - (sums.item(block - 1) if block else 0.0)
        first = block * BLOCK
        inside = accumulate(weights[first : first + BLOCK], dtype=FLOAT64)
        n = int(inside.searchsorted(rest, "right"))
        # The two ways to add may differ in the last bit; a weight of 0 is never the answer.
        n = min(n, int(inside.searchsorted(inside.item(-1))))
        if weights.dtype == FLOAT32:
            error = self._error(u, total)
            before = inside.item(n - 1) if n else 0.0
            if not before + error <= rest < inside.item(n) - error:
                raise _TooClose
        return first + n, total

    def _error(self, u: float, total: float) -> float:
        """How far a sum of float32 weights may be from what it is compared with, u times all.

        A weight has 3 roundings of its exponent x and two units in the last place of exp: it is
        off by (3 |x| + 6) half units in proportion. Of weights that add up to A the mean |x| is at
        most ln(V / A), as the entropy is at most ln V. The errors of what is before the border and
        of what is behind it count 1 - u and u. 1e-6 is for all roundings in float64.
        """
        both = u * (1 - u) + 1e-6
        exponents = 2 * math.log(self.size / total) - math.log(both)
        return total * both * HALF_UNIT * (3 * exponents + 12)

    def _lowest(self, highest: np.floating[Any]) -> np.floating[Any]:
        """The smallest number that a logit can be and be left by min-p."""
        border = float(highest) + self._temperature * math.log(self._sampling.min_p)
        lowest = highest.dtype.type(border)
        return np.nextafter(lowest, highest) if float(lowest) < border else lowest


def _mark_likelier(logits: Logits, token_id: int, out: Mask) -> None:
    """Marks the tokens that come before one by probability: lower ids first among equals."""
    logit = logits[token_id]
    np.greater_equal(logits[:token_id], logit, out[:token_id])
    np.greater(logits[token_id:], logit, out[token_id:])


def _mark_nucleus(logits: Logits, sampling: Sampling, out: Mask) -> None:
    """Marks the tokens that top-p leaves of all. Sorts them, as only top-p with typical-p needs."""
    values = np.sort(logits)[::-1]
    cumulative = accumulate(_weights(values, sampling.temperature))
    last = nth_most_likely(logits, values, _count_nucleus(cumulative, sampling.top_p) - 1)
    _mark_likelier(logits, last, out)
    out[last] = True


def _mark_more_typical(
    logits: Logits, exponents: npt.NDArray[Any], mean: float, token_id: int, out: Mask
) -> None:
    """Marks the tokens that come before one by distance of the exponent from the mean: those
    between it and its mirror image; likelier ones, then lower ids, first among equals.

    With float32 also some more, a little further away than the mirror image.
    """
    exponent = exponents.item(token_id)
    slack = 1e-30 - FLOAT32_ERROR * (mean + exponent) if exponents.dtype == FLOAT32 else 0.0
    if slack and abs(exponent - mean) <= slack:
        raise _TooClose
    if exponent <= mean:
        _mark_likelier(logits, token_id, out)
        out &= exponents <= 2 * mean - exponent + slack
    else:
        logit = logits[token_id]
        np.less_equal(logits[:token_id], logit, out[:token_id])
        np.less(logits[token_id:], logit, out[token_id:])
        out &= exponents > 2 * mean - exponent - slack


def _weighted_sum(
    weights: npt.NDArray[Any], values: npt.NDArray[Any], memory: npt.NDArray[Any]
) -> float:
    """The sum of the products; where the weight is 0 a value may be -inf, and is set to 0."""
    # Not np.dot: BLAS would wake threads.
    found = float(np.multiply(weights, values, memory).sum())
    if math.isnan(found):
        values[weights == 0] = 0
        found = float(np.multiply(weights, values, memory).sum())
    return found


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
    return int((logits == value).nonzero()[0][n - int(np.count_nonzero(values > value))])


def check_finite(highest: float) -> None:
    """Raises PicoEdgeError unless the largest logit of a model is a finite number."""
    if not math.isfinite(highest):
        raise PicoEdgeError(
            f"the model's largest logit is {highest}: expected a finite number; the file is "
            "damaged or its numbers overflow: export the checkpoint again"
        )


def penalize(
    logits: Logits, seen: npt.NDArray[np.bool_], counts: npt.NDArray[np.int64], sampling: Sampling
) -> npt.NDArray[np.float32]:
    """A copy of the logits in which tokens of the text so far are less likely.

    logits, seen, counts: (V,). seen: tokens of the prompt or drawn since, whose logit is divided by
    repetition_penalty if positive, else multiplied. counts: how often each was drawn since the
    prompt; frequency_penalty times the count, and presence_penalty once, are then subtracted.
    """
    penalized = logits.astype(np.float32)
    ids = seen.nonzero()[0]
    values = penalized[ids].astype(np.float64)
    r = sampling.repetition_penalty
    with np.errstate(over="ignore"):
        values = np.where(values > 0, values / r, values * r)
        drawn = counts[ids]
        values -= sampling.frequency_penalty * drawn + sampling.presence_penalty * (drawn > 0)
    penalized[ids] = np.clip(values, -MAX_LOGIT, MAX_LOGIT)
    return penalized


def _weights(values: Logits, temperature: float) -> Weights:
    """Probabilities of descending logits up to a factor; that of the first is 1: none overflows."""
    highest = float(values[0])
    check_finite(highest)
    weights = values.astype(FLOAT64)
    weights -= highest
    weights /= max(temperature, MIN_TEMPERATURE)
    return exp(weights, weights)


def _choose(weights: Weights, u: float, sampling: Sampling) -> int:
    """The index that u chooses among descending weights, after top-p, min-p and typical-p."""
    # u * total < total for every u <= 1 - 2**-53, also in float64: no token of weight 0 is chosen.
    cumulative = accumulate(weights)
    kept = weights.size
    if sampling.top_p < 1:
        kept = _count_nucleus(cumulative, sampling.top_p)
    if sampling.min_p > 0:
        kept = min(kept, weights.size - int(weights[::-1].searchsorted(sampling.min_p)))
    if sampling.typical_p < 1:
        return _choose_typical(weights[:kept], u, sampling.typical_p)
    return int(cumulative[:kept].searchsorted(u * cumulative[kept - 1], "right"))


def _count_nucleus(cumulative: Weights, top_p: float) -> int:
    """How many of descending weights, given their sums, top-p leaves."""
    return int(cumulative.searchsorted(top_p * cumulative[-1])) + 1


def _choose_typical(weights: Weights, u: float, typical_p: float) -> int:
    """The index that u chooses among descending weights after typical-p; sorts them once more."""
    weights = weights[: np.count_nonzero(weights)]
    p = weights / weights.sum()
    surprise = -np.log(p)
    order = np.abs(surprise - (p * surprise).sum()).argsort(kind="stable")
    n = int(accumulate(p[order]).searchsorted(typical_p)) + 1
    kept = np.sort(order[:n])
    cumulative = accumulate(weights[kept])
    return int(kept[cumulative.searchsorted(u * cumulative[-1], "right")])


def _check_whole(name: str, value: object, expected: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UsageError(f"{name} is {value!r}: expected a whole number, {expected}")
    if value < 0:
        raise UsageError(f"{name} is {value}: expected {expected}")
    return int(value)


def check_number(name: str, value: object, expected: str) -> float:
    """The value as a float. Raises UsageError for what is no finite number."""
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # of a whole number of 309 digits
            number = float(value)
    if not math.isfinite(number):
        raise UsageError(f"{name} is {value!r}: expected {expected}")
    return number
