"""Samplers against distributions worked out by hand, a slow oracle, and frequencies."""

import collections
import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pico_edge.artefact import SAMPLING_DEFAULTS
from pico_edge.errors import PicoEdgeError, UsageError
from pico_edge.runtime import sampling as module
from pico_edge.runtime.adjust import Adjuster
from pico_edge.runtime.philox import uniform
from pico_edge.runtime.sampling import (
    Sampler,
    Sampling,
    check_seed,
    largest,
    nth_most_likely,
    penalize,
    sample,
)

PLAIN = Sampling(temperature=1.0, top_k=0)
RANKED = Sampling(temperature=1.0, top_k=10**6)  # of all as well, but by descending probability
FOUR = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float64))  # by probability: 1, 3, 2, 0


def further(seed, position, row=0):
    """What `again` is in a text."""
    return functools.partial(uniform, seed, position, row)


def kept(logits, sampling, steps=2048):
    """The tokens that can come, in the order of u, found with a fine comb of u."""
    return list(
        dict.fromkeys(sample(logits, i / steps, sampling, further(0, i)) for i in range(steps))
    )


def oracle(logits, u, s):
    """The definition in sampling's docstring, token by token in plain Python; with top-k."""
    logits = [float(x) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if s.temperature == 0:
        return order[0]
    order = order[: s.top_k or None]
    weight = {i: float(np.exp((logits[i] - logits[order[0]]) / s.temperature)) for i in order}
    total = sum(weight.values())
    nucleus, mass = [], 0.0
    for i in order:
        if mass >= s.top_p * total:
            break
        nucleus.append(i)
        mass += weight[i]
    nucleus = [i for i in nucleus if weight[i] >= s.min_p]
    if s.typical_p < 1:
        nucleus = [i for i in nucleus if weight[i] > 0]
        p = np.array([weight[i] for i in nucleus])
        p /= p.sum()
        entropy = -(p * np.log(p)).sum()
        typical, mass = [], 0.0
        for n in sorted(range(len(p)), key=lambda n: abs(-np.log(p[n]) - entropy)):
            if mass >= s.typical_p:
                break
            typical.append(nucleus[n])
            mass += p[n]
        nucleus = [i for i in nucleus if i in typical]
    total, mass = sum(weight[i] for i in nucleus), 0.0
    for i in nucleus:
        mass += weight[i]
        if mass > u * total:
            return i
    return max(nucleus, key=lambda i: (weight[i] > 0, -weight[i], i))


# The four tokens in order of probability end at 0.4, 0.7, 0.9 and 1 times the total of those kept.
@pytest.mark.parametrize(
    ("changes", "u", "token"),
    [
        ({}, 0.0, 1),
        ({}, 0.39, 1),
        ({}, 0.41, 3),
        ({}, 0.69, 3),
        ({}, 0.71, 2),
        ({}, 0.91, 0),
        ({}, 1 - 2**-53, 0),
        ({"top_k": 2}, 0.57, 1),  # 0.4 / 0.7 = 0.5714
        ({"top_k": 2}, 0.58, 3),
        ({"top_p": 0.71}, 0.44, 1),  # 0.4 / 0.9 = 0.4444
        ({"top_p": 0.71}, 0.45, 3),
        ({"top_p": 0.69}, 0.58, 3),
        ({"min_p": 0.6}, 0.58, 3),  # 0.2 < 0.6 * 0.4
        ({"temperature": 0.5}, 0.53, 1),  # 0.16 / 0.30 = 0.5333
        ({"temperature": 0.5}, 0.54, 3),
        ({"temperature": 0.0}, 0.99, 1),
        ({"temperature": 1e-9}, 0.99, 1),
        ({"temperature": 1e-300}, 0.99, 1),
    ],
)
def test_draws_of_a_hand_computed_distribution(changes, u, token):
    assert sample(FOUR, u, dataclasses.replace(RANKED, **changes)) == token


# By id, the four end at 0.1, 0.5, 0.7 and 1. numbers: those that the draw takes, all of them.
@pytest.mark.parametrize(
    ("changes", "numbers", "token"),
    [
        ({}, [0.0], 0),
        ({}, [0.09], 0),
        ({}, [0.11], 1),
        ({}, [0.49], 1),
        ({}, [0.51], 2),
        ({}, [0.69], 2),
        ({}, [0.71], 3),
        ({}, [1 - 2**-53], 3),
        ({"temperature": 0.5}, [0.03], 0),  # 1 : 16 : 4 : 9, of 30
        ({"temperature": 0.5}, [0.04], 1),
        ({"temperature": 0.5}, [0.56], 1),
        ({"temperature": 0.5}, [0.57], 2),
        ({"temperature": 1e-300}, [0.0], 1),
        ({"min_p": 0.6}, [0.57], 1),  # 1 and 3 are left: 0.4 / 0.7 = 0.5714
        ({"min_p": 0.6}, [0.58], 3),
        # top-p: 2 comes after 0.7, 0 after 0.9.
        ({"top_p": 0.71}, [0.2], 1),
        ({"top_p": 0.71}, [0.6], 2),
        ({"top_p": 0.71}, [0.05, 0.44], 1),  # 0 is out; of 1, 2, 3: 4/9, 6/9, 1
        ({"top_p": 0.71}, [0.05, 0.45], 2),
        ({"top_p": 0.71}, [0.05, 0.67], 3),
        ({"top_p": 0.69}, [0.6, 0.57], 1),  # 2 is out; of 1, 3: 4/7, 1
        ({"top_p": 0.69}, [0.6, 0.58], 3),
        ({"top_p": 0.69}, [0.05, 0.6, 0.58], 3),
        ({"top_p": 0.39}, [0.05, 0.6, 0.58, 0.99], 1),
        # The share is of all, not of what min-p leaves, 0.7: 0.4 < 0.42 * 1.
        ({"top_p": 0.42, "min_p": 0.6}, [0.58], 3),
        ({"top_p": 0.39, "min_p": 0.6}, [0.58, 0.5], 1),
        # typical-p: 3, 2, 1, 0 come after 0, 0.3, 0.5, 0.9; see below.
        ({"typical_p": 0.45}, [0.6], 2),
        ({"typical_p": 0.45}, [0.2, 0.39], 2),  # 1 is out; of 2, 3: 0.4, 1
        ({"typical_p": 0.45}, [0.2, 0.41], 3),
        ({"typical_p": 0.45}, [0.05, 0.4, 0.41], 3),  # 0; of 1, 2, 3: 4/9, 6/9, 1
        ({"typical_p": 0.29}, [0.05, 0.4, 0.39, 0.0], 3),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_draws_without_top_k_of_a_hand_computed_distribution(changes, numbers, token, dtype):
    asked = []

    def again(n):
        asked.append(n)
        return numbers[n]

    sampling = dataclasses.replace(PLAIN, **changes)
    assert sample(FOUR.astype(dtype), numbers[0], sampling, again) == token
    assert max(asked, default=0) == len(numbers) - 1


def test_equal_tokens_come_in_the_order_of_their_ids():
    """Four of 1/4 each: a share of 0.6 holds the first three."""
    four, numbers = np.zeros(4, np.float32), [0.8, 0.7]
    for changes in ({"top_p": 0.6}, {"typical_p": 0.6}):
        sampling = dataclasses.replace(PLAIN, **changes)
        assert sample(four, 0.7, sampling) == 2
        assert sample(four, numbers[0], sampling, numbers.__getitem__) == 2
    # Three of 0.3, nearer to the entropy than the last one.
    logits, sampling = np.log([0.3, 0.3, 0.3, 0.1]), dataclasses.replace(PLAIN, typical_p=0.5)
    assert sample(logits, 0.5, sampling) == 1
    assert sample(logits, 0.8, sampling, lambda n: 0.6) == 1
    # One after exactly the share is out.
    for changes in ({"top_p": 0.5}, {"typical_p": 0.5}):
        sampling = dataclasses.replace(PLAIN, **changes)
        assert sample(four, 0.3, sampling) == 1
        assert sample(four, 0.5, sampling, lambda n: 0.4) == 0


def test_a_draw_that_needs_more_numbers_says_so():
    sampling = dataclasses.replace(PLAIN, top_p=0.5)
    assert sample(FOUR, 0.2, sampling) == 1
    with pytest.raises(UsageError, match="expected `again`"):
        sample(FOUR, 0.05, sampling)


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, [1, 3, 2, 0]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 2]),
        ({"top_k": 99}, [1, 3, 2, 0]),
        ({"top_p": 0.3}, [1]),
        ({"top_p": 0.5}, [1, 3]),
        ({"top_p": 0.91}, [1, 3, 2, 0]),
        ({"top_k": 2, "top_p": 0.6}, [1, 3]),  # of the two kept, 1 alone has 0.571
        ({"top_k": 2, "top_p": 0.55}, [1]),
        ({"min_p": 0.3}, [1, 3, 2]),
        ({"min_p": 1.0}, [1]),
        ({"top_p": 0.95, "min_p": 0.6}, [1, 3]),
        # -ln p of 1, 3, 2, 0: 0.916, 1.204, 1.609, 2.303; the entropy is 1.280: 3, 2, 1, 0.
        ({"typical_p": 0.25}, [3]),
        ({"typical_p": 0.45}, [3, 2]),
        ({"typical_p": 0.55}, [1, 3, 2]),
        ({"typical_p": 0.95}, [1, 3, 2, 0]),
        # Of the two kept: 0.560, 0.847; 0.683.
        ({"top_k": 2, "typical_p": 0.5}, [1]),
        # At T 0.5 the four have 8/15, 3/10, 2/15, 1/30: 0.629, 1.204, 2.015, 3.401; 1.078.
        ({"temperature": 0.5, "typical_p": 0.2}, [3]),
        # Of the three kept 4/9, 3/9, 2/9: 0.811, 1.099, 1.504; 1.061: 3, 1, 2.
        ({"top_p": 0.85, "typical_p": 0.3}, [3]),
        ({"top_p": 0.85, "typical_p": 0.4}, [1, 3]),
        ({"min_p": 0.3, "typical_p": 0.4}, [1, 3]),
        ({"min_p": 0.3, "typical_p": 0.8}, [1, 3, 2]),
    ],
)
def test_tokens_kept_of_a_hand_computed_distribution(changes, tokens):
    assert kept(FOUR, dataclasses.replace(RANKED, **changes)) == tokens
    without = dataclasses.replace(PLAIN, **changes)
    assert sorted(kept(FOUR, without)) == sorted(tokens)
    assert sorted(kept(FOUR.astype(np.float32), without)) == sorted(tokens)


def test_equal_logits_are_taken_by_id():
    for size in (5, 2000, 60000):  # small, the column search, and many columns
        logits = np.zeros(size, np.float32)
        assert sample(logits, 0.0, Sampling(temperature=0.0)) == 0
        assert kept(logits, dataclasses.replace(PLAIN, top_k=4), steps=4) == [0, 1, 2, 3]
    five = np.zeros(5, np.float32)
    assert kept(five, PLAIN) == kept(five, dataclasses.replace(PLAIN, min_p=1.0)) == [*range(5)]
    logits = np.zeros(2000, np.float32)
    logits[[3, 1999]] = 1
    values, _ = largest(logits, 4)
    assert [nth_most_likely(logits, values, n) for n in range(4)] == [3, 1999, 0, 1]


def test_minus_infinity_is_never_drawn():
    logits = np.array([-np.inf, 0, -np.inf, 0], np.float32)
    for changes in ({}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": 0.01}, {"typical_p": 0.99}):
        assert kept(logits, dataclasses.replace(PLAIN, **changes)) == [1, 3]
        assert sample(logits, 1 - 2**-53, dataclasses.replace(PLAIN, **changes)) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("size", [4, 3000])
@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"top_k": 2}, {"top_k": 0}])
def test_logits_that_are_not_finite_are_an_error(bad, size, changes):
    logits = np.zeros(size, np.float32)
    logits[size // 2] = bad
    with pytest.raises(PicoEdgeError, match="logit is") as caught:
        sample(logits, 0.5, dataclasses.replace(PLAIN, **changes))
    assert caught.value.exit_code == 1
    with pytest.raises(PicoEdgeError, match="logit is -inf"):
        sample(np.full(size, -np.inf, np.float32), 0.5, dataclasses.replace(PLAIN, **changes))


SETTINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-9, 0.3, 0.8, 1.0, 7.5]),
    top_k=st.integers(1, 60),
    top_p=st.floats(0.01, 1.0),
    typical_p=st.sampled_from([0.2, 0.65, 1.0, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.37, 1.0]),
)
UNIFORM = st.integers(0, 2**53 - 1).map(lambda i: i * 2.0**-53)


@settings(deadline=None)
@given(
    # Few different values, so that many tokens are equally likely.
    logits=st.lists(st.sampled_from([-math.inf, -3.5, -1.0, 0.0, 0.25, 2.0]), min_size=1).filter(
        lambda values: max(values) > -math.inf
    ),
    u=UNIFORM,
    sampling=SETTINGS,
)
def test_draws_follow_the_definition_among_many_ties(logits, u, sampling):
    logits = np.array(logits, np.float32)
    assert sample(logits, u, sampling) == oracle(logits, u, sampling)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([257, 258, 800, 1000, 2500, 5003]),
    spread=st.sampled_from([0.01, 1.0, 4.0]),
    sampling=SETTINGS,
)
def test_draws_follow_the_definition_in_large_vocabularies(seed, size, spread, sampling):
    logits = np.random.default_rng(seed).normal(size=size).astype(np.float32) * spread
    u = uniform(seed, 1)
    assert sample(logits, u, sampling) == oracle(logits, u, sampling)
    half = logits.astype(np.float16)
    assert sample(half, u, sampling) == oracle(half, u, sampling)


@given(seed=st.integers(0, 2**32), size=st.integers(1, 3000), levels=st.integers(1, 400))
def test_the_largest_are_a_sort_by_value_then_id(seed, size, levels):
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, levels, size).astype(np.float32) * (-1 if seed % 3 else 1)
    k = int(rng.integers(1, size + 1)) if seed % 2 else min(size, 50)
    expected = np.argsort(-logits, kind="stable")[:k]
    for guess in (np.inf, -np.inf, 0.0, float(logits[expected[-1]]), float(logits[0])):
        values, _ = largest(logits, k, guess)
        assert values.tolist() == logits[expected].tolist()
    some = range(0, k, 1 + k // 20)
    assert [nth_most_likely(logits, values, n) for n in some] == expected[some].tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.8, "top_k": 50},
        {"temperature": 1.5},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_frequencies_are_those_of_the_distribution(changes):
    draws = 20_000
    logits = np.random.default_rng(5).normal(size=300).astype(np.float32) * 1.5
    sampling = dataclasses.replace(PLAIN, **changes)
    order = np.argsort(-logits, kind="stable")[: sampling.top_k or None]
    p = np.exp(logits[order].astype(np.float64) / sampling.temperature)
    p /= p.sum()
    n = min(int((np.cumsum(p) < sampling.top_p).sum()) + 1, int((p >= sampling.min_p * p[0]).sum()))
    order, p = order[:n], p[:n] / p[:n].sum()

    found = np.zeros(logits.size)
    for position in range(draws):
        u, again = uniform(11, position), further(11, position)
        found[sample(logits, u, sampling, again)] += 1
    assert found.sum() == found[order].sum()
    # Chi-square needs some draws in each cell: the rare tokens share one.
    rare = p * draws < 10
    expected = np.append(p[~rare], p[rare].sum())[: None if rare.any() else -1] * draws
    counted = np.append(found[order][~rare], found[order][rare].sum())[: len(expected)]
    assert stats.chisquare(counted, expected).pvalue > 1e-3


def test_penalties_of_a_hand_computed_text():
    logits = np.array([2.0, -2.0, 1.0, 1.0, 0.0], np.float32)
    seen = np.array([True, True, True, False, False])  # 0 and 1 in the prompt, 2 drawn three times
    counts = np.array([0, 0, 3, 0, 0])
    repetition = dataclasses.replace(PLAIN, repetition_penalty=2.0)
    assert penalize(logits, seen, counts, repetition).tolist() == [1, -4, 0.5, 1, 0]
    presence = dataclasses.replace(PLAIN, presence_penalty=0.5)
    assert penalize(logits, seen, counts, presence).tolist() == [2, -2, 0.5, 1, 0]
    frequency = dataclasses.replace(PLAIN, frequency_penalty=0.5)
    assert penalize(logits, seen, counts, frequency).tolist() == [2, -2, -0.5, 1, 0]
    assert logits.tolist() == [2, -2, 1, 1, 0]
    assert [s.penalizes for s in (PLAIN, repetition, presence, frequency)] == [False] + [True] * 3


def test_sampling_defaults_are_those_of_the_artefact():
    assert dataclasses.asdict(Sampling()) == SAMPLING_DEFAULTS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-1, math.inf, math.nan, "0.8", True)),
        *(("top_k", value) for value in (-1, 1.5, "50", True)),
        *(("top_p", value) for value in (0, 1.5, -0.1, math.nan)),
        *(("min_p", value) for value in (-0.1, 1.01, math.nan)),
        *(("typical_p", value) for value in (0, 1.5, math.nan)),
        *(("no_repeat_ngram_size", value) for value in (-1, 2.0)),
        *(("min_new_tokens", value) for value in (-1, 2.0)),
        *(("repetition_penalty", value) for value in (0, -1, math.inf)),
        *(("presence_penalty", value) for value in (math.nan, -math.inf)),
        *(("frequency_penalty", value) for value in (math.nan, "x")),
        *(("max_new_tokens", value) for value in (-1, 0.5, math.nan)),
        ("context_overflow", "wrap"),
    ],
)
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(UsageError, match=f"{name} is .*expected") as caught:
        Sampling(**{name: value})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0},
        {"temperature": 1e-9},
        {"temperature": np.float32(0.5)},
        {"top_k": 0},
        {"top_k": 10**9},
        {"top_k": np.int64(3)},
        {"top_p": 1},
        {"min_p": 1},
        {"max_new_tokens": 0},
        {"max_new_tokens": 10**9},
    ],
)
def test_settings_at_the_edge_of_their_range_work(changes):
    assert sample(FOUR, 0.2, dataclasses.replace(PLAIN, **changes)) == 1


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "1", None, True])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(UsageError, match=r"seed is .*expected .*0 to 9223372036854775807"):
        check_seed(seed)


@pytest.mark.parametrize("seed", [0, 2**63 - 1, np.int64(5)])
def test_seeds_of_63_bits_are_accepted(seed):
    check_seed(seed)


class Replay:
    """The definition without top-k, in long double; `gap`: how near the nearest border was.

    A gap of exactly 0 is no doubt: sums of equal weights are exact. token: the one drawn.
    """

    def __init__(self, logits, numbers, s):
        logits = np.asarray(logits, np.longdouble)
        with np.errstate(over="ignore"):
            x = (logits - logits.max()) / np.longdouble(s.temperature)
        w, self.gap = np.exp(x), math.inf
        ids = np.arange(len(w))
        order = np.lexsort((ids, -logits))
        if s.top_p < 1:
            top_p = order[self.reach(w[order], s.top_p * w.sum())]
        if s.min_p > 0:
            lowest = np.log(np.longdouble(s.min_p))
            self.near((x - lowest) / (1 - lowest))
            ids = np.flatnonzero(x >= lowest)
        share, total = s.top_p, w.sum()
        if s.typical_p < 1:
            if s.top_p < 1:
                ids = np.intersect1d(ids, top_p)
            share, total = s.typical_p, w[ids].sum()
            mean = (w[ids] * np.where(w > 0, x, 0)[ids]).sum() / total
            distance = np.where(w > 0, abs(x - mean), np.inf)
            order = np.lexsort((np.arange(len(w)), -logits, distance))
            some = order[: np.count_nonzero(w)]
            distances = distance[some][1:][np.diff(logits[some]) != 0]
            gaps = np.diff(distance[some])[np.diff(logits[some]) != 0]
            # Here 0 is one: the distances of different logits are only equal by rounding.
            self.near(np.maximum(gaps / (abs(mean) + distances), 1e-30))
        rank = np.empty(len(w), int)
        rank[order] = range(len(w))
        for n in itertools.count():
            sums = np.cumsum(w[ids])
            target = numbers(n) * sums[-1]
            self.near((sums - target) / sums[-1])
            self.token = token = int(ids[(sums <= target).sum()])
            if share == 1:
                return
            ids = ids[rank[ids] < rank[token]]
            missing = share * total - w[ids].sum()
            self.near(missing / total)
            if missing > 0:
                return

    def reach(self, weights, target):
        """The first of the weights that together come to the target."""
        before = np.cumsum(weights) - weights
        self.near((before - target) / weights.sum())
        return before < target

    def near(self, gaps):
        gaps = np.abs(np.atleast_1d(gaps))
        self.gap = min(self.gap, *gaps[gaps > 0], math.inf)


def check(logits, sampling, seed, sampler=None, first=None):
    """A draw is that of the definition; False where rounding in float64 may decide."""
    u = uniform(seed, 1) if first is None else first
    expected = Replay(logits, lambda n: uniform(seed, 1, 0, n) if n else u, sampling)
    found = (sampler or Sampler(sampling)).draw(logits, u, further(seed, 1))
    if expected.gap > 1e-12:
        assert found == expected.token
    return expected.gap > 1e-12


WITHOUT = st.builds(
    Sampling,
    temperature=st.sampled_from([1e-300, 1e-9, 0.3, 0.8, 1.0, 1.0, 7.5, 1e30, 1e300]),
    top_k=st.just(0),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    typical_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    min_p=st.sampled_from([0.0, 0.0, 1e-4, 0.37, 1.0]),
)


@settings(deadline=None, max_examples=400)
@given(
    logits=st.lists(
        st.sampled_from([-math.inf, -3e38, -6e4, -90, -3.5, -1.0, 0.0, 0.25, 2.0, 3e38]), min_size=1
    ).filter(lambda values: max(values) > -math.inf),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    first=st.one_of(st.sampled_from([0.0, 0.5, 1 - 2**-53]), UNIFORM),
    seed=st.integers(0, 2**32),
    sampling=WITHOUT,
)
def test_draws_without_top_k_follow_the_definition_among_many_ties(
    logits, dtype, first, seed, sampling
):
    if dtype is np.float16:
        logits = [max(value, -6e4) if value < 6e4 else 6e4 for value in logits]
    check(np.array(logits, dtype), sampling, seed, first=first)


def some_logits(kind, size, seed):
    rng = np.random.default_rng(seed)
    spread = {"flat": 0.3, "spread": 2, "peaked": 8}.get(kind, 1)
    logits = (rng.normal(size=size) * spread).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits * 3)
    elif kind == "one value":
        logits[:] = 1.5
    elif kind == "banned":
        logits[1:][rng.random(size - 1) < 0.9] = -np.inf
    elif kind == "one large":
        logits[seed % size] = 30
    elif kind == "steps":  # many equal ones in a row, whose errors do not cancel
        logits = np.repeat(logits[:8] * 3, -(-size // 8))[:size]
    return logits


KINDS = ("flat", "spread", "peaked", "ties", "one value", "banned", "one large", "steps")


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    size=st.one_of(st.sampled_from([1, 255, 256, 257, 512]), st.integers(1, 9000)),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    sampling=WITHOUT,
)
def test_draws_without_top_k_follow_the_definition_in_large_vocabularies(
    kind, size, seed, dtype, sampling
):
    sampler = Sampler(sampling)
    for more in range(3):  # with the same memory
        check(some_logits(kind, size, seed + more).astype(dtype), sampling, seed + more, sampler)


FILTERS = (
    {},
    {"top_p": 0.9},
    {"min_p": 0.01},
    {"top_p": 0.7, "min_p": 0.001},
    {"typical_p": 0.9},
    {"typical_p": 0.5, "top_p": 0.9, "min_p": 0.001},
)


@pytest.mark.parametrize("changes", FILTERS, ids=str)
def test_few_draws_need_float64_and_none_is_in_doubt(changes, monkeypatch):
    used = collections.Counter()
    real = module._Unsorted._draw

    def counted(self, logits, u, again, dtype):
        used[dtype] += 1
        return real(self, logits, u, again, dtype)

    monkeypatch.setattr(module._Unsorted, "_draw", counted)
    sampling = dataclasses.replace(PLAIN, temperature=0.8, **changes)
    sampler = Sampler(sampling)
    for kind in ("flat", "spread", "peaked", "banned"):
        for seed in range(50):
            assert check(some_logits(kind, 20_000, seed), sampling, seed, sampler)
    assert used[np.dtype(np.float32)] == 200
    # A draw that typical-p does not leave is made again in float64.
    rejected = 200 * (1 - sampling.typical_p)
    assert used[np.dtype(np.float64)] < 12 + 1.3 * rejected


@pytest.mark.parametrize("kind", ["flat", "spread", "peaked", "ties", "steps"])
def test_draws_at_the_border_of_two_tokens_are_those_of_exact_sums(kind):
    """Where sums in float32 cannot tell on which side of it u is, or whether a token is in."""
    logits = some_logits(kind, 20_000, 1)
    x = logits.astype(np.longdouble) - logits.max()
    p = np.exp(x) / np.exp(x).sum()
    ids, by_id = np.arange(len(p)), np.cumsum(p)
    ranked = {
        "top_p": np.lexsort((ids, -logits)),
        "typical_p": np.lexsort((ids, -logits, abs(x - (p * x).sum()))),
    }
    far = [sign * d for d in (1e-6, 3e-7, 1e-7, 3e-8, 1e-8, 1e-10) for sign in (1, -1)]
    for n in np.random.default_rng(0).integers(1, 20_000, 12):
        for d in far:
            if by_id[n] + d < 1:
                check(logits, PLAIN, 5, first=float(by_id[n] + d))
    for name, order in ranked.items():
        for before in np.random.default_rng(1).random(12):
            n = int((np.cumsum(p[order]) <= before).sum())
            u = float(by_id[order[n]] - p[order[n]] / 2)
            for d in far:
                share = float(p[order[:n]].sum() + d)
                if 0 < share <= 1:
                    check(logits, dataclasses.replace(PLAIN, **{name: share}), 5, first=u)
    logits = np.arange(-5000, 1, dtype=np.float32) / 500
    for n in range(0, 5000, 250):
        for d in (0, 1e-15, 1e-9, -1e-9, 1e-6, -1e-6):
            check(logits, dataclasses.replace(PLAIN, min_p=math.exp(float(logits[n])) + d), n)


def test_tokens_as_far_from_the_entropy_as_the_one_drawn_are_told_apart():
    """The first tokens hold most, and are at the mirror image of the last one, or just beside."""
    sampling = dataclasses.replace(PLAIN, temperature=0.7, typical_p=0.5)
    for n in range(100, 130):
        logits = np.append(np.repeat(np.float32([0.1, -0.6]), n), np.float32(0))
        for _ in range(20):
            x = (logits.astype(np.longdouble) - logits[0]) / 0.7
            mean = (np.exp(x) * x).sum() / np.exp(x).sum()
            logits[-1] = logits[0] + 0.7 * 2 * mean
        for units in range(-5, 6):
            moved = logits.copy()
            moved[-1] += units * np.spacing(logits[-1])
            check(moved, sampling, n, first=1 - 1e-6)


@pytest.mark.parametrize("changes", [{"top_p": 0.8}, {"typical_p": 0.8}, {"min_p": 0.1}])
def test_a_single_token_and_one_that_has_all_probability(changes):
    sampling = dataclasses.replace(PLAIN, **changes)
    assert sample(np.array([-3e38], np.float32), 0.99, sampling) == 0
    for others in (-60, -200, -3e38, -np.inf):
        logits = np.full(3000, others, np.float32)
        logits[1234] = 7
        assert sample(logits, 0.99, sampling) == 1234


def torch_distribution(torch, logits, ids, s, bias, banned):
    """Probabilities (V,) after all steps, in torch's own operations; ids: the text, all drawn."""
    x = torch.tensor(logits, dtype=torch.float64)
    seen, counts = torch.unique(torch.tensor(ids), return_counts=True)
    x[seen] = torch.where(
        x[seen] > 0, x[seen] / s.repetition_penalty, x[seen] * s.repetition_penalty
    )
    x[seen] -= s.frequency_penalty * counts + s.presence_penalty
    for token_id, value in bias.items():
        x[token_id] += value
    n = s.no_repeat_ngram_size
    if n:
        banned = [
            *banned,
            *(
                g[-1]
                for g in zip(*(ids[i:] for i in range(n)), strict=False)
                if list(g[:-1]) == ids[len(ids) - n + 1 :]
            ),
        ]
    x[banned] = -torch.inf
    values, order = torch.sort(x / s.temperature, descending=True, stable=True)
    if s.top_k:
        values[s.top_k :] = -torch.inf
    p = torch.softmax(values, 0)
    p[(p.cumsum(0) - p) >= s.top_p] = 0
    p[p < s.min_p * p[0]] = 0
    p /= p.sum()
    if s.typical_p < 1:
        surprise = -torch.log(p)
        distance = (surprise - torch.special.entr(p).sum()).abs()
        nearest = torch.sort(distance, stable=True).indices
        mass = p[nearest].cumsum(0) - p[nearest]
        p[nearest[mass >= s.typical_p]] = 0
        p /= p.sum()
    result = torch.zeros_like(p)
    result[order] = p
    return result.numpy()


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.7},
        {"top_k": 25},
        {"top_p": 0.85},
        {"min_p": 0.03},
        {"typical_p": 0.5},
        {"typical_p": 0.9, "top_k": 40},
        {"typical_p": 0.6, "top_p": 0.7},
        {"typical_p": 0.8, "min_p": 0.01},
        {"top_p": 0.7, "min_p": 0.05},
        {"repetition_penalty": 1.7, "presence_penalty": 0.4, "frequency_penalty": 0.3},
        {"no_repeat_ngram_size": 2},
        {
            "temperature": 1.3,
            "top_k": 80,
            "top_p": 0.95,
            "min_p": 0.01,
            "typical_p": 0.8,
            "repetition_penalty": 1.2,
            "no_repeat_ngram_size": 2,
        },
    ],
)
def test_frequencies_are_those_of_the_steps_in_torch(changes):
    torch = pytest.importorskip("torch")
    draws, V = 10_000, 300
    logits = np.random.default_rng(6).normal(size=V).astype(np.float32) * 1.5
    sampling = dataclasses.replace(PLAIN, **changes)
    likely = np.argsort(-logits)[:4].tolist()
    ids = [likely[0], likely[1], likely[0], likely[2], likely[0]]
    bias, banned = {7: 4.0, likely[3]: -1.0}, [9, likely[2]]
    adjuster = Adjuster(sampling, [], V, eot_id=0, bias=bias, banned=banned)
    for token_id in ids:
        adjuster.add(token_id)
    p = torch_distribution(torch, logits, ids, sampling, bias, banned)
    sampler = Sampler(sampling)
    found = np.zeros(V)
    for position in range(draws):
        u, again = uniform(12, position), further(12, position)
        found[sampler.draw(adjuster.adjust(logits), u, again)] += 1
    assert found[p == 0].sum() == 0
    often = p * draws >= 10
    expected = np.append(p[often], p[~often].sum()) * draws
    counted = np.append(found[often], found[~often].sum())
    expected, counted = expected[expected > 0], counted[expected > 0]
    assert stats.chisquare(counted, expected * draws / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 1e-3},
        {"top_k": 0},
        {"top_p": 0.9},
        {"top_k": 0, "top_p": 0.9},
        {"top_k": 0, "typical_p": 0.8, "min_p": 0.01},
    ],
)
def test_what_a_sampler_remembers_never_changes_a_token(changes):
    """Logits that drift, jump, and become NaN in one place."""
    sampling = Sampling(**changes)
    sampler = Sampler(sampling)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=3000).astype(np.float32)
    for step in range(200):
        logits += rng.normal(size=3000).astype(np.float32) / 4 + (10 if step % 50 == 49 else -0.1)
        u = uniform(1, step)
        if step % 3 == 0:
            logits = np.round(logits, 1)  # many are equal
        again = further(1, step)
        assert sampler.draw(logits, u, again) == sample(logits, u, sampling, again)
    for bad in (np.nan, np.inf):
        logits[1234] = bad
        with pytest.raises(PicoEdgeError, match=str(bad)):
            sampler.draw(logits, 0.5)
    with pytest.raises(PicoEdgeError, match="-inf"):
        sampler.draw(np.full_like(logits, -np.inf), 0.5)
