"""Weights from the file to the kernels of the CPU with one copy at most.

By path, onnxruntime reads the whole file, parses it and copies each tensor, which its kernels then
pack into memory of their own. Here it is given the graph alone, whose large tensors point back into
the file: it maps each until the kernel has packed it. What kernels read as it is, the table of
tokens, is read once and shared by all sessions. Half of the time, and less memory: figures are in
NOTES.md. Nothing stays mapped, so a file that is overwritten later harms no session.

Try: `Weights.of(read_model_file("model.onnx"))`, None for a small model.
"""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pico_edge.errors import ArtefactError
from pico_edge.runtime.preflight import ModelFile, Tensor, identity
from pico_edge.runtime.wire import (
    ATTRIBUTE,
    GRAPH,
    LENGTH,
    MODEL,
    NODE,
    RAW_DATA,
    TENSOR,
    VARINT,
    Reader,
)

LARGE_BYTES = 1 << 16  # a map takes two calls of the system and whole pages
# Their kernels pack the weights when they are loaded, and do not look at the tensor again.
PACKING = frozenset(
    {"DynamicQuantizeMatMul", "Gemm", "MatMul", "MatMulIntegerToFloat", "MatMulNBits"}
)
ITEM_BYTES = {
    name: np.dtype(name).itemsize
    for name in ("int8", "uint8", "float16", "float32", "int32", "int64")
}

# Fields of messages that are written here; those of reading are in `wire`.
NODE_INPUT, NODE_OP_TYPE, NODE_ATTRIBUTE = 1, 4, 5
ATTRIBUTE_GRAPHS = (6, 11)
GRAPH_NODE, GRAPH_INITIALIZER = 1, 5
MODEL_GRAPH, MODEL_METADATA = 7, 14
TENSOR_EXTERNAL_DATA, TENSOR_DATA_LOCATION, EXTERNAL = 13, 14, 1


@dataclass(frozen=True)
class Weights:
    """What to load instead of a path.

    model: the graph without its large tensors. folder: where the file is that these point into.
    shared: the tensors that stay in use, by name.
    """

    model: bytes
    folder: str
    shared: dict[str, npt.NDArray[Any]]

    @staticmethod
    def of(model_file: ModelFile) -> Weights | None:
        """The weights of a checked file; None where a path does as well, or must do.

        That is a file without large tensors, one whose tensors are not aligned to their elements
        (those of pico-edge are), one with a name that is not UTF-8 or has gone (it may still be
        open, as /dev/fd/3), and any on Windows, where this has not been tried.
        """
        large = {
            tensor.span: tensor
            for tensor in model_file.initializers
            if tensor.n_bytes >= LARGE_BYTES
        }
        path = Path(os.path.realpath(model_file.path))  # a link may not leave its folder
        if os.name != "posix" or not large or not is_utf8(path) or not path.exists():
            return None
        with open(path, "rb") as file:
            if identity(os.fstat(file.fileno())) != model_file.identity:
                return None
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                reader = Reader(model_file.path, data)
                packed = _packed_names(reader, model_file.graph_span)
                if not all(_can_point_to(t, t.name in packed) for t in large.values()):
                    return None
                model = _without_contents(reader, model_file.graph_span, large, path.name)
            shared = {
                tensor.name: _read(file, tensor)
                for tensor in large.values()
                if tensor.name not in packed
            }
        return Weights(model, str(path.parent), shared)


def is_utf8(path: Path) -> bool:
    """Whether onnxruntime can be told the path: it takes no other names."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _can_point_to(tensor: Tensor, mapped: bool) -> bool:
    """Whether onnxruntime can take the contents out of the file as they are."""
    item_bytes = ITEM_BYTES.get(tensor.elem_type)
    if tensor.contents < 0 or item_bytes is None:
        return False
    return not mapped or tensor.contents % item_bytes == 0


def _packed_names(reader: Reader, graph_span: tuple[int, int]) -> set[str]:
    """Names that only nodes of PACKING read."""
    packed, others = set[str](), set[str]()
    graphs = [graph_span]
    while graphs:
        for number, start, stop in reader.fields(GRAPH, *graphs.pop()):
            if number == GRAPH_NODE:
                op_type, names, branches = _node(reader, start, stop)
                (packed if op_type in PACKING else others).update(names)
                graphs += branches
    return packed - others


def _node(reader: Reader, pos: int, end: int) -> tuple[str, list[str], list[tuple[int, int]]]:
    """Operator, names of the inputs, and where the graphs among the attributes are."""
    op_type, names, graphs = "", list[str](), list[tuple[int, int]]()
    for number, start, stop in reader.fields(NODE, pos, end):
        if number == NODE_OP_TYPE:
            op_type = reader.text(start, stop, "operator name")
        elif number == NODE_INPUT:
            names.append(reader.text(start, stop, "name in a node"))
        elif number == NODE_ATTRIBUTE:
            graphs += [
                (first, last)
                for field, first, last in reader.fields(ATTRIBUTE, start, stop)
                if field in ATTRIBUTE_GRAPHS
            ]
    return op_type, names, graphs


def _read(file: BinaryIO, tensor: Tensor) -> npt.NDArray[Any]:
    file.seek(tensor.contents)
    array = np.fromfile(file, tensor.elem_type, math.prod(tensor.shape))
    if array.nbytes != tensor.n_bytes:
        raise ArtefactError(f"{file.name}: cut short while it was loaded: try again")
    return array.reshape(tensor.shape)


def _without_contents(
    reader: Reader, graph_span: tuple[int, int], large: dict[tuple[int, int], Tensor], name: str
) -> bytes:
    """The model, whose large tensors point into the file of that name, without its metadata."""
    graph = bytearray()
    for number, start, stop in reader.fields(GRAPH, *graph_span):
        if number == GRAPH_INITIALIZER and (start, stop) in large:
            graph += _field(number, _pointing(reader, large[start, stop], name))
        else:
            graph += _field(number, reader.data[start:stop])
    model = bytearray()
    for number, start, stop in reader.fields(MODEL, 0, len(reader.data)):
        if number == MODEL_GRAPH:
            model += _field(number, graph)
        elif number != MODEL_METADATA:
            model += _copied(reader, number, start, stop)
    return bytes(model)


def _pointing(reader: Reader, tensor: Tensor, name: str) -> bytes:
    """The TensorProto without its contents: where they are instead."""
    message = bytearray()
    for number, start, stop in reader.fields(TENSOR, *tensor.span):
        if number not in (RAW_DATA, TENSOR_DATA_LOCATION):
            message += _copied(reader, number, start, stop)
    place = {"location": name, "offset": str(tensor.contents), "length": str(tensor.n_bytes)}
    for key, value in place.items():
        entry = _field(1, key.encode()) + _field(2, value.encode())
        message += _field(TENSOR_EXTERNAL_DATA, entry)
    return bytes(message + _varint(TENSOR_DATA_LOCATION << 3 | VARINT) + _varint(EXTERNAL))


def _copied(reader: Reader, number: int, start: int, stop: int) -> bytes:
    if stop < 0:  # a number, in place of a span
        return _varint(number << 3 | VARINT) + _varint(start)
    return _field(number, reader.data[start:stop])


def _field(number: int, contents: bytes | bytearray) -> bytes:
    return _varint(number << 3 | LENGTH) + _varint(len(contents)) + contents


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    digits.append(value)
    return bytes(digits)
