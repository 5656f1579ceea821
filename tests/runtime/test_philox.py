"""The random numbers are those of Random123 and of numpy, and are uniform."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pico_edge.runtime.philox import philox4x64, uniform

WORDS = st.integers(0, 2**64 - 1)


# The known-answer vectors of Random123, tests/kat_vectors, philox4x64 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
        ),
        (
            (2**64 - 1,) * 4,
            (2**64 - 1,) * 2,
            (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
        ),
        (
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
        ),
    ],
)
def test_known_answers_of_random123(counter, key, words):
    assert philox4x64(counter, key) == words


@given(counter=st.tuples(WORDS, WORDS, WORDS, WORDS), key=st.tuples(WORDS, WORDS))
def test_words_are_those_of_numpy_one_block_earlier(counter, key):
    number = sum(word << 64 * i for i, word in enumerate(counter))
    numpys = np.random.Philox(counter=(number - 1) % 2**256, key=key[0] | key[1] << 64)
    assert philox4x64(counter, key) == tuple(int(word) for word in numpys.random_raw(4))


@given(
    seed=st.integers(0, 2**63 - 1),
    position=st.integers(1, 2**40),
    row=st.integers(0, 2**20),
    again=st.integers(0, 2**20),
)
def test_a_uniform_is_the_top_53_bits_of_the_first_word(seed, position, row, again):
    numpys = np.random.Philox(key=seed, counter=[position - 1, row, again, 0])
    assert uniform(seed, position, row, again) == (int(numpys.random_raw()) >> 11) / 2**53
    assert 0 <= uniform(seed, position, row, again) < 1
    assert uniform(seed, position, row) == uniform(seed, position, row, 0)


def test_draws_are_uniform_along_positions_samples_and_seeds():
    for draws in (
        [uniform(7, position) for position in range(4000)],
        [uniform(7, 12, row) for row in range(4000)],
        [uniform(seed, 12) for seed in range(4000)],
        [uniform(7, 12, 0, again) for again in range(4000)],
    ):
        assert stats.kstest(draws, "uniform").pvalue > 1e-4
