"""Large tensors at multiples of 64 bytes in the file, so that a runtime can map them.

Protobuf puts contents wherever the fields before them end, and onnxruntime maps floats only if it
may read them as floats (`pico_edge.runtime.weights`). What is missing is made up with doc strings:
of the tensor before, of the model before the first. Fields are written in the order of their
numbers, https://protobuf.dev/programming-guides/encoding/.

Try: `align(proto)`, then `proto.SerializeToString()`.
"""

from __future__ import annotations

import math

import onnx
from onnx.helper import tensor_dtype_to_np_dtype

from pico_edge.runtime.weights import LARGE_BYTES

ALIGNMENT = 64  # as onnxruntime's own memory


def align(proto: onnx.ModelProto) -> None:
    """Pad, so that the raw contents of each tensor of LARGE_BYTES begin at a multiple of ALIGNMENT.

    Metadata comes after them: it may change without moving them.
    """
    tensors = proto.graph.initializer
    # Asked for once, since that makes a copy of all contents; what doc strings add is counted.
    sizes, graph_bytes = [tensor.ByteSize() for tensor in tensors], proto.graph.ByteSize()
    shift = -1
    while shift:  # once more, for a doc string may have made a length before it longer
        shift = 0
        starts = _starts(proto, graph_bytes, sizes)
        for i, (before, start) in enumerate(zip([proto, *tensors], starts, strict=False)):
            missing = -(start + shift) % ALIGNMENT
            if sizes[i] < LARGE_BYTES or not missing:
                continue
            tag_bytes = 0 if before.doc_string else 2
            if missing <= tag_bytes:
                missing += ALIGNMENT
            doc_bytes = _doc_bytes(before)
            before.doc_string += " " * (missing - tag_bytes)
            if i:
                field_bytes = _field_bytes(sizes[i - 1])
                sizes[i - 1] += _doc_bytes(before) - doc_bytes
                graph_bytes += _field_bytes(sizes[i - 1]) - field_bytes
            shift += missing


def _starts(proto: onnx.ModelProto, graph_bytes: int, sizes: list[int]) -> list[int]:
    """Where in the serialized model the raw contents of each initializer begin.

    sizes: bytes of the initializers.
    """
    graph = proto.graph
    head = onnx.ModelProto()  # the fields before the graph, whose number is 7
    for field, value in proto.ListFields():
        if field.number < 7:
            setattr(head, field.name, value)
    at = head.ByteSize() + _field_bytes(graph_bytes) - graph_bytes
    at += sum(_field_bytes(node.ByteSize()) for node in graph.node)
    at += _field_bytes(len(graph.name.encode()))
    starts = []
    for tensor, size in zip(graph.initializer, sizes, strict=True):
        contents = math.prod(tensor.dims) * tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        end = at + _field_bytes(size)
        starts.append(end - _doc_bytes(tensor) - contents)
        at = end
    return starts


def _doc_bytes(message: onnx.ModelProto | onnx.TensorProto) -> int:
    return _field_bytes(len(message.doc_string)) if message.doc_string else 0


def _field_bytes(size: int) -> int:
    """Bytes of a field of `size` bytes, with its tag and its length."""
    return 1 + max(1, -(-size.bit_length() // 7)) + size
