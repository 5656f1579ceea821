"""The file for the target `portable`, held to GPT-2 as others wrote it: numpy here, transformers
in the slow test, onnx's reference evaluator as another runtime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from pico_edge import artefact
from pico_edge.export.pipeline import export
from pico_edge.runtime import Model
from pico_edge.runtime.evaluate import evaluate
from pico_edge.runtime.portable import CHUNK_TOKENS
from pico_edge.runtime.session import Session
from pico_edge.train.model import GPT

Array = npt.NDArray[Any]
IDS = np.array(
    [[84, 104, 101, 32, 118, 97, 108, 117, 101], [105, 102, 32, 97, 58, 10, 32, 32, 120]]
)


@pytest.fixture(scope="module")
def fp32_file(checkpoint_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("portable") / "fp32.onnx"
    export(checkpoint_path, path, target="portable")
    return path


@pytest.fixture(scope="module")
def int8_file(checkpoint_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("portable") / "int8.onnx"
    export(checkpoint_path, path, target="portable", quantize=True)
    return path


def gpt2(weights: dict[str, Array], n_head: int, ids: Array) -> Array:
    """GPT-2 in numpy, float64, written from the paper and OpenAI's release: logits (T, V)."""

    def norm(x: Array, name: str) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Array, name: str) -> Array:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def attend(x: Array, name: str) -> Array:
        heads = []
        q, k, v = np.split(linear(x, f"{name}.c_attn"), 3, axis=-1)
        d = x.shape[1] // n_head
        for h in range(n_head):
            part = slice(h * d, (h + 1) * d)
            rows = []
            for t in range(len(x)):  # a token sees itself and those before it, nothing else
                score = k[: t + 1, part] @ q[t, part] / math.sqrt(d)
                p = np.exp(score - score.max())
                rows.append(p / p.sum() @ v[: t + 1, part])
            heads.append(np.stack(rows))
        return linear(np.concatenate(heads, -1), f"{name}.c_proj")

    def gelu(x: Array) -> Array:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    wte = weights["transformer.wte.weight"]
    x = wte[ids] + weights["transformer.wpe.weight"][: len(ids)]
    n_layer = sum(name.endswith("ln_1.weight") for name in weights)
    for i in range(n_layer):
        block = f"transformer.h.{i}"
        x = x + attend(norm(x, f"{block}.ln_1"), f"{block}.attn")
        h = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(gelu(h), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ wte.T


def numpy_logits(model: GPT, ids: Sequence[int] | Array) -> Array:
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    return gpt2(weights, model.config.n_head, np.asarray(ids))


def feeds(
    names: list[str], shapes: tuple[int, ...], ids: Array, **inputs: Array
) -> dict[str, Array]:
    """Inputs as Hugging Face names them, over an empty past."""
    B, S = ids.shape
    return {
        "input_ids": ids,
        "attention_mask": np.ones((B, S), np.int64),
        "position_ids": np.tile(np.arange(S), (B, 1)),
        **{name: np.zeros(shapes, np.float32) for name in names},
        **inputs,
    }


def test_names_and_operators_are_the_standard_ones(fp32_file: Path, int8_file: Path) -> None:
    for path in (fp32_file, int8_file):
        model = onnx.load(path)
        assert [entry.domain for entry in model.opset_import] == [""]
        assert {node.domain for node in model.graph.node} == {""}
        assert [value.name for value in model.graph.input] == [
            "input_ids",
            "attention_mask",
            "position_ids",
            *(f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")),
        ]
        assert [value.name for value in model.graph.output] == [
            "logits",
            *(f"present.{i}.{part}" for i in range(2) for part in ("key", "value")),
        ]


def test_onnxruntime_agrees_with_numpy_in_one_call_and_over_the_cache(
    fp32_file: Path, model: GPT
) -> None:
    run = Session(fp32_file, threads=1).ort.run
    names = artefact.past_names(2)
    shape = (2, model.config.n_head, 0, model.config.head_dim)
    whole = run(None, feeds(names, shape, IDS))
    first = run(None, feeds(names, shape, IDS[:, :4]))
    rest = run(
        None,
        {
            **dict(zip(names, first[1:], strict=True)),
            "input_ids": IDS[:, 4:],
            "attention_mask": np.ones(IDS.shape, np.int64),
            "position_ids": np.tile(np.arange(4, IDS.shape[1]), (2, 1)),
        },
    )
    expected = np.stack([numpy_logits(model, row) for row in IDS])
    np.testing.assert_allclose(whole[0], expected, atol=1e-4)
    np.testing.assert_allclose(np.concatenate((first[0], rest[0]), 1), expected, atol=1e-4)
    for a, b in zip(whole[1:], rest[1:], strict=True):
        assert a.shape == (2, 2, IDS.shape[1], 16)
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_padding_in_front_is_masked(fp32_file: Path, model: GPT) -> None:
    """As Hugging Face's generate feeds a batch of prompts of different lengths."""
    run = Session(fp32_file, threads=1).ort.run
    mask = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    positions = np.array([[1, 1, 1, 0, 1, 2, 3, 4, 5], list(range(9))])
    shape = (2, 2, 0, 16)
    inputs = feeds(artefact.past_names(2), shape, IDS, attention_mask=mask, position_ids=positions)
    logits = run(None, inputs)[0]
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[0, 3:], numpy_logits(model, IDS[0, 3:]), atol=1e-4)
    np.testing.assert_allclose(logits[1], numpy_logits(model, IDS[1]), atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_another_runtime_runs_it(
    precision: str, model: GPT, request: pytest.FixtureRequest
) -> None:
    """onnx's own evaluator, which shares no code with onnxruntime."""
    path: Path = request.getfixturevalue(f"{precision}_file")
    evaluator = ReferenceEvaluator(onnx.load(path))
    names = artefact.past_names(2)
    inputs = feeds(names, (2, 2, 0, 16), IDS)
    found = evaluator.run(None, inputs)
    expected = np.stack([numpy_logits(model, row) for row in IDS])
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        found[0], expected, atol=1e-4 if precision == "fp32" else 0.05 * scale
    )
    here = Session(path, threads=1).ort.run(None, inputs)
    np.testing.assert_allclose(
        found[0], here[0], atol=1e-4 if precision == "fp32" else 0.02 * scale
    )
    step = {
        **dict(zip(names, found[1:], strict=True)),
        "input_ids": IDS[:, :1],
        "attention_mask": np.ones((2, 10), np.int64),
        "position_ids": np.full((2, 1), 9),
    }
    after = [numpy_logits(model, np.append(row, row[0]))[-1:] for row in IDS]
    np.testing.assert_allclose(
        evaluator.run(None, step)[0],
        np.stack(after),
        atol=1e-4 if precision == "fp32" else 0.05 * scale,
    )


def test_the_cache_of_the_runtime_agrees_with_numpy(fp32_file: Path, model: GPT) -> None:
    """Prefill of unequal rows, steps, chunks beyond one call, forgetting and a full row."""
    session = Session(fp32_file, threads=1)
    cache = session.new_cache(batch=2)
    rows = [IDS[0].tolist(), IDS[1, :3].tolist()]
    logits = [cache.prefill(rows), cache.decode([65, 66])]
    for row, extra in enumerate((65, 66)):
        expected = numpy_logits(model, [*rows[row], extra])[-2:]
        np.testing.assert_allclose([step[row] for step in logits], expected, atol=1e-4)
    assert cache.lengths == [10, 4]
    cache.truncate(0, 5)
    again = cache.append(0, [70, 71], all_logits=True)
    np.testing.assert_allclose(again, numpy_logits(model, [*rows[0][:5], 70, 71])[-2:], atol=1e-4)
    long = np.arange(session.config.block_size) % 250
    cache.reset()
    assert len(long) > 2 * CHUNK_TOKENS
    found = cache.append(1, long, all_logits=True)
    np.testing.assert_allclose(found, numpy_logits(model, long), atol=2e-4)
    with pytest.raises(ValueError, match="the cache holds 288"):
        cache.append(1, [1])
    with pytest.raises(ValueError, match="the cache holds 288"):
        cache.decode([1, 1])


@pytest.mark.parametrize("ids", [[], [272], [-1], [0] * 289])
def test_ids_that_do_not_fit_are_refused(ids: list[int], fp32_file: Path) -> None:
    cache = Session(fp32_file, threads=1).new_cache()
    with pytest.raises(ValueError, match=r"expected 0 to 271|the cache holds 288"):
        cache.prefill([ids])
    assert cache.lengths == [0]


def test_its_loss_is_that_of_the_cpu_file(fp32_file: Path, fp32: Session) -> None:
    ids = fp32.tokenizer.encode("A list of names, and what they are bound to. " * 12)
    portable = evaluate(Session(fp32_file, threads=1), ids)
    assert portable.loss == pytest.approx(evaluate(fp32, ids).loss, rel=1e-5)


@pytest.mark.slow
def test_transformers_gives_the_same_logits_and_text(fp32_file: Path, model: GPT) -> None:
    """Our weights in transformers' GPT-2. Its linear layers hold the transposed matrices."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    other = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    state = {}
    for name, value in model.state_dict().items():
        linear = name.endswith("weight") and (".attn." in name or ".mlp." in name)
        state[name] = value.T.contiguous() if linear else value
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("attn.bias" in name or "masked_bias" in name for name in missing)
    with torch.no_grad():
        expected = other(torch.from_numpy(IDS)).logits.numpy()
    session = Session(fp32_file, threads=1)
    inputs = feeds(artefact.past_names(2), (2, 2, 0, 16), IDS)
    np.testing.assert_allclose(session.ort.run(None, inputs)[0], expected, atol=1e-4)
    cache, tokens = session.new_cache(), IDS[0].tolist()
    logits = cache.prefill([tokens])
    with torch.no_grad():
        for _ in range(64):
            tokens.append(int(logits[0].argmax()))
            full = other(torch.tensor([tokens])).logits[0, -1].numpy()
            logits = cache.decode(tokens[-1:])
            np.testing.assert_allclose(logits[0], full, atol=1e-4)


def test_texts_of_a_batch_and_of_a_kept_cache_are_those_of_single_runs(fp32_file: Path) -> None:
    """Rows that leave at different times, and a prompt that begins as the last text did."""
    model = Model(fp32_file, threads=1)
    prompts, lengths = ["The ", "a", "import statement", ""], [3, 20, 11, 7]
    batch = model.generate(prompts, seed=[1, 2, 3, 4], max_new_tokens=lengths)
    for number, (made, n) in enumerate(zip(batch, lengths, strict=True), 1):
        alone = model.generate(made.prompt, seed=number, max_new_tokens=n)
        assert made.token_ids == alone.token_ids
    with pytest.raises(ValueError, match="rows"):
        model.session.new_cache(2).keep_rows([1, 0])
    reusing = Model(fp32_file, threads=1, reuse_prefix=True)
    text = "The "
    for seed in range(3):
        made = reusing.generate(text, seed=seed, max_new_tokens=6)
        assert made.text == model.generate(text, seed=seed, max_new_tokens=6).text
        text += made.text + "x"
