"""The provider webgpu says what the CPU says, on whatever adapter is here, a software one too.

Collected only where its plugin is installed (see conftest.py). A software adapter: libvulkan1, and
Chromium's SwiftShader named by VK_ICD_FILENAMES.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.testing import assert_allclose
from onnx import TensorProto, helper

from pico_edge.errors import PicoEdgeError, UsageError
from pico_edge.runtime import Model
from pico_edge.runtime.bench import measure
from pico_edge.runtime.session import Session
from pico_edge.runtime.verify import verify

DATA = Path(__file__).parents[1] / "data"
FILE = DATA / "tiny_fp32.onnx"
TOLERANCE = 1e-5  # of the largest logit
PROMPTS = ["The", "A prompt of more tokens than WebGPU is given in one call, to see the seams", "x"]


@pytest.fixture(scope="module")
def model():
    os.environ["ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"] = "1"  # read when the plugin is registered
    try:
        return Model(FILE, provider="webgpu")
    except PicoEdgeError as error:
        if "finds no GPU" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cpu():
    return Model(FILE, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def text(cpu):
    """Ids that fill the context, and the logits of all positions by one call on the CPU."""
    session = cpu.session
    ids = np.random.default_rng(0).integers(0, cpu.tokenizer.n_vocab, session.config.block_size)
    return ids.tolist(), session.new_cache().append(0, ids, all_logits=True)


def close(got, expected):
    assert_allclose(got, expected, rtol=0, atol=TOLERANCE * float(np.abs(expected).max()))


def test_it_says_that_it_is_experimental(model):
    assert model.info["provider"] == "webgpu"
    assert model.session.notices == ["provider webgpu is experimental"]


@pytest.mark.parametrize("size", [1, 2, 7, 31, 32, 33, 64])
def test_chunks_of_every_size_give_the_logits_of_the_cpu(model, text, size):
    ids, expected = text
    cache = model.session.new_cache()
    chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
    close(np.concatenate([cache.append(0, each, all_logits=True) for each in chunks]), expected)


@pytest.mark.parametrize("length", [1, 31, 32, 40, 63])
def test_prefill_then_steps_give_the_logits_of_the_cpu(model, text, length):
    ids, expected = text
    cache = model.session.new_cache()
    close(cache.prefill([ids[:length]])[0], expected[length - 1])
    for position in range(length, len(ids)):
        close(cache.decode([ids[position]])[0], expected[position])
    cache.truncate(0, 20)
    close(cache.decode([ids[20]])[0], expected[20])


@pytest.mark.parametrize("speculate", ["off", "on"])
def test_greedy_texts_are_those_of_the_cpu(model, cpu, speculate):
    """Twice the context: the window is refilled too."""
    for prompt in PROMPTS:
        options = {"temperature": 0, "max_new_tokens": 2 * cpu.config.block_size}
        found = model.generate(prompt, speculate=speculate, **options)
        assert found.token_ids == cpu.generate(prompt, **options).token_ids


def test_texts_made_at_once_are_those_made_alone(model, cpu):
    """Its queue takes one call at a time: without the lock, WebGPU refuses or mixes them."""
    prompts = PROMPTS * 2
    options = {"temperature": 0, "max_new_tokens": 30}
    with ThreadPoolExecutor(len(prompts)) as pool:
        made = pool.map(lambda prompt: model.generate(prompt, **options), prompts)
        found = [each.token_ids for each in made]
    assert found == [cpu.generate(prompt, **options).token_ids for prompt in prompts]


def test_wrong_calls_change_nothing(model):
    cache = model.session.new_cache(capacity=40)
    for call, message in (
        (lambda: cache.append(0, [1] * 41), "0 \\+ 41 tokens: the cache holds 40"),
        (lambda: cache.append(0, [1] * 39 + [10**6]), "token ids"),
        (lambda: cache.append(1, [1]), "row 1"),
        (lambda: cache.prefill([[1], [1]]), "2 rows: the cache has 1"),
        (lambda: cache.prefill([[]]), "0 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert cache.lengths == [0]
    cache.prefill([[1]])
    with pytest.raises(ValueError, match="empty cache"):
        cache.prefill([[1]])


def test_the_file_answers_as_it_did_at_export(model):
    report = verify(FILE, provider="webgpu")
    assert [check["name"] for check in report["checks"] if not check["ok"]] == []
    assert report["provider"] == "webgpu"


def test_bench_measures_it(model):
    found = measure(FILE, provider="webgpu", prompt_tokens=8, new_tokens=4, repeats=1)
    assert found["provider"] == "webgpu"
    assert found["decode_tokens_per_second"]["mean"] > 0


def test_a_batch_is_refused(model):
    with pytest.raises(UsageError, match="batch is 2: webgpu runs one text at a time"):
        model.generate(["a", "b"])


def test_an_int8_cache_is_refused(model):
    with pytest.raises(PicoEdgeError, match=r"int8 cache.*--target directml --quantize"):
        Session(DATA / "tiny.onnx", provider="webgpu")


def test_a_node_without_a_kernel_there_is_an_error(model, tmp_path):
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2])] for name in "ab"
    )
    node = helper.make_node("Det", ["a"], ["b"])
    outputs[0].type.tensor_type.shape.Clear()
    graph = helper.make_graph([node], "g", inputs, outputs)
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    Session(tmp_path / "m.onnx", provider="cpu", allow_foreign=True)
    with pytest.raises(PicoEdgeError, match=r"webgpu cannot run it.*fallback to CPU EP"):
        Session(tmp_path / "m.onnx", provider="webgpu", allow_foreign=True)


@pytest.mark.parametrize("software", ["0", "1"])
def test_no_adapter_is_one_line(software, tmp_path):
    """Twice, as a program may that goes on after an error."""
    code = (
        "import sys\n"
        "from pico_edge.errors import PicoEdgeError\n"
        "from pico_edge.runtime import Model\n"
        "for _ in range(2):\n"
        "    try: Model(sys.argv[1], provider='webgpu')\n"
        "    except PicoEdgeError as error: print(error)\n"
    )
    nowhere = {name: str(tmp_path / "no.json") for name in ("VK_ICD_FILENAMES", "VK_DRIVER_FILES")}
    environment = os.environ | nowhere | {"ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": software}
    ran = subprocess.run(
        [sys.executable, "-c", code, FILE], capture_output=True, text=True, env=environment
    )
    first, again = ran.stdout.splitlines()
    assert ran.returncode == 0
    assert first == again
    assert first.startswith("provider webgpu finds no GPU: install its driver")
