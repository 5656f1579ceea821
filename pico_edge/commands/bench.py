"""`pico-edge bench`: how fast a model.onnx is here, and what it takes."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pico_edge.errors import UsageError
from pico_edge.terminal import (
    Debug,
    Depth,
    Json,
    NewTokens,
    PromptTokens,
    Provider,
    Quiet,
    Signals,
    Threads,
    print_json,
    progress_bar,
    say,
    table,
    write,
)

# What a line of csv and jsonl has beside its test.
SHARED = (
    "model",
    "bytes",
    "precision",
    "provider",
    "threads",
    "depth",
    "load_s",
    "time_to_first_token_s",
    "peak_rss_bytes",
    "end_to_end_tokens_per_second",
    "bandwidth_share",
    "cpu",
)


def bench(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model.onnx made by export.")],
    prompt_tokens: PromptTokens = None,
    new_tokens: NewTokens = 128,
    depth: Depth = 0,
    repeats: Annotated[int, typer.Option(metavar="N", help="Measured runs of each test.")] = 5,
    provider: Provider = "auto",
    threads: Threads = "auto",
    format_: Annotated[
        Literal["md", "csv", "json", "jsonl"],
        typer.Option("--format", help="Of what is printed; csv, jsonl: one line per test."),
    ] = "md",
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure prefill, decode, memory: without tokenizing and sampling, as llama-bench does."""
    if json_ and format_ not in ("md", "json"):
        raise UsageError(f"--json and --format {format_}: expected one of them")
    with Signals() as signals:
        from pico_edge.runtime.bench import measure
        from pico_edge.train.report import Reporter

        signals.raise_at_once()
        reporter = Reporter(quiet=quiet)
        start = time.perf_counter()

        def progress(done: int, total: int) -> None:
            elapsed_s = time.perf_counter() - start
            reporter.progress(lambda _: progress_bar(done, total, elapsed_s, "tests"))

        result = measure(
            model,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            depth=depth,
            repeats=repeats,
            provider=provider,
            threads=threads,
            progress=progress,
        )
        reporter.end_progress()
    if not quiet:
        for notice in result["notices"]:
            say(f"note: {notice}")
    if json_ or format_ == "json":
        print_json(result)
    elif format_ == "jsonl":
        write("".join(json.dumps(line, allow_nan=False) + "\n" for line in _tests(result)))
    elif format_ == "csv":
        write(_csv(_tests(result)))
    else:
        write(_markdown(result))


def _tests(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat record for each of the two tests."""
    shared = {key: result[key] for key in SHARED}
    return [
        {"test": name, **result[f"{kind}_tokens_per_second"], **shared}
        for name, kind in zip(_names(result), ("prefill", "decode"), strict=True)
    ]


def _names(result: dict[str, Any]) -> tuple[str, str]:
    """llama-bench's names. Example: "pp128", "tg128 @ d256"."""
    depth = f" @ d{result['depth']}" if result["depth"] else ""
    return f"pp{result['prompt_tokens']}", f"tg{result['new_tokens']}{depth}"


def _csv(lines: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _markdown(result: dict[str, Any]) -> str:
    """Two tables of at most 80 columns and the line of the machine."""
    name = result["model"] if len(result["model"]) <= 40 else "..." + result["model"][-37:]
    rows = []
    for line in _tests(result):
        spread = f"{line['mean']:.1f} ± {line['stdev']:.1f}"
        rows.append([line["test"], spread, f"{line['median']:.1f}"])
    rows.append(["end to end", "", f"{result['end_to_end_tokens_per_second']:.1f}"])
    facts = [
        ["file", f"{result['bytes'] / 1e6:.2f} MB, {result['parameters']:,} parameters"],
        ["load", f"{1000 * result['load_s']:.1f} ms"],
        [
            "first token",
            f"{1000 * result['time_to_first_token_s']:.2f} ms after a prompt of "
            f"{result['prompt_tokens']}",
        ],
        ["peak memory", f"{result['peak_rss_bytes'] / 1e6:.1f} MB, Python included"],
        [
            "decode reads",
            f"{result['achieved_bytes_per_second'] / 1e9:.2f} GB/s, "
            f"{100 * result['bandwidth_share']:.0f} % of memory's "
            f"{result['read_bandwidth_bytes_per_second'] / 1e9:.1f}",
        ],
    ]
    used = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return (
        f"{name}: {result['precision']}, {result['provider']}, threads {result['threads']}\n\n"
        + table(["test", "tokens/s", "median"], rows)
        + "\n\n"
        + table(["what", "value"], facts, left=2)
        + f"\n\n{result['cpu']}, {result['cores']} cores, {result['os']}\n{used}\n"
        "Tokenizing and sampling are in 'end to end' and 'first token' only.\n"
    )
