"""Philox4x64-10: the random numbers of sampling, a pure function that any language can repeat.

A draw depends on the seed, the position of the token and the number of the sample, and on nothing
that was drawn before; one that takes several numbers counts them. In plain integers: a number takes
5 us, once per token; numpy.random would cost every start 20 ms and 7 MB.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC11), Random123.
Try: `uniform(seed=1, position=5)`.
"""

from __future__ import annotations

import functools
import sys

MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
KEY_STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B  # golden ratio, sqrt(3) - 1
ROUNDS = 10
MASK = (1 << 64) - 1
LANE = 128

Words = tuple[int, int, int, int]


def philox4x64(counter: Words, key: tuple[int, int]) -> Words:
    """The four 64-bit words of one block, by the definition of Random123.

    NOTE: numpy's generator counts up before its first block, so these are the first four words of
    np.random.Philox(counter=counter - 1, key=key), the counter being one number of 256 bits.
    """
    a, b, c, d = counter
    m0, m1 = MULTIPLIERS
    for k0, k1 in _round_keys(key):
        x, y = m0 * a, m1 * c
        a, b, c, d = (y >> 64) ^ b ^ k0, y & MASK, (x >> 64) ^ d ^ k1, x & MASK
    return a, b, c, d


@functools.lru_cache(maxsize=16)
def _round_keys(key: tuple[int, int]) -> list[tuple[int, int]]:
    (k0, k1), (w0, w1) = key, KEY_STEPS
    return [((k0 + i * w0) & MASK, (k1 + i * w1) & MASK) for i in range(ROUNDS)]


def uniforms(seed: int, position: int, sample: int = 0, *, n: int) -> list[float]:
    """`uniform` for n positions in a row, at a tenth of the cost of each by itself.

    The n blocks are computed at once in long integers, one lane of 128 bits to a block: a word of
    64 bits times a multiplier fills its lane and never reaches the next.
    """
    ones, numbers = _lanes(n)
    m0, m1 = MULTIPLIERS
    low = ones * MASK
    # Positions are far below 2**64: no lane carries into the next.
    a, b, c, d = ones * position + numbers, ones * sample, 0, 0
    for k0, k1 in _round_key_lanes(seed, n):
        x, y = m0 * a, m1 * c
        a, b = ((y >> 64) & low) ^ b ^ k0, y & low
        c, d = ((x >> 64) & low) ^ d ^ k1, x & low
    words = memoryview(a.to_bytes(LANE // 8 * n, sys.byteorder)).cast("Q").tolist()
    # Of each lane the low word; big-endian bytes begin with the high word of the last lane.
    firsts = words[::2] if sys.byteorder == "little" else words[::-2]
    return [(word >> 11) * 2.0**-53 for word in firsts]


@functools.lru_cache(maxsize=4)
def _lanes(n: int) -> tuple[int, int]:
    """A 1 in each of n lanes, and the number of the lane in each."""
    return sum(1 << LANE * i for i in range(n)), sum(i << LANE * i for i in range(n))


@functools.lru_cache(maxsize=16)
def _round_key_lanes(seed: int, n: int) -> list[tuple[int, int]]:
    ones, _ = _lanes(n)
    return [(ones * k0, ones * k1) for k0, k1 in _round_keys((seed, 0))]


def uniform(seed: int, position: int, sample: int = 0, again: int = 0) -> float:
    """A number of [0, 1) for the token at a position of the text of a sample.

    Key (seed, 0), counter (position, sample, again, 0); top 53 bits of the first word, times
    2**-53. again: 0 for the first number of a draw; the few that take more go on with 1, 2, ...
    """
    return (philox4x64((position, sample, again, 0), (seed, 0))[0] >> 11) * 2.0**-53
