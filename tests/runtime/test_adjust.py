"""Biases, bans, repeated n-grams and the least length, on texts worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pico_edge.errors import PicoEdgeError, UsageError
from pico_edge.runtime.adjust import Adjuster, adjusts, resolve_banned, resolve_bias, token_of
from pico_edge.runtime.sampling import Sampling
from pico_edge.tokenizer import EOT, SimpleTokenizer

EOT_ID = 4
LOGITS = np.array([1.0, 2.0, 3.0, 4.0, 5.0], np.float32)
BYTES = SimpleTokenizer()


def banned_after(ids, **changes):
    """The tokens that cannot come after these, all of them drawn."""
    adjuster = Adjuster(Sampling(**changes), [], 5, eot_id=EOT_ID)
    for token_id in ids:
        adjuster.add(token_id)
    adjusted = adjuster.adjust(LOGITS)
    assert (adjusted[adjusted > -np.inf] == LOGITS[adjusted > -np.inf]).all()
    return np.flatnonzero(adjusted == -np.inf).tolist()


@pytest.mark.parametrize(
    ("n", "ids", "banned"),
    [
        (1, [], []),
        (1, [0, 3, 0], [0, 3]),
        (2, [0], []),
        (2, [0, 1, 0], [1]),
        (2, [0, 1, 0, 2, 0], [1, 2]),
        (2, [0, 0], [0]),
        (3, [0, 1, 2, 0, 1], [2]),
        (3, [0, 1, 2, 1], []),
        (3, [1, 1, 1], [1]),
        (9, [0, 1, 2], []),
    ],
)
def test_no_ngram_comes_twice(n, ids, banned):
    assert banned_after(ids, no_repeat_ngram_size=n) == banned


def test_ngrams_of_the_prompt_count():
    adjuster = Adjuster(Sampling(no_repeat_ngram_size=2), [0, 1, 2, 0], 5, eot_id=EOT_ID)
    assert adjuster.adjust(LOGITS).tolist() == [1, -np.inf, 3, 4, 5]


@given(ids=st.lists(st.integers(0, 3), max_size=20), n=st.integers(1, 4))
def test_banned_are_exactly_the_tokens_that_repeat_an_ngram(ids, n):
    def ngrams(text):
        return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]

    repeats = [t for t in range(5) if len(ids) >= n - 1 and ngrams([*ids, t])[-1] in ngrams(ids)]
    assert banned_after(ids, no_repeat_ngram_size=n) == repeats


def test_end_of_text_waits_for_the_least_length():
    assert banned_after([], min_new_tokens=2) == [EOT_ID]
    assert banned_after([0], min_new_tokens=2) == [EOT_ID]
    assert banned_after([0, 0], min_new_tokens=2) == []


def test_a_bias_is_added_after_the_penalties_and_before_the_bans():
    adjuster = Adjuster(
        Sampling(repetition_penalty=2.0),
        [3],
        5,
        eot_id=EOT_ID,
        bias={3: 10.0, 0: -0.5, 1: 100.0},
        banned=[1],
    )
    adjusted = adjuster.adjust(LOGITS)
    assert adjusted.tolist() == [0.5, -np.inf, 3, 4 / 2 + 10, 5]
    assert (adjusted.dtype, LOGITS.tolist()) == (np.float32, [1, 2, 3, 4, 5])
    half = adjuster.adjust(LOGITS.astype(np.float16))
    assert half.tolist() == adjusted.tolist()


@pytest.mark.parametrize("sign", [1, -1])
def test_penalties_and_biases_of_any_size_leave_finite_logits(sign):
    sampling = Sampling(
        repetition_penalty=1e-308 if sign < 0 else 1e308,
        presence_penalty=sign * 1e308,
        frequency_penalty=sign * 1e308,
    )
    adjuster = Adjuster(sampling, [1], 5, eot_id=EOT_ID, bias={0: sign * 1e308, 3: 1.0})
    for token_id in (2, 2, 3):
        adjuster.add(token_id)
    adjusted = adjuster.adjust(LOGITS)
    assert np.isfinite(adjusted).all()
    assert (adjusted[2] < adjusted[4]) == (sign > 0)
    assert (adjusted[0] > adjusted[4]) == (sign > 0)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_damaged_logits_are_an_error_also_where_they_are_adjusted(bad):
    logits = np.full(5, bad, np.float32)
    for changes in ({"repetition_penalty": 1.2}, {"presence_penalty": 1.0}):
        with pytest.raises(PicoEdgeError, match="largest logit is"):
            Adjuster(Sampling(**changes), [1], 5, eot_id=EOT_ID).adjust(logits)
    with pytest.raises(PicoEdgeError, match="largest logit is"):
        Adjuster(Sampling(), [1], 5, eot_id=EOT_ID, bias={1: 1.0}).adjust(logits)


def test_nothing_left_to_draw_is_an_error_that_says_why():
    adjuster = Adjuster(Sampling(min_new_tokens=1), [], 5, eot_id=EOT_ID, banned=[0, 1, 2, 3])
    with pytest.raises(PicoEdgeError, match="after 0 tokens every token is banned"):
        adjuster.adjust(LOGITS)
    adjuster.add(0)
    assert adjuster.adjust(LOGITS).argmax() == EOT_ID
    with pytest.raises(PicoEdgeError, match="largest logit is nan"):
        from pico_edge.runtime.sampling import sample

        sample(adjuster.adjust(np.full(5, np.nan, np.float32)), 0.5, Sampling())


def test_whether_anything_is_to_be_done():
    assert not adjusts(Sampling(), {}, [])
    assert adjusts(Sampling(), {1: 2.0}, [])
    assert adjusts(Sampling(), {}, [1])
    for changes in (
        {"min_new_tokens": 1},
        {"no_repeat_ngram_size": 3},
        {"repetition_penalty": 1.1},
    ):
        assert adjusts(Sampling(**changes), {}, [])


def test_tokens_go_by_id_or_by_text():
    assert (
        token_of("x", "a", BYTES) == token_of("x", 97, BYTES) == token_of("x", np.int64(97), BYTES)
    )
    assert token_of("x", EOT, BYTES) == BYTES.eot_id
    assert resolve_bias({"a": 1, 98: -2.5}, BYTES) == {97: 1.0, 98: -2.5}
    assert resolve_banned(["a", 98], BYTES) == [97, 98]
    assert resolve_banned("a", BYTES) == [97]
    assert (resolve_bias(None, BYTES), resolve_banned(None, BYTES)) == ({}, [])


@pytest.mark.parametrize(
    ("bias", "banned", "message"),
    [
        ({"ab": 1}, None, "logit_bias: 'ab' is 2 tokens"),
        ({"": 1}, None, "logit_bias: '' is 0 tokens"),
        ({257: 1}, None, "logit_bias: token 257: expected 0 to 256"),
        ({-1: 1}, None, "token -1"),
        ({True: 1}, None, "True: expected the id or the text"),
        ({1: float("inf")}, None, "logit_bias of 1 is inf"),
        ({1: "2"}, None, "logit_bias of 1 is '2'"),
        ({"a": 1, 97: 2}, None, "97 is there twice"),
        ([1], None, "expected a mapping"),
        (None, ["é"], "banned_tokens: 'é' is 2 tokens"),
        (None, [1.5], "banned_tokens: 1.5"),
        (None, 300, "banned_tokens: token 300"),
    ],
)
def test_what_is_no_token_is_refused(bias, banned, message):
    with pytest.raises(UsageError, match=message):
        resolve_bias(bias, BYTES)
        resolve_banned(banned, BYTES)
