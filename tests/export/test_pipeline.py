from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from pico_edge import artefact
from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.export import kernels, pipeline
from pico_edge.export.pipeline import export
from pico_edge.export.report import table
from pico_edge.export.targets import Target
from pico_edge.export.verify import SAMPLE_TOKENS, Parity, check_parity
from pico_edge.runtime import Model
from pico_edge.runtime.evaluate import evaluate
from pico_edge.runtime.info import info
from pico_edge.runtime.preflight import read_model_file
from pico_edge.runtime.session import Session
from pico_edge.runtime.verify import verify
from pico_edge.train.checkpoint import build_model, load_checkpoint, save_checkpoint
from pico_edge.train.model import GPT

SMALL = GPTConfig(block_size=16, vocab_size=272, n_layer=1, n_head=2, n_embd=32)


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_report_has_the_keys_of_the_contract(int8_report: dict[str, Any]) -> None:
    keys = {"file", "bytes", "target", "precision", "parity", "quality", "speed"}
    assert set(int8_report) == keys
    assert set(int8_report["parity"]) == {"max_abs_error", "max_rel_error", "greedy_match_tokens"}
    assert set(int8_report["quality"]) == {
        "fp32_bits_per_byte",
        "bits_per_byte",
        "loss_increase_percent",
        "top1_agreement",
        "kl_divergence",
        "tokens",
        "calibration_tokens",
    }
    assert set(int8_report["speed"]) == {
        "fp32_decode_tokens_per_second",
        "decode_tokens_per_second",
        "fp32_prefill_tokens_per_second",
        "prefill_tokens_per_second",
    }
    assert int8_report["bytes"] == Path(int8_report["file"]).stat().st_size
    assert json.loads(json.dumps(int8_report, allow_nan=False)) == int8_report
    assert abs(int8_report["quality"]["loss_increase_percent"]) < 0.2


def test_exporting_twice_gives_the_same_bytes(
    checkpoint_path: Path, int8_path: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    export(checkpoint_path, tmp_path / "again.onnx", quantize=True, progress=lines.append)
    assert lines
    assert _files(tmp_path) == {"again.onnx"}
    assert (tmp_path / "again.onnx").read_bytes() == int8_path.read_bytes()


@pytest.mark.parametrize("file", ["fp32_path", "int8_path"])
def test_the_file_is_self_contained_and_tells_nothing_of_this_machine(
    file: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(file)
    data = path.read_bytes()
    for secret in (str(Path(__file__).parents[2]), sys.prefix, ".py", "stack_trace", 'File "'):
        assert secret.encode() not in data
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert all(tensor.data_location == 0 for tensor in model.graph.initializer)
    assert {entry.domain: entry.version for entry in model.opset_import} == {
        "": 18,
        "com.microsoft": 1,
    }
    assert model.ir_version == 8
    assert {prop.key for prop in model.metadata_props} == set(artefact.KEYS)


def test_names_types_and_shapes_follow_the_contract(fp32_path: Path) -> None:
    model_file = read_model_file(fp32_path)
    n_layer = model_file.config.n_layer if model_file.config else 0
    assert [value.name for value in model_file.inputs] == artefact.input_names(n_layer)
    assert [value.name for value in model_file.outputs] == artefact.output_names(n_layer)
    names = {tensor.name for tensor in model_file.initializers}
    assert "transformer.wte.weight" in names
    assert "transformer.h.1.mlp.c_proj.weight" in names
    assert not [name for name in names if name.startswith("model.")]


def test_the_parity_record_is_what_the_file_does(int8_path: Path) -> None:
    record = read_model_file(int8_path).metadata[artefact.PARITY_KEY]
    session = Session(int8_path)
    logits = session.new_cache().prefill([record["prompt_ids"]])[0]
    np.testing.assert_allclose(
        logits[record["logits"]["ids"]], record["logits"]["values"], atol=1e-3
    )
    text = Model(int8_path)
    cache = text.session.new_cache()
    token = int(cache.prefill([record["prompt_ids"]])[0, :257].argmax())
    greedy = [token]
    for _ in record["greedy_ids"][1:]:
        greedy.append(int(cache.decode([greedy[-1]])[0, :257].argmax()))
    assert greedy == record["greedy_ids"]


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", "wide"])
def test_a_file_verifies_and_carries_its_quality(
    precision: str, request: pytest.FixtureRequest
) -> None:
    report = request.getfixturevalue(f"{precision}_report")
    found = verify(report["file"], threads=1)
    assert [check["detail"] for check in found["checks"] if not check["ok"]] == []
    quality = info(report["file"])["quality"]
    assert {**quality, "calibration_tokens": None} == {
        **report["quality"],
        "calibration_tokens": None,
    }


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@pytest.mark.parametrize("bias", [True, False])
def test_every_form_of_the_model_exports(
    gelu: str, bias: bool, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    config = GPTConfig(
        block_size=16,
        vocab_size=272,
        n_layer=2,
        n_head=2,
        n_embd=48,
        bias=bias,
        gelu=gelu,  # type: ignore[arg-type]
    )
    report = export(make_checkpoint(config), tmp_path / "m.onnx")
    assert report["parity"]["max_abs_error"] < 1e-4
    assert report["parity"]["greedy_match_tokens"] == 9


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_shortest_contexts_export(
    block_size: int, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    config = GPTConfig(block_size=block_size, vocab_size=272, n_layer=1, n_head=2, n_embd=32)
    export(make_checkpoint(config), tmp_path / "m.onnx", quantize=True)
    generation = Model(tmp_path / "m.onnx").generate("Hello", max_new_tokens=5, seed=1)
    assert generation.new_tokens == 5


def test_a_graph_that_is_not_the_model_is_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traced weights differ from the checkpoint's by one number."""
    traced = pipeline.trace_for

    def wrong(model: GPT, target: Target) -> ir.Model:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.transformer.ln_f.weight[0] += 0.01
        return traced(other, target)

    checkpoint = make_checkpoint(SMALL)
    monkeypatch.setattr(pipeline, "trace_for", wrong)
    with pytest.raises(PicoEdgeError, match="differs from PyTorch") as error:
        export(checkpoint, tmp_path / "m.onnx")
    assert error.value.exit_code == 1
    assert _files(tmp_path) == {"ckpt.pt"}


def test_nan_is_not_within_the_tolerance() -> None:
    nan = float("nan")
    with pytest.raises(PicoEdgeError):
        check_parity(Parity(nan, nan, 0, "one prefill"))


def test_a_loss_increase_beyond_the_limit_writes_nothing(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = pipeline.quantize_for

    def ruin(model: ir.Model, *args: Any) -> None:
        quantize(model, *args)
        for name, value in model.graph.initializers.items():
            if name.endswith("c_fc.weight.scales"):
                assert value.const_value is not None
                value.const_value = ir.tensor(9 * value.const_value.numpy(), name=name)

    checkpoint = make_checkpoint(SMALL)
    monkeypatch.setattr(pipeline, "quantize_for", ruin)
    with pytest.raises(PicoEdgeError, match=r"loss rises by .* % .*--max-loss-increase") as error:
        export(checkpoint, tmp_path / "m.onnx", quantize=True, max_loss_increase=0.5)
    assert error.value.exit_code == 1
    assert _files(tmp_path) == {"ckpt.pt"}
    export(checkpoint, tmp_path / "m.onnx", quantize=True, max_loss_increase=1000)
    assert _files(tmp_path) == {"ckpt.pt", "m.onnx"}


def test_bits_imply_quantize_and_4_bits_are_smaller(
    int4_report: dict[str, Any], int8_report: dict[str, Any]
) -> None:
    assert int4_report["precision"] == "int4"
    assert int4_report["bytes"] < int8_report["bytes"]
    assert int4_report["quality"]["loss_increase_percent"] < 1
    assert int4_report["quality"]["top1_agreement"] > 0.9


def test_bits_that_no_kernel_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bits is 3: expected 8 or 4"):
        export(tmp_path / "ckpt.pt", tmp_path / "m.onnx", bits=3)


def test_calibration_never_sees_what_is_measured(
    int8_report: dict[str, Any],
    checkpoint_path: Path,
    tmp_path: Path,
) -> None:
    """Another measured text changes the record of the loss and nothing else in the file."""
    quality = int8_report["quality"]
    assert (quality["calibration_tokens"], quality["tokens"]) == (
        1001,
        3004,
    )  # of 4006 bytes and ids
    held_out = load_checkpoint(checkpoint_path).held_out
    files = []
    for name, text in (("a", held_out[:700]), ("b", held_out[700:1400])):
        (tmp_path / name).write_text(text, encoding="utf-8")
        export(checkpoint_path, tmp_path / f"{name}.onnx", quantize=True, eval_data=tmp_path / name)
        model = onnx.load(tmp_path / f"{name}.onnx")
        kept = [prop for prop in model.metadata_props if prop.key != artefact.PARITY_KEY]
        del model.metadata_props[:]
        model.metadata_props.extend(kept)
        files.append(model.SerializeToString())
    assert files[0] == files[1]


def test_the_file_says_how_it_is_stored(
    int4_report: dict[str, Any], wide_report: dict[str, Any]
) -> None:
    said = read_model_file(Path(int4_report["file"])).metadata[artefact.EXPORT_KEY]
    assert said["precision"] == "int4"
    assert said["weights"]["int4"] == (
        "h.1.attn.c_attn, h.1.attn.c_proj, h.1.mlp.c_fc, h.1.mlp.c_proj"
    )
    assert said["weights"]["int8"].startswith("h.0.attn.c_attn")
    assert said["weights"]["int8"].endswith("table")
    assert said["cache"] == "int8"
    assert said["rows_are_independent"] is True
    assert said["few_tokens"] is None
    assert said["min_onnxruntime"] == "1.28"  # of the int8 cache
    said = read_model_file(Path(wide_report["file"])).metadata[artefact.EXPORT_KEY]
    assert said["weights"] == {"rows": "layers", "int8": "table"}
    assert said["few_tokens"] == artefact.FEW_TOKENS
    assert said["kernels"] == {"cpu": {"missing": [], "source": kernels.SOURCES["cpu"]}}


@pytest.mark.parametrize("report", ["fp32_report", "int8_report", "wide_report", "int4_report"])
def test_the_loss_of_the_sample_can_be_had_again(
    report: str, request: pytest.FixtureRequest
) -> None:
    session = Session(request.getfixturevalue(report)["file"])
    sample = session.metadata[artefact.PARITY_KEY]["sample"]
    again = evaluate(session, sample["ids"]).bits_per_byte
    assert len(sample["ids"]) == SAMPLE_TOKENS
    assert abs(again / sample["bits_per_byte"] - 1) <= sample["tolerance_percent"] / 100


@pytest.mark.parametrize("limit", [-1.0, float("nan")])
def test_a_limit_that_is_none_is_refused(limit: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_loss_increase"):
        export(tmp_path / "ckpt.pt", tmp_path / "m.onnx", max_loss_increase=limit)


def test_an_existing_file_is_kept_without_force(checkpoint_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    out.write_text("precious")
    with pytest.raises(UsageError, match="exists"):
        export(checkpoint_path, out)
    assert out.read_text() == "precious"


def test_held_out_text_can_be_given_and_must_suffice(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(SMALL, held_out="")
    with pytest.raises(ArtefactError, match=r"0 tokens of held-out text.*--eval-data"):
        export(checkpoint, tmp_path / "m.onnx")
    text = tmp_path / "eval.txt"
    text.write_text("A text of its own. " * 20, encoding="utf-8")
    utf8 = export(checkpoint, tmp_path / "m.onnx", eval_data=text)
    assert (tmp_path / "m.onnx").exists()
    text.write_text("A text of its own. " * 20, encoding="utf-16-le")
    out = tmp_path / "n.onnx"
    utf16 = export(checkpoint, out, eval_data=text, encoding="utf-16-le")
    assert utf16["quality"] == utf8["quality"]
    with pytest.raises(UsageError, match="name the text with --eval-data"):
        export(checkpoint, out, encoding="utf-16-le", force=True)


def test_the_loss_of_the_file_is_the_loss_of_the_model(
    checkpoint_path: Path, fp32_report: dict[str, Any]
) -> None:
    """An independent computation: torch, a plain loop over the same windows."""
    checkpoint = load_checkpoint(checkpoint_path)
    model = build_model(checkpoint)
    ids = torch.tensor(checkpoint.tokenizer.encode(checkpoint.held_out))
    ids = ids[len(ids) // 4 :]  # what goes before is for calibration
    block_size, nats = model.config.block_size, 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, block_size):
            window = ids[start : start + block_size + 1]
            logits = model(window[None, :-1])[0][0, :, :257].double()
            nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    n_bytes = len(ids) - 1
    found = fp32_report["quality"]["bits_per_byte"]
    assert found == pytest.approx(nats / np.log(2) / n_bytes, rel=1e-5)


@pytest.mark.parametrize("name", ["fp32_report", "int8_report", "int4_report"])
def test_the_table_fits_80_columns(name: str, request: pytest.FixtureRequest) -> None:
    report = {**request.getfixturevalue(name), "file": "model.onnx"}
    # Longer numbers than most: a large and bad model.
    report["bytes"] = 1_234_567_890
    report["quality"]["loss_increase_percent"] = -12.345
    for line in table(report).splitlines():
        assert len(line) <= 80, line


def test_neither_the_checkpoint_nor_its_text_is_replaced_by_the_model(
    checkpoint_path: Path, tmp_path: Path
) -> None:
    checkpoint, text = tmp_path / "ckpt.pt", tmp_path / "text.txt"
    checkpoint.write_bytes(checkpoint_path.read_bytes())
    text.write_text("to be " * 1000)
    for out in (checkpoint, text):
        before = out.read_bytes()
        with pytest.raises(UsageError, match="is read, so it cannot be --out too"):
            export(checkpoint, out, eval_data=text, force=True)
        assert out.read_bytes() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    make_checkpoint: Callable[..., Path], value: float, tmp_path: Path
) -> None:
    path = make_checkpoint(SMALL)
    checkpoint = load_checkpoint(path)
    checkpoint.model["transformer.h.0.mlp.c_fc.weight"][0, 0] = value
    save_checkpoint(path, checkpoint)
    with pytest.raises(ArtefactError, match=r"h\.0\.mlp\.c_fc\.weight holds numbers that are not"):
        export(path, tmp_path / "model.onnx")


def test_a_model_of_zeros_exports(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = make_checkpoint(SMALL)
    checkpoint = load_checkpoint(path)
    for tensor in checkpoint.model.values():
        tensor.zero_()
    save_checkpoint(path, checkpoint)
    for bits in (None, 8, 4):
        report = export(path, tmp_path / f"{bits}.onnx", bits=bits)
        assert report["parity"]["max_abs_error"] == report["parity"]["max_rel_error"] == 0


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ckpt.pt")
    with pytest.raises(ArtefactError, match="is a device or a pipe"):
        export(tmp_path / "ckpt.pt", tmp_path / "model.onnx")
