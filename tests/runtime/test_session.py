"""Every way through the cache gives the logits of one call; nothing moves to another provider."""

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.testing import assert_allclose

from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.runtime import session as session_module
from pico_edge.runtime.installed import install_advice, onnxruntime_distributions
from pico_edge.runtime.portable import PortableCache
from pico_edge.runtime.session import (
    Session,
    choose_provider,
)

DATA = Path(__file__).parents[1] / "data"
# Of the largest logit. fp32 sums differ in order only; int8 kernels also round activations, and
# where such a difference moves one of them over the edge of a step, the logits move by up to 5e-3
# of it.
TOLERANCE = {"tiny_fp32.onnx": 1e-5, "tiny.onnx": 1e-2, "tiny_int4.onnx": 1e-2}


@pytest.fixture(scope="module", params=sorted(TOLERANCE))
def model(request):
    return Session(DATA / request.param, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def fp32():
    return Session(DATA / "tiny_fp32.onnx", provider="cpu", threads=1)


@pytest.fixture(scope="module")
def text(model):
    """Ids that fill the context, and the logits of all positions by one call."""
    block_size = model.config.block_size
    ids = np.random.default_rng(0).integers(0, model.tokenizer.n_vocab, block_size).tolist()
    return ids, model.new_cache().append(0, ids, all_logits=True)


def close(model, got, expected):
    scale = max(1.0, float(np.abs(expected).max()))
    assert_allclose(got, expected, rtol=0, atol=TOLERANCE[model.path.name] * scale)


def test_session_says_what_it_is(model):
    assert model.provider == "cpu"
    assert model.threads == 1
    assert model.notices == []
    assert model.export["target"] == "cpu"
    assert model.tokenizer.n_vocab <= model.config.vocab_size
    is_float = model.export["precision"] == "fp32"
    assert model.cache_dtype == (np.float32 if is_float else np.int8)
    assert model.sampling["max_new_tokens"] > 0


def test_prefill_of_every_length_matches_one_call(model, text):
    ids, expected = text
    cache = model.new_cache()
    for length in range(1, len(ids) + 1):
        cache.reset()
        logits = cache.prefill([ids[:length]])
        assert logits.shape == (1, model.config.vocab_size)
        assert cache.lengths == [length]
        close(model, logits[0], expected[length - 1])


def test_decode_at_every_length_matches_one_call(model, text):
    ids, expected = text
    cache = model.new_cache()
    for position, token_id in enumerate(ids):
        close(model, cache.decode([token_id])[0], expected[position])
    assert cache.lengths == [len(ids)]


def test_a_chunk_at_every_length_matches_one_call(model, text):
    ids, expected = text
    cache = model.new_cache()
    for past in range(len(ids)):
        cache.reset()
        if past:
            cache.append(0, ids[:past])
        rest = ids[past : past + 7]
        got = cache.append(0, rest, all_logits=True)
        close(model, got, expected[past : past + len(rest)])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 63])
def test_chunks_of_one_size_match_one_call(model, text, size):
    ids, expected = text
    cache = model.new_cache()
    chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
    got = [cache.append(0, chunk, all_logits=True) for chunk in chunks]
    close(model, np.concatenate(got), expected)


def test_append_without_all_logits_gives_those_of_the_last_token(model, text):
    ids, expected = text
    cache = model.new_cache()
    close(model, cache.append(0, ids[:9]), expected[8:9])
    close(model, cache.append(0, ids[9:20]), expected[19:20])


def test_rows_of_a_batch_are_those_of_single_runs(model, text):
    """Ragged prefill, steps, chunks on one row, a row cut to nothing: each row stays its own."""
    ids, expected = text
    lengths = [5, 17, 1]
    cache = model.new_cache(3)
    close(model, cache.prefill([ids[:n] for n in lengths]), expected[[n - 1 for n in lengths]])
    for _ in range(3):
        close(model, cache.decode([ids[n] for n in lengths]), expected[lengths])
        lengths = [n + 1 for n in lengths]
    close(model, cache.append(2, ids[4:13], all_logits=True), expected[4:13])
    lengths[2] = 13
    cache.truncate(0, 3)
    cache.truncate(1, 0)
    lengths[:2] = [3, 0]
    assert cache.lengths == lengths
    for _ in range(len(ids) - max(lengths)):
        close(model, cache.decode([ids[n] for n in lengths]), expected[lengths])
        lengths = [n + 1 for n in lengths]
    assert cache.lengths == lengths


def test_replay_where_chunks_cannot_be_appended_gives_the_same(model, text):
    """DirectML's way, run on the CPU: all tokens again from position 0."""
    ids, expected = text
    model.appends = False
    try:
        for batch in (1, 3):
            cache = model.new_cache(batch)
            row = batch - 1
            close(model, cache.append(row, ids[:4], all_logits=True), expected[:4])
            close(model, cache.decode([ids[4]] * batch)[row], expected[4])
            cache.truncate(row, 3)
            close(model, cache.append(row, ids[3:11], all_logits=True), expected[3:11])
            close(model, cache.append(row, ids[11:12]), expected[11:12])
            close(model, cache.decode([ids[12]] * batch)[row], expected[12])
            assert cache.lengths[row] == 13
            cache.reset()
            rows = [ids[: 2 + i] for i in range(batch)]
            cache.prefill(rows)
            close(model, cache.append(0, ids[2:8]), expected[7:8])
            follow = [ids[8], ids[3], ids[4]][:batch]
            close(model, cache.decode(follow), expected[[8, 3, 4][:batch]])
        assert cache.keep_rows([0, 2]) == [0, 1]
        cache.truncate(0, 4)
        close(model, cache.append(0, ids[4:7]), expected[6:7])
        close(model, cache.append(1, ids[5:9]), expected[8:9])
    finally:
        model.appends = True


def test_caches_of_one_session_do_not_touch_each_other(model, text):
    ids, expected = text
    one, other = model.new_cache(), model.new_cache(2, capacity=8)
    for position in range(8):
        close(model, one.decode([ids[position]])[0], expected[position])
        close(model, other.decode([ids[position], 0])[0], expected[position])


def test_decode_logits_are_one_array_and_prefill_logits_the_callers(fp32):
    cache = fp32.new_cache()
    first = cache.prefill([[1, 2, 3]])
    kept = first.copy()
    step = cache.decode([4])
    assert cache.decode([5]) is step
    assert (first == kept).all()


def test_a_full_row_refuses_more(fp32):
    cache = fp32.new_cache(2, capacity=4)
    cache.prefill([[1, 2, 3, 4], [1]])
    before = list(cache.lengths)
    with pytest.raises(ValueError, match="the cache holds 4"):
        cache.decode([1, 1])
    with pytest.raises(ValueError, match="the cache holds 4"):
        cache.append(1, [1, 2, 3, 4])
    assert cache.lengths == before
    cache.append(1, [1, 2, 3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.prefill([[1]]), "1 rows: the cache has 2"),
        (lambda c: c.prefill([[1], []]), "row 1 has 0 tokens"),
        (lambda c: c.prefill([[1], [2] * 9]), "row 1 has 9 tokens"),
        (lambda c: c.prefill([[1], [-1]]), "token ids -1 to 1"),
        (lambda c: c.prefill([[1], [10**6]]), "token ids"),
        (lambda c: c.append(2, [1]), "row 2"),
        (lambda c: c.append(0, []), "0 tokens"),
        (lambda c: c.truncate(0, 1), "row 0 holds 0 tokens"),
    ],
)
def test_wrong_calls_say_what_they_are_and_change_nothing(fp32, call, message):
    cache = fp32.new_cache(2, capacity=8)
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert cache.lengths == [0, 0]


def test_prefill_needs_an_empty_cache(fp32):
    cache = fp32.new_cache()
    cache.prefill([[1]])
    with pytest.raises(ValueError, match="empty cache"):
        cache.prefill([[1]])


@pytest.mark.parametrize("arguments", [{"batch": 0}, {"capacity": 0}, {"capacity": 10**6}])
def test_a_cache_of_an_impossible_size_is_refused(fp32, arguments):
    with pytest.raises(UsageError, match=f"{next(iter(arguments))} is .*expected"):
        fp32.new_cache(**arguments)


def test_a_file_that_is_not_there_or_not_a_model_is_refused(tmp_path):
    with pytest.raises((ArtefactError, FileNotFoundError)):
        Session(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ArtefactError):
        Session(tmp_path / "text.onnx")


def test_a_foreign_file_loads_only_when_allowed_and_has_no_cache(tmp_path):
    path = tmp_path / "foreign.onnx"
    path.write_bytes((DATA / "tiny.onnx").read_bytes().replace(b"pico_edge.", b"who_knows."))
    with pytest.raises(ArtefactError):
        Session(path, provider="cpu", threads=1)
    foreign = Session(path, provider="cpu", threads=1, allow_foreign=True)
    assert (foreign.metadata, foreign.provider) == ({}, "cpu")
    for ask in (lambda: foreign.config, foreign.new_cache, lambda: foreign.tokenizer):
        with pytest.raises(ArtefactError, match="not a file of pico-edge"):
            ask()


def test_a_file_for_a_target_of_the_future_is_refused(tmp_path):
    data, n = re.subn(rb'("target": ?)"cpu"', rb'\1"npu"', (DATA / "tiny.onnx").read_bytes())
    assert n == 1
    path = tmp_path / "npu.onnx"
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match="'npu'"):
        Session(path)


CPU, CUDA, DML, WEBGPU = (
    session_module.ORT_PROVIDERS[name] for name in ("cpu", "cuda", "directml", "webgpu")
)


@pytest.mark.parametrize(
    ("wanted", "target", "available", "chosen", "notices"),
    [
        ("auto", "cpu", [CPU], "cpu", 0),
        ("auto", "cpu", [CUDA, CPU], "cpu", 0),
        ("auto", "cuda", [CUDA, CPU], "cuda", 0),
        ("auto", "cuda", [CPU], "cpu", 1),
        ("auto", "directml", [DML, CPU], "directml", 0),
        ("auto", "directml", [CUDA, CPU], "cpu", 1),
        ("auto", "web", [CPU], "cpu", 0),
        ("auto", "portable", [CUDA, CPU], "cpu", 0),
        ("cpu", "cpu", [CPU], "cpu", 0),
        ("cpu", "web", [CPU], "cpu", 0),
        ("cpu", "portable", [CPU], "cpu", 0),
        ("cpu", "directml", [DML, CPU], "cpu", 0),
        ("cpu", "cuda", [CUDA, CPU], "cpu", 0),
        ("cuda", "cuda", [CUDA, CPU], "cuda", 0),
        ("directml", "directml", [DML, CPU], "directml", 0),
        ("auto", "cpu", [CPU, WEBGPU], "cpu", 0),
        ("auto", "directml", [CPU, WEBGPU], "cpu", 1),
        ("webgpu", "cpu", [CPU, WEBGPU], "webgpu", 1),
        ("webgpu", "directml", [CPU, WEBGPU], "webgpu", 1),
    ],
)
def test_provider_choice(wanted, target, available, chosen, notices):
    provider, said = choose_provider(wanted, target, available)
    assert (provider, len(said)) == (chosen, notices)
    expected = "experimental" if wanted == "webgpu" else "running on cpu"
    assert all(expected in notice for notice in said)


@pytest.mark.parametrize(
    ("wanted", "target", "available", "parts"),
    [
        ("cuda", "cpu", [CUDA, CPU], ["made for cpu", "export ckpt.pt --target cuda"]),
        ("cuda", "cpu", [CPU], ["not in this onnxruntime", "onnxruntime-gpu", "--target cuda"]),
        ("cuda", "cuda", [CPU], ["not in this onnxruntime", "which has cpu", "onnxruntime-gpu"]),
        ("cuda", "directml", [CUDA, CPU], ["made for directml", "export ckpt.pt --target cuda"]),
        ("cuda", "portable", [CUDA, CPU], ["made for portable", "export ckpt.pt --target cuda"]),
        ("cuda", "web", [CUDA, CPU], ["made for web", "export ckpt.pt --target cuda"]),
        ("directml", "cuda", [DML, CPU], ["made for cuda", "export ckpt.pt --target directml"]),
        ("directml", "cpu", [DML, CPU], ["made for cpu", "export ckpt.pt --target directml"]),
        ("directml", "directml", [CPU], ["pip install onnxruntime-directml"]),
        ("webgpu", "cpu", [CPU], ["not in this onnxruntime", "pip install onnxruntime-ep-webgpu"]),
        ("webgpu", "cuda", [CPU, WEBGPU], ["made for cuda", "export ckpt.pt --target directml"]),
        ("webgpu", "web", [CPU, WEBGPU], ["made for web", "export ckpt.pt --target directml"]),
        ("webgpu", "portable", [CPU, WEBGPU], ["made for portable", "--target directml"]),
    ],
)
def test_a_named_provider_that_cannot_run_is_an_error_with_its_cure(
    wanted, target, available, parts
):
    with pytest.raises(PicoEdgeError) as caught:
        choose_provider(wanted, target, available)
    assert caught.value.exit_code == 1
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_unknown_providers_and_targets_are_refused():
    with pytest.raises(UsageError, match="provider is 'tpu': expected auto, cpu, cuda, directml"):
        choose_provider("tpu", "cpu", [CPU])
    with pytest.raises(ArtefactError, match="target 'tpu'"):
        choose_provider("auto", "tpu", [CPU])


@pytest.mark.skipif(CUDA in session_module.ort.get_available_providers(), reason="has CUDA")
def test_a_session_never_moves_to_another_provider(monkeypatch):
    with pytest.raises(PicoEdgeError, match="provider cuda is not in this onnxruntime"):
        Session(DATA / "tiny.onnx", provider="cuda")
    monkeypatch.setenv("PICO_EDGE_PROVIDER", "cuda")
    with pytest.raises(PicoEdgeError, match="provider cuda is not in this onnxruntime"):
        Session(DATA / "tiny.onnx")
    assert Session(DATA / "tiny.onnx", provider="cpu", threads=1).provider == "cpu"


def test_a_plugin_that_is_not_installed_is_named_with_the_cure():
    code = (
        "import sys; sys.modules['onnxruntime_ep_webgpu'] = None\n"
        "from pico_edge.cli import main; main(sys.argv[1:])"
    )
    command = ["generate", DATA / "tiny_fp32.onnx", "x", "--provider", "webgpu"]
    ran = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(
        "error: provider webgpu is not in this onnxruntime .*: pip install onnxruntime-ep-webgpu\n",
        ran.stderr,
    )


def test_two_distributions_of_onnxruntime_are_named_with_the_cure(tmp_path, monkeypatch):
    for name in ("onnxruntime", "onnxruntime_gpu"):
        folder = tmp_path / f"{name}-9.9.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert onnxruntime_distributions() == ["onnxruntime", "onnxruntime-gpu"]
    advice = install_advice("cuda")
    assert "onnxruntime and onnxruntime-gpu are installed over each other" in advice
    assert advice.endswith("then pip install onnxruntime-gpu")


def test_a_portable_graph_that_breaks_its_promise_is_refused_not_misread():
    config = GPTConfig(block_size=8, vocab_size=272, n_layer=1, n_head=2, n_embd=16)
    present = np.zeros((1, 2, 3, 8), np.float32)
    for logits, key in (
        (np.zeros(272, np.float32), present),
        (np.zeros((1, 3, 272), np.float32), present[:, :, :2]),
    ):
        answer = [logits, key, present]
        cache = PortableCache(lambda inputs, a=answer: a, config, 1, 8, np.dtype(np.float32))
        with pytest.raises(ArtefactError, match="export it again"):
            cache.prefill([[1, 2, 3]])


def test_what_fails_while_it_runs_is_one_error_that_names_the_file(tmp_path):
    """A scale too few for the int8 cache, which onnxruntime notices at the first call."""
    broken = onnx.load(DATA / "tiny.onnx")
    (scales,) = [t for t in broken.graph.initializer if t.name == "cache.0.key.scales"]
    shorter = onnx.numpy_helper.to_array(scales)[:-1]
    scales.CopyFrom(onnx.numpy_helper.from_array(shorter, scales.name))
    onnx.save(broken, tmp_path / "broken.onnx")
    cache = Session(tmp_path / "broken.onnx", threads=1).new_cache()
    with pytest.raises(
        PicoEdgeError, match=r"broken\.onnx: onnxruntime .* failed on cpu"
    ) as caught:
        cache.prefill([[1, 2, 3]])
    assert str(caught.value).endswith("pico-edge verify")


class Turns:
    """A lock that counts who is inside, and how often somebody was."""

    def __init__(self):
        self.lock, self.inside, self.most, self.taken = threading.Lock(), 0, 0, 0

    def __enter__(self):
        self.lock.acquire()
        self.inside += 1
        self.most, self.taken = max(self.most, self.inside), self.taken + 1

    def __exit__(self, *exception):
        self.inside -= 1
        self.lock.release()


def test_calls_of_several_threads_come_one_at_a_time_where_the_provider_wants_it():
    session = Session(DATA / "tiny.onnx", threads=1)
    assert session.one_at_a_time is None  # the CPU does not mind
    session.one_at_a_time = turns = Turns()

    def work(seed):
        cache = session.new_cache()
        cache.prefill([[seed]])
        for token in range(20):
            cache.decode([token])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert (turns.taken, turns.most) == (4 * 21, 1)


def test_what_onnxruntime_quotes_need_not_be_text(tmp_path):
    """Its own message cannot be decoded then; the file is refused all the same."""
    data = (DATA / "tiny_fp32.onnx").read_bytes()
    path = tmp_path / "model.onnx"
    proto = onnx.load_from_string(data)
    attention = next(n for n in proto.graph.node if n.op_type == "GroupQueryAttention")
    attention.attribute.append(onnx.helper.make_attribute("k_quant_type", "PER_CHANNEL"))
    path.write_bytes(proto.SerializeToString().replace(b"PER_CHANNEL", b"PER\xf8CHANNEL"))
    with pytest.raises(ArtefactError, match="cannot load it"):
        Session(path, provider="cpu", threads=1)
