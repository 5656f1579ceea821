"""`pico-edge info` repeats what a file says: all of it in JSON, in 80 columns for people."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pico_edge import artefact, cli
from pico_edge.commands.info import table
from pico_edge.runtime.info import info, part_of
from pico_edge.runtime.preflight import Tensor, read_model_file

DATA = Path(__file__).parents[1] / "data"
TINY = DATA / "tiny.onnx"
FILES = [TINY, DATA / "tiny_fp32.onnx", DATA / "tiny_int4.onnx"]
# Of the contract, and what a device must know before it takes a file.
KEYS = {
    "file", "bytes", "config", "parameters", "tokenizer", "precision", "target", "provider",
    "inputs", "outputs", "provenance", "sizes", "requires", "rows_are_independent", "across_cpus",
    "kernels", "parity", "quality", "sampling", "ngrams", "cache", "nodes", "op_types", "weights",
    "can_be_verified", "format_version", "producer",
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_json_has_it_all(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["info", str(path), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)
    assert found.keys() == KEYS
    assert found == info(path)
    assert found["bytes"] == path.stat().st_size
    assert found["requires"]["opset"] == 18
    assert found["kernels"]["cpu"]["missing"] == []
    assert found["can_be_verified"]
    assert found["sampling"] == artefact.SAMPLING_DEFAULTS
    assert [value["name"] for value in found["outputs"]] == artefact.output_names(2)
    assert found["inputs"][0] == {"name": "input_ids", "type": "int64", "shape": ["batch", "seq"]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_sizes_add_up_and_every_weight_has_a_part(path: Path) -> None:
    sizes = info(path)["sizes"]
    assert sizes["weights"] + sizes["nodes"] + sizes["metadata"] == sizes["file"]
    for parts in (sizes["weights_by_type"], sizes["weights_by_part"]):
        assert sum(parts.values()) == sizes["weights"]
    assert sizes["weights_by_part"].get("other", 0) < 100  # shapes, no weights
    assert next(iter(sizes["weights_by_part"])) == "mlp"
    found = info(DATA / "tiny_fp32.onnx")
    assert found["sizes"]["weights"] == 4 * found["parameters"] + 24  # two shapes


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("transformer.wte.weight.blocks", "token table"),
        ("transformer.wpe.weight", "positions"),
        ("transformer.h.11.attn.c_proj.weight.scales", "attention"),
        ("transformer.h.0.ln_2.bias", "norms"),
        ("transformer.ln_f.weight", "norms"),
        ("cache.3.key.scale", "cache scales"),
        ("val_31", "other"),
    ],
)
def test_a_weight_belongs_to_a_part_by_its_name(name: str, part: str) -> None:
    assert part_of(Tensor(name, "float32", (), 4, (0, 0), -1)) == part


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_table_fits_80_columns(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["info", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0] == str(path)
    assert max(map(len, lines[1:])) <= 80
    assert "model       2 layers x 32 (2 heads), context 64, vocabulary 272" in captured.out
    assert f"kernels     cpu: all {info(path)['nodes']} nodes have one" in captured.out
    assert "            past_key_values.N.key|value " in captured.out


def test_the_table_bears_what_a_strange_file_says() -> None:
    found = info(TINY)
    strange = "\x1b[31m" + "x" * 5000
    for key in ("precision", "weights", "kernels", "quality", "target", "across_cpus"):
        for value in (None, strange, [strange], {strange: {"a": 10**400}}, 10**400):
            text = table({**found, key: value})
            assert "\x1b" not in text
            assert max(map(len, text.splitlines()[1:])) <= 80
    metadata = {"min_order": None, "bytes": 250_000, "max_order": 5}
    assert "drafting    n-gram table of 250 kB\n" in table({**found, "ngrams": metadata})
    report = {"cuda": {"missing": ["Gather(f32): no kernel"], "source": "somewhere"}}
    assert "cuda: by somewhere, none for ['Gather(f32)" in table({**found, "kernels": report})


def test_an_n_gram_table_is_mentioned(tmp_path: Path) -> None:
    assert info(TINY)["ngrams"] is None
    entry = b"\x0a" + bytes([len(artefact.NGRAMS_KEY)]) + artefact.NGRAMS_KEY.encode()
    entry += b"\x12\x0f" + b'{"min_order":2}'
    path = tmp_path / "with.onnx"
    path.write_bytes(TINY.read_bytes() + b"\x72" + bytes([len(entry)]) + entry)
    assert info(path)["ngrams"] == {"bytes": 15, "min_order": 2, "max_order": None}


def test_a_checkpoint_and_a_missing_file_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"PK\x03\x04" + bytes(26) + b"ckpt/data.pkl" + bytes(100))
    assert cli._run(["info", str(tmp_path / "ckpt.pt")]) == 3
    assert "this is a checkpoint: `pico-edge export` it first" in capsys.readouterr().err
    assert cli._run(["info", str(tmp_path / "none.onnx")]) == 3


def test_info_imports_no_onnxruntime_and_no_numpy() -> None:
    code = (
        "import sys; from pico_edge.runtime.info import info; info(sys.argv[1]);"
        "sys.exit(bool({'onnxruntime', 'numpy', 'torch', 'tiktoken'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(TINY)]).returncode == 0
    assert read_model_file(TINY).config is not None
