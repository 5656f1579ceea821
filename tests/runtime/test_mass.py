"""The token at a cumulative weight, found without a sort, is that of exact sums, or not told."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pico_edge.runtime.mass import LEFT, RIGHT, SORTED, Mass


def exact(logits, temperature):
    """Ascending logits, and the weights of each and all above it, in long double."""
    values = np.sort(logits)[::-1]
    shifted = (values.astype(np.longdouble) - np.longdouble(values[0])) / temperature
    return values, np.cumsum(np.exp(shifted))


def logits_of(kind, size, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=size) * {"flat": 0.1, "spread": 2, "peaked": 8}.get(kind, 1)).astype(
        np.float32
    )
    if kind == "ties":
        logits = np.round(logits * 3)
    elif kind == "one value":
        logits[:] = 1.5
    elif kind == "banned":
        logits[1:][rng.random(size - 1) < 0.9] = -np.inf
    elif kind == "one large":
        logits[seed % size] = 30
    return logits


KINDS = ("flat", "spread", "peaked", "ties", "one value", "banned", "one large")


@given(
    kind=st.sampled_from(KINDS),
    size=st.integers(2, 12_000),
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.01, 0.5, 0.8, 1.0, 3.7]),
    share=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1 - 2**-53])),
    side=st.sampled_from([LEFT, RIGHT]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_a_place_is_the_one_of_exact_sums(kind, size, seed, temperature, share, side, dtype):
    logits = logits_of(kind, size, seed)
    mass = Mass(logits, temperature, dtype)
    values, sums = exact(logits, temperature)
    target = share * mass.total
    place = mass.find(target, side)
    if place is None:
        return
    n = int(sums.searchsorted(np.longdouble(share) * sums[-1], side))
    assert n < size
    assert place.logit == values[n]
    assert place.before == n - int(np.count_nonzero(values > values[n]))
    assert place.reached == pytest.approx(float(sums[n]), rel=2 * mass.error + 1e-12)
    again = mass.find(target, side, lowest=values[min(n + 5, size - 1)])
    assert again is None or again == pytest.approx(place, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_nearly_all_places_are_found(kind):
    """Not None each time: else every draw would sort. float64 tells what float32 leaves."""
    found = {np.float32: 0, np.float64: 0}
    for seed in range(50):
        logits = logits_of(kind, 20_000, seed)
        assert logits.size > 2 * SORTED
        for dtype in found:
            mass = Mass(logits, 0.8, dtype)
            share = np.random.default_rng(seed).random()
            found[dtype] += mass.find(share * mass.total, RIGHT) is not None
    assert found[np.float32] >= 40
    assert found[np.float64] == 50


@pytest.mark.parametrize("spread", [0.0, 0.1, 3, 20, 80, 1e4])
@pytest.mark.parametrize("temperature", [1e-3, 0.7, 1.0, 30.0])
def test_sums_are_within_their_stated_error(spread, temperature):
    rng = np.random.default_rng(4)
    for size in (4097, 50_304, 300_000):
        logits = (rng.normal(size=size) * spread).astype(np.float32)
        weights = np.exp((logits.astype(np.float64) - float(logits.max())) / temperature)
        total = math.fsum(weights)
        for dtype in (np.float32, np.float64):
            mass = Mass(logits, temperature, dtype)
            assert abs(mass.total / total - 1) <= mass.error < 1e-5
            assert abs(mass.rough.value / total - 1) <= mass.rough.error < 1e-5
            for share in (1e-3, 0.05, 0.9):
                likely = mass.at_least(share)
                expected = math.fsum(weights[weights >= share])
                assert likely is None or abs(likely / expected - 1) <= mass.error
                assert likely is not None or spread in (0.0, 1e4) or size == 300_000


def test_a_weight_at_the_border_of_min_p_is_not_told():
    logits = np.array([0, -1, -2, -3] * 500, np.float32)
    mass = Mass(logits, 1.0, np.float32)
    assert mass.at_least(math.exp(-2)) is None
    assert mass.at_least(math.exp(-2.1)) == pytest.approx(
        500 * (1 + math.exp(-1) + math.exp(-2)), rel=mass.error
    )
