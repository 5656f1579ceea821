from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from pico_edge.export.quantize import block_size_for, quantize_blocks


@given(
    weight=st_numpy.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.sampled_from([16, 32, 64])),
        elements=st.floats(-1e3, 1e3, width=32),
    ),
    block_size=st.sampled_from([16]),
)
def test_every_weight_is_within_half_a_step(weight: np.ndarray, block_size: int) -> None:
    blocks, scales = quantize_blocks(weight, block_size)
    restored = (blocks.astype(np.float32) - 128) * scales[..., None]
    error = np.abs(restored.reshape(weight.shape) - weight).reshape(len(weight), -1, block_size)
    # The code 255 is missing one step on the far side: an equal and opposite weight loses a whole
    # step.
    step = np.abs(scales)[..., None]
    assert (error <= step * 1.0001 + 1e-30).all()
    inside = np.abs(weight.reshape(error.shape) / scales[..., None]) <= 127
    assert (error[inside] <= (0.5001 * np.broadcast_to(step, error.shape) + 1e-30)[inside]).all()


def test_the_largest_weight_of_a_block_is_exact() -> None:
    weight = np.array([[0.5, -2.0, *[0.1] * 14]], np.float32)
    blocks, scales = quantize_blocks(weight, 16)
    assert blocks[0, 0, 1] == 0
    assert scales[0, 0] == 2.0 / 128
    assert (float(blocks[0, 0, 1]) - 128) * scales[0, 0] == -2.0


def test_zeros_stay_zeros() -> None:
    blocks, scales = quantize_blocks(np.zeros((2, 32), np.float32), 16)
    assert (blocks == 128).all()
    assert np.isfinite(scales).all()


@pytest.mark.parametrize(("k", "expected"), [(768, 128), (384, 128), (192, 64), (96, 32), (48, 16)])
def test_the_block_is_the_largest_that_divides_the_rows(k: int, expected: int) -> None:
    assert block_size_for(k) == expected


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
    assert largest_float == 288 * 32  # the position table
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
    # Of the float file, beside metadata: 1 byte and a 32nd of 4 of a weight, and the position
    # table.
    assert int8_path.stat().st_size < 0.5 * fp32_path.stat().st_size
