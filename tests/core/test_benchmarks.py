"""What the benchmarks make of their numbers; nothing here measures."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")  # what regression.py sets, undone after the test
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_loss_of_ten_percent_is_reported_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    regression = load("regression", monkeypatch)
    last = {"decode": 1.0, "prompt": 2.0, "load": 3.0, "gone": 1.0}
    lines, slower = regression.compare({"decode": 1.2, "prompt": 2.1, "load": 1.5, "new": 9}, last)
    assert slower == ["decode: 20 % slower", "gone: not measured any more"]
    assert "| decode | 1.200 | 1.000 | +20.0 % |" in lines
    assert "| new | 9.000 |  |  |" in lines


def test_the_committed_result_is_of_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    regression = load("regression", monkeypatch)
    result = json.loads(regression.RESULT.read_text(encoding="utf-8"))
    assert {"command", "date", "cpu", "versions", "ratios"} == result.keys()
    assert all(ratio > 0 for ratio in result["ratios"].values())
    decodes = {name for name in result["ratios"] if re.fullmatch(r"decode \S+ \S+", name)}
    assert decodes == {f"decode {shape} {precision}" for shape, precision in regression.FILES}


def row(engine: str, precision: str, decode: float, **more: Any) -> dict[str, Any]:
    return {
        "shape": "4x128",
        "engine": engine,
        "precision": precision,
        "settings": "",
        "threads": 2,
        "prefill": 1000.0,
        "decode_16": decode,
        "first_token_s": 0.002,
        "cold_first_token_s": 0.5,
        "peak_rss_bytes": 80e6,
        "bytes": 2e6,
        "bits_per_byte": 1.75,
        "greedy_equal": 32,
        "greedy_tokens": 32,
        **more,
    }


def test_the_table_has_losing_rows_and_those_that_did_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peers = load("peers", monkeypatch)
    rows = [
        row("pico-edge", "int8", 90.0),
        row("llama.cpp", "int8", 100.0),
        row("llama.cpp", "fp32", 50.0, greedy_equal=7),
        {
            "shape": "4x128",
            "engine": "ctranslate2",
            "precision": "bf16",
            "settings": "",
            "error": "no bf16",
        },
    ]
    text = peers.render({"date": "today", "machine": "this", "versions": {}, "rows": rows})
    table = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")][1:]
    assert table == [["| 32", "llama.cpp"], ["| 8", "llama.cpp"], ["| **8**", "**pico-edge**"]]
    assert "Did not run: ctranslate2 bf16: no bf16" in text
    assert "part from pico-edge's in llama.cpp after 7" in text


def test_later_rounds_have_the_threads_that_were_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = load("peers", monkeypatch)
    monkeypatch.setattr(peers.os, "cpu_count", lambda: 2)
    one, two = {"threads": 1, "decode_16": 100.0}, {"threads": 2, "decode_16": 150.0}
    assert peers.next_threads([]) == [1, 2]
    assert peers.next_threads([one]) == [1, 2]
    assert peers.next_threads([one, two]) == [2]
    assert peers.next_threads([one, {"threads": 2, "decode_16": 103.0}]) == [1, 2]
    assert peers.next_threads([one, {"threads": 2, "error": "failed"}]) == [1, 2]


def test_every_variant_has_an_engine_and_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = load("peers", monkeypatch)
    engines = load("engines", monkeypatch)
    assert set(engines.ENGINES) == set(peers.ENGINE_ORDER) == set(peers.VERSION_OF)
    assert set(peers.PACKAGES) == set(peers.ENGINE_ORDER) - {"pico-edge"}
    for _, precision in peers.VARIANTS:
        assert peers._bits({"precision": precision}) in (4, 8, 16, 32)
