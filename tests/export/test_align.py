"""Large tensors begin at multiples of ALIGNMENT in the file, and hold what they held."""

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pico_edge.export import align as align_module
from pico_edge.export.align import ALIGNMENT, align

SMALL = 256  # bytes of a tensor that counts as large here


@given(
    names=st.lists(st.text(min_size=1, max_size=200), min_size=1, max_size=12, unique=True),
    sizes=st.lists(st.integers(1, 300), min_size=12, max_size=12),
    types=st.lists(
        st.sampled_from([np.float32, np.int8, np.float16, np.int64]), min_size=12, max_size=12
    ),
    producer=st.text(max_size=20),
)
def test_aligned_tensors_begin_at_multiples_and_keep_their_contents(
    names: list[str], sizes: list[int], types: list[Any], producer: str
) -> None:
    arrays = {
        name: np.arange(size).astype(dtype)
        for name, size, dtype in zip(names, sizes, types, strict=False)
    }
    nodes = [onnx.helper.make_node("Identity", [name], [f"{name}!"]) for name in names]
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            producer,
            [],
            [],
            [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
        ),
        producer_name=producer,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align_module, "LARGE_BYTES", SMALL)
        align(proto)
        once = proto.SerializeToString()
        align(proto)
    data = proto.SerializeToString()
    assert data == once
    loaded = onnx.load_from_string(data)
    at = 0
    for tensor in loaded.graph.initializer:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), arrays[tensor.name])
        if tensor.ByteSize() >= SMALL:
            at = data.index(tensor.name.encode() + b"\x4a", at)  # the name, then raw_data
            assert data.index(tensor.raw_data, at) % ALIGNMENT == 0
