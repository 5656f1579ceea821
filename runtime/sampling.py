"""Logits -> the next token: adjustments, temperature, filters, and one uniform number.

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
9. the inverse of the cumulative distribution of what is left, by descending probability, lower
   ids first among equals, in float64: the first token where the sum exceeds u times the total.

Steps 1 to 3 depend on the text so far: `pico_edge.runtime.adjust` applies them to a copy of the
logits. Each is computed in float64 and rounded to float32. A `Sampler` does the rest.

Try: `sample(np.log([0.1, 0.7, 0.2]), 0.75, Sampling(temperature=1.0))` -> 2: 0.7 <= 0.75 < 0.9.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pico_edge.artefact import SAMPLING_DEFAULTS
from pico_edge.errors import PicoEdgeError, UsageError
from pico_edge.runtime.mass import LEFT, RIGHT, Logits, Mass, Place, Side, Weights, weigh

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
HEAD = 256  # tokens of a block; without top-k so many are tried by themselves first
HEAD_AGAIN = 8  # draws after which they are, if others were needed
FEW = 4096  # where sorting all of them is cheaper
MIN_HEAD_TEMPERATURE = 1e-3  # below it float32 exponents could overflow
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
        self._in_head = True  # the last draw was of the HEAD likeliest
        self._draws = 0
        self._negative: Logits = np.empty(0, np.float32)  # memory of `_sample_all`
        self._weights: Weights = np.empty(0)
        self._scratch: Weights = np.empty(0)

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
        n = int(weights.searchsorted(u * weights.item(-1), RIGHT))
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
            check_finite(float(logits[best]))
            return best
        if logits.dtype == np.float16:
            logits = logits.astype(np.float32)  # numpy has no fast half-precision
        V = logits.size
        k = sampling.top_k if 0 < sampling.top_k < V else V
        if k < V:
            values = self._largest(logits, k)
            weights = _weights(values, sampling.temperature)
            return nth_most_likely(logits, values, _choose(weights, u, sampling))
        return self._sample_all(logits, u)

    def _sample_all(self, logits: Logits, u: float) -> int:
        """`sample` without top-k. How many tokens it looks at never changes the one it takes."""
        V, sampling = logits.size, self.sampling
        # Memory of our own: the system takes longer to hand out 600 kB than numpy to fill them.
        if self._negative.size != V or self._negative.dtype != logits.dtype:
            self._negative, self._weights, self._scratch = (
                np.empty_like(logits),
                np.empty(V),
                np.empty(V),
            )
        if V > FEW and sampling.typical_p == 1 and sampling.temperature >= MIN_HEAD_TEMPERATURE:
            place = self._place(logits, u)
            if place is not None:
                return _nth_equal(logits, place.logit, place.before)
        negative = np.negative(logits, self._negative)
        negative.sort()  # a NaN comes last
        check_finite(-float(negative[-1] if np.isnan(negative[-1]) else negative[0]))
        weights = np.subtract(negative[0], negative, self._weights, dtype=np.float64)
        weights /= max(sampling.temperature, MIN_TEMPERATURE)
        chosen = _choose(exp(weights, weights), u, sampling)
        value = negative[chosen]
        before = chosen - int(negative.searchsorted(value))
        return _nth_equal(logits, -value, before)

    def _place(self, logits: Logits, u: float) -> Place | None:
        """Where the token is that u chooses; None where only a sort of all of them can tell."""
        sampling = self.sampling
        self._draws += 1
        values = None
        if self._in_head or self._draws % HEAD_AGAIN == 0:
            values = self._largest(logits, HEAD)
        for dtype in (FLOAT32, FLOAT64):
            memory, scratch = (
                array.view(dtype)[: logits.size] for array in (self._weights, self._scratch)
            )
            mass = Mass(logits, sampling.temperature, dtype, memory, scratch)
            check_finite(float(mass.highest))
            place = None if values is None else _place_in_head(values, mass, u, sampling)
            if values is not None:
                self._in_head = place is not None
            place = place or _place(mass, u, sampling)
            if place is not None:
                return place
        return None

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
    return _nth_equal(logits, values[n], _n_equal_before(values, n))


def _n_equal_before(values: Logits, n: int) -> int:
    """How many of the descending values equal the n-th and come before it."""
    return n - int(np.count_nonzero(values > values[n]))


def _nth_equal(logits: Logits, value: float, n: int) -> int:
    """The id of the n-th logit of that value."""
    return int((logits == value).nonzero()[0][n])


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
    return weigh(values, highest, max(temperature, MIN_TEMPERATURE))


def _choose(weights: Weights, u: float, sampling: Sampling) -> int:
    """The index that u chooses among descending weights, after top-p, min-p and typical-p."""
    # u * total < total for every u <= 1 - 2**-53, also in float64: no token of weight 0 is chosen.
    kept = weights.size
    if kept <= HEAD and sampling.typical_p == 1:
        cumulative = accumulate(weights)
        if sampling.top_p < 1:
            kept = int(cumulative.searchsorted(sampling.top_p * cumulative[-1])) + 1
        if sampling.min_p > 0:
            kept = min(kept, _count_likely(weights, sampling.min_p))
        return int(cumulative[:kept].searchsorted(u * cumulative[kept - 1], RIGHT))
    ends = _ends(weights)
    if sampling.top_p < 1:
        kept = min(kept, _find(weights, ends, sampling.top_p * ends.item(-1), LEFT) + 1)
    if sampling.min_p > 0:
        kept = min(kept, _count_likely(weights, sampling.min_p))
    if sampling.typical_p < 1:
        return _choose_typical(weights[:kept], u, sampling.typical_p)
    return _find(weights, ends, u * _sum(weights, ends, kept), RIGHT)


def _place_in_head(values: Logits, mass: Mass, u: float, sampling: Sampling) -> Place | None:
    """`_place` from the largest of all logits, descending; None where these do not decide it."""
    weights = _weights(values, sampling.temperature)
    sums = accumulate(weights)
    kept = _count_likely(weights, sampling.min_p) if sampling.min_p > 0 else weights.size
    if sampling.top_p == 1 and sampling.min_p > 0:
        if kept == weights.size:
            return None
    else:
        p, side = (sampling.top_p, LEFT) if sampling.top_p < 1 else (u, RIGHT)
        total, error = mass.rough
        low, high = p * total * (1 - 2 * error), p * total * (1 + 2 * error)
        first = int(sums.searchsorted(low, side))
        decided = high < sums[-1] and first == sums.searchsorted(high, side)
        if sampling.top_p == 1:
            return _place_of(values, sums, first) if decided else None
        if decided:
            kept = min(kept, first + 1)
        elif kept == weights.size or first + 1 < kept:  # or min-p leaves fewer in any case
            return None
    n = int(sums[:kept].searchsorted(u * sums[kept - 1], RIGHT))
    return _place_of(values, sums, n)


def _place_of(values: Logits, sums: Weights, n: int) -> Place:
    """values: the largest logits, descending."""
    return Place(values[n], _n_equal_before(values, n), float(sums[n]))


def _place(mass: Mass, u: float, sampling: Sampling) -> Place | None:
    """The token that u chooses among all, after top-p and min-p; None where `mass` cannot tell."""
    kept, lowest = mass.total, None
    if sampling.top_p < 1:
        last = mass.find(sampling.top_p * mass.total, LEFT)
        if last is None:
            return None
        kept, lowest = last.reached, last.logit
    if sampling.min_p > 0:
        likely = mass.at_least(sampling.min_p)
        if likely is None:
            return None
        kept = min(kept, likely)
    if kept < mass.total and u * (1 + 2 * mass.error) >= 1:
        return None  # the token behind the last one kept could be found
    return mass.find(u * kept, RIGHT, lowest)


def _choose_typical(weights: Weights, u: float, typical_p: float) -> int:
    """The index that u chooses among descending weights after typical-p; sorts them once more."""
    weights = weights[: np.count_nonzero(weights)]
    p = weights / weights.sum()
    surprise = -np.log(p)
    order = np.abs(surprise - (p * surprise).sum()).argsort(kind="stable")
    n = int(accumulate(p[order]).searchsorted(typical_p)) + 1
    kept = np.sort(order[:n])
    cumulative = accumulate(weights[kept])
    return int(kept[cumulative.searchsorted(u * cumulative[-1], RIGHT)])


def _count_likely(weights: Weights, min_p: float) -> int:
    """How many of the descending weights are at least min_p; the first is 1."""
    return weights.size - int(weights[::-1].searchsorted(min_p))


# Adding one number after the other takes 3 ns each, sums of blocks of HEAD a fifteenth of that. The
# first block is added one by one all the same: most draws end there.
def _ends(weights: Weights) -> Weights:
    """The sums of all weights up to the end of each block of HEAD, the last one maybe shorter."""
    first = accumulate(weights[:HEAD])[-1:]
    if weights.size <= HEAD:
        return first
    whole = weights.size // HEAD * HEAD
    sums = weights[:whole].reshape(-1, HEAD).sum(axis=1)
    if whole < weights.size:
        sums = np.append(sums, weights[whole:].sum())
    sums[0] = first[0]
    return accumulate(sums)


def _inside(weights: Weights, ends: Weights, block: int) -> Weights:
    """The sums of all weights up to each one of a block."""
    inside = weights[block * HEAD : (block + 1) * HEAD]
    if block == 0:
        return accumulate(inside)
    return accumulate(np.append(ends[block - 1], inside))[1:]


def _sum(weights: Weights, ends: Weights, n: int) -> float:
    """The sum of the first n weights, n >= 1."""
    if n == weights.size:
        return ends.item(-1)
    return _inside(weights, ends, (n - 1) // HEAD).item((n - 1) % HEAD)


def _find(weights: Weights, ends: Weights, target: float, side: Side) -> int:
    """The first index where the sum reaches the target (LEFT) or exceeds it (RIGHT)."""
    block = min(int(ends.searchsorted(target, side)), ends.size - 1)
    inside = _inside(weights, ends, block)
    # The two ways to add may differ in the last bit; a weight of 0 is never the answer.
    last = int(np.count_nonzero(weights[block * HEAD : (block + 1) * HEAD])) - 1
    return block * HEAD + max(0, min(int(inside.searchsorted(target, side)), last))


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
