"""Hostile, damaged and foreign model files are refused in one line, unread by onnxruntime.

Files are built by a wire-format writer of our own: no library would write most of them.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pico_edge import artefact
from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError
from pico_edge.runtime import preflight, wire
from pico_edge.runtime.contract import ValueInfo
from pico_edge.runtime.preflight import Tensor, check_unchanged, read_model_file
from pico_edge.tokenizer import BPETokenizer, SimpleTokenizer

TINY = Path(__file__).parents[1] / "data" / "tiny.onnx"
CONFIG = GPTConfig(block_size=8, vocab_size=272, n_layer=1, n_head=2, n_embd=16)
FLOAT, UINT8, INT8, INT32, INT64, STRING, FLOAT16, INT4 = 1, 2, 3, 6, 7, 8, 10, 22

# The wire format: https://protobuf.dev/programming-guides/encoding/


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def entry(key: str, value: str | bytes) -> bytes:
    return field(1, key) + field(2, value)


def tensor(
    dims: list[int], data_type: int = FLOAT, contents: bytes | None = None, name: str = "w"
) -> bytes:
    """A TensorProto; its contents are raw zeros of 4 bytes per element unless given as fields."""
    if contents is None:
        n = 1
        for dim in dims:
            n *= dim
        contents = field(9, bytes(4 * n))
    return b"".join(field(1, dim) for dim in dims) + field(2, data_type) + field(8, name) + contents


def external(location: str, *more: bytes) -> bytes:
    entries = [entry("location", location), *more]
    return field(14, 1) + b"".join(field(13, one) for one in entries)


def external_tensor(location: str) -> bytes:
    return tensor([4], contents=external(location))


def node(
    op_type: str = "Identity", *attributes: bytes, domain: str = "", extra: bytes = b""
) -> bytes:
    fields = field(1, "a") + field(2, "b") + field(4, op_type) + field(7, domain)
    return fields + b"".join(field(5, attribute) for attribute in attributes) + extra


def graph_attribute(graph: bytes) -> bytes:
    return field(1, "body") + field(20, 5) + field(6, graph)


def value(name: str, elem_type: int, shape: tuple[int | str, ...]) -> bytes:
    dims = b"".join(
        field(1, field(2, axis) if isinstance(axis, str) else field(1, axis)) for axis in shape
    )
    return field(1, name) + field(2, field(1, field(1, elem_type) + field(2, dims)))


Values = dict[str, tuple[int, tuple[int | str, ...]]]


def contract() -> tuple[Values, Values]:
    """The inputs and outputs of CONFIG's graph, by name."""
    cache = (FLOAT, ("batch", CONFIG.n_head, "capacity", CONFIG.head_dim))
    inputs: Values = {
        "input_ids": (INT64, ("batch", "seq")),
        "position_ids": (INT64, ("batch", "seq")),
        "seqlens_k": (INT32, ("batch",)),
        "total_seq_len": (INT32, ()),
        "out_index": (INT64, ("n_out",)),
        **dict.fromkeys(artefact.past_names(CONFIG.n_layer), cache),
    }
    outputs: Values = {
        "logits": (FLOAT, ("n_out", CONFIG.vocab_size)),
        **dict.fromkeys(artefact.present_names(CONFIG.n_layer), cache),
    }
    return inputs, outputs


def metadata(**changes: object) -> dict[str, bytes]:
    """Sound values of all keys, changed by the last part of their names."""
    values: dict[str, Any] = {
        "format_version": artefact.FORMAT_VERSION,
        "config": CONFIG.to_dict(),
        "tokenizer": SimpleTokenizer().to_dict(),
        "sampling": artefact.SAMPLING_DEFAULTS,
        "export": {"target": "cpu"},
        "provenance": {},
        "parity": {},
        **changes,
    }
    return {
        artefact.KEY_PREFIX + key: value if isinstance(value, bytes) else json.dumps(value).encode()
        for key, value in values.items()
    }


def model(
    *graph_fields: bytes,
    entries: dict[str, bytes] | None = None,
    inputs: Values | None = None,
    outputs: Values | None = None,
    ir_version: int = 10,
    opsets: tuple[tuple[str, int], ...] = (("", 20), ("com.microsoft", 1)),
    more: bytes = b"",
) -> bytes:
    """A sound file of CONFIG, and what is asked for on top of it."""
    sound_inputs, sound_outputs = contract()
    inputs = sound_inputs if inputs is None else inputs
    outputs = sound_outputs if outputs is None else outputs
    graph = b"".join(
        [
            field(1, node("Gather")),
            field(2, "main"),
            field(5, tensor([3, 2])),
            *(field(11, value(name, *described)) for name, described in inputs.items()),
            *(field(12, value(name, *described)) for name, described in outputs.items()),
            *graph_fields,
        ]
    )
    entries = metadata() if entries is None else entries
    return b"".join(
        [
            field(1, ir_version),
            field(2, "test"),
            field(7, graph),
            *(field(8, field(1, domain) + field(2, version)) for domain, version in opsets),
            *(field(14, entry(key, text)) for key, text in entries.items()),
            more,
        ]
    )


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[..., str]:
    """Writes bytes to a file and returns the message of its refusal."""

    def check(data: bytes, **options: bool) -> str:
        path = tmp_path / "model.onnx"
        path.write_bytes(data)
        with pytest.raises(ArtefactError) as refused:
            read_model_file(path, **options)
        message = str(refused.value)
        assert message.startswith(str(path))
        assert "\n" not in message
        assert refused.value.exit_code == 3
        return message.removeprefix(f"{path}: ")

    return check


def accept(tmp_path: Path, data: bytes, **options: bool) -> preflight.ModelFile:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    return read_model_file(path, **options)


# What is accepted, and what is said about it.


def test_a_sound_file_is_described(tmp_path):
    found = accept(tmp_path, model(field(1, node("FastGelu", domain="com.microsoft"))))
    assert found.config == CONFIG
    assert found.metadata[artefact.SAMPLING_KEY] == artefact.SAMPLING_DEFAULTS
    assert set(found.metadata) == set(artefact.KEYS)
    assert (found.ir_version, found.producer) == (10, "test")
    assert found.opsets == {"": 20, "com.microsoft": 1}
    assert found.node_count == 2
    assert found.op_types == {"Gather": 1, "com.microsoft.FastGelu": 1}
    (weight,) = found.initializers
    assert weight == Tensor("w", "float32", (3, 2), 24, weight.span, weight.contents)
    assert found.path.read_bytes()[weight.contents :][:24] == bytes(24)
    data = found.path.read_bytes()
    assert data[slice(*weight.span)] == tensor([3, 2])
    assert data[slice(*found.graph_span)].startswith(field(1, node("Gather")))
    assert found.inputs[0] == ValueInfo("input_ids", "int64", ("batch", "seq"))
    assert found.inputs[3] == ValueInfo("total_seq_len", "int32", ())
    assert found.outputs[0] == ValueInfo("logits", "float32", ("n_out", 272))
    assert found.size == found.path.stat().st_size


def test_the_committed_model_is_described_as_onnx_sees_it():
    onnx = pytest.importorskip("onnx")
    found = read_model_file(TINY)
    expected = onnx.load(TINY)
    assert found.node_count == len(expected.graph.node)
    assert sum(found.op_types.values()) == found.node_count
    assert [(t.name, t.shape, t.n_bytes) for t in found.initializers] == [
        (t.name, tuple(t.dims), len(t.raw_data)) for t in expected.graph.initializer
    ]
    assert [value.name for value in found.inputs] == [one.name for one in expected.graph.input]
    assert found.config is not None
    assert [value.name for value in found.outputs] == artefact.output_names(found.config.n_layer)
    assert found.opsets == {one.domain: one.version for one in expected.opset_import}


def portable_contract() -> tuple[Values, Values]:
    """The inputs and outputs of CONFIG's graph for the target portable."""
    cache = (FLOAT, ("batch", CONFIG.n_head, "past_seq", CONFIG.head_dim))
    inputs: Values = {
        "input_ids": (INT64, ("batch", "seq")),
        "attention_mask": (INT64, ("batch", "total_seq")),
        "position_ids": (INT64, ("batch", "seq")),
        **dict.fromkeys(artefact.past_names(CONFIG.n_layer), cache),
    }
    outputs: Values = {
        "logits": (FLOAT, ("batch", "seq", CONFIG.vocab_size)),
        **dict.fromkeys(artefact.present_names(CONFIG.n_layer), cache),
    }
    return inputs, outputs


PORTABLE = {"target": "portable"}


def test_a_portable_file_is_accepted(tmp_path):
    inputs, outputs = portable_contract()
    assert list(inputs) == artefact.portable_input_names(CONFIG.n_layer)
    entries = metadata(export=PORTABLE)
    found = accept(
        tmp_path, model(entries=entries, inputs=inputs, outputs=outputs, opsets=(("", 18),))
    )
    assert found.metadata[artefact.EXPORT_KEY] == PORTABLE
    assert found.inputs[1] == ValueInfo("attention_mask", "int64", ("batch", "total_seq"))


def test_each_target_is_held_to_its_own_contract(refusal):
    inputs, outputs = portable_contract()
    message = refusal(model(inputs=inputs, outputs=outputs))  # says cpu
    assert "5 inputs and 3 outputs: expected 7 and 3" in message
    message = refusal(model(entries=metadata(export=PORTABLE)))
    assert "7 inputs and 3 outputs: expected 5 and 3" in message
    outputs["logits"] = (FLOAT, ("batch", CONFIG.vocab_size))
    inputs["attention_mask"] = (FLOAT, ("batch", "total_seq"))
    message = refusal(model(entries=metadata(export=PORTABLE), inputs=inputs, outputs=outputs))
    assert "input attention_mask expected int64 (B, T), found float32 (batch, total_seq)" in message
    assert f"output logits expected float32 or float16 (B, S, {CONFIG.vocab_size})" in message


@pytest.mark.parametrize("elem_type, name", [(INT8, "int8"), (FLOAT16, "float16")])
def test_a_smaller_cache_type_is_accepted(tmp_path, elem_type, name):
    inputs, outputs = contract()
    for values in (inputs, outputs):
        for key in values:
            if "." in key:
                values[key] = (elem_type, values[key][1])
    found = accept(tmp_path, model(inputs=inputs, outputs=outputs))
    assert found.inputs[-1].elem_type == name


def test_a_bpe_tokenizer_is_accepted_without_importing_tiktoken(tmp_path):
    tokenizer = BPETokenizer([bytes([byte]) for byte in range(256)]).to_dict()
    path = tmp_path / "model.onnx"
    path.write_bytes(model(entries=metadata(tokenizer=tokenizer)))
    code = (
        "import sys; from pico_edge.runtime.preflight import read_model_file;"
        "read_model_file(sys.argv[1]); sys.exit('tiktoken' in sys.modules)"
    )
    assert read_model_file(path).metadata[artefact.TOKENIZER_KEY] == tokenizer
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 0


# Other files: never opened.


@pytest.fixture(scope="module")
def opened() -> list[str]:
    """Paths that this process opens; clear it before use. An audit hook cannot be taken away."""
    paths: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            paths.append(str(arguments[0]))

    sys.addaudithook(hook)
    return paths


def with_sparse(values: bytes, indices: bytes) -> bytes:
    return field(1, values) + field(2, indices) + field(3, 4)


EXTERNAL_PLACES: dict[str, Callable[[bytes], bytes]] = {
    "initializer": lambda t: model(field(5, t)),
    "constant": lambda t: model(
        field(1, node("Constant", field(1, "value") + field(20, 4) + field(5, t)))
    ),
    "tensors attribute": lambda t: model(
        field(1, node("Constant", field(1, "value") + field(20, 9) + field(10, t)))
    ),
    "subgraph": lambda t: model(field(1, node("If", graph_attribute(field(5, t))))),
    "graphs attribute": lambda t: model(
        field(1, node("If", field(1, "value") + field(20, 10) + field(11, field(5, t))))
    ),
    "constant in a subgraph": lambda t: model(
        field(1, node("If", graph_attribute(field(1, node("Constant", field(5, t))))))
    ),
    "sparse values": lambda t: model(field(15, with_sparse(t, tensor([1], INT64)))),
    "sparse indices": lambda t: model(field(15, with_sparse(tensor([1]), t))),
    "sparse attribute": lambda t: model(
        field(1, node("Constant", field(22, with_sparse(t, tensor([1], INT64)))))
    ),
    "function": lambda t: model(
        more=field(25, field(1, "F") + field(7, node("Constant", field(5, t))))
    ),
    "training graph": lambda t: model(more=field(20, field(1, field(5, t)))),
}


@pytest.mark.parametrize("place", EXTERNAL_PLACES)
@pytest.mark.parametrize("location", ["/abs", "../w.data", "a/../../w.data", "w.data", "link"])
def test_external_data_is_refused_and_its_target_never_opened(
    tmp_path, refusal, opened, place, location
):
    # Opening a pipe without a writer would hang; the hook sees an attempt of any kind.
    os.mkfifo(tmp_path / "w.data")
    (tmp_path / "link").symlink_to("w.data")
    location = str(tmp_path / "w.data") if location == "/abs" else location
    data = EXTERNAL_PLACES[place](external_tensor(location))
    opened.clear()
    message = refusal(data)
    assert [path for path in opened if str(tmp_path) in path or "w.data" in path] == [
        str(tmp_path / "model.onnx"),
        str(tmp_path / "model.onnx"),
    ]  # written by the test, read by us
    if not place.startswith(("sparse", "function", "training")):
        assert "'w'" in message
        assert "in another file" in message
        assert "w.data" in message or "link" in message
        assert "self-contained" in message


@pytest.mark.parametrize(
    "contents",
    [
        field(14, 1),
        field(14, 2),
        field(13, entry("location", "x.data")),
        external("x.data", entry("__class__", "os.system")),
        external("x.data", entry("length", str(1 << 60))),
        external("x.data", entry("offset", "-1")),
        external("x.data") + field(9, bytes(16)),
        external("x" * 5000),
    ],
)
def test_every_form_of_external_data_is_refused(refusal, contents):
    message = refusal(model(field(5, tensor([4], contents=contents))))
    assert "in another file" in message or "location of external data of 5000 bytes" in message


def test_a_name_in_the_file_cannot_break_the_line_or_the_terminal(refusal):
    message = refusal(model(field(5, external_tensor("\x1b[2Jx\ny\u202e.data"))))
    assert all(character.isprintable() for character in message)
    inputs, outputs = contract()
    inputs["seqlens_k"] = (INT32, ("a\x1b\nb", 1))
    assert "a??b" in refusal(model(inputs=inputs, outputs=outputs))


# Operators, opsets, sizes.


@pytest.mark.parametrize(
    "data, expected",
    [
        (model(field(1, node(domain="evil.org"))), "operators of domain 'evil.org'"),
        (model(field(1, node(domain="com.microsoft.nchwc"))), "com.microsoft.nchwc"),
        (
            model(field(1, node("If", graph_attribute(field(1, node(domain="evil.org")))))),
            "operators of domain 'evil.org'",
        ),
        (model(opsets=(("", 20), ("evil.org", 1))), "operators of domain 'evil.org'"),
        (model(opsets=(("", 99),)), "opset 99 of domain '': this pico-edge reads 1-28: upgrade"),
        (model(opsets=(("", 20), ("com.microsoft", 2))), "opset 2 of domain 'com.microsoft'"),
        (model(opsets=(("", 0),)), "opset 0"),
        (model(opsets=(("", -1),)), "opset 18446744073709551615"),
        (model(opsets=(("", 20), ("ai.onnx", 19))), "twice"),
        (model(opsets=()), "names no opset"),
        (model(ir_version=15), "ONNX IR version 15: this pico-edge reads 1-14: upgrade pico-edge"),
        (model(ir_version=0), "IR version 0"),
        (model(ir_version=-1), "IR version 18446744073709551615"),
        (model(more=field(25, field(1, "F"))), "functions of its own"),
        (model(more=field(20, b"")), "training"),
        (model(field(15, with_sparse(tensor([1]), tensor([1])))), "sparse"),
        (model(field(1, node("EPContext", domain="com.microsoft"))), "EPContext"),
        (model(field(1, node(extra=field(3, b"\xff")))), "name in a node at byte"),
    ],
)
def test_what_we_do_not_know_is_refused(refusal, data, expected):
    assert expected in refusal(data)


def test_the_long_name_of_the_standard_domain_is_accepted(tmp_path):
    found = accept(
        tmp_path, model(field(1, node("Add", domain="ai.onnx")), opsets=(("ai.onnx", 20),))
    )
    assert found.opsets == {"": 20}
    assert found.op_types["Add"] == 1


def nested(depth: int) -> bytes:
    inner = node()
    for _ in range(depth):
        inner = node("If", graph_attribute(field(1, inner)))
    return model(field(1, inner))


def test_subgraphs_are_accepted_to_four_levels_and_refused_below(tmp_path, refusal):
    assert accept(tmp_path, nested(4)).op_types["If"] == 4
    for depth in (5, 10_000):
        assert "nested deeper than 4" in refusal(nested(depth))


def test_a_million_and_one_nodes_are_refused(refusal):
    data = model(field(1, b"") * 1_000_000)  # and the one of every model
    assert "more than 1000000 nodes" in refusal(data)


def test_nodes_cost_no_memory(tmp_path):
    data = model(field(1, node()) * 20_000)
    tracemalloc.start()
    try:
        assert accept(tmp_path, data).node_count == 20_001
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 500_000


@pytest.mark.parametrize(
    "data, expected",
    [
        (model(field(5, tensor([0])) * 100_000), "more than 100000 tensors"),
        (model(field(13, b"") * 100_001), "more than 100000 named values"),
        (model(more=field(14, b"") * 100_001), "more than 100000 entries"),
        (model(field(1, node("If", *[field(1, str(i)) for i in range(1001)]))), "1000 attributes"),
    ],
)
def test_what_costs_memory_is_counted(refusal, data, expected):
    assert expected in refusal(data)


def test_the_number_of_fields_is_bounded(refusal, monkeypatch):
    monkeypatch.setattr(wire, "MAX_FIELDS", 1000)
    assert "more than 1000 fields" in refusal(model(field(1, field(1, "x") * 1000)))


# Tensors. Crashes of onnxruntime 1.32 that fuzzing found are refused by the attributes.


@pytest.mark.parametrize(
    "data",
    [
        tensor([0]),
        tensor([]),
        tensor([2, 3], UINT8, field(9, bytes(6))),
        tensor([3], INT4, field(9, bytes(2))),
        tensor([3], INT4, field(5, varint(1) + varint(255))),
        tensor([5], 25, field(9, bytes(2))),
        tensor([2], FLOAT, field(4, bytes(8))),
        tensor([2], FLOAT, (varint(4 << 3 | 5) + bytes(4)) * 2),
        tensor([3], INT64, field(7, varint(1) + varint(-1) + varint(300))),
        tensor([3], INT64, field(7, varint(1) + varint(2)) + field(7, 5)),
        tensor([2], 11, field(10, bytes(16))),
        tensor([2], 13, field(11, varint(1) + varint(2))),
        tensor([2], STRING, field(6, "a") + field(6, "long")),
        field(1, varint(2) + varint(3)) + field(2, FLOAT) + field(9, bytes(24)),  # packed dims
        tensor([0, 5], FLOAT, b""),
    ],
)
def test_tensors_of_the_right_length_are_accepted(tmp_path, data):
    assert len(accept(tmp_path, model(field(5, data))).initializers) == 2


@pytest.mark.parametrize(
    "data, expected",
    [
        (tensor([4], contents=field(9, bytes(15))), "stores 15 bytes: float32 [4] takes 16"),
        (tensor([4], contents=field(9, bytes(17))), "stores 17 bytes"),
        (tensor([4], contents=b""), "stores 0 values: float32 [4] takes 4"),
        (tensor([3], INT4, field(9, bytes(3))), "stores 3 bytes: int4 [3] takes 2"),
        (tensor([2], FLOAT, field(4, bytes(12))), "stores 3 values"),
        (tensor([2], INT64, field(7, varint(1))), "stores 1 values"),
        (tensor([2], FLOAT, field(5, bytes(2))), "stores 0 values"),
        (tensor([2], FLOAT, field(9, bytes(8)) + field(4, bytes(8))), "nothing else"),
        (tensor([2], STRING, field(6, "a")), "stores 1 values"),
        (tensor([8], STRING, field(9, b"a")), "stores 0 values"),
        (tensor([-1], contents=b""), "dimensions [-1]"),
        (tensor([-1, -1], contents=field(9, bytes(4))), "none negative"),
        (tensor([1 << 31, 1 << 31], contents=b""), "at most"),
        (tensor([0, 1 << 62, 1 << 62], contents=b""), "at most"),
        (tensor([1 << 62, 4], contents=b""), "at most"),
        (tensor([1] * 33, contents=field(9, bytes(4))), "more than 32 dimensions"),
        (tensor([1], 0), "element type 0"),
        (tensor([1], 99), "element type 99"),
        (tensor([1], (1 << 32) + 1), "element type 4294967297"),
        (tensor([1], -1), "element type 18446744073709551615"),
        (tensor([1], contents=field(9, bytes(4)) + field(3, b"")), "segment"),
        (tensor([1], name="n" * 5000), "tensor name of 5000 bytes"),
        (tensor([1], name="x", contents=field(9, bytes(4)) + field(13, b"")), "another file"),
    ],
)
@pytest.mark.parametrize("place", ["initializer", "constant", "subgraph"])
def test_tensors_of_another_length_than_their_shape_are_refused(refusal, place, data, expected):
    assert expected in refusal(EXTERNAL_PLACES[place](data))


@pytest.mark.parametrize(
    "attribute, op_type, expected",
    [
        (field(1, "num_outputs") + field(20, 2) + field(3, 2), "Split", "num_outputs 2, and 1"),
        (field(1, "num_heads") + field(20, 2) + field(3, 1 << 32), "Attention", "is 4294967296"),
        (field(1, "axis") + field(20, 2) + field(3, -(1 << 63)), "Gather", "'axis' of 'Gather'"),
    ],
)
def test_attributes_that_crash_onnxruntime_are_refused(refusal, attribute, op_type, expected):
    assert expected in refusal(model(field(1, node(op_type, attribute))))
    inner = graph_attribute(field(1, node(op_type, attribute)))
    assert expected in refusal(model(field(1, node("If", inner))))


def test_a_norm_without_a_name_for_its_bias_is_refused(refusal):
    """onnxruntime 1.32 ends in a segmentation fault when it fuses one; a shorter list is fine."""
    norm = node("LayerNormalization", extra=field(1, "scale") + field(1, ""))
    assert "input without a name" in refusal(model(field(1, norm)))


def test_an_attribute_given_twice_is_refused(refusal):
    one = field(1, "axis") + field(20, 2) + field(3, 0)
    assert "two attributes 'axis'" in refusal(model(field(1, node("Gather", one, one))))


# The wire format.


@pytest.mark.parametrize(
    "more",
    [
        b"\x80",  # a tag without an end
        b"\x08",  # a field without a value
        b"\x2a\x05abc",  # longer than the file
        b"\x2a" + b"\xff" * 9 + b"\x01",  # 2^64 - 1 bytes long
        b"\x28" + b"\x80" * 10 + b"\x01",  # a number of 11 bytes
        b"\x28" + b"\xff" * 9 + b"\x02",  # a number above 2^64
        b"\x00\x00",  # field 0
        field(99, 1),
        field(5, b"text"),  # model_version with the wire type of bytes
        varint(7 << 3 | 3) + varint(7 << 3 | 4),  # a group
        varint(7 << 3 | 6),  # a wire type that is none
        field(7, b""),  # a second graph, which protobuf would merge with the first
        field(1, 10),  # a second IR version
    ],
)
def test_malformed_wire_data_is_refused(refusal, more):
    assert "not a whole ONNX model" in refusal(model(more=more))


@pytest.mark.parametrize(
    "data",
    [
        field(4, bytes(7)),  # packed floats, not a multiple of 4 bytes
        field(7, b"\x80"),  # packed numbers, the last without an end
        field(7, b"\xff" * 10 + b"\x01"),
        varint(7 << 3 | 5) + bytes(4),
        varint(1 << 3 | 1) + bytes(8),
    ],
)
def test_malformed_tensors_are_refused(refusal, data):
    assert "not a whole ONNX model" in refusal(model(field(5, data)))


@pytest.mark.parametrize(
    "data, expected",
    [
        (value("x", 0, ()), "element type 0"),
        (value("x", 99, ()), "element type 99"),
        (value("x", FLOAT, (-1,)), "an axis of size -1"),
        (value("x", FLOAT, (1 << 40,)), "an axis of size"),
        (value("x", FLOAT, (1,) * 33), "more than 32 axes"),
        (field(1, "x") + field(2, field(4, b"")), "a value is a sequence"),
        (field(1, "x") + field(2, field(8, b"")), "a value is a sparse_tensor"),
        (field(1, b"\xff"), "not UTF-8"),
        (
            field(2, field(1, field(2, field(1, field(1, 3) + field(2, "n"))))),
            "both a size and a name",
        ),
    ],
)
@pytest.mark.parametrize("number", [11, 12, 13])
def test_values_that_are_no_plain_tensors_are_refused(refusal, number, data, expected):
    assert expected in refusal(model(field(number, data)))


# The metadata.


@pytest.mark.parametrize("key", artefact.KEYS)
def test_every_key_must_be_there_once_in_utf8_and_json(refusal, key):
    sound = metadata()
    missing = {name: text for name, text in sound.items() if name != key}
    assert f"metadata lacks {key}" in refusal(model(entries=missing))
    twice = model(more=field(14, entry(key, sound[key])))
    assert f"{key!r} occurs twice" in refusal(twice)
    for text, expected in {
        b"\xff": "not UTF-8",
        b"{": "not JSON",
        b"": "not JSON",
        b"NaN": "not JSON",
        b"[" * 100_000: "not JSON",
        b"1" * 10_000: "not JSON",
    }.items():
        assert expected in refusal(model(entries={**sound, key: text}))
    large = b'"' + b"x" * artefact.MAX_METADATA_BYTES + b'"'
    assert "16777218 bytes" in refusal(model(entries={**sound, key: large}))
    if key != artefact.FORMAT_VERSION_KEY:
        assert f"{key} is not an object" in refusal(model(entries={**sound, key: b"[]"}))


def test_metadata_is_bounded_in_all(refusal):
    large = b'"' + b"x" * (12 << 20) + b'"'
    message = refusal(model(entries=metadata(a=large, b=large, c=large)))
    assert "bytes in all" in message


def test_keys_of_others_are_nobodys_business(tmp_path):
    entries = {**metadata(), "author": b"\xff", "licence": b"MIT"}
    assert set(accept(tmp_path, model(entries=entries)).metadata) == set(artefact.KEYS)


def test_a_newer_format_is_named_before_anything_else(refusal):
    data = model(entries={artefact.FORMAT_VERSION_KEY: b"3"}, ir_version=99, opsets=(("", 99),))
    assert refusal(data) == "model format 3, this pico-edge reads 1: upgrade pico-edge"


@pytest.mark.parametrize("version", ["1", True, 0, -1, 1.0, None, [1]])
def test_a_format_version_is_a_number_from_1(refusal, version):
    assert "expected a number from 1" in refusal(model(entries=metadata(format_version=version)))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"config": {}}, "missing fields"),
        ({"config": {**CONFIG.to_dict(), "n_head": 3}}, "n_embd 16 is not a multiple of n_head 3"),
        ({"config": {**CONFIG.to_dict(), "n_layer": 2**70}}, "n_layer is"),
        ({"config": {**CONFIG.to_dict(), "x": {"y" * 100_000: 1}}}, "unknown fields ['x']"),
        ({"tokenizer": {}}, "tokenizer of kind 'None'"),
        ({"tokenizer": {"kind": "simple", "regex": "(a+)+"}}, "with 2 fields"),
        ({"tokenizer": {"kind": "pickle"}}, "expected 'simple' or 'bpe'"),
        ({"tokenizer": {"kind": "bpe", "pattern": "(a+)+", "tokens": []}}, "'(a+)+'"),
        ({"tokenizer": {"kind": "bpe", "pattern": "gpt2", "tokens": {}}}, "a list"),
        ({"tokenizer": {"kind": "bpe", "pattern": "gpt2", "tokens": [0] * 1_000_001}}, "at most"),
        ({"tokenizer": {"kind": "bpe", "pattern": "gpt2", "tokens": [""] * 272}}, "of 273 ids"),
        ({"config": {**CONFIG.to_dict(), "vocab_size": 256}}, "of 257 ids for a model of 256"),
    ],
)
def test_config_and_tokenizer_must_make_sense(refusal, changes, expected):
    assert expected in refusal(model(entries=metadata(**changes)))


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {artefact.CONFIG_KEY: b"{}"},
        metadata(tokenizer=b"\xff"),
        metadata(format_version=3),
    ],
)
def test_allow_foreign_waives_the_metadata_and_nothing_else(tmp_path, refusal, entries):
    assert refusal(model(entries=entries))
    found = accept(tmp_path, model(entries=entries), allow_foreign=True)
    assert found.config is None
    assert found.metadata == {}
    for fault in (field(5, external_tensor("w.data")), field(1, node(domain="evil.org"))):
        assert refusal(model(fault, entries=entries), allow_foreign=True)
    message = refusal(model(entries=entries, inputs={}), allow_foreign=False)
    assert "inputs" not in message


def test_allow_foreign_takes_a_sound_file_as_it_is(tmp_path, refusal):
    assert accept(tmp_path, model(), allow_foreign=True).config == CONFIG
    assert "7 inputs" not in refusal(model(inputs={}), allow_foreign=True)


# The contract of inputs and outputs.

CACHE = ("batch", CONFIG.n_head, "capacity", CONFIG.head_dim)


@pytest.mark.parametrize(
    "name, described, expected",
    [
        (
            "past_key_values.0.key",
            (FLOAT, ("b", 4, "k", 8)),
            "input past_key_values.0.key expected float32 (B, 2, K, 8), found float32 (b, 4, k, 8)",
        ),
        (
            "past_key_values.0.value",
            (FLOAT16, CACHE),
            "input past_key_values.0.value expected float32 (B, 2, K, 8), found float16",
        ),
        ("present.0.key", (INT8, CACHE), "output present.0.key expected float32"),
        ("past_key_values.0.key", (FLOAT, (1, 2, "k", 8)), "found float32 (1, 2, k, 8)"),
        ("input_ids", (INT32, ("b", "s")), "input input_ids expected int64 (B, S), found int32"),
        ("total_seq_len", (INT32, (1,)), "input total_seq_len expected int32 (), found int32 (1)"),
        (
            "logits",
            (FLOAT, ("n", 271)),
            "output logits expected float32 or float16 (N, 272), found",
        ),
        ("logits", (FLOAT, ("n", "v")), "found float32 (n, v)"),
    ],
)
def test_a_graph_that_differs_from_its_metadata_is_refused(refusal, name, described, expected):
    inputs, outputs = contract()
    values = inputs if name in inputs else outputs
    values[name] = described
    message = refusal(model(inputs=inputs, outputs=outputs))
    assert message.startswith("the graph differs from its metadata: ")
    assert expected in message


def test_missing_and_unexpected_inputs_are_listed(refusal):
    inputs, outputs = contract()
    del inputs["past_key_values.0.key"]
    assert "6 inputs and 3 outputs: expected 7 and 3" in refusal(model(inputs=inputs))
    inputs["evil"] = (FLOAT, ())
    outputs["more"] = outputs.pop("logits")
    message = refusal(model(inputs=inputs, outputs=outputs))
    assert "input 'evil' found, none expected" in message
    assert "input past_key_values.0.key missing, expected float32 (B, 2, K, 8)" in message
    assert "output 'more' found, none expected" in message


def test_a_cache_of_one_unusable_type_lists_the_usable_ones(refusal):
    inputs, _ = contract()
    for name in artefact.past_names(1):
        inputs[name] = (INT64, CACHE)
    assert "expected float32 or float16 or int8 (B, 2, K, 8)" in refusal(model(inputs=inputs))


def test_layers_claimed_by_the_metadata_cost_nothing(refusal):
    config = {**CONFIG.to_dict(), "n_layer": 1 << 24}
    assert "expected 33554437" in refusal(model(entries=metadata(config=config)))


# Files that are no models.


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"", "0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"<html>", "web page"),
        (b"PK\x03\x04" + bytes(20) + b"ckpt/data.pkl", "pico-edge export"),
        (b"PK\x03\x04" + bytes(20) + b"hello.txt", "unpack it"),
        (b"\x1f\x8b\x08" + bytes(20), "gzip"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"\x14\0\0\0ORTM", "ORT format"),
        (b'\x10\0\0\0\0\0\0\0{"w":{}}', "safetensors"),
        ("Грузите апельсины бочками".encode(), "this is text"),
        (bytes(100), "damaged or cut short"),
        (field(1, 10), "no pico_edge metadata"),
        (model()[:300], "damaged or cut short"),
    ],
)
def test_what_is_no_model_gets_a_helpful_guess(refusal, data, expected):
    assert expected in refusal(data)


@pytest.mark.parametrize(
    ("op_type", "names"),
    [
        ("MatMulIntegerToFloat", ["a", "B", "s", "scales"]),
        ("MatMulIntegerToFloat", ["a", "B", "s", "one", "", "scales"]),
        ("MatMulIntegerToFloat", ["a", "B", "s", "one", "", "", "scales"]),
        ("DynamicQuantizeMatMul", ["a", "B", "scales"]),
    ],
)
def test_scales_that_do_not_fit_the_columns_of_their_weights_are_refused(
    op_type, names, tmp_path, refusal
):
    """onnxruntime 1.32 reads past their end: found by fuzzing, a segmentation fault."""
    fields = b"".join(field(1, name) for name in names)
    multiply = field(1, fields + field(2, "y") + field(4, op_type) + field(7, "com.microsoft"))
    one = field(5, tensor([], name="one"))

    def with_weights(weights: list[int], scales: list[int]) -> bytes:
        codes = tensor(weights, INT8, field(9, bytes(math.prod(weights))), name="B")
        return model(multiply, field(5, codes), field(5, tensor(scales, name="scales")), one)

    for scales in ([3], [1], [1, 3]):
        accept(tmp_path, with_weights([4, 3], scales))
    for weights, scales in (([4, 1], [3]), ([4, 3], [4]), ([4, 3], [0]), ([4], [4])):
        assert "one value or one a column" in refusal(with_weights(weights, scales))
    computed = model(multiply, field(5, tensor([3], name="scales")), one)  # who knows its columns
    assert f"{op_type} has weights 'B' []" in refusal(computed, allow_foreign=True)


def test_a_file_without_a_graph_is_no_model(refusal):
    assert "no graph" in refusal(field(1, 10) + field(8, field(2, 20)), allow_foreign=True)


def test_pipes_folders_and_the_ending_of_the_other_format_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "model.ort").write_bytes(model())
    for name in ("pipe.onnx", "folder.onnx", "model.ort"):
        with pytest.raises(ArtefactError, match="expected an ONNX model"):
            read_model_file(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_model_file(tmp_path / "absent.onnx")


def test_a_file_above_protobufs_limit_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.touch()
    os.truncate(path, 1 << 31)  # a hole: takes no room
    with pytest.raises(ArtefactError, match="2147483648 bytes: expected at most 2147483647"):
        read_model_file(path)


def test_a_model_cut_at_any_length_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(TINY.read_bytes())
    read_model_file(path)
    accepted = []
    for size in reversed(range(TINY.stat().st_size)):
        os.truncate(path, size)
        try:
            read_model_file(path)
        except ArtefactError:
            continue
        accepted.append(size)
    assert accepted == []


def test_a_small_model_cut_at_any_length_is_refused_even_if_foreign(tmp_path, refusal):
    data = model(entries={})
    whole = model(entries={}, opsets=(("", 20),))
    for size in range(len(data)):
        if data[:size] != whole:  # its last field is the second opset
            refusal(data[:size], allow_foreign=True)


# Mutations.


@functools.cache
def tiny_places() -> list[int]:
    """Positions in TINY outside of long tensor contents: mutations there teach nothing."""
    data = TINY.read_bytes()
    places = list(range(len(data)))
    lengths = {one.n_bytes for one in read_model_file(TINY).initializers if one.n_bytes > 200}
    for n_bytes in lengths:
        marker = b"\x4a" + varint(n_bytes)  # field 9 of TensorProto
        start = data.find(marker)
        while start >= 0:
            first = start + len(marker)
            places[first : first + n_bytes] = [-1] * len(places[first : first + n_bytes])
            start = data.find(marker, first + n_bytes)
    return [place for place in places if place >= 0]


def mutate(data: bytes, places: list[int], draw: Callable[[int], int]) -> bytes:
    """draw(n): a number below n."""
    changed = bytearray(data)
    for _ in range(1 + draw(3)):
        place = places[draw(len(places))] % max(len(changed), 1)
        kind = draw(6)
        if kind < 2:
            changed[place] ^= 1 << draw(8)
        elif kind == 2:
            changed[place] = draw(256)
        elif kind == 3:
            del changed[place : place + 1 + draw(20)]
        elif kind == 4:
            source = places[draw(len(places))]
            changed[place:place] = data[source : source + 1 + draw(60)]
        else:
            del changed[place:]
        if not changed:
            break
    return bytes(changed)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("mutants") / "model.onnx"


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data(), st.booleans(), st.booleans())
def test_a_mutated_model_is_refused_or_read_and_nothing_else(scratch, data, tiny, foreign):
    original = TINY.read_bytes() if tiny else model(field(1, node("If", graph_attribute(b""))))
    places = tiny_places() if tiny else list(range(len(original)))
    scratch.write_bytes(mutate(original, places, lambda n: data.draw(st.integers(0, n - 1))))
    try:
        found = read_model_file(scratch, allow_foreign=foreign)
    except ArtefactError as error:
        assert "\n" not in str(error)
    else:
        assert foreign or found.config is not None


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_bytes_are_refused(scratch, data):
    scratch.write_bytes(data)
    with pytest.raises(ArtefactError):
        read_model_file(scratch)


LOAD = """
import os, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime
from pathlib import Path
from pico_edge.errors import ArtefactError
from pico_edge.runtime.preflight import read_model_file
onnxruntime.set_default_logger_severity(4)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
loaded = refused = failed = 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_model_file(path)
    except ArtefactError:
        refused += 1
        continue
    try:
        onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        loaded += 1
    except Exception as error:  # its errors have no common base: any of them will do, a signal not
        assert type(error).__module__.startswith("onnxruntime"), repr(error)
        failed += 1
print(loaded, refused, failed)
"""


def test_a_mutated_model_that_passes_does_not_crash_onnxruntime(tmp_path):
    original = TINY.read_bytes()
    places = tiny_places()
    numbers = random.Random(0)
    for i in range(300):
        (tmp_path / f"{i:03}.onnx").write_bytes(mutate(original, places, numbers.randrange))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded, refused, failed = map(int, done.stdout.split())
    assert loaded + refused + failed == 300
    assert refused > 100
    assert loaded + failed > 20


# Between the check and the load.


def test_a_file_that_changes_after_the_check_is_noticed(tmp_path):
    path = tmp_path / "model.onnx"

    def checked() -> preflight.ModelFile:
        path.write_bytes(model())
        return read_model_file(path)

    found = checked()
    check_unchanged(found)
    other = tmp_path / "other.onnx"
    other.write_bytes(model())
    os.utime(other, ns=(found.identity[3], found.identity[3]))
    os.replace(other, path)  # same size, same time: another inode
    with pytest.raises(ArtefactError, match="changed while it was loaded"):
        check_unchanged(found)

    found = checked()
    os.utime(path, ns=(1, 1))
    with pytest.raises(ArtefactError, match="changed while it was loaded"):
        check_unchanged(found)

    found = checked()
    with open(path, "ab") as file:
        file.write(b"x")
    os.utime(path, ns=(found.identity[3], found.identity[3]))
    with pytest.raises(ArtefactError, match="changed while it was loaded"):
        check_unchanged(found)

    found = checked()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        check_unchanged(found)
