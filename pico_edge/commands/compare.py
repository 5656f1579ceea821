"""`pico-edge compare`: speed, quality, size and memory of several files, a row each."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.terminal import (
    Debug,
    Depth,
    Encoding,
    Json,
    NewTokens,
    PromptTokens,
    Quiet,
    Signals,
    TextField,
    Threads,
    print_json,
    progress_bar,
    table,
    write,
)

ERRORS = {error.exit_code: error for error in (PicoEdgeError, UsageError, ArtefactError)}


def compare(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL...", help="Files made by export; the first is the measure."),
    ],
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text that was not trained on: adds the quality."),
    ] = None,
    encoding: Encoding = None,
    text_field: TextField = "text",
    prompt_tokens: PromptTokens = None,
    new_tokens: NewTokens = 128,
    depth: Depth = 0,
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Processes for each file, in turns.")
    ] = 3,
    threads: Threads = "auto",
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure several model files, each in a process of its own, in alternating rounds."""
    if rounds < 1:
        raise UsageError(f"--rounds is {rounds}: expected 1 or more")
    if encoding is not None and data is None:
        raise UsageError(f"--encoding is {encoding}, of no text: name the text with --data")
    with Signals() as signals:
        from pico_edge.train.report import Reporter

        signals.raise_at_once()
        reporter = Reporter(quiet=quiet)
        total = len(models) * (rounds + (data is not None))
        start, done = time.perf_counter(), 0

        def child(*arguments: str) -> dict[str, Any]:
            nonlocal done
            result = _run(*arguments, "--threads", threads)
            done += 1
            elapsed_s = time.perf_counter() - start
            reporter.progress(lambda _: progress_bar(done, total, elapsed_s, "runs"))
            return result

        flags = ["--new-tokens", str(new_tokens), "--depth", str(depth), "--repeats", "3"]
        if prompt_tokens is not None:
            flags += ["--prompt-tokens", str(prompt_tokens)]
        runs: list[list[dict[str, Any]]] = [[] for _ in models]
        for _ in range(rounds):
            for model, found in zip(models, runs, strict=True):
                found.append(child("bench", str(model), *flags))
        rows = [_row(found) for found in runs]
        if data is not None:
            reading = ["--text-field", text_field]
            reading += [] if encoding is None else ["--encoding", encoding]
            against = ["--compare", str(models[0]), *reading]
            for model, row in zip(models, rows, strict=True):
                quality = child("eval", str(model), str(data), *against)
                row |= {
                    key: quality[key]
                    for key in (
                        "bits_per_byte",
                        "loss_increase_percent",
                        "top1_agreement",
                        "kl_divergence",
                    )
                }
        reporter.end_progress()
    if json_:
        print_json({"data": None if data is None else str(data), "models": rows})
    else:
        write(_markdown(rows))


def _run(*arguments: str) -> dict[str, Any]:
    """A command of ours with --json, in a process of its own; its error becomes ours."""
    command = [sys.executable, "-m", "pico_edge", *arguments, "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{arguments[0]} ended with no word"]
        message = lines[-1].removeprefix("error: ")
        raise ERRORS.get(done.returncode, PicoEdgeError)(message)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _row(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the processes of one file."""
    first = found[0]
    row = {
        key: first[key] for key in ("model", "bytes", "precision", "target", "provider", "threads")
    }
    for key in ("load_s", "time_to_first_token_s", "peak_rss_bytes"):
        row[key] = statistics.median(run[key] for run in found)
    for key in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        row[key] = statistics.median(run[key]["median"] for run in found)
    row["end_to_end_tokens_per_second"] = statistics.median(
        run["end_to_end_tokens_per_second"] for run in found
    )
    return row


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of at most 80 columns: speeds in tokens/s, the first token in ms, sizes in MB."""
    header = ["file", "type", "prompt", "decode", "first", "MB", "RSS"]
    with_quality = "bits_per_byte" in rows[0]
    header += ["bits/B", "loss %"] if with_quality else []
    lines = []
    for row in rows:
        name = Path(row["model"]).name
        line = [
            name if len(name) <= 20 else name[:17] + "...",
            str(row["precision"]),
            f"{row['prefill_tokens_per_second']:.0f}",
            f"{row['decode_tokens_per_second']:.0f}",
            f"{1000 * row['time_to_first_token_s']:.2f}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['peak_rss_bytes'] / 1e6:.0f}",
        ]
        if with_quality:
            line += [f"{row['bits_per_byte']:.4f}", f"{row['loss_increase_percent']:+.2f}"]
        lines.append(line)
    note = f"{rows[0]['provider']}, threads {rows[0]['threads']}; tokens/s, first token in ms"
    if with_quality:
        note += "; loss against the first file"
    return f"{table(header, lines, left=2)}\n\n{note}\n"
