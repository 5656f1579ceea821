"""What people embed: threads, batches of unequal prompts, cancelling, information, re-use."""

import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

from pico_edge import artefact
from pico_edge.errors import PicoEdgeError, UsageError
from pico_edge.runtime import Model

DATA = Path(__file__).parents[1] / "data"
HELLO = "Hello, world"
PROMPTS = ["", "a", HELLO, "The import statement ", "x" * 63, "y" * 200]
FILES = ("tiny.onnx", "tiny_fp32.onnx", "tiny_int4.onnx")


@pytest.fixture(scope="module", params=FILES)
def model(request):
    return Model(DATA / request.param, "cpu", 1)


@pytest.fixture(scope="module")
def fp32():
    return Model(DATA / "tiny_fp32.onnx", "cpu", 1)


def test_rows_of_unequal_prompts_say_what_they_say_alone(model, same_but_for_near_ties):
    """Each with its own seed, stop and length, so that rows leave the batch at all times."""
    seeds, lengths = [5, 6, 7, 8, 9, 10], [40, 3, 90, 0, 25, 70]
    stops = [["e"], [], ["zz", "th"], [], ["y"], "q"]
    batch = model.generate(PROMPTS, seed=seeds, max_new_tokens=lengths, stop=stops)
    assert [made.seed for made in batch] == seeds
    for made, seed, n, stop in zip(batch, seeds, lengths, stops, strict=True):
        same_but_for_near_ties(model, made, seed=seed, max_new_tokens=n, stop=stop)
    lengths = [1, 2, 30, 70, 100, 7]
    batch = model.generate(PROMPTS, temperature=0, max_new_tokens=lengths)
    for made, n in zip(batch, lengths, strict=True):
        same_but_for_near_ties(model, made, temperature=0, max_new_tokens=n)


def test_one_value_is_for_all_prompts(fp32):
    one = fp32.generate(["a", "b"], seed=3, max_new_tokens=8, stop=["e", "t"])
    lists = fp32.generate(["a", "b"], seed=3, max_new_tokens=[8, 8], stop=[["e", "t"], ("t", "e")])
    assert [made.text for made in one] == [made.text for made in lists]
    equal = fp32.generate(["a", "a"], seed=[3, 3], max_new_tokens=8)
    assert equal[0].text == equal[1].text == fp32.generate("a", seed=3, max_new_tokens=8).text
    assert fp32.generate([], seed=[], max_new_tokens=[], stop=[]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": [1]}, "seed has 1 values for 2 prompts"),
        ({"seed": [1, -1]}, "seed is -1"),
        ({"max_new_tokens": [1, 2, 3]}, "max_new_tokens has 3 values for 2 prompts"),
        ({"max_new_tokens": [1, None]}, "max_new_tokens is None"),
        ({"stop": [["a"]]}, "stop has 1 entries for 2 prompts"),
        ({"stop": [["a"], [""]]}, r"stop is \(''"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"typical_p": 0}, "typical_p is 0"),
    ],
)
def test_lists_that_do_not_fit_the_prompts_are_refused(fp32, options, message):
    with pytest.raises(UsageError, match=message):
        fp32.generate(["a", "b"], **options)
    if "values" in message:
        with pytest.raises(UsageError, match="prompts"):
            fp32.generate("a", **{name: [*v, 1, 1] for name, v in options.items()})


def test_threads_share_a_model_and_say_what_they_say_alone(model):
    """More generations than cores, single, streamed and in batches, all at once."""
    jobs = [(prompt, seed) for seed in range(4) for prompt in PROMPTS[:4]]
    expected = [model.generate(p, max_new_tokens=30, seed=seed).text for p, seed in jobs]
    start = threading.Barrier(8)

    def work(number):
        start.wait()
        texts = []
        for prompt, seed in jobs[number:] + jobs[:number]:
            if (number + seed) % 2:
                texts.append("".join(model.stream(prompt, max_new_tokens=30, seed=seed)))
            else:
                made = model.generate([prompt], max_new_tokens=30, seed=seed)
                texts.append(made[0].text)
        return texts[len(jobs) - number :] + texts[: len(jobs) - number]

    with ThreadPoolExecutor(8) as pool:
        for texts in pool.map(work, range(8)):
            assert texts == expected


def test_threads_share_a_model_that_reuses_prefixes():
    model = Model(DATA / "tiny_fp32.onnx", "cpu", 1, reuse_prefix=True)
    plain = Model(DATA / "tiny_fp32.onnx", "cpu", 1)
    jobs = [(HELLO[:n], n) for n in range(1, len(HELLO))]
    expected = [plain.generate(p, max_new_tokens=15, seed=seed).text for p, seed in jobs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            texts = pool.map(
                lambda j: model.generate(j[0], max_new_tokens=15, seed=j[1]).text, jobs
            )
            assert list(texts) == expected


def test_a_stream_can_be_cancelled_from_another_thread(fp32):
    stream = fp32.stream(HELLO, max_new_tokens=10**9, min_new_tokens=10**9, seed=1)
    canceller = threading.Timer(0.05, stream.cancel)
    canceller.start()
    text = "".join(stream)
    canceller.join()
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.text == text
    alone = fp32.generate(HELLO, max_new_tokens=50, min_new_tokens=50, seed=1)
    assert text[:40] == alone.text[:40]


def test_cancelling_before_and_after_the_end(fp32):
    stream = fp32.stream(HELLO, max_new_tokens=5, seed=1)
    stream.cancel()
    assert list(stream) == []
    assert (stream.result.finish_reason, stream.result.new_tokens) == ("cancelled", 0)
    stream = fp32.stream(HELLO, max_new_tokens=5, seed=1, cancel=lambda: False)
    text = "".join(stream)
    stream.cancel()
    stream.close()
    assert (stream.result.finish_reason, stream.result.text) == ("length", text)
    stream = fp32.stream(HELLO, max_new_tokens=50, min_new_tokens=50, seed=1)
    first = next(stream)
    stream.cancel()  # between two tokens: no other is made
    assert list(stream) == []
    assert (stream.result.text, stream.result.finish_reason) == (first, "cancelled")


def test_a_model_goes_on_after_an_error_in_the_middle(fp32):
    expected = fp32.generate(HELLO, max_new_tokens=20, seed=1).text
    with pytest.raises(PicoEdgeError, match="after 3 tokens every token is banned"):
        fp32.generate(
            HELLO,
            seed=1,
            banned_tokens=[i for i in range(257) if i not in (97, 98, 99)],
            no_repeat_ngram_size=1,
        )
    with pytest.raises(ZeroDivisionError):
        fp32.generate([HELLO, "a"], seed=1, min_new_tokens=9, cancel=lambda: 1 // 0)
    assert fp32.generate(HELLO, max_new_tokens=20, seed=1).text == expected


def test_what_the_file_says_of_itself(model):
    info = model.info
    assert info["config"] == model.config.to_dict()
    assert info["file"] == str(model.session.path)
    assert info["bytes"] == model.session.path.stat().st_size
    assert (info["provider"], info["threads"]) == ("cpu", 1)
    assert {"format_version", "tokenizer", "sampling", "export", "provenance", "parity"} <= set(
        info
    )
    info["config"]["n_layer"] = 99  # a copy
    assert model.info["config"]["n_layer"] == model.config.n_layer


def test_files_without_the_newer_sampling_settings_have_their_defaults(tmp_path):
    older = onnx.load(DATA / "tiny.onnx")
    for entry in older.metadata_props:
        if entry.key == artefact.SAMPLING_KEY:
            values = json.loads(entry.value)
            for name in ("typical_p", "min_new_tokens", "no_repeat_ngram_size"):
                del values[name]
            entry.value = json.dumps(values)
    onnx.save(older, tmp_path / "older.onnx")
    model = Model(tmp_path / "older.onnx", threads=1)
    assert "typical_p" not in model.session.sampling
    assert model.sampling.typical_p == 1
    assert model.sampling.min_new_tokens == model.sampling.no_repeat_ngram_size == 0


def test_neither_a_stop_nor_an_end_comes_before_the_least_length(fp32):
    plain = fp32.generate("a", max_new_tokens=40, seed=2, stop=" ")
    assert plain.finish_reason == "stop"
    for least in (1, plain.new_tokens, plain.new_tokens + 1, 30):
        made = fp32.generate("a", max_new_tokens=40, seed=2, stop=" ", min_new_tokens=least)
        assert made.new_tokens >= least
        assert (made.text == plain.text) == (least <= plain.new_tokens)
        pieces = "".join(
            fp32.stream("a", max_new_tokens=40, seed=2, stop=" ", min_new_tokens=least)
        )
        assert pieces == made.text
    end = {"<|endoftext|>": 50.0}
    assert fp32.generate("a", seed=1, logit_bias=end).finish_reason == "eos"
    made = fp32.generate("a", seed=1, logit_bias=end, min_new_tokens=7)
    assert (made.new_tokens, made.finish_reason) == (7, "eos")
    made = fp32.generate("a", seed=1, logit_bias=end, min_new_tokens=7, max_new_tokens=3)
    assert (made.new_tokens, made.finish_reason) == (3, "length")


def test_biases_bans_and_ngrams_reach_the_text(fp32):
    options = {"max_new_tokens": 60, "min_new_tokens": 60, "seed": 1}
    assert set(fp32.generate("a", logit_bias={"z": 100.0}, **options).text) == {"z"}
    assert "t" in fp32.generate("a", **options).text
    assert "t" not in fp32.generate("a", banned_tokens=["t"], **options).text
    ids = [97, *fp32.generate("a", no_repeat_ngram_size=2, temperature=0, **options).token_ids]
    pairs = list(itertools.pairwise(ids))
    assert len(set(pairs)) == len(pairs)


def test_rows_leave_a_cache_and_the_others_stay(fp32):
    session = fp32.session
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 257, n).tolist() for n in (3, 20, 7, 11)]
    cache, whole = session.new_cache(4), session.new_cache(4)
    cache.prefill(rows)
    whole.prefill(rows)
    for kept in ([0, 1, 3], [0, 1, 2], [1, 2], [0]):
        assert cache.keep_rows(kept) == list(range(len(kept)))
        rows = [rows[row] for row in kept]
        token_ids = rng.integers(0, 257, len(kept)).tolist()
        logits = cache.decode(token_ids)
        for row, token_id in zip(rows, token_ids, strict=True):
            row.append(token_id)
        assert cache.lengths == [len(row) for row in rows]
        expected = np.concatenate([session.new_cache().prefill([row]) for row in rows])
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
        more = cache.append(len(rows) - 1, [1, 2])
        rows[-1] += [1, 2]
        np.testing.assert_allclose(more, session.new_cache().prefill([rows[-1]]), rtol=0, atol=1e-4)
    for bad in ([], [1], [-1], [0, 0]):
        with pytest.raises(ValueError, match="rows"):
            cache.keep_rows(bad)
