"""Weights from the file to the kernels of the CPU with one copy at most.

By path, onnxruntime reads the whole file, parses it and copies each tensor, which its kernels then
pack into memory of their own. Here it is given the graph alone, whose large tensors point back into
the file: it maps each until the kernel has packed it. What kernels read as it is, the table of
tokens, is read once and shared by all sessions. Half of the time, and less memory: figures are in
NOTES.md. Nothing stays mapped, so a file that is overwritten later harms no session.

A graph that is one choice by the number of tokens (`pico_edge.export.prompts`) becomes two, each
for a session of its own.

Try: `Weights.of(read_model_file("model.onnx"))`, None for a small model.
"""

from __future__ import annotations

import math
import mmap
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from pico_edge import artefact
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
    VALUE,
    VARINT,
    Reader,
)

LARGE_BYTES = 1 << 16  # a map takes two calls of the system and whole pages
# Their kernels pack the weights when they are loaded, and do not look at the tensor again.
PACKING = frozenset(
    {"DynamicQuantizeMatMul", "Gemm", "MatMul", "MatMulIntegerToFloat", "MatMulNBits", "QGemm"}
)
ITEM_BYTES = {
    name: np.dtype(name).itemsize
    for name in ("int8", "uint8", "float16", "float32", "int32", "int64")
}
# Of a graph with two branches, or FEW alone.
FEW, MANY = "few", "many"
BRANCHES = {"else_branch": FEW, "then_branch": MANY}
CHOICE = ["Shape", "Greater", "If"]  # its nodes
SIGN = 128  # the bit between a code of u8 and one of s8

# Fields of messages that are written here; those of reading are in `wire`.
NODE_INPUT, NODE_OUTPUT, NODE_OP_TYPE, NODE_ATTRIBUTE = 1, 2, 4, 5
ATTRIBUTE_NAME, ATTRIBUTE_INT, ATTRIBUTE_GRAPHS = 1, 3, (6, 11)
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_OUTPUT, GRAPH_VALUE_INFO = 1, 5, 12, 13
MODEL_GRAPH, MODEL_METADATA = 7, 14
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME = 1, 2, 8
TENSOR_EXTERNAL_DATA, TENSOR_DATA_LOCATION, EXTERNAL = 13, 14, 1
INT8 = 3  # of TensorProto.DataType


class _Node(NamedTuple):
    """graphs: attribute and where the graph is. integers: attribute -> value."""

    span: tuple[int, int]
    inputs: list[str]
    outputs: list[str]
    graphs: list[tuple[str, tuple[int, int]]]
    integers: dict[str, int]
    op_type: str = ""


class Graph(NamedTuple):
    """A model to load. model: without its large tensors. shared: names of those that stay in use.

    signed: name -> the codes of 8 bits that it is made of, whose first bit is turned round, and its
    shape: what the graph would do at every load, in a third of the time and without copies.
    whole: of all that the file does.
    """

    model: bytes
    shared: list[str]
    signed: dict[str, tuple[Tensor, tuple[int, ...]]]
    whole: bool


@dataclass(frozen=True)
class Weights:
    """What to load instead of a path.

    graphs: by branch; FEW alone if the graph has none. folder: of the file that they point into,
    None if they do not. shared: the tensors that stay in use, by name.
    """

    graphs: dict[str, Graph]
    path: Path
    identity: tuple[int, int, int, int]
    folder: str | None
    shared: dict[str, npt.NDArray[Any]]

    @staticmethod
    def of(model_file: ModelFile, *, lean: bool = False) -> Weights | None:
        """The weights of a checked file, lean: of two branches only FEW; None where a path does.

        It does for a file of one branch without large tensors, or with one that nothing can point
        to. Nothing points to tensors that are not aligned to their elements (those of pico-edge
        are), into a file that has changed, whose name is not UTF-8 or has gone (it may still be
        open, as /dev/fd/3), and on Windows, where this has not been tried: branches are then given
        with all contents.
        """
        path = Path(os.path.realpath(model_file.path))  # a link may not leave its folder
        large = [tensor for tensor in model_file.initializers if tensor.n_bytes >= LARGE_BYTES]
        points = os.name == "posix" and is_utf8(path) and path.exists()
        if not points:
            path, large = model_file.path, []
        try:
            file = open(path, "rb")  # noqa: SIM115
        except OSError:
            return None
        with file:
            if identity(os.fstat(file.fileno())) != model_file.identity:
                return None
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                name = path.name if points else None
                source = _Source(Reader(model_file.path, data), model_file, large, name)
                graphs = _graphs(source, lean)
                shared = {name for graph in graphs.values() for name in graph.shared}
                if not all(_can_point_to(tensor, tensor.name not in shared) for tensor in large):
                    large = []
                    graphs = _graphs(source._replace(large=large, file_name=None), lean)
            if not large and all(graph.whole for graph in graphs.values()):
                return None
            arrays = {t.name: _read(file, t) for t in large if t.name in shared}
        folder = str(path.parent) if points else None
        return Weights(graphs, path, model_file.identity, folder, arrays)

    def arrays(self, branch: str) -> dict[str, npt.NDArray[Any]]:
        """The tensors that the branch is given beside its model; some are read anew from the file.

        Raises ArtefactError if that is another one now.
        """
        graph = self.graphs[branch]
        arrays = {name: self.shared[name] for name in graph.shared}
        if graph.signed:
            with open(self.path, "rb") as file:
                if identity(os.fstat(file.fileno())) != self.identity:
                    raise ArtefactError(f"{self.path}: changed since it was loaded: try again")
                for name, (tensor, shape) in graph.signed.items():
                    codes = _read(file, tensor)
                    codes ^= SIGN
                    arrays[name] = codes.view(np.int8).reshape(shape)
        return arrays


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


def _read(file: BinaryIO, tensor: Tensor) -> npt.NDArray[Any]:
    file.seek(tensor.contents)
    array = np.fromfile(file, tensor.elem_type, math.prod(tensor.shape))
    if array.nbytes != tensor.n_bytes:
        raise ArtefactError(f"{file.name}: cut short while it was loaded: try again")
    return array.reshape(tensor.shape)


class _Source(NamedTuple):
    """A mapped file. large: tensors that the model points to, in the file of that name; None if it
    cannot be named."""

    reader: Reader
    model_file: ModelFile
    large: list[Tensor]
    file_name: str | None


def _graphs(source: _Source, lean: bool) -> dict[str, Graph]:
    """By branch; FEW alone for a graph that is not just the choice that the metadata speaks of."""
    reader, span = source.reader, source.model_file.graph_span
    nodes = _nodes(reader, span)
    if [node.op_type for node in nodes] != CHOICE or not _has_limit(source, nodes[1]):
        return {FEW: _graph(source, nodes, None)}
    choice, graphs = nodes[-1], {}
    for attribute, branch in BRANCHES.items():
        inside = dict(choice.graphs).get(attribute, (0, 0))
        outputs = [
            _value_name(reader, start, stop)
            for number, start, stop in reader.fields(GRAPH, *inside)
            if number == GRAPH_OUTPUT
        ]
        fields = {number for number, _, _ in reader.fields(GRAPH, *inside)}
        if len(outputs) != len(choice.outputs) or GRAPH_INITIALIZER in fields or not outputs:
            return {FEW: _graph(source, nodes, None)}
        if branch == FEW or not lean:
            names = dict(zip(outputs, choice.outputs, strict=True))
            graphs[branch] = _graph(source, _nodes(reader, inside), names)
    return graphs


def _has_limit(source: _Source, greater: _Node) -> bool:
    """Whether a number of tokens is compared with the one in the metadata."""
    tensors = [t for t in source.model_file.initializers if t.name in greater.inputs[1:]]
    limit = artefact.few_tokens(source.model_file.metadata.get(artefact.EXPORT_KEY, {}))
    return [_raw(source.reader, tensor, "int64") for tensor in tensors] == [[limit]]


def _graph(source: _Source, nodes: list[_Node], names: dict[str, str] | None) -> Graph:
    """The model whose graph has these nodes, or whose nodes these are if names is None.

    names: what values are called instead.
    """
    reader, initializers = source.reader, source.model_file.initializers
    signed: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    if names is not None:
        nodes, signed = _without_signs(reader, nodes, {t.name: t for t in initializers})
    packed, others = _readers(reader, nodes)
    used = {t.span: t for t in initializers if names is None or t.name in packed | others}
    pointing = {tensor.span for tensor in source.large} & used.keys()
    shared = [t.name for t in source.large if t.span in used and t.name not in packed - others]
    graph = bytearray()
    if names is not None:
        for node in nodes:
            graph += _field(GRAPH_NODE, _renamed(reader, node, names))
        for name, (tensor, shape) in signed.items():
            graph += _field(GRAPH_INITIALIZER, _signed(source, tensor, name, shape))
    for number, start, stop in reader.fields(GRAPH, *source.model_file.graph_span):
        if number == GRAPH_INITIALIZER:
            if (start, stop) in pointing:
                graph += _field(number, _pointing(source, used[start, stop]))
            elif (start, stop) in used:
                graph += _field(number, reader.data[start:stop])
        elif names is None or number not in (GRAPH_NODE, GRAPH_VALUE_INFO):
            graph += _field(number, reader.data[start:stop])
    model = bytearray()
    for number, start, stop in reader.fields(MODEL, 0, len(reader.data)):
        if number == MODEL_GRAPH:
            model += _field(number, graph)
        elif number != MODEL_METADATA:
            model += _copied(reader, number, start, stop)
    given = {} if source.file_name is None else signed
    return Graph(bytes(model), shared, given, whole=names is None)


def _nodes(reader: Reader, graph_span: tuple[int, int]) -> list[_Node]:
    return [
        _node(reader, start, stop)
        for number, start, stop in reader.fields(GRAPH, *graph_span)
        if number == GRAPH_NODE
    ]


def _node(reader: Reader, pos: int, end: int) -> _Node:
    node = _Node((pos, end), [], [], [], {})
    op_type = ""
    for number, start, stop in reader.fields(NODE, pos, end):
        if number == NODE_OP_TYPE:
            op_type = reader.text(start, stop, "operator name")
        elif number in (NODE_INPUT, NODE_OUTPUT):
            names = node.inputs if number == NODE_INPUT else node.outputs
            names.append(reader.text(start, stop, "name in a node"))
        elif number == NODE_ATTRIBUTE:
            name = ""
            for field, first, last in reader.fields(ATTRIBUTE, start, stop):
                if field == ATTRIBUTE_NAME:
                    name = reader.text(first, last, "attribute name")
                elif field == ATTRIBUTE_INT:
                    node.integers[name] = first
                elif field in ATTRIBUTE_GRAPHS:
                    node.graphs.append((name, (first, last)))
    return node._replace(op_type=op_type)


def _readers(reader: Reader, nodes: list[_Node]) -> tuple[set[str], set[str]]:
    """Names that nodes of PACKING read, and those that others do, graphs in them included."""
    packed, others = set[str](), set[str]()
    rest = list(nodes)
    while rest:
        node = rest.pop()
        (packed if node.op_type in PACKING else others).update(node.inputs)
        for _, span in node.graphs:
            rest += _nodes(reader, span)
    return packed, others


def _without_signs(
    reader: Reader, nodes: list[_Node], initializers: dict[str, Tensor]
) -> tuple[list[_Node], dict[str, tuple[Tensor, tuple[int, ...]]]]:
    """The nodes but for those that make s8 of a tensor of u8; and what these make: see Graph.

    They are BitwiseXor with SIGN, Cast and Reshape, each read by the next alone.
    """
    uses = Counter(name for node in nodes for name in node.inputs)
    plain = [node for node in nodes if node.inputs and len(node.outputs) == 1]
    by_input = {node.inputs[0]: node for node in plain if uses[node.inputs[0]] == 1}
    dropped, signed = set[tuple[int, int]](), {}
    for xor in plain:
        tensor = initializers.get(xor.inputs[0])
        cast = by_input.get(xor.outputs[0])
        reshape = None if cast is None else by_input.get(cast.outputs[0])
        if tensor is None or cast is None or reshape is None:
            continue
        if [node.op_type for node in (xor, cast, reshape)] != ["BitwiseXor", "Cast", "Reshape"]:
            continue
        sign, shape = (
            _raw(reader, initializers.get(node.inputs[1] if len(node.inputs) == 2 else ""), kind)
            for node, kind in ((xor, "uint8"), (reshape, "int64"))
        )
        if (
            tensor.elem_type == "uint8"
            and tensor.n_bytes >= LARGE_BYTES
            and sign == [SIGN]
            and cast.integers.get("to") == INT8
            and min(shape, default=0) > 0
            and math.prod(shape) == tensor.n_bytes
        ):
            signed[reshape.outputs[0]] = tensor, tuple(shape)
            dropped |= {node.span for node in (xor, cast, reshape)}
    return [node for node in nodes if node.span not in dropped], signed


def _raw(reader: Reader, tensor: Tensor | None, elem_type: str) -> list[int]:
    """The numbers of a small tensor; none of one that is not there, or of another type."""
    if tensor is None or tensor.elem_type != elem_type or not 0 < tensor.n_bytes < 100:
        return []
    if tensor.contents < 0:
        return []
    contents = reader.data[tensor.contents : tensor.contents + tensor.n_bytes]
    return np.frombuffer(contents, elem_type).tolist()  # type: ignore[no-any-return]


def _value_name(reader: Reader, pos: int, end: int) -> str:
    """Of a ValueInfoProto."""
    for number, start, stop in reader.fields(VALUE, pos, end):
        if number == 1:
            return reader.text(start, stop, "value name")
    return ""


def _renamed(reader: Reader, node: _Node, names: dict[str, str]) -> bytes | bytearray:
    if names.keys().isdisjoint(node.inputs + node.outputs):
        return reader.data[slice(*node.span)]
    message = bytearray()
    for number, start, stop in reader.fields(NODE, *node.span):
        if number in (NODE_INPUT, NODE_OUTPUT):
            name = reader.text(start, stop, "name in a node")
            message += _field(number, names.get(name, name).encode())
        else:
            message += _copied(reader, number, start, stop)
    return message


def _pointing(source: _Source, tensor: Tensor) -> bytes:
    """The TensorProto without its contents: where they are instead."""
    message, reader = bytearray(), source.reader
    for number, start, stop in reader.fields(TENSOR, *tensor.span):
        if number not in (RAW_DATA, TENSOR_DATA_LOCATION):
            message += _copied(reader, number, start, stop)
    assert source.file_name is not None
    return bytes(message + _place(tensor, source.file_name))


def _signed(source: _Source, tensor: Tensor, name: str, shape: tuple[int, ...]) -> bytes:
    """A TensorProto of s8, as many as the tensor has of u8, without contents if these can be
    given: onnxruntime wants a place in a file even then."""
    message = bytearray()
    for length in shape:
        message += _varint(TENSOR_DIMS << 3 | VARINT) + _varint(length)
    message += _varint(TENSOR_TYPE << 3 | VARINT) + _varint(INT8)
    message += _field(TENSOR_NAME, name.encode())
    if source.file_name is not None:
        return bytes(message + _place(tensor, source.file_name))
    codes = np.frombuffer(source.reader.data, np.uint8, tensor.n_bytes, tensor.contents)
    return bytes(message + _field(RAW_DATA, (codes ^ SIGN).tobytes()))


def _place(tensor: Tensor, file_name: str) -> bytes:
    message = bytearray()
    place = {"location": file_name, "offset": str(tensor.contents), "length": str(tensor.n_bytes)}
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
