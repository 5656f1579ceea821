"""bench, eval and compare as their users meet them: what they print, and what they refuse."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pico_edge.terminal import progress_bar, table

DATA = Path(__file__).parents[1] / "data"
TINY, FP32 = DATA / "tiny.onnx", DATA / "tiny_fp32.onnx"
QUICK = ["--new-tokens", "4", "--repeats", "2"]
TEXT = "The following identifiers are used as reserved words, or keywords.\n" * 4
BENCH_KEYS = {
    "model",
    "bytes",
    "precision",
    "provider",
    "threads",
    "load_s",
    "time_to_first_token_s",
    "peak_rss_bytes",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "end_to_end_tokens_per_second",
    "cpu",
    "versions",
}
EVAL_KEYS = {
    "loss",
    "perplexity",
    "bits_per_byte",
    "tokens",
    "bytes",
    "block_size",
    "stride",
    "seconds",
}
COMPARE_KEYS = {"loss_increase_percent", "top1_agreement", "kl_divergence"}
# Runs a command in this process and says on stderr what it imported.
WATCHED = """
import sys
from pico_edge.cli import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "onnx", "tokenizers", "matplotlib"} & set(sys.modules)
    print("imported:", *sorted(heavy), file=sys.stderr)
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pico_edge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def json_of(*arguments: str | Path) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress in a pipe, and nothing to note
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held out.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_bench_reports_what_is_agreed() -> None:
    result = json_of("bench", TINY, *QUICK, "--depth", "62", "--threads", "1")
    assert result.keys() >= BENCH_KEYS
    for kind in ("prefill", "decode"):
        speed = result[f"{kind}_tokens_per_second"]
        assert speed.keys() == {"mean", "stdev", "median"}
        assert speed["mean"] > 0
        assert speed["stdev"] >= 0
    assert result["bytes"] == TINY.stat().st_size
    assert (result["precision"], result["threads"], result["depth"]) == ("int8", 1, 62)
    assert result["prompt_tokens"] == 64  # the context, which is less than 128
    assert 20e6 < result["peak_rss_bytes"] < 2e9
    assert 0 < result["bytes_per_token"] < result["bytes"]


def test_bench_prints_two_tables_of_80_columns() -> None:
    done = run("bench", TINY, *QUICK)
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines() if line.startswith("|")) <= 80
    for word in ("pp64", "tg4", "end to end", "first token", "peak memory", "GB/s"):
        assert word in done.stdout


def test_bench_gives_csv_and_jsonl_a_line_per_test() -> None:
    done = run("bench", TINY, *QUICK, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["test"] for row in rows] == ["pp64", "tg4"]
    done = run("bench", TINY, *QUICK, "--depth", "8", "--format", "jsonl")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["test"] for line in lines] == ["pp64", "tg4 @ d8"]
    assert all(line["median"] > 0 for line in lines)


def test_eval_reports_what_is_agreed(text: Path) -> None:
    result = json_of("eval", TINY, text)
    assert result.keys() >= EVAL_KEYS
    assert not COMPARE_KEYS & result.keys()
    assert result["tokens"] == result["bytes"] == len(TEXT) - 1  # bytes are the tokens
    assert result["block_size"] == result["stride"] == 64
    overlapping = json_of("eval", TINY, text, "--stride", "16")
    assert overlapping["stride"] == 16
    assert overlapping["tokens"] == result["tokens"]
    assert overlapping["loss"] < result["loss"]  # more context


def test_eval_compares_with_another_file(text: Path) -> None:
    result = json_of("eval", TINY, text, "--compare", FP32)
    assert result.keys() >= COMPARE_KEYS
    assert 0.9 < result["top1_agreement"] <= 1
    assert 0 < result["kl_divergence"] < 0.01
    itself = json_of("eval", FP32, text, "--compare", FP32)
    assert itself["top1_agreement"] == 1
    assert itself["loss_increase_percent"] == itself["kl_divergence"] == 0


def test_eval_reads_what_train_reads(tmp_path: Path, text: Path) -> None:
    (tmp_path / "utf16.txt").write_bytes(TEXT.encode("utf-16"))
    lines = [json.dumps({"text": TEXT[:67]}), json.dumps({"text": TEXT[67:]})]
    (tmp_path / "two.jsonl").write_text("\n".join(lines), encoding="utf-8")
    plain = json_of("eval", TINY, text)
    assert json_of("eval", TINY, tmp_path / "utf16.txt")["loss"] == plain["loss"]
    documents = json_of("eval", TINY, tmp_path / "two.jsonl")
    assert documents["sha256"] == plain["sha256"]
    assert documents["tokens"] == plain["tokens"] + 1  # end of text between the two
    assert documents["bytes"] == plain["bytes"]


def test_compare_has_a_row_for_each_file(text: Path) -> None:
    flags = ["--data", text, "--rounds", "1", "--new-tokens", "4"]
    result = json_of("compare", FP32, TINY, *flags)
    assert [row["precision"] for row in result["models"]] == ["fp32", "int8"]
    assert result["models"][0]["loss_increase_percent"] == 0
    assert all(row["decode_tokens_per_second"] > 0 for row in result["models"])
    flags[1] = text.with_name("utf16.txt")
    flags[1].write_text(text.read_text(encoding="utf-8"), encoding="utf-16-le")
    flags += ["--encoding", "utf-16-le"]
    assert json_of("compare", FP32, *flags)["models"][0]["bits_per_byte"] == pytest.approx(
        result["models"][0]["bits_per_byte"]
    )
    done = run("compare", TINY, *flags)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["bench", "{tmp}/none.onnx"], 3, "none.onnx: No such file"),
        (["bench", "{text}"], 3, "this is text: expected a model made by"),
        (["bench", "{tiny}", "--depth", "64"], 2, "depth is 64: expected less than the context"),
        (["bench", "{tiny}", "--prompt-tokens", "65"], 2, "prompt_tokens is 65"),
        (["bench", "{tiny}", "--repeats", "0"], 2, "repeats is 0"),
        (["bench", "{tiny}", "--format", "sql"], 2, "'sql' is not one of"),
        (["bench", "{tiny}", "--json", "--format", "csv"], 2, "--json and --format csv"),
        (["bench", "{tiny}", "--threads", "0"], 2, "threads is 0: expected"),
        (["eval", "{tiny}", "{tmp}/none.txt"], 3, "none.txt does not exist"),
        (["eval", "{tiny}", "{tmp}/bad.txt"], 3, "bad.txt: byte offset 2"),
        (["eval", "{tiny}", "{tmp}/empty.txt"], 3, "empty.txt: 0 tokens: expected 2 or more"),
        (["eval", "{tmp}/none.onnx", "{text}"], 3, "none.onnx: No such file"),
        (["eval", "{tiny}", "{text}", "--stride", "65"], 2, "stride is 65: expected 1 to"),
        (["compare", "{tiny}", "{text}", "--rounds", "1"], 3, "this is text: expected a model"),
        (["compare", "{tiny}", "--rounds", "0"], 2, "--rounds is 0"),
        (["compare", "{tiny}", "--encoding", "latin-1"], 2, "name the text with --data"),
        (["compare"], 2, "Missing argument 'MODEL"),
    ],
)
def test_an_error_is_one_line_that_says_what(
    tmp_path: Path, text: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "empty.txt").touch()
    places = {"tiny": TINY, "text": text, "tmp": tmp_path}
    done = run(*(argument.format(**places) for argument in arguments))
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


@pytest.mark.parametrize("command", ["bench", "eval"])
def test_a_file_is_measured_without_torch(command: str, text: Path) -> None:
    arguments = [command, str(TINY), *([str(text)] if command == "eval" else QUICK)]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "imported:\n"


def test_a_bar_says_how_far_and_how_long() -> None:
    assert progress_bar(500, 1000, 2.0, "tokens") == (
        f"[{'#' * 12}{' ' * 12}] 50 % | 250 tokens/s | 0:02 left"
    )
    assert progress_bar(1, 2, 4.0, "runs") == f"[{'#' * 12}{' ' * 12}] 50 % | 0:04 left"
    assert progress_bar(0, 10, 0.0, "runs") == f"[{' ' * 24}] 0 %"


def test_a_table_lines_up() -> None:
    assert table(["name", "n"], [["a", "12345"], ["longer", "1"]]).splitlines() == [
        "| name   |     n |",
        "| ------ | ----: |",
        "| a      | 12345 |",
        "| longer |     1 |",
    ]
