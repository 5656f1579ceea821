"""Refuse an unsafe, damaged or foreign `model.onnx` before onnxruntime sees a byte of it.

The file is mapped, and its fields (`wire`) walked once: tensor contents are skipped, nothing is
copied but names and metadata, no other file is opened. Inputs and outputs are then held to what the
metadata promises (`contract`). Knows nothing of onnx, onnxruntime or running a model; that nodes
fit together is for onnxruntime to say.

Try: `read_model_file("model.onnx").config`.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pico_edge import artefact
from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError
from pico_edge.runtime.contract import ValueInfo, contract_error
from pico_edge.runtime.wire import (
    AGAIN,
    ATTRIBUTE,
    DIMENSION,
    ELEMENTS,
    ENTRY,
    GRAPH,
    MODEL,
    NODE,
    OPSET,
    OTHER_TYPES,
    RAW_DATA,
    SHAPE,
    TENSOR,
    TENSOR_TYPE,
    TYPE,
    VALUE,
    Reader,
    WireError,
    signed,
)
from pico_edge.tokenizer import MAX_RANKS, PATTERNS, BPETokenizer, SimpleTokenizer

MAX_FILE_BYTES = (1 << 31) - 1  # protobuf's own limit for one message
# What onnxruntime 1.32 loads, the newest that pico-edge is tested with.
MAX_IR_VERSION = 14
MAX_OPSETS = {"": 28, "com.microsoft": 1}
MAX_NODES = 1_000_000
MAX_SUBGRAPH_DEPTH = 4
# Ours are smaller by orders of magnitude: these bound the time and memory a hostile file can take.
MAX_ITEMS = 100_000  # of each: tensors, described values, metadata entries
MAX_ATTRIBUTES = 1000  # of one node
MAX_RANK = 32
MAX_INT32 = (1 << 31) - 1
MAX_ELEMENTS = MAX_FILE_BYTES * 4  # of 2 bits
# Operators whose kernels read as many scales, zero points and biases as the weights have columns,
# whatever is there: input of the weights, inputs of these.
BY_COLUMN = {"MatMulIntegerToFloat": (1, (3, 5, 6)), "DynamicQuantizeMatMul": (1, (2, 3, 4))}
MAX_METADATA_TOTAL_BYTES = 2 * artefact.MAX_METADATA_BYTES


@dataclass(frozen=True)
class Tensor:
    """An initializer. n_bytes: length of its contents. span: where its message is in the file.

    contents: where its raw bytes begin in the file; -1 if they are numbers one by one.
    """

    name: str
    elem_type: str
    shape: tuple[int, ...]
    n_bytes: int
    span: tuple[int, int]
    contents: int


@dataclass(frozen=True)
class ModelFile:
    """What a model file says of itself, as checked by `read_model_file`.

    size: bytes. identity: device, inode, size, mtime_ns. opsets: domain -> version, "" is ai.onnx.
    op_types: how many nodes of each, subgraphs included; "Gemm", "com.microsoft.FastGelu".
    metadata: `artefact.KEYS` -> parsed JSON; empty, and config None, for a foreign file.
    graph_span: where the graph is in the file; its initializers have spans inside it.
    """

    path: Path
    size: int
    identity: tuple[int, int, int, int]
    ir_version: int
    producer: str
    opsets: dict[str, int]
    inputs: list[ValueInfo]
    outputs: list[ValueInfo]
    metadata: dict[str, Any]
    node_count: int
    op_types: dict[str, int]
    initializers: list[Tensor]
    graph_span: tuple[int, int]
    config: GPTConfig | None


def read_model_file(path: str | os.PathLike[str], *, allow_foreign: bool = False) -> ModelFile:
    """Check a model file, and return what it says of itself.

    allow_foreign: also take a file without sound pico_edge metadata; all other checks stay.
    Raises ArtefactError, one line, for a file that is refused, OSError if it cannot be read.
    """
    path = Path(path)
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
        raise ArtefactError(f"{path}: not a regular file: expected an ONNX model")
    if path.suffix.lower() == ".ort":  # onnxruntime chooses its other format by this ending
        raise ArtefactError(f"{path}: ends in .ort: expected an ONNX model, rename it to .onnx")
    with open(path, "rb") as file:
        found = os.fstat(file.fileno())
        if found.st_size == 0:
            raise ArtefactError(f"{path}: 0 bytes: expected an ONNX model, {AGAIN}")
        if found.st_size > MAX_FILE_BYTES:
            raise ArtefactError(f"{path}: {found.st_size} bytes: expected at most {MAX_FILE_BYTES}")
        with mmap.mmap(file.fileno(), found.st_size, access=mmap.ACCESS_READ) as data:
            try:
                model_file = _Walk(path, data).model(identity(found), allow_foreign)
            except WireError as error:
                reason = _guess(data[:1024]) or f"damaged or cut short ({error}): {AGAIN}"
                raise ArtefactError(f"{path}: not a whole ONNX model: {reason}") from error
        if identity(os.fstat(file.fileno())) != model_file.identity:
            raise ArtefactError(f"{path}: changed while it was read: try again")
    return model_file


def check_unchanged(model_file: ModelFile) -> None:
    """To be called after loading by path: what was loaded is what was checked.

    Raises ArtefactError if the path names another file now, or one of other size or mtime.
    """
    if identity(os.stat(model_file.path)) != model_file.identity:
        raise ArtefactError(f"{model_file.path}: changed while it was loaded: try again")


def identity(found: os.stat_result) -> tuple[int, int, int, int]:
    """Device, inode, size and mtime_ns: another file, or other contents, differ in one of them."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


UPGRADE = "upgrade pico-edge"


def _guess(head: bytes) -> str | None:
    """What a file that is not a model may be, from its first bytes, and what to do about it."""
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer: run `git lfs pull`"
    if head.startswith(b"PK"):
        if b"data.pkl" in head:
            return "this is a checkpoint: `pico-edge export` it first"
        return "this is a zip archive: unpack it first"
    if head.startswith(b"\x1f\x8b"):
        return "this is gzip data: unpack it first"
    if head.startswith(b"\x80\x02"):
        return "this is a pickle: expected a model made by `pico-edge export`"
    if head.startswith(b"GGUF"):
        return "this is a GGUF model: expected one made by `pico-edge export`"
    if head[4:8] == b"ORTM":
        return "this is a model in ORT format: expected one made by `pico-edge export`"
    if head[8:10] == b'{"':
        return "this is a safetensors file: expected a model made by `pico-edge export`"
    text = head.decode("utf-8", "ignore").strip().lower()
    if text.startswith(("<!doctype", "<html", "<?xml")):
        return "this is a web page: download the file itself"
    if len(text) > 3 and all(character.isprintable() or character.isspace() for character in text):
        return "this is text: expected a model made by `pico-edge export`"
    return None


class _Walk(Reader):
    """One pass over one file: where it is, and what has been counted."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        super().__init__(path, data)
        self.node_count = 0
        self.tensors_seen = 0
        self.values_seen = 0
        self.op_types: Counter[str] = Counter()

    # The messages of ONNX.

    def model(self, identity: tuple[int, int, int, int], allow_foreign: bool) -> ModelFile:
        ir_version, producer = 0, ""
        graph: tuple[int, int] | None = None
        opset_spans, entries = [], []
        for number, start, end in self.fields(MODEL, 0, len(self.data)):
            if number == 1:
                ir_version = start
            elif number == 2:
                producer = self.text(start, end, "producer name")
            elif number == 7:
                graph = start, end
            elif number == 8:
                opset_spans.append((start, end))
            elif number == 14:
                entries.append((start, end))
            elif number == 20:
                self.refuse("holds training graphs: expected a model for inference only")
            elif number == 25:  # 1.5 kB of them can unfold to more nodes than memory holds
                self.refuse("defines functions of its own: expected them inlined")
            if len(entries) > MAX_ITEMS or len(opset_spans) > MAX_ITEMS:
                self.refuse(f"more than {MAX_ITEMS} entries: expected a model of pico-edge")
        metadata: dict[str, Any] = {}
        config = None
        try:  # first, for the format version: the rest of a newer file may not look like ours
            metadata, config = self.metadata(entries)
        except ArtefactError:
            if not allow_foreign:
                raise
        if not 1 <= ir_version <= MAX_IR_VERSION:
            self.refuse(
                f"ONNX IR version {ir_version}: this pico-edge reads 1-{MAX_IR_VERSION}: {UPGRADE}"
            )
        opsets = self.opsets(opset_spans)
        if graph is None:
            raise WireError("no graph")
        inputs, outputs, initializers = self.graph(*graph, 0)
        if config is not None:
            portable = metadata[artefact.EXPORT_KEY].get("target") == artefact.PORTABLE
            difference = contract_error(config, inputs, outputs, portable=portable)
            if difference is not None:
                self.refuse(f"{difference}: {AGAIN}")
        return ModelFile(
            path=self.path,
            size=len(self.data),
            identity=identity,
            ir_version=ir_version,
            producer=producer,
            opsets=opsets,
            inputs=inputs,
            outputs=outputs,
            metadata=metadata,
            node_count=self.node_count,
            op_types=dict(self.op_types),
            initializers=initializers,
            graph_span=graph,
            config=config,
        )

    def opsets(self, spans: list[tuple[int, int]]) -> dict[str, int]:
        versions: dict[str, int] = {}
        for span in spans:
            domain, version = "", 0
            for number, start, end in self.fields(OPSET, *span):
                if number == 1:
                    domain = self.domain(start, end)
                elif number == 2:
                    version = start
            if domain in versions:
                self.refuse(f"names the opset of domain {domain!r} twice: {AGAIN}")
            if not 1 <= version <= MAX_OPSETS[domain]:
                self.refuse(
                    f"opset {version} of domain {domain!r}: "
                    f"this pico-edge reads 1-{MAX_OPSETS[domain]}: {UPGRADE}"
                )
            versions[domain] = version
        if not versions:
            self.refuse(f"names no opset: {AGAIN}")
        return versions

    def domain(self, start: int, end: int) -> str:
        domain = self.text(start, end, "operator domain")
        if domain == "ai.onnx":
            return ""
        if domain not in MAX_OPSETS:
            self.refuse(
                f"operators of domain {domain[:80]!r}: expected only ai.onnx and com.microsoft"
            )
        return domain

    def graph(
        self, pos: int, end: int, depth: int
    ) -> tuple[list[ValueInfo], list[ValueInfo], list[Tensor]]:
        if depth > MAX_SUBGRAPH_DEPTH:
            self.refuse(f"graphs nested deeper than {MAX_SUBGRAPH_DEPTH}: expected a flat graph")
        inputs, outputs, initializers = [], [], []
        by_column: list[tuple[str, list[str]]] = []
        for number, start, stop in self.fields(GRAPH, pos, end):
            if number == 1:
                self.node(start, stop, depth, by_column)
            elif number == 2:
                self.text(start, stop, "graph name")
            elif number == 5:
                initializers.append(self.tensor(start, stop))
            elif number == 11:
                inputs.append(self.value(start, stop))
            elif number == 12:
                outputs.append(self.value(start, stop))
            elif number == 13:
                self.value(start, stop)
            elif number == 15:
                self.refuse_sparse()
        if by_column:
            shapes = {tensor.name: tensor.shape for tensor in initializers}
            for op_type, names in by_column:
                self.check_by_column(op_type, names, shapes)
        return inputs, outputs, initializers

    def check_by_column(
        self, op_type: str, names: list[str], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        """Weights and what belongs to their columns are initializers, and fit each other."""
        weights, others = BY_COLUMN[op_type]
        shape = shapes.get(names[weights], ()) if len(names) > weights else ()
        for i in others:
            if i >= len(names) or not names[i]:
                continue
            count = math.prod(shapes[names[i]]) if names[i] in shapes else -1
            if len(shape) != 2 or count not in (1, shape[1]):
                self.refuse(
                    f"{op_type} has weights {names[weights][:80]!r} {list(shape)} with "
                    f"{names[i][:80]!r}: expected initializers, and one value or one a column: "
                    f"{AGAIN}"
                )

    def node(self, pos: int, end: int, depth: int, by_column: list[tuple[str, list[str]]]) -> None:
        """by_column: to which the node is added, with its inputs, if it is one of BY_COLUMN."""
        self.node_count += 1
        if self.node_count > MAX_NODES:
            self.refuse(f"more than {MAX_NODES} nodes: expected a model of pico-edge")
        domain, op_type, n_outputs = "", "", 0
        names: list[str] = []  # of the inputs
        integers: dict[str, int] = {}  # all attributes; 0 for one that is no integer
        for number, start, stop in self.fields(NODE, pos, end):
            n_outputs += number == 2
            if number == 4:
                op_type = self.text(start, stop, "operator name")
            elif number == 5:
                self.attribute(start, stop, depth, integers)
            elif number == 7:
                domain = self.domain(start, stop)
            elif number in (1, 2, 3):  # or onnxruntime's own errors end in UnicodeDecodeError
                name = self.text(start, stop, "name in a node")
                if number == 1:
                    names.append(name)
        if op_type in BY_COLUMN:
            by_column.append((op_type, names))
        self.check_node(op_type, names, n_outputs, integers)
        self.op_types[f"{domain}.{op_type}" if domain else op_type] += 1

    def check_node(
        self, op_type: str, names: list[str], n_outputs: int, integers: dict[str, int]
    ) -> None:
        """What onnxruntime 1.32 does not check, and then crashes or opens another file."""
        if op_type == "EPContext":
            self.refuse("an EPContext node may load another file: expected plain operators")
        if op_type == "LayerNormalization" and "" in names:
            self.refuse(f"a LayerNormalization has an input without a name: expected one: {AGAIN}")
        if op_type == "Split" and integers.get("num_outputs", n_outputs) != n_outputs:
            self.refuse(
                f"a Split has num_outputs {integers['num_outputs']}, and {n_outputs} outputs: "
                f"expected the same: {AGAIN}"
            )
        for name, value in integers.items():
            if abs(value) > MAX_INT32 and op_type != "Constant":  # kernels cut them to 32 bits
                self.refuse(
                    f"attribute {name[:80]!r} of {op_type[:80]!r} is {value}: "
                    f"expected at most {MAX_INT32}: {AGAIN}"
                )

    def attribute(self, pos: int, end: int, depth: int, integers: dict[str, int]) -> None:
        name, integer = "", 0
        for number, start, stop in self.fields(ATTRIBUTE, pos, end):
            if number == 1:
                name = self.text(start, stop, "attribute name")
            elif number == 3:
                integer = signed(start)
            elif number in (5, 10):
                self.tensor(start, stop)
            elif number in (6, 11):
                self.graph(start, stop, depth + 1)
            elif number in (14, 15):
                self.type(start, stop)
            elif number in (22, 23):
                self.refuse_sparse()
        if name in integers:  # which of the two would count?
            self.refuse(f"a node has two attributes {name[:80]!r}: {AGAIN}")
        if len(integers) == MAX_ATTRIBUTES:
            self.refuse(f"a node of more than {MAX_ATTRIBUTES} attributes: {AGAIN}")
        integers[name] = integer

    def refuse_sparse(self) -> NoReturn:
        # onnxruntime makes them dense: 120 bytes of file can ask for any amount of memory.
        self.refuse("holds a sparse tensor, which may name other files: expected dense ones")

    def tensor(self, pos: int, end: int) -> Tensor:
        """A tensor whose contents, raw or typed, have the length that its shape asks for."""
        self.tensors_seen += 1
        if self.tensors_seen > MAX_ITEMS:
            self.refuse(f"more than {MAX_ITEMS} tensors: expected a model of pico-edge")
        name, data_type, dims = "", 0, list[int]()
        stored: Counter[int] = Counter()  # field of contents -> elements there; bytes if raw
        n_bytes, contents = 0, -1
        for number, start, stop in self.fields(TENSOR, pos, end):
            if number == 1:
                for dim in (start,) if stop < 0 else self.packed(start, stop):
                    dims.append(dim)
                    if len(dims) > MAX_RANK:
                        self.refuse(f"a tensor of more than {MAX_RANK} dimensions: {AGAIN}")
            elif number == 2:
                data_type = start
            elif number == 8:
                name = self.text(start, stop, "tensor name")
            elif number == 13 or (number == 14 and start != 0):
                self.refuse_external(pos, end)
            elif number == 3:
                self.refuse(f"tensor {name[:80]!r} is a segment of another: {AGAIN}")
            elif number in (4, 5, 6, 7, 9, 10, 11):
                n_bytes += stop - start if stop >= 0 else 0
                contents = start if number == RAW_DATA else contents
                stored[number] += self.n_stored(number, start, stop)
        element = ELEMENTS.get(data_type)
        if element is None:
            self.refuse(f"tensor {name[:80]!r} has element type {data_type}: expected a known one")
        n_elements = self.n_elements(name, dims)
        if RAW_DATA in stored and element.name != "string":
            field, unit = RAW_DATA, "bytes"
            expected = -(-n_elements * element.bits // 8)
        else:
            field, unit = element.field, "values"
            per_value = 8 // element.bits if 0 < element.bits < 8 else 1  # small ones share a byte
            expected = -(-n_elements // per_value)
        found = stored.pop(field, 0)
        if found != expected or stored:
            self.refuse(
                f"tensor {name[:80]!r} stores {found} {unit}: "
                f"{element.name} {dims} takes {expected}, and nothing else: {AGAIN}"
            )
        return Tensor(name, element.name, tuple(dims), n_bytes, (pos, end), contents)

    def n_stored(self, number: int, start: int, stop: int) -> int:
        """Values in one occurrence of a contents field of TensorProto; bytes for raw_data."""
        if number == RAW_DATA:
            return stop - start
        size = {4: 4, 10: 8}.get(number)
        if size is None:
            is_one = stop < 0 or number == 6
            return 1 if is_one else self.count_varints(start, stop)
        if (stop - start) % size:
            raise WireError(f"byte {start}: no valid packed numbers")
        return (stop - start) // size

    def n_elements(self, name: str, dims: list[int]) -> int:
        total = bound = 1  # bound leaves out zeros: onnxruntime may multiply in any order
        for dim in dims:
            total *= dim
            bound *= dim or 1
            if bound > MAX_ELEMENTS:  # a negative number arrives as one above 2^63
                self.refuse(
                    f"tensor {name[:80]!r} has dimensions {[signed(dim) for dim in dims]}: "
                    f"expected none negative, and at most {MAX_ELEMENTS} elements"
                )
        return total

    def refuse_external(self, pos: int, end: int) -> NoReturn:
        """pos, end: the tensor. Only its own words are read, never the file that they name."""
        name, location = "", ""
        for number, start, stop in self.fields(TENSOR, pos, end):
            if number == 8:
                name = self.text(start, stop, "tensor name")
            elif number == 13:
                key, value = self.entry(start, stop)
                if self.starts_with(key, b"location"):
                    location = self.text(*value, "location of external data")
        self.refuse(
            f"tensor {name[:80]!r} is in another file, {location[:80]!r}: expected one "
            "self-contained file, export with `pico-edge export`"
        )

    def value(self, pos: int, end: int) -> ValueInfo:
        self.values_seen += 1
        if self.values_seen > MAX_ITEMS:
            self.refuse(f"more than {MAX_ITEMS} named values: expected a model of pico-edge")
        name = ""
        elem_type: str = "?"
        shape: tuple[int | str, ...] = ("...",)
        for number, start, stop in self.fields(VALUE, pos, end):
            if number == 1:
                name = self.text(start, stop, "value name")
            elif number == 2:
                elem_type, shape = self.type(start, stop)
        return ValueInfo(name, elem_type, shape)

    def type(self, pos: int, end: int) -> tuple[str, tuple[int | str, ...]]:
        elem_type: str = "?"
        shape: tuple[int | str, ...] = ("...",)
        for number, start, stop in self.fields(TYPE, pos, end):
            if number == 1:
                elem_type, shape = self.tensor_type(start, stop)
            elif number != 6:
                self.refuse(f"a value is a {OTHER_TYPES[number]}: expected tensors only")
        return elem_type, shape

    def tensor_type(self, pos: int, end: int) -> tuple[str, tuple[int | str, ...]]:
        elem_type: str = "?"
        shape: tuple[int | str, ...] = ("...",)
        for number, start, stop in self.fields(TENSOR_TYPE, pos, end):
            if number == 1:
                if start not in ELEMENTS:
                    self.refuse(f"a value has element type {start}: expected a known one")
                elem_type = ELEMENTS[start].name
            elif number == 2:
                shape = self.shape(start, stop)
        return elem_type, shape

    def shape(self, pos: int, end: int) -> tuple[int | str, ...]:
        axes: list[int | str] = []
        for _, start, stop in self.fields(SHAPE, pos, end):
            axis: int | str = "?"
            for number, value, last in self.fields(DIMENSION, start, stop):
                if number == 3:
                    continue
                if axis != "?":
                    self.refuse(f"an axis has both a size and a name: {AGAIN}")
                if number == 2:
                    axis = self.text(value, last, "axis name") or "?"
                elif value > MAX_ELEMENTS:
                    self.refuse(f"an axis of size {signed(value)}: {AGAIN}")
                else:
                    axis = value
            axes.append(axis)
            if len(axes) > MAX_RANK:
                self.refuse(f"a value of more than {MAX_RANK} axes: {AGAIN}")
        return tuple(axes)

    # pico_edge's own metadata.

    def entry(self, pos: int, end: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where the key and the value of a StringStringEntryProto are; (0, 0) if absent."""
        key = value = (0, 0)
        for number, start, stop in self.fields(ENTRY, pos, end):
            if number == 1:
                key = start, stop
            else:
                value = start, stop
        return key, value

    def starts_with(self, span: tuple[int, int], prefix: bytes) -> bool:
        start, end = span
        return self.data[start : min(end, start + len(prefix))] == prefix

    def metadata(self, entries: list[tuple[int, int]]) -> tuple[dict[str, Any], GPTConfig]:
        """The parsed values of the pico_edge keys, and the config among them."""
        prefix = artefact.KEY_PREFIX.encode()
        spans: dict[str, tuple[int, int]] = {}
        for span in entries:
            key_span, value_span = self.entry(*span)
            if not self.starts_with(key_span, prefix):
                continue
            key = self.text(*key_span, "metadata key")
            if key in spans:  # onnxruntime would take the last
                self.refuse(f"metadata {key[:80]!r} occurs twice: {AGAIN}")
            spans[key] = value_span
        if not spans:
            self.refuse("no pico_edge metadata: expected a file of `pico-edge export`")
        if artefact.FORMAT_VERSION_KEY in spans:
            version = self.json(artefact.FORMAT_VERSION_KEY, *spans[artefact.FORMAT_VERSION_KEY])
            self.check_format_version(version)
        missing = [key for key in artefact.KEYS if key not in spans]
        if missing:
            self.refuse(f"metadata lacks {', '.join(missing)}: {AGAIN}")
        total = sum(end - start for start, end in spans.values())
        if total > MAX_METADATA_TOTAL_BYTES:
            self.refuse(
                f"metadata of {total} bytes in all: expected at most {MAX_METADATA_TOTAL_BYTES}"
            )
        values = {key: self.json(key, *span) for key, span in spans.items()}
        for key in (*artefact.KEYS[1:], *artefact.OPTIONAL_KEYS):
            if not isinstance(values.get(key, {}), dict):
                self.refuse(f"metadata {key} is not an object: {AGAIN}")
        try:
            config = GPTConfig.from_dict(values[artefact.CONFIG_KEY])
        except ArtefactError as error:
            self.refuse(f"{error}: {AGAIN}")
        self.check_tokenizer(values[artefact.TOKENIZER_KEY], config)
        return values, config

    def json(self, key: str, start: int, end: int) -> Any:
        most = artefact.MAX_METADATA_BYTES
        if key == artefact.NGRAMS_KEY:
            most = artefact.MAX_NGRAMS_BYTES
        if end - start > most:
            self.refuse(f"metadata {key[:80]!r} has {end - start} bytes: expected at most {most}")
        try:
            return json.loads(
                self.data[start:end].decode("utf-8"),
                parse_constant=_no_constant,
                parse_float=_finite,
            )
        except UnicodeDecodeError:
            self.refuse(f"metadata {key[:80]!r} is not UTF-8: {AGAIN}")
        except (ValueError, RecursionError) as error:
            self.refuse(f"metadata {key[:80]!r} is not JSON ({error}): {AGAIN}")

    def check_format_version(self, version: object) -> None:
        known = artefact.FORMAT_VERSION
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            self.refuse(f"model format {str(version)[:40]!r}: expected a number from 1: {AGAIN}")
        if version > known:
            reads = "1" if known == 1 else f"1-{known}"
            self.refuse(f"model format {version}, this pico-edge reads {reads}: {UPGRADE}")

    def check_tokenizer(self, values: dict[str, Any], config: GPTConfig) -> None:
        """The outer shape only: `tokenizer_from_dict` looks at every token, and takes its time."""
        kind, tokens, pattern = (values.get(name) for name in ("kind", "tokens", "pattern"))
        if kind == SimpleTokenizer.kind and values.keys() == {"kind"}:
            n_vocab = SimpleTokenizer.n_vocab
        elif kind == BPETokenizer.kind and values.keys() == {"kind", "pattern", "tokens"}:
            if not isinstance(tokens, list) or len(tokens) > MAX_RANKS:
                self.refuse(f"tokenizer: expected a list of at most {MAX_RANKS} tokens: {AGAIN}")
            if not isinstance(pattern, str) or pattern not in PATTERNS:
                self.refuse(
                    f"tokenizer pattern {str(pattern)[:80]!r}: expected one of {sorted(PATTERNS)}"
                )
            n_vocab = len(tokens) + 1  # and the end of text
        else:
            self.refuse(
                f"tokenizer of kind {str(kind)[:80]!r} with {len(values)} fields: "
                f"expected 'simple' or 'bpe': {AGAIN}"
            )
        if n_vocab > config.vocab_size:
            self.refuse(f"tokenizer of {n_vocab} ids for a model of {config.vocab_size}: {AGAIN}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999 is infinite, and nothing could print it as JSON again
        raise ValueError(f"{text[:40]} is no JSON number")
    return value
