"""`verify` finds one changed bit anywhere, names it, and bears what another CPU may differ by."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pico_edge import artefact, cli
from pico_edge.errors import ArtefactError
from pico_edge.runtime.digests import SHORT_HEX, digests
from pico_edge.runtime.preflight import read_model_file
from pico_edge.runtime.session import Session
from pico_edge.runtime.verify import read_record, verify

DATA = Path(__file__).parents[1] / "data"
TINY = DATA / "tiny.onnx"
FILES = [TINY, DATA / "tiny_fp32.onnx", DATA / "tiny_int4.onnx"]
NAMES = [
    "structure",
    "metadata",
    "graph",
    "weights",
    "logits",
    "greedy ids",
    "bits per byte",
]


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def with_parity(record: object) -> bytes:
    """The bytes of TINY with another parity record."""
    data = TINY.read_bytes()
    key = artefact.PARITY_KEY.encode()
    parity = read_model_file(TINY).metadata[artefact.PARITY_KEY]
    # As export writes it, in an entry of metadata_props, which is field 14 of the model.
    text = json.dumps(parity, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    entry = field(14, field(1, key) + field(2, text))
    assert data.count(entry) == 1
    return data.replace(entry, field(14, field(1, key) + field(2, json.dumps(record).encode())))


@pytest.fixture
def record() -> dict[str, Any]:
    found: dict[str, Any] = read_model_file(TINY).metadata[artefact.PARITY_KEY]
    return copy.deepcopy(found)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def failed(path: Path) -> list[str]:
    report = verify(path, threads=1)
    names = [check["name"] for check in report["checks"] if not check["ok"]]
    assert report["ok"] == (not names)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_committed_model_is_sound_here(path: Path) -> None:
    report = verify(path, threads=1)
    assert [check["name"] for check in report["checks"]] == NAMES
    assert [check["detail"] for check in report["checks"] if not check["ok"]] == []
    assert report["ok"]
    for check in report["checks"]:
        assert {"name", "expected", "found", "tolerance", "ok"} <= check.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_one_bit_of_any_tensor_changes_its_digest_alone(path: Path, model: Path) -> None:
    data = path.read_bytes()
    before = digests(read_model_file(path))
    for i, tensor in enumerate(read_model_file(path).initializers):
        changed = bytearray(data)
        changed[tensor.span[1] - 1] ^= 1  # the contents are the last field
        model.write_bytes(changed)
        after = digests(read_model_file(model))
        was, now = (
            [one["each"][j : j + SHORT_HEX] for j in range(0, len(one["each"]), SHORT_HEX)]
            for one in (before, after)
        )
        assert [j for j, pair in enumerate(zip(was, now, strict=True)) if len(set(pair)) > 1] == [i]
        assert after["weights"] != before["weights"]
        assert {**after, "weights": before["weights"], "each": before["each"]} == before


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_one_changed_weight_fails_the_check_that_names_it(place: float, model: Path) -> None:
    tensors = [t for t in read_model_file(TINY).initializers if t.elem_type == "float32"]
    tensor = tensors[int(place * (len(tensors) - 1))]
    changed = bytearray(TINY.read_bytes())
    changed[tensor.span[1] - 4] ^= 1  # the lowest bit of a float: no logit tells
    model.write_bytes(changed)
    report = verify(model, threads=1)
    assert not report["ok"]
    checks = {check["name"]: check for check in report["checks"]}
    assert [name for name in NAMES if not checks[name]["ok"]] == ["weights"]
    assert checks["weights"]["detail"] == f"changed: {tensor.name}"


def test_a_weight_without_which_it_cannot_run_is_named_too(model: Path) -> None:
    tensor = next(t for t in read_model_file(TINY).initializers if t.elem_type == "int64")
    changed = bytearray(TINY.read_bytes())
    changed[tensor.span[1] - 7] ^= 1  # 256 more, in the shape of a Reshape
    model.write_bytes(changed)
    assert failed(model) == ["weights", "run"]


def test_a_not_a_number_fails_and_is_null_in_json(model: Path) -> None:
    fp32 = FILES[1]
    tensors = {tensor.name: tensor for tensor in read_model_file(fp32).initializers}
    end = tensors["transformer.ln_f.weight"].span[1]
    changed = bytearray(fp32.read_bytes())
    changed[end - 4 : end] = b"\x00\x00\xc0\x7f"
    model.write_bytes(changed)
    report = verify(model, threads=1)
    assert failed(model) == ["weights", "logits", "greedy ids", "bits per byte"]
    json.dumps(report, allow_nan=False)


def test_a_changed_node_and_a_changed_setting_are_told_apart(model: Path) -> None:
    data = TINY.read_bytes()
    at = data.index(b"epsilon") + len(b"epsilon") + 1
    model.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert failed(model) == ["graph"]
    model.write_bytes(data.replace(b'"temperature":0.8', b'"temperature":0.9'))
    assert failed(model) == ["metadata"]
    report = verify(model, threads=1)
    assert report["checks"][1]["detail"] == "changed: sampling"


def test_logits_and_loss_are_held_to_their_tolerance(record: dict[str, Any], model: Path) -> None:
    record["logits"]["values"][3] += 0.99 * record["logits"]["tolerance"]
    record["sample"]["bits_per_byte"] *= 1 + 0.0099 * record["sample"]["tolerance_percent"]
    model.write_bytes(with_parity(record))
    assert failed(model) == []
    record["logits"]["values"][3] += 0.02 * record["logits"]["tolerance"]
    model.write_bytes(with_parity(record))
    assert failed(model) == ["logits"]
    record["sample"]["bits_per_byte"] *= 1 + 0.0002 * record["sample"]["tolerance_percent"]
    model.write_bytes(with_parity(record))
    assert failed(model) == ["logits", "bits per byte"]


def test_a_greedy_id_may_differ_where_the_two_likeliest_are_near(
    record: dict[str, Any], model: Path
) -> None:
    session = Session(TINY, threads=1)
    cache = session.new_cache()
    cache.prefill([record["prompt_ids"]])
    logits = cache.decode(record["greedy_ids"][:1])[0]
    best, second = (-logits).argsort()[:2]
    gap = float(logits[best] - logits[second])
    assert record["greedy_ids"][1] == best
    record["greedy_ids"][1:] = [int(second)]  # what another CPU may have found
    for tolerance, expected in ((1.01 * gap, []), (0.99 * gap, ["greedy ids"])):
        record["logits"]["tolerance"] = tolerance
        model.write_bytes(with_parity(record))
        assert failed(model) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "expected a list of 1 to 64 ids"),
        ({"prompt_ids": [0] * 65}, "expected a list of 1 to 64 ids"),
        ({"prompt_ids": [272]}, "expected ids of 0 to 271"),
        ({"prompt_ids": [True]}, "expected ids of 0 to 271"),
        ({"greedy_ids": [1] * 64}, "more tokens than the context holds"),
        ({"greedy_ids": None}, "expected a list"),
        ({"logits": {"ids": [1], "values": [], "tolerance": 1}}, "differ in number"),
        ({"logits": {"ids": [1], "values": ["1"], "tolerance": 1}}, "expected a number"),
        ({"logits": {"ids": [1], "values": [10**400], "tolerance": 1}}, "too large"),
        ({"logits": []}, "list indices"),
        ({"sample": {"ids": [1]}}, "expected a list of 2"),
        ({"sample": {"ids": [1, 2]}}, "'bits_per_byte'"),
        ({"digests": {"nodes": "", "weights": "", "metadata": {}}}, "'each'"),
        ({"digests": {"nodes": "", "weights": "", "each": "", "metadata": []}}, "items"),
    ],
)
def test_a_damaged_record_is_refused(
    change: dict[str, Any], message: str, record: dict[str, Any], model: Path
) -> None:
    model.write_bytes(with_parity({**record, **change}))
    with pytest.raises(ArtefactError) as refused:
        read_record(read_model_file(model))
    assert message in str(refused.value)
    assert "its parity record is damaged" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_of_an_older_pico_edge_is_refused_with_the_cure(
    record: dict[str, Any], model: Path
) -> None:
    del record["digests"]
    model.write_bytes(with_parity(record))
    with pytest.raises(ArtefactError, match=r"older pico-edge .* pico-edge export"):
        verify(model)
    model.write_bytes(with_parity({}))
    with pytest.raises(ArtefactError, match=r"no parity record: .* pico-edge export"):
        verify(model)


def test_the_command_says_it_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["verify", str(TINY), "--threads", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert [line[6:19].strip() for line in lines[:-1]] == NAMES
    assert all(line.startswith("ok  ") for line in lines[:-1])
    assert max(map(len, lines)) <= 80


def test_names_out_of_a_file_are_folded_and_cannot_control_the_terminal(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = TINY.read_bytes().replace(
        b".attn.c_attn.weight.blocks", b".attn.\x1b[31m_.weight.blocks"
    )
    model.write_bytes(changed)
    assert cli._run(["verify", str(model), "--threads", "1"]) == 1
    out = capsys.readouterr().out
    assert "transformer.h.0.attn.?[31m_.weight.blocks" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_command_fails_with_exit_1_and_one_line(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = bytearray(TINY.read_bytes())
    tensor = next(t for t in read_model_file(TINY).initializers if t.elem_type == "uint8")
    changed[tensor.span[1] - 1] ^= 1
    model.write_bytes(changed)
    assert cli._run(["verify", str(model), "--json", "--threads", "1"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert not report["ok"]
    assert captured.err.startswith(f"error: {model}: weights: ")
    assert captured.err.count("\n") == 1
    assert cli._run(["verify", str(model), "--threads", "1"]) == 1
    table = capsys.readouterr().out
    assert f"FAIL  weights        changed: {tensor.name}\n" in table
    assert cli._run(["verify", str(model.parent / "none.onnx")]) == 3


def test_verify_needs_no_torch_and_no_onnx() -> None:
    code = (
        "import sys; from pico_edge.runtime.verify import verify;"
        "assert verify(sys.argv[1], threads=1)['ok'];"
        "sys.exit(bool({'torch', 'onnx', 'typer'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(TINY)]).returncode == 0
