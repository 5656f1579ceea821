"""Texts: seeds, batches, stops, streams, split characters, end of the context, bad arguments."""

import dataclasses
import functools
import gc
import itertools
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.runtime import Generation, Model
from pico_edge.runtime import generate as generate_module
from pico_edge.runtime.generate import split_at_stop
from pico_edge.runtime.philox import uniform
from pico_edge.runtime.sampling import sample
from pico_edge.tokenizer import EOT, SimpleTokenizer

DATA = Path(__file__).parents[1] / "data"
HELLO = "Hello, world"
SPLIT = "aé漢🙂\n"  # characters of 1, 2, 3 and 4 bytes


@pytest.fixture(scope="module")
def model():
    return Model(DATA / "tiny_fp32.onnx", provider="cpu", threads=1)


@pytest.fixture
def scripted(model, monkeypatch):
    """Makes the model say given tokens: the sampler, not the engine, is replaced."""

    def script(*ids):
        said = itertools.cycle(ids)
        monkeypatch.setattr(generate_module.Sampler, "draw", lambda *_: next(said))
        return model

    return script


def no_end(model, **changes):
    """Options under which a text does not end by itself."""
    return {"max_new_tokens": 40, "seed": 3, **changes}


def slow_ids(model, prompt, n, *, seed, number=0, **changes):
    """The tokens of a text by one call of the whole window per token: nothing cached, no batch.

    The window rule is that of the loop: when block_size tokens are in it, the newest third goes on.
    """
    window = model.config.block_size
    ids = model.tokenizer.encode(prompt) or [model.tokenizer.eot_id]
    n_prompt, start = len(ids), max(0, len(ids) - window)
    while len(ids) - n_prompt < n:
        if len(ids) - start > window:
            start = len(ids) - window // 3
        logits = model.session.new_cache().prefill([ids[start:]])[0, : model.tokenizer.n_vocab]
        numbers = functools.partial(uniform, seed, len(ids), number)
        sampling = dataclasses.replace(model.sampling, **changes)
        token_id = sample(logits, numbers(), sampling, numbers)
        if token_id == model.tokenizer.eot_id:
            break
        ids.append(token_id)
    return ids[n_prompt:]


def test_a_text_is_that_of_a_plain_loop_over_the_window(model):
    window = model.config.block_size
    for seed, prompt in enumerate(
        ["", "H", HELLO, "x" * (window - 1), "x" * window, "xy" * window]
    ):
        n = 2 * window + 5
        made = model.generate(prompt, max_new_tokens=n, seed=seed)
        assert made.token_ids == slow_ids(model, prompt, n, seed=seed)


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.5}, {"typical_p": 0.4, "temperature": 1.3}])
def test_a_text_from_all_tokens_is_that_of_a_plain_loop(model, changes):
    """A draw that takes more numbers takes those of its seed, position and row."""
    options = {"top_k": 0, **changes}
    alone = model.generate(HELLO, max_new_tokens=60, seed=8, **options)
    assert alone.token_ids == slow_ids(model, HELLO, 60, seed=8, **options)
    for number, made in enumerate(
        model.generate([HELLO] * 3, max_new_tokens=40, seed=8, **options)
    ):
        assert made.token_ids == slow_ids(model, HELLO, 40, seed=8, number=number, **options)
    again = model.generate(HELLO, max_new_tokens=60, **options)  # a seed of its own
    assert again.token_ids == slow_ids(model, HELLO, 60, seed=again.seed, **options)


def test_a_long_text_slides_over_the_context_many_times(model, monkeypatch):
    """No end-of-text, so that the window is refilled again and again."""
    monkeypatch.setattr(model.tokenizer, "n_vocab", 256)
    n = 5 * model.config.block_size
    made = model.generate(HELLO, max_new_tokens=n, seed=1)
    assert (made.finish_reason, made.new_tokens) == ("length", n)
    assert made.token_ids == slow_ids(model, HELLO, n, seed=1)


def test_rows_of_a_batch_say_what_they_say_alone(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "n_vocab", 256)
    window = model.config.block_size
    prompts = [HELLO, "", "x" * window, "ab", "long " * window]
    n = 2 * window
    batch = model.generate(prompts, max_new_tokens=n, seed=9)
    assert [made.prompt for made in batch] == prompts
    for number, made in enumerate(batch):
        expected = slow_ids(model, made.prompt, n, seed=9, number=number)
        assert made.token_ids == expected
    assert batch[0].token_ids == model.generate(HELLO, max_new_tokens=n, seed=9).token_ids


def test_rows_of_a_batch_end_each_by_itself(model):
    """Some end early by a stop; the others go on as if alone."""
    batch = model.generate([HELLO] * 8, max_new_tokens=150, seed=2, stop="v")
    assert len({made.text for made in batch}) > 1
    assert len({made.finish_reason for made in batch}) > 1
    for number, made in enumerate(batch):
        ids = slow_ids(model, HELLO, made.new_tokens, seed=2, number=number)
        assert made.token_ids == ids


def test_greedy_rows_of_a_batch_equal_single_runs(model):
    prompts = ["a", "bcd", HELLO]
    batch = model.generate(prompts, max_new_tokens=90, temperature=0)
    for prompt, made in zip(prompts, batch, strict=True):
        assert model.generate(prompt, max_new_tokens=90, temperature=0).text == made.text


def test_one_seed_is_one_text_and_others_are_others(model):
    texts = [model.generate(HELLO, seed=seed, max_new_tokens=30).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    again = Model(DATA / "tiny_fp32.onnx", provider="cpu", threads=2)
    assert again.generate(HELLO, seed=1, max_new_tokens=30).text == texts[0]


def test_a_seed_is_drawn_and_reported(model):
    made = model.generate(HELLO, max_new_tokens=30)
    assert 0 <= made.seed < 2**63
    assert model.generate(HELLO, max_new_tokens=30, seed=made.seed).text == made.text


def test_seeds_at_the_ends_of_their_range_work(model):
    for seed in (0, 2**63 - 1):
        assert model.generate(HELLO, max_new_tokens=2, seed=seed).seed == seed


def test_the_text_does_not_depend_on_how_much_was_asked_for(model):
    long = model.generate(HELLO, max_new_tokens=30, seed=5)
    for n in (0, 1, 7):
        made = model.generate(HELLO, max_new_tokens=n, seed=5)
        assert made.token_ids == long.token_ids[:n]
        assert made.finish_reason == "length"


def test_stream_pieces_make_the_text(model):
    for seed in range(5):
        stream = model.stream(HELLO, max_new_tokens=60, seed=seed)
        pieces = list(stream)
        assert all(pieces)
        made = model.generate(HELLO, max_new_tokens=60, seed=seed)
        assert "".join(pieces) == made.text == stream.result.text
        assert made.token_ids == stream.result.token_ids
        assert made.text == model.tokenizer.decode(made.token_ids)


def test_pieces_come_with_their_token(scripted):
    stream = scripted(*b"abc").stream("x", max_new_tokens=3)
    assert [next(stream), next(stream), next(stream)] == ["a", "b", "c"]
    assert next(stream, None) is None


def test_a_character_split_over_tokens_comes_whole(scripted):
    pieces = list(scripted(*SPLIT.encode()).stream("x", max_new_tokens=len(SPLIT.encode())))
    assert pieces == list(SPLIT)


def test_bytes_that_are_never_utf8_become_replacement_characters(scripted):
    made = scripted(0xFF, 0x61, 0xE6, 0xBC).generate("x", max_new_tokens=4)
    assert made.text == "\ufffda\ufffd"
    assert made.token_ids == [0xFF, 0x61, 0xE6, 0xBC]


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("world", "hello ", "stop"),
        (["nothing", "world"], "hello ", "stop"),
        (["wor", "world"], "hello ", "stop"),
        (["ello", "h"], "", "stop"),
        ("漢", "hello world, ", "stop"),
        ("worlds", "hello world, 漢字", "length"),
        ("字!", "hello world, 漢字", "length"),
        ((), "hello world, 漢字", "length"),
    ],
)
def test_a_stop_ends_the_text_and_is_not_in_it(scripted, stop, text, reason):
    said = "hello world, 漢字".encode()
    model = scripted(*said)
    made = model.generate("x", max_new_tokens=len(said), stop=stop)
    assert (made.text, made.finish_reason) == (text, reason)
    stream = scripted(*said).stream("x", max_new_tokens=len(said), stop=stop)
    assert "".join(stream) == text
    assert stream.result.token_ids == made.token_ids


def test_only_what_may_start_a_stop_is_held_back(scripted):
    stream = scripted(*b"a<b<|c").stream("x", max_new_tokens=6, stop="<|end|>")
    assert list(stream) == ["a", "<b", "<|c"]


def test_a_stop_that_came_before_the_least_length_is_text_for_good(scripted):
    """Also where it is held back because a longer one may begin with it."""
    options = {"max_new_tokens": 5, "min_new_tokens": 3, "stop": ["b", "abc"]}
    made = scripted(*b"abxab").generate("q", **options)
    assert (made.text, made.finish_reason) == ("abxa", "stop")
    made = scripted(*b"abcab").generate("q", **options)
    assert (made.text, made.finish_reason) == ("", "stop")  # the longer one ends in time


def test_a_stop_in_the_prompt_does_not_end_the_text(scripted):
    made = scripted(*b"abc").generate("stop", max_new_tokens=3, stop=["stop", "pa"])
    assert made.text == "abc"


@given(
    cut=st.lists(st.text("ab", max_size=6), max_size=6),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stops_are_found_however_the_text_is_cut(cut, stops):
    """The text up to the stop that is complete first; held back is only what may be one."""
    text = "".join(cut)
    shown, held, found = "", "", False
    for piece in cut:
        ready, held, found = split_at_stop(held + piece, stops)
        shown += ready
        if found:
            break
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert found == bool(ends)
    if found:
        end = min(ends)
        assert shown == text[: min(end - len(s) for s in stops if text[:end].endswith(s))]
    else:
        assert shown + held == text
        assert not held or any(stop.startswith(held) for stop in stops)


def test_end_of_text_ends_and_is_not_printed(scripted):
    model = scripted(*b"ab", SimpleTokenizer.eot_id)
    made = model.generate("x", max_new_tokens=10)
    assert (made.text, made.finish_reason, made.token_ids) == ("ab", "eos", [97, 98])
    assert model.generate("x", max_new_tokens=2).finish_reason == "length"


def test_an_empty_prompt_starts_from_end_of_text(model):
    made = model.generate("", max_new_tokens=10, seed=1)
    same = model.generate(EOT, max_new_tokens=10, seed=1, allow_special=True)
    assert made.token_ids == same.token_ids
    assert (made.prompt, made.prompt_tokens) == ("", 1)
    assert model.generate(max_new_tokens=10, seed=1).text == made.text
    assert model.generate("  \n", max_new_tokens=3).prompt_tokens == 3


def test_end_of_text_in_a_prompt_is_plain_text_unless_asked(model):
    assert model.generate(EOT, max_new_tokens=1).prompt_tokens == len(EOT)
    made = model.generate(f"a{EOT}b", max_new_tokens=1, allow_special=True)
    assert made.prompt_tokens == 3


def test_any_character_can_be_prompted(model):
    made = model.generate("漢🙂\x00\ud800", max_new_tokens=2, seed=1)
    assert made.new_tokens == 2


def test_the_context_ends_the_text_when_asked_to_stop(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "n_vocab", 256)
    window = model.config.block_size
    for n_prompt, n_new in ((window - 3, 4), (window - 1, 2), (window, 1), (window + 1, 0)):
        made = model.generate("x" * n_prompt, max_new_tokens=99, context_overflow="stop", seed=1)
        assert (made.finish_reason, made.new_tokens) == ("context", n_new)
        slid = model.generate("x" * n_prompt, max_new_tokens=99, context_overflow="slide", seed=1)
        assert slid.token_ids[:n_new] == made.token_ids
        assert (slid.finish_reason, slid.new_tokens) == ("length", 99)
    batch = model.generate(
        ["x" * (window + 1), "x"], max_new_tokens=5, context_overflow="stop", seed=1
    )
    assert [made.finish_reason for made in batch] == ["context", "length"]
    assert batch[1].new_tokens == 5


def test_penalties_reach_the_sampler(model):
    options = {"max_new_tokens": 60, "temperature": 0}
    plain = model.generate("aaaa", **options).token_ids
    assert len(set(plain)) < len(plain)  # greedy text of a small model repeats itself
    once = model.generate("aaaa", presence_penalty=1e6, **options).token_ids
    assert len(set(once)) == len(once)
    banned = model.generate("aaaa", repetition_penalty=1e9, **options).token_ids
    assert len(set(banned)) >= len(set(plain))
    counted = model.generate("aaaa", frequency_penalty=1e6, **options).token_ids
    assert counted == once


def test_generation_has_the_fields_of_the_json(model):
    made = model.generate(HELLO, max_new_tokens=5, seed=1)
    assert isinstance(made, Generation)
    assert list(made.to_dict()) == [
        "prompt",
        "text",
        "token_ids",
        "finish_reason",
        "prompt_tokens",
        "new_tokens",
        "time_to_first_token_s",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "provider",
        "threads",
        "seed",
        "drafted_tokens",
        "accepted_tokens",
    ]
    assert (made.provider, made.threads, made.prompt_tokens) == ("cpu", 1, len(HELLO))
    assert all(type(i) is int for i in made.token_ids)
    assert made.time_to_first_token_s > 0
    assert made.prefill_tokens_per_second > 0
    assert made.decode_tokens_per_second > 0
    nothing = model.generate(HELLO, max_new_tokens=0)
    assert nothing.decode_tokens_per_second == nothing.prefill_tokens_per_second == 0
    assert model.generate([], max_new_tokens=5) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"logit_bias": {"a": 10**400}}, "logit_bias of 'a' is 1000"),
        ({"banned_tokens": 5.0}, "banned_tokens: 5.0"),
        ({"stop": 5}, "stop is 5: expected a text, or a list"),
        ({"cancel": 5}, "cancel is 5: expected a function"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"stop": ""}, "stop is"),
        ({"stop": ["a", ""]}, "stop is"),
        ({"stop": [1]}, "stop is"),
        ({"context_overflow": "wrap"}, "context_overflow is 'wrap'"),
    ],
)
def test_bad_arguments_are_refused_before_any_work_and_the_model_goes_on(model, options, message):
    with pytest.raises(UsageError, match=message):
        model.generate(HELLO, **options)
    with pytest.raises(UsageError, match=message):
        model.stream(HELLO, **options)
    assert model.generate(HELLO, max_new_tokens=1, seed=1).new_tokens == 1


def test_prompts_that_are_not_text_and_unknown_options_are_refused(model):
    with pytest.raises(UsageError, match="prompt is a bytes"):
        model.generate([b"x"])
    for prompt in (None, b"x", 5, {"x"}):
        with pytest.raises(UsageError, match=r"prompt is a \w+: expected text, or a list of texts"):
            model.generate(prompt)
    with pytest.raises(UsageError, match="stop holds None"):
        model.generate(["a", "b"], stop=[["a"], None])
    with pytest.raises(UsageError, match="seed is -1"):
        model.generate([], seed=-1)
    with pytest.raises(TypeError, match="temprature"):
        model.generate("x", temprature=1)


def test_leaving_a_stream_cancels_and_the_model_goes_on(model):
    whole = model.generate(HELLO, max_new_tokens=20, seed=4)
    stream = model.stream(HELLO, max_new_tokens=20, seed=4)
    first = next(stream)
    with pytest.raises(ValueError, match="has not ended"):
        _ = stream.result
    stream.close()
    assert next(stream, None) is None
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.text == first
    assert whole.token_ids[: stream.result.new_tokens] == stream.result.token_ids
    assert model.generate(HELLO, max_new_tokens=20, seed=4).text == whole.text


def test_cancel_ends_after_the_current_token(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "n_vocab", 256)
    asked = itertools.count(1)
    batch = model.generate(["a", "b"], max_new_tokens=20, seed=4, cancel=lambda: next(asked) == 3)
    assert [(made.finish_reason, made.new_tokens) for made in batch] == [("cancelled", 3)] * 2
    stream = model.stream("a", max_new_tokens=20, seed=4, cancel=lambda: True)
    list(stream)
    assert (stream.result.finish_reason, stream.result.new_tokens) == ("cancelled", 1)


def test_a_stream_that_is_left_frees_its_cache_at_once(model, monkeypatch):
    caches = weakref.WeakSet()
    new_cache = model.session.new_cache

    def noted(*arguments):
        cache = new_cache(*arguments)
        caches.add(cache)
        return cache

    monkeypatch.setattr(model.session, "new_cache", noted)
    gc.disable()
    try:
        for _ in range(3):
            for _ in model.stream(HELLO, max_new_tokens=20, seed=4):
                break
            assert len(caches) == 0
    finally:
        gc.enable()


def test_what_was_held_back_is_part_of_a_text_that_is_cancelled(scripted):
    a, first_byte = ord("a"), 0xE2
    for ids, text in (((a, a), "aa"), ((a, first_byte), "a\ufffd")):
        model = scripted(*ids)
        asked = itertools.count(1)
        stream = model.stream("x", stop=["aab"], seed=1, cancel=lambda n=asked: next(n) == 2)
        assert "".join(stream) == text
        assert (stream.result.text, stream.result.token_ids) == (text, list(ids))
    stream = scripted(a).stream("x", stop=["aab"], seed=1)
    assert next(stream) == "a"
    stream.close()
    assert stream.result.text == "aaa"


def test_several_streams_of_one_model_do_not_disturb_each_other(model):
    prompts = ["a", HELLO, "zz"]
    alone = [model.generate(p, max_new_tokens=30, seed=6).text for p in prompts]
    streams = [model.stream(p, max_new_tokens=30, seed=6) for p in prompts]
    texts = ["", "", ""]
    for pieces in itertools.zip_longest(*streams, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == alone


def with_nan(path, out):
    """The file with a NaN in its token table, the only tensor of that length."""
    data = bytearray(path.read_bytes())
    config = Model(path, provider="cpu", threads=1).config
    length, prefix = 4 * config.vocab_size * config.n_embd, bytearray(b"\x4a")  # raw_data
    while length > 127:
        prefix.append(length & 127 | 128)
        length >>= 7
    at = data.index(bytes([*prefix, length])) + len(prefix) + 1
    data[at : at + 4] = np.float32(np.nan).tobytes()
    out.write_bytes(data)
    return out


def test_nan_logits_are_an_error_and_not_a_text(tmp_path):
    damaged = Model(with_nan(DATA / "tiny_fp32.onnx", tmp_path / "nan.onnx"), "cpu", 1)
    for temperature in (0.0, 0.8):
        with pytest.raises(PicoEdgeError, match="largest logit is nan") as caught:
            damaged.generate(HELLO, temperature=temperature)
        assert caught.value.exit_code == 1


@pytest.mark.parametrize("bad", [rb'"top_k":\g<1>-5', rb'"top_q":\g<1>50'])
def test_sampling_defaults_of_a_file_that_make_no_sense_are_refused(tmp_path, bad):
    data, n = re.subn(rb'"top_k":( ?)50', bad, (DATA / "tiny_fp32.onnx").read_bytes())
    assert n == 1
    path = tmp_path / "bad.onnx"
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match="sampling"):
        Model(path, "cpu", 1)


def test_the_line_of_the_readme_works_in_a_fresh_process():
    line = (
        "from pico_edge.runtime import Model; "
        "print(Model('tiny.onnx').generate('Hello', max_new_tokens=20, seed=1).text)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", line],
        cwd=DATA,
        env={**os.environ, "PICO_EDGE_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    model = Model(DATA / "tiny.onnx", threads=1)
    expected = model.generate("Hello", max_new_tokens=20, seed=1).text
    assert done.stdout.decode().replace("\r\n", "\n") == expected + "\n"
