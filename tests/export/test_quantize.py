from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from pico_edge import artefact
from pico_edge.config import GPTConfig
from pico_edge.export import quantize
from pico_edge.export.blocks import quantize_matrix
from pico_edge.export.pipeline import export
from pico_edge.export.prompts import GELU_SHIFT
from pico_edge.export.quantize import block_size_for, choose_plan
from pico_edge.runtime.preflight import read_model_file
from pico_edge.runtime.session import Session
from pico_edge.train.checkpoint import load_checkpoint
from pico_edge.train.choose import int8_bytes


@pytest.mark.parametrize(("k", "expected"), [(768, 128), (384, 128), (192, 64), (96, 32), (48, 16)])
def test_the_block_is_the_largest_that_divides_the_rows(k: int, expected: int) -> None:
    assert block_size_for(k) == expected


def test_the_head_and_the_end_of_the_mlp_have_finer_blocks(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    config = GPTConfig(block_size=32, vocab_size=272, n_layer=4, n_head=2, n_embd=128)
    path = export(make_checkpoint(config), tmp_path / "m.onnx", quantize=True)["file"]
    sizes = [
        next(a.i for a in node.attribute if a.name == "block_size")
        for node in onnx.load(path).graph.node
        if node.op_type == "MatMulNBits"
    ]
    assert sizes == [128, 128, 128, 32] * 4 + [16]
    assert Path(path).stat().st_size == pytest.approx(int8_bytes(config, 257), rel=0.03)


def test_rows_that_no_block_divides_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 40 weights"):
        block_size_for(40)


def test_an_int8_file_holds_the_table_once_and_no_float_matrix(
    int8_path: Path, fp32_path: Path
) -> None:
    model = onnx.load(int8_path)
    largest_float = max(
        np.prod(tensor.dims)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    )
    assert largest_float == 288  # scales of the positions
    tables = [t for t in model.graph.initializer if list(t.dims) == [272, 1, 32]]
    assert len(tables) == 1
    users = [n.op_type for n in model.graph.node if tables[0].name in n.input]
    assert sorted(users) == ["GatherBlockQuantized", "MatMulNBits"]
    fast = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
    assert len(fast) == 4 * 2 + 1
    for node in fast:
        attributes = {a.name: a.i for a in node.attribute}
        assert attributes["accuracy_level"] == 4
        assert attributes["bits"] == 8
    # 1 byte and a 32nd of 4 of a weight, where the block is the width, 32.
    assert _matrix_bytes(int8_path) < 0.3 * _matrix_bytes(fp32_path)


def _matrix_bytes(path: Path) -> int:
    """Of all matrices and their scales, but the position table."""
    return sum(
        onnx.numpy_helper.to_array(tensor).nbytes
        for tensor in onnx.load(path).graph.initializer
        if len(tensor.dims) >= 2 and tensor.dims[0] != 288
    )


def test_the_branches_of_a_wide_int8_file_have_its_matrices_in_two_forms(
    wide_report: dict[str, Any],
) -> None:
    choice = onnx.load(wide_report["file"]).graph.node[-1]
    many, few = (
        Counter(node.op_type for node in next(a.g for a in choice.attribute if a.name == name).node)
        for name in ("then_branch", "else_branch")
    )
    assert many["QGemm"] == many["BitwiseXor"] == 4 * 2
    assert few["MatMulNBits"] == 4 * 2 + 1 and not few["QGemm"]
    assert many["MatMulNBits"] == 1  # the head
    assert not many["DynamicQuantizeMatMul"] and not many["DynamicQuantizeLinear"]


@pytest.mark.parametrize("report", ["int8_report", "wide_report", "int4_report"])
def test_the_cache_is_int8(report: str, request: pytest.FixtureRequest) -> None:
    session = Session(request.getfixturevalue(report)["file"], threads=1)
    assert session.cache_dtype == np.int8


def test_a_narrow_model_of_a_short_context_keeps_its_cache_in_float32(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    short = GPTConfig(block_size=256, vocab_size=272, n_layer=2, n_head=2, n_embd=32)
    path = Path(export(make_checkpoint(short), tmp_path / "short.onnx", quantize=True)["file"])
    assert Session(path, threads=1).cache_dtype == np.float32
    assert read_model_file(path).metadata[artefact.EXPORT_KEY]["cache"] == "float32"


def test_positions_have_8_bits_and_are_read_by_one_node(
    int8_path: Path, checkpoint_path: Path, int8: Session
) -> None:
    """The rows of the file's table, as onnxruntime reads them, against the checkpoint's."""
    table = load_checkpoint(checkpoint_path).model["transformer.wpe.weight"].numpy()  # (288, 32)
    model = onnx.load(int8_path)
    (node,) = (
        node for node in model.graph.node if node.input[0] == "transformer.wpe.weight.blocks"
    )
    assert node.op_type == "GatherBlockQuantized"
    inputs = [onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, ["n"])]
    outputs = [onnx.helper.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, ["n", 32])]
    node.output[0] = "rows"
    weights = [tensor for tensor in model.graph.initializer if tensor.name in node.input]
    graph = onnx.helper.make_graph([node], "positions", inputs, outputs, weights)
    alone = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=8)
    session = ort.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {"position_ids": np.arange(288)})
    step = np.abs(table).max(axis=1, keepdims=True) / 128
    error = np.abs(rows - table) / step
    assert error.max() < 1.01  # of a number as large as the largest, with the other sign
    assert np.mean(error < 0.51) > 0.99
    assert error.max() > 0.4


@pytest.mark.parametrize("bias", [True, False])
def test_codes_after_gelu_are_shifted_back_by_the_next_bias(
    bias: bool,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the model has none: the shift then becomes the bias."""
    monkeypatch.setattr(quantize, "ROWS_MIN_WIDTH", 32)
    config = GPTConfig(block_size=64, vocab_size=272, n_layer=2, n_head=2, n_embd=32, bias=bias)
    checkpoint = make_checkpoint(config)
    wide = Session(export(checkpoint, tmp_path / "wide.onnx", quantize=True)["file"], threads=1)
    fp32 = Session(export(checkpoint, tmp_path / "fp32.onnx")["file"], threads=1)
    ids = list(b"Identifiers are used as names, and keywords are reserved.")
    found, expected = (
        session.new_cache().append(0, ids, all_logits=True) for session in (wide, fp32)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_the_plan_follows_the_shape_alone() -> None:
    narrow, wide = GPTConfig(n_layer=2, n_head=6, n_embd=384), GPTConfig(n_layer=2)
    assert set(choose_plan(narrow, 8).forms.values()) == {"int8"}
    assert set(choose_plan(wide, 8).forms.values()) == {"int8", "rows"}
    assert choose_plan(wide, 8).forms["lm_head"] == "int8"
    assert choose_plan(narrow, 8).cache == "int8"  # of 1024 positions
    short = dataclasses.replace(narrow, block_size=256)
    assert choose_plan(short, 8).cache == choose_plan(short, 4).cache == "float32"
    assert choose_plan(dataclasses.replace(wide, block_size=256), 8).cache == "int8"
    mlp, head = "transformer.h.1.mlp.c_proj", "lm_head"
    micro = GPTConfig(n_layer=4, n_head=4, n_embd=256, vocab_size=272)
    plan = choose_plan(micro, 8)
    assert (plan.largest_block(head), plan.largest_block(mlp)) == (16, 32)
    words = choose_plan(narrow, 8)  # whose fine table would grow the file by an eighth
    assert (words.largest_block(head), words.largest_block(mlp)) == (128, 64)
    assert choose_plan(wide, 8).largest_block(head) == choose_plan(micro, 4).largest_block(head)
    single = choose_plan(GPTConfig(n_layer=1), 4).forms  # nothing of it is spared
    assert single["transformer.h.0.mlp.c_proj"] == single["transformer.h.0.attn.c_attn"] == "int4"
    deep = choose_plan(GPTConfig(), 4).forms
    assert deep["transformer.h.0.mlp.c_proj"] == "int4"
    assert deep["transformer.h.0.mlp.c_fc"] == "int8"
    assert (choose_plan(narrow, 4).int4_block, choose_plan(wide, 4).int4_block) == (64, 128)
    assert choose_plan(wide, 4).forms["transformer.h.0.mlp.c_proj"] == "int8"
    with pytest.raises(ValueError, match="bits is 2"):
        choose_plan(wide, 2)


def test_gelu_stays_above_the_shift() -> None:
    x = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    for form in ("tanh", "none"):
        assert torch.nn.functional.gelu(x, approximate=form).min() > -GELU_SHIFT


def test_int4_packs_the_first_weight_into_the_low_half(int4_report: dict[str, Any]) -> None:
    """Against onnxruntime's own reading of it: one matrix, column by column."""
    weight = torch.arange(-8, 8.0).repeat(2)[None].clone()  # (1, 32): every code in turn
    weight[0, 16:] *= -1
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20, "com.microsoft": 1})
    x = ir.Value(name="x", shape=ir.Shape((32, 32)), type=ir.TensorType(ir.DataType.FLOAT))
    w = quantize.initializer(graph, "w", weight.T.numpy())
    node = ir.node("MatMul", [x, w])
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape((32, 1)), ir.TensorType(ir.DataType.FLOAT)
    graph.inputs.append(x)
    graph.outputs.append(y)
    graph.append(node)
    quantize._replace_by_blocks(graph, node, weight, 4, None, 128)
    del graph.initializers["w"]
    data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.eye(32, dtype=np.float32)})
    restored = quantize_matrix(weight, 4, 32).restore()
    np.testing.assert_allclose(found[:, 0], restored[0].numpy(), rtol=1e-5, atol=1e-5)
