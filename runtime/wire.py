"""The protobuf wire format, and the messages of ONNX as far as it allows: where each field is.

Reads a map of bytes in place and copies nothing but names. What a message does not know it refuses,
so that every field onnxruntime acts on has been looked at. Knows nothing of what fields mean
(`preflight` does). Sources: https://protobuf.dev/programming-guides/encoding/ and onnx.proto of
ONNX 1.23 (IR 14). Try: `list(Reader(path, data).fields(MODEL, 0, len(data)))`.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from pico_edge.errors import ArtefactError

# Ours are smaller by orders of magnitude: these bound the time and memory a hostile file can take.
MAX_FIELDS = 20_000_000
MAX_NAME_BYTES = 4096
MAX_MESSAGE_CHARACTERS = 2000

AGAIN = "copy or export it again"


class WireError(Exception):
    """The bytes are not the protobuf message that they should be."""


# Wire types, and MANY for a field that may be repeated.
VARINT, FIXED64, LENGTH, FIXED32, MANY = 0, 1, 2, 5, 8


class Message(NamedTuple):
    """A message: tag (field number << 3 | wire type) -> whether the field may be repeated."""

    name: str
    tags: dict[int, bool]


RAW_DATA = 9  # of TensorProto


def message(name: str, fields: dict[int, int]) -> Message:
    tags = {}
    for number, kind in fields.items():
        tags[number << 3 | kind & 7] = bool(kind & MANY)
        if kind & MANY:  # repeated numbers come one by one or packed
            tags[number << 3 | LENGTH] = True
    return Message(name, tags)


_L, _M = LENGTH, LENGTH | MANY
MODEL = message(
    "ModelProto",
    {
        1: VARINT,
        2: _L,
        3: _L,
        4: _L,
        5: VARINT,
        6: _L,
        7: _L,
        8: _M,
        14: _M,
        20: _M,
        25: _M,
        26: _M,
    },
)
OPSET = message("OperatorSetIdProto", {1: _L, 2: VARINT})
ENTRY = message("StringStringEntryProto", {1: _L, 2: _L})
GRAPH = message(
    "GraphProto", {1: _M, 2: _L, 5: _M, 10: _L, 11: _M, 12: _M, 13: _M, 14: _M, 15: _M, 16: _M}
)
NODE = message("NodeProto", {1: _M, 2: _M, 3: _L, 4: _L, 5: _M, 6: _L, 7: _L, 8: _L, 9: _M, 10: _M})
ATTRIBUTE = message(
    "AttributeProto",
    {
        **dict.fromkeys((1, 4, 5, 6, 13, 14, 21, 22), _L),
        **dict.fromkeys((9, 10, 11, 15, 23), _M),
        **dict.fromkeys((3, 20), VARINT),
        2: FIXED32,
        7: FIXED32 | MANY,
        8: VARINT | MANY,
    },
)
TENSOR = message(
    "TensorProto",
    {
        **dict.fromkeys((3, 8, 9, 12), _L),
        **dict.fromkeys((6, 13, 16), _M),
        **dict.fromkeys((1, 5, 7, 11), VARINT | MANY),
        **dict.fromkeys((2, 14), VARINT),
        4: FIXED32 | MANY,
        10: FIXED64 | MANY,
    },
)
VALUE = message("ValueInfoProto", {1: _L, 2: _L, 3: _L, 4: _M})
TYPE = message("TypeProto", {1: _L, 4: _L, 5: _L, 6: _L, 7: _L, 8: _L, 9: _L})
TENSOR_TYPE = message("TypeProto.Tensor", {1: VARINT, 2: _L})
SHAPE = message("TensorShapeProto", {1: _M})
DIMENSION = message("TensorShapeProto.Dimension", {1: VARINT, 2: _L, 3: _L})

OTHER_TYPES = {4: "sequence", 5: "map", 7: "opaque", 8: "sparse_tensor", 9: "optional"}


class Element(NamedTuple):
    """An element type: name, size in bits, and the TensorProto field of its values when not raw."""

    name: str
    bits: int
    field: int


ELEMENTS = {
    1: Element("float32", 32, 4),
    2: Element("uint8", 8, 5),
    3: Element("int8", 8, 5),
    4: Element("uint16", 16, 5),
    5: Element("int16", 16, 5),
    6: Element("int32", 32, 5),
    7: Element("int64", 64, 7),
    8: Element("string", 0, 6),
    9: Element("bool", 8, 5),
    10: Element("float16", 16, 5),
    11: Element("float64", 64, 10),
    12: Element("uint32", 32, 11),
    13: Element("uint64", 64, 11),
    16: Element("bfloat16", 16, 5),
    17: Element("float8e4m3fn", 8, 5),
    18: Element("float8e4m3fnuz", 8, 5),
    19: Element("float8e5m2", 8, 5),
    20: Element("float8e5m2fnuz", 8, 5),
    21: Element("uint4", 4, 5),
    22: Element("int4", 4, 5),
    23: Element("float4e2m1", 4, 5),
    24: Element("float8e8m0", 8, 5),
    25: Element("uint2", 2, 5),
    26: Element("int2", 2, 5),
}

_LONG_VARINT = re.compile(rb"[\x80-\xff]{10}")
_CONTINUED = bytes(range(128, 256))
_CHUNK_BYTES = 1 << 20


class Reader:
    """One pass over one file: where it is, and how many fields were seen."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.fields_seen = 0

    def refuse(self, text: str) -> NoReturn:
        # Names in the file are anyone's: they must not break the line or control the terminal.
        line = "".join(c if c.isprintable() else "?" for c in text[:MAX_MESSAGE_CHARACTERS])
        raise ArtefactError(f"{self.path}: {line}")

    def fields(self, message: Message, pos: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(number, value, -1) for a varint, (number, start, end) for all other fields."""
        data, tags = self.data, message.tags
        seen = 0
        while pos < end:
            start = pos
            tag = data[pos]
            pos += 1
            if tag > 127:
                tag, pos = self.varint(start, end)
            repeated = tags.get(tag)
            if repeated is None:
                raise WireError(
                    f"byte {start}: {message.name} has no field {tag >> 3} of wire type {tag & 7}"
                )
            number = tag >> 3
            if not repeated:  # protobuf would merge two messages, or take the last of two values
                if seen >> number & 1:
                    raise WireError(f"byte {start}: {message.name} repeats field {number}")
                seen |= 1 << number
            wire = tag & 7
            if wire == VARINT:
                value, pos = self.varint(pos, end)
                yield number, value, -1
            else:
                length = 4 if wire == FIXED32 else 8
                if wire == LENGTH:
                    length, pos = self.varint(pos, end)
                if length > end - pos:
                    raise WireError(
                        f"byte {start}: field of {length} bytes in the last {end - pos} "
                        f"of {message.name}"
                    )
                yield number, pos, pos + length
                pos += length
            self.fields_seen += 1
            if self.fields_seen > MAX_FIELDS:
                self.refuse(f"more than {MAX_FIELDS} fields: expected a model of pico-edge")

    def varint(self, pos: int, end: int) -> tuple[int, int]:
        """The unsigned number at pos, below 2^64, and the position after it."""
        data = self.data
        if pos < end and data[pos] < 128:  # nearly all of them
            return data[pos], pos + 1
        start, value, shift = pos, 0, 0
        while pos < end:
            byte = data[pos]
            pos += 1
            value |= (byte & 127) << shift
            if byte < 128:
                if value >> 64:
                    break
                return value, pos
            shift += 7
            if shift == 70:
                break
        raise WireError(f"byte {start}: no valid number")

    def packed(self, pos: int, end: int) -> Iterator[int]:
        while pos < end:
            value, pos = self.varint(pos, end)
            yield value

    def count_varints(self, pos: int, end: int) -> int:
        """How many numbers are packed there, found without decoding them."""
        if pos == end:
            return 0
        if self.data[end - 1] > 127 or _LONG_VARINT.search(self.data, pos, end) is not None:
            raise WireError(f"byte {pos}: no valid packed numbers")
        return sum(
            len(self.data[start : min(start + _CHUNK_BYTES, end)].translate(None, _CONTINUED))
            for start in range(pos, end, _CHUNK_BYTES)
        )

    def text(self, pos: int, end: int, what: str) -> str:
        if end - pos > MAX_NAME_BYTES:
            self.refuse(f"{what} of {end - pos} bytes: expected at most {MAX_NAME_BYTES}")
        try:
            return self.data[pos:end].decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(f"{what} at byte {pos} is not UTF-8: {AGAIN}")


def signed(value: int) -> int:
    """A protobuf int64 from the unsigned number on the wire."""
    return value - (1 << 64) if value >> 63 else value
