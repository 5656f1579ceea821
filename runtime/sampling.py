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

MAX_SEED = (1 << 63) - 1
# Below it logits would overflow; long before, only the largest have any chance.
MIN_TEMPERATURE = 1e-200
# Without top-k, this many of the most likely tokens are sorted first: they nearly always decide.
HEAD = 256


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


def sample(logits: Logits, u: float, sampling: Sampling) -> int:
    """The token that a uniform number u of [0, 1) chooses; the module says by which steps.

    logits: (V,), -inf for a token that must not be drawn. Penalties are left to `penalize`.
    Raises PicoEdgeError for logits that are NaN or +inf, or all of them -inf.
    """
    best = int(logits.argmax())  # a NaN counts as largest
    highest = float(logits[best])
    if not math.isfinite(highest):
        raise PicoEdgeError(
            f"the largest logit is {highest}: expected a finite number; the model file is damaged "
            "or its numbers overflow: check it with pico-edge verify"
        )
    if sampling.temperature == 0 or sampling.top_k == 1:
        return best
    if logits.dtype == np.float16:
        logits = logits.astype(np.float32)  # numpy has no fast half-precision
    V = logits.size
    if 0 < sampling.top_k < V:
        ids, values = most_likely(logits, sampling.top_k)
        weights = _weights(values, highest, sampling.temperature)
        return int(ids[_choose(weights, None, u, sampling)])
    everything = _weights(logits, highest, sampling.temperature)
    total = float(everything.sum())
    head = HEAD
    while head < V:
        ids, _ = most_likely(logits, head)
        chosen = _choose(everything[ids], total, u, sampling)
        if chosen < head:
            return int(ids[chosen])
        head *= 8
    ids = (-logits).argsort(kind="stable")
    return int(ids[_choose(everything[ids], None, u, sampling)])


def most_likely(logits: Logits, k: int) -> tuple[npt.NDArray[np.intp], Logits]:
    """The ids of the k largest logits and their values, descending, lower ids first among equals.

    logits: (V,) without NaN, 1 <= k <= V.
    """
    V = logits.size
    rows = min(32, V // (4 * k))
    if rows < 4:
        bound = _kth_largest(logits, k)
    else:
        # At least k logits reach the k-th largest of the column maxima, few others do, and it is
        # found in a fraction of the time of the k-th largest of all.
        columns = V // rows
        bound = _kth_largest(logits[: rows * columns].reshape(rows, columns).max(axis=0), k)
    ids = (logits >= bound).nonzero()[0]
    values = logits[ids]
    order = (-values).argsort(kind="stable")[:k]
    return ids[order], values[order]


def _kth_largest(values: Logits, k: int) -> Any:
    parted = values.copy()  # np.partition does the same with more overhead
    parted.partition(values.size - k)
    return parted[values.size - k]


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


def _weights(logits: Logits, highest: float, temperature: float) -> npt.NDArray[np.float64]:
    """Probabilities up to a factor; that of the highest logit is 1, so no temperature overflows."""
    weights = logits.astype(np.float64)
    weights -= highest
    weights /= max(temperature, MIN_TEMPERATURE)
    return np.exp(weights, out=weights)


def _choose(
    weights: npt.NDArray[np.float64], total: float | None, u: float, sampling: Sampling
) -> int:
    """The index that u chooses among descending weights after top-p and min-p.

    total: the sum of all weights, if these are only the largest of them; then the result is
    len(weights) when more of them are needed to tell.
    """
    n = kept = len(weights)
    cumulative = weights.cumsum()
    mass = cumulative[-1] if total is None else total
    # u * mass < mass for every u <= 1 - 2**-53, also in float64: a token of no chance never comes.
    if sampling.top_p == 1 and sampling.min_p == 0:
        return int(cumulative.searchsorted(u * mass, "right"))
    if sampling.top_p < 1:
        kept = min(kept, int(cumulative.searchsorted(sampling.top_p * mass)) + 1)
    if sampling.min_p > 0:
        kept = min(kept, int(np.count_nonzero(weights >= sampling.min_p)))
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
