"""The branch for many tokens: what it computes and stores, and how it is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from pico_edge.artefact import FEW_TOKENS
from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError, PicoEdgeError
from pico_edge.export import align as align_module
from pico_edge.export import prompts, quantize, targets
from pico_edge.export.pipeline import export
from pico_edge.runtime import session as session_module
from pico_edge.runtime import weights as weights_module
from pico_edge.runtime.preflight import read_model_file
from pico_edge.runtime.session import Session
from pico_edge.runtime.speculate import MAX_DRAFT
from pico_edge.runtime.weights import Weights

Codes = npt.NDArray[np.int8]


@pytest.fixture(scope="module")
def plain(folder: Path, checkpoint_path: Path) -> Session:
    """The wide file without branches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "ROWS_MIN_WIDTH", 32)
        patch.setattr(targets, "branch_calls", lambda graph: None)
        report = export(checkpoint_path, folder / "plain.onnx", quantize=True)
    return Session(report["file"], threads=1)


@pytest.fixture(scope="module")
def attends(folder: Path, checkpoint_path: Path) -> Session:
    """The wide file with attention in floats, but the same products, in its branch for many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "ROWS_MIN_WIDTH", 32)
        patch.setattr(prompts, "_multiply_integers", lambda graph, branch: None)
        report = export(checkpoint_path, folder / "attends.onnx", quantize=True)
    return Session(report["file"], threads=1)


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    return np.random.default_rng(1).integers(0, 257, (3, 200)).tolist()  # type: ignore[no-any-return]


def read(session: Session, rows: list[list[int]]) -> tuple[npt.NDArray[Any], list[Codes]]:
    """Logits of each row's last token, and keys and values of the first layer, row by row."""
    cache = session.new_cache(len(rows))
    logits = cache.prefill(rows)
    stored = [
        array[row, :, : len(ids)] for array in cache._arrays[:2] for row, ids in enumerate(rows)
    ]
    return logits.copy(), [codes.copy() for codes in stored]


def test_drafts_go_through_the_kernel_of_the_steps() -> None:
    assert MAX_DRAFT + 1 <= FEW_TOKENS


def test_a_call_of_few_tokens_is_the_same_to_the_bit(
    wide: Session, plain: Session, rows: list[list[int]]
) -> None:
    few = [row[:FEW_TOKENS] for row in rows]
    for found, expected in zip(read(wide, few), read(plain, few), strict=True):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("lengths", [(FEW_TOKENS + 1,), (200,), (200, 3, 40)])
def test_a_call_of_many_tokens_stores_the_codes_of_the_kernel(
    lengths: tuple[int, ...], attends: Session, plain: Session, rows: list[list[int]]
) -> None:
    """In the first layer, whose inputs are the same to the bit. Padding is not looked at."""
    texts = [row[:n] for row, n in zip(rows, lengths, strict=False)]
    logits, codes = read(attends, texts)
    expected, stored = read(plain, texts)
    for a, b in zip(codes, stored, strict=True):
        assert np.abs(b).max() > 64
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.03)


def test_only_the_branch_for_many_tokens_attends_in_floats(attends: Session) -> None:
    """What is compared above is two kernels. That such a call takes that branch, others show."""
    branches = {a.name: a.g.node for a in onnx.load(attends.path).graph.node[-1].attribute}
    writes = {
        name: sum(n.op_type == "ScatterND" for n in nodes) for name, nodes in branches.items()
    }
    assert writes == {"then_branch": 2 * 2, "else_branch": 0}


@pytest.mark.parametrize("name", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
def test_integer_products_are_those_of_the_weights(name: str, wide_report: dict[str, Any]) -> None:
    """A matrix of the branch for many by itself, against numpy in float64 on the same codes."""
    model = onnx.load(wide_report["file"])
    branch = next(a.g for a in model.graph.node[-1].attribute if a.name == "then_branch")
    weight = f"transformer.h.1.{name}.weight"
    made_by = {output: node for node in branch.node for output in node.output}
    read_by = {value: node for node in branch.node for value in node.input}
    xor = read_by[f"{weight}.blocks"]
    product = read_by[read_by[read_by[xor.output[0]].output[0]].output[0]]
    assert (xor.op_type, product.op_type) == ("BitwiseXor", "QGemm")
    codes = made_by[made_by[product.input[0]].input[0]]
    x = made_by[codes.input[0]].input[0]
    end = read_by[read_by[product.output[0]].output[0]]
    if name == "mlp.c_proj":  # what a shift of its input adds is taken off again
        x = made_by[x].input[0]
        end = read_by[end.output[0]]
    assert (codes.op_type, end.op_type) == (
        "QuantizeLinear",
        "Add" if name == "mlp.c_proj" else "Mul",
    )
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    blocks = weights[f"{weight}.blocks"]
    matrix = (blocks.reshape(len(blocks), -1) - 128.0) * weights[f"{weight}.scales"][:, None]
    assert np.abs(matrix).max() > 0.01
    graph = onnx.helper.make_graph(
        list(branch.node),
        "one product",
        [onnx.helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, [2, 3, matrix.shape[1]])],
        [onnx.helper.make_tensor_value_info(end.output[0], onnx.TensorProto.FLOAT, None)],
        list(model.graph.initializer),
    )
    alone = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=8)
    alone = onnx.utils.Extractor(alone).extract_model([x], [end.output[0]])
    session = ort.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    given = rng.normal(size=(2, 3, matrix.shape[1])).astype(np.float32)
    given[1] *= 1000  # no row knows of another's size
    given[0, 1] = 0  # where the code is that of 0 / 0, whatever the kernel makes of that
    if name == "mlp.c_proj":
        given = np.maximum(given, -0.17)
    (found,) = session.run(None, {x: given})
    assert name == "mlp.c_proj" or (found[0, 1] == 0).all()
    expected = given.astype(np.float64) @ matrix.T
    for row, (a, b) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(a, b, rtol=0, atol=0.02 * np.abs(b).max(), err_msg=str(row))


def test_pieces_of_many_tokens_agree_to_the_bit(wide: Session, rows: list[list[int]]) -> None:
    cache = wide.new_cache()
    whole = cache.append(0, rows[0], all_logits=True).copy()
    cache.reset()
    sizes = (FEW_TOKENS + 1, 100, 67)
    ends = np.cumsum(sizes)
    parts = [
        cache.append(0, rows[0][end - size : end], all_logits=True).copy()
        for size, end in zip(sizes, ends, strict=True)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_row_takes_the_form_that_it_takes_alone(wide: Session, rows: list[list[int]]) -> None:
    """Beside a long one, a prompt of few tokens has the logits of a batch of its kind."""
    few, many = rows[0][:FEW_TOKENS], rows[1][: FEW_TOKENS + 1]
    found = wide.new_cache(2).prefill([few, many])
    alone = [wide.new_cache().prefill([row])[0] for row in (few, many)]
    np.testing.assert_array_equal(found, alone)


def test_narrow_models_and_other_targets_have_no_branches(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    config = GPTConfig(n_layer=2, n_embd=384, n_head=6)
    assert not quantize.choose_plan(config, 8).branches
    path = export(make_checkpoint(GPTConfig(32, 272, 1, 2, 32)), tmp_path / "m.onnx", bits=8)
    assert "If" not in read_model_file(path["file"]).op_types


@pytest.fixture
def split_path(checkpoint_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wide file that counts as one of large tensors, and so is loaded by branches."""
    for module in (weights_module, align_module):
        monkeypatch.setattr(module, "LARGE_BYTES", 256)
    monkeypatch.setattr(quantize, "ROWS_MIN_WIDTH", 32)
    return Path(export(checkpoint_path, tmp_path / "split.onnx", quantize=True)["file"])


def by_every_way(session: Session, rows: list[list[int]]) -> npt.NDArray[Any]:
    cache = session.new_cache(3)
    parts = [cache.prefill([row[:n] for row, n in zip(rows, (100, 60, 40), strict=True)]).copy()]
    parts += [cache.decode([65, 66, 67]).copy(), cache.append(1, rows[1][:FEW_TOKENS]).copy()]
    parts += [cache.append(2, rows[2][: FEW_TOKENS + 1]).copy(), cache.decode([1, 2, 3]).copy()]
    return np.concatenate(parts)


@pytest.mark.parametrize("utf8", [True, False])
def test_branches_loaded_apart_give_the_logits_of_the_whole_file(
    utf8: bool,
    split_path: Path,
    rows: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether or not onnxruntime can be told where the file is."""
    split_path = split_path.rename(split_path.parent / ("m.onnx" if utf8 else "caf\udce9.onnx"))
    session = Session(split_path, threads=1)
    assert session._weights is not None
    assert (session._weights.folder is None) == (not utf8 or os.name != "posix")
    assert session.few_tokens == FEW_TOKENS
    found = by_every_way(session, rows)
    with monkeypatch.context() as patch:
        patch.setattr(session_module.Weights, "of", lambda *_, **__: None)
        whole = Session(split_path, threads=1)
    assert whole.few_tokens is None
    np.testing.assert_array_equal(found, by_every_way(whole, rows))


def test_without_vnni_every_call_takes_the_products_that_do_not_saturate(
    split_path: Path, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_every_way(Session(split_path, threads=1), rows)
    monkeypatch.setattr(session_module, "may_saturate", lambda: True)
    session = Session(split_path, threads=1)
    assert session.few_tokens is None
    assert "QGemm" not in op_types(session._weights.graphs["few"].model)
    found = by_every_way(session, rows)
    assert 0 < np.abs(found - expected).max() < 0.03
    monkeypatch.setattr(session_module, "SATURATING", "none")  # as in files of 4 bits
    assert Session(split_path, threads=1).few_tokens == FEW_TOKENS


def op_types(model: bytes) -> set[str]:
    return {node.op_type for node in onnx.load_from_string(model).graph.node}


def test_each_branch_has_its_own_form_and_shares_the_table(split_path: Path) -> None:
    weights = Weights.of(read_model_file(split_path))
    assert weights is not None
    few, many = weights.graphs["few"], weights.graphs["many"]
    assert "QGemm" in op_types(many.model) - op_types(few.model)
    assert not {"If", "BitwiseXor"} & (op_types(few.model) | op_types(many.model))
    table = "transformer.wte.weight.blocks"
    assert table in few.shared and table in many.shared
    assert len(many.signed) == 2 * 4 and not few.signed
    codes = "transformer.h.0.mlp.c_fc.weight.blocks"
    assert codes.encode() in few.model and codes.encode() not in many.model
    assert codes not in weights.shared


def test_a_lean_session_has_the_form_of_steps_for_all_calls(
    split_path: Path, wide: Session, rows: list[list[int]]
) -> None:
    lean = Session(split_path, threads=1, lean=True)
    assert lean.few_tokens is None
    assert lean._weights is not None and list(lean._weights.graphs) == ["few"]
    both = Session(split_path, threads=1)
    many, few = (session.new_cache().append(0, rows[0]) for session in (both, lean))
    assert 0 < np.abs(many - few).max() < 0.03
    cache = lean.new_cache()
    pieces = [cache.append(0, rows[0][at : at + 20]) for at in range(0, 200, 20)]
    np.testing.assert_allclose(pieces[-1], few, rtol=0, atol=0.03)
    for session in (both, lean):  # steps, and calls of few tokens, are the same to the bit
        cache = session.new_cache()
        found = [cache.append(0, [65] * 7).copy(), cache.decode([66]).copy()]
        if session is both:
            expected = found
    np.testing.assert_array_equal(found, expected)


def test_a_file_that_has_changed_before_it_is_loaded_is_refused(split_path: Path) -> None:
    weights = Weights.of(read_model_file(split_path))
    assert weights is not None
    split_path.write_bytes(split_path.read_bytes() + b"\x42\x00")
    with pytest.raises(PicoEdgeError, match="changed"):
        weights.arrays("many")


def test_nodes_without_outputs_are_refused(split_path: Path) -> None:
    proto = onnx.load(split_path)
    branch = next(a.g for a in proto.graph.node[-1].attribute if a.name == "then_branch")
    sound = [node for node in branch.node if node.op_type in ("BitwiseXor", "Cast", "Reshape")]
    for node in sound[:6]:
        kept = node.output.pop()
        split_path.write_bytes(proto.SerializeToString())
        with pytest.raises(ArtefactError, match="cannot load it"):
            Session(split_path, threads=1)
        node.output.append(kept)


@pytest.mark.parametrize("damage", ["sign", "cast", "choice", "limit", "initializer"])
def test_a_graph_of_another_make_is_left_to_onnxruntime(
    damage: str, split_path: Path, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not ours, and sound: what the loader does not know it does not touch."""
    proto = onnx.load(split_path)
    branch = next(a.g for a in proto.graph.node[-1].attribute if a.name == "then_branch")
    first = next(node for node in branch.node if node.op_type == "BitwiseXor")
    if damage == "sign":  # turns other bits
        bits = numpy_helper.from_array(np.array(255, np.uint8), "all_bits")
        proto.graph.initializer.append(bits)
        first.input[1] = "all_bits"
    elif damage == "cast":  # is read by a second node
        branch.node.append(onnx.helper.make_node("Identity", first.output, ["also_read"]))
    elif damage == "choice":
        proto.graph.node.append(onnx.helper.make_node("Identity", ["few_tokens"], ["unread"]))
    elif damage == "limit":
        (limit,) = (t for t in proto.graph.initializer if t.name == "few_tokens")
        limit.CopyFrom(numpy_helper.from_array(np.array([FEW_TOKENS + 8]), "few_tokens"))
    else:
        branch.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "unread"))
    align_module.align(proto)
    split_path.write_bytes(proto.SerializeToString())
    session = Session(split_path, threads=1)
    assert (session.few_tokens is None) == (damage in ("choice", "limit", "initializer"))
    found = by_every_way(session, rows)
    monkeypatch.setattr(session_module.Weights, "of", lambda *_, **__: None)
    whole = Session(split_path, threads=1)
    np.testing.assert_array_equal(found, by_every_way(whole, rows))


def test_a_weight_that_a_branch_reads_as_it_is_stays_in_memory(split_path: Path) -> None:
    """Or the file would stay mapped; onnxruntime would see what is written over it."""
    proto = onnx.load(split_path)
    packed = "transformer.h.0.mlp.c_fc.weight.blocks"
    found = []
    for also_read in (False, True):
        if also_read:
            branch = proto.graph.node[-1].attribute[0].g
            branch.node.append(onnx.helper.make_node("Identity", [packed], ["also_read"]))
        align_module.align(proto)
        split_path.write_bytes(proto.SerializeToString())
        weights = Weights.of(read_model_file(split_path))
        assert weights is not None
        found.append(packed in weights.shared)
    assert found == [False, True]
