"""Decode speed of an exported model against torch eager, and the cost of the loop around it.

    python benchmarks/decode_speed.py [--rounds 7] [--json]

Makes a 6 x 384 model with random weights and a 4096-token vocabulary trained on pydoc_data.topics,
exports it as fp32 and int8, and decodes it with each engine in a process of its own, in alternating
rounds, each engine with 1 and 2 threads (up to the cores of the machine). Quoted are medians over
rounds and each engine's better thread count. Needs pico-edge[all]. Run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

N_LAYER, N_HEAD, N_EMBD, BLOCK_SIZE, VOCAB_SIZE = 6, 6, 384, 256, 4096
PROMPT_TOKENS, NEW_TOKENS = 64, 128


def prepare(folder: Path) -> None:
    """ckpt.pt, fp32.onnx and int8.onnx in the folder."""
    import torch
    from random_model import save_random

    from pico_edge.config import GPTConfig
    from pico_edge.export.pipeline import export
    from pico_edge.train.bpe import train_bpe

    text = "\n".join(pydoc_data.topics.topics.values())
    tokenizer = train_bpe([text], VOCAB_SIZE)
    torch.manual_seed(0)
    config = GPTConfig(BLOCK_SIZE, VOCAB_SIZE, N_LAYER, N_HEAD, N_EMBD)
    save_random(folder / "ckpt.pt", config, tokenizer, text[:8000])
    export(folder / "ckpt.pt", folder / "fp32.onnx")
    export(folder / "ckpt.pt", folder / "int8.onnx", quantize=True)


def measure_torch(folder: Path, threads: int) -> dict[str, float]:
    """Median step of the torch model, eager, with its own cache; argmax as the sampler."""
    import torch

    from pico_edge.train.checkpoint import build_model, load_checkpoint

    torch.set_num_threads(threads)
    model = build_model(load_checkpoint(folder / "ckpt.pt"))
    steps = []
    with torch.inference_mode():
        idx = torch.arange(PROMPT_TOKENS)[None]
        logits, past = model.forward_cached(idx)
        for _ in range(NEW_TOKENS):
            token = logits[:, -1].argmax(-1, keepdim=True)
            start = time.perf_counter()
            logits, past = model.forward_cached(token, past)
            steps.append(time.perf_counter() - start)
    return {"step_s": statistics.median(steps)}


def measure_onnx(path: Path, threads: int) -> dict[str, float]:
    """Median step inside the session call, and the median of all around it.

    That is binding, sampling at the default top-k 50, and detokenizing.
    """
    from pico_edge.runtime import Model

    model = Model(path, threads=threads)
    run, times = model.session.ort.run_with_iobinding, []

    def timed(binding: Any) -> None:
        start = time.perf_counter()
        run(binding)
        times.append((start, time.perf_counter()))

    model.session.ort.run_with_iobinding = timed
    prompt = (
        "The following identifiers are used as reserved words, or keywords of the language. " * 4
    )
    for seed in (0, 1):  # the first warms up
        times.clear()
        started = time.perf_counter()
        made = model.generate(prompt, max_new_tokens=NEW_TOKENS, seed=seed, speculate="off")
        total = time.perf_counter() - started
    steps = times[1:]  # the first call is the prefill
    inside = [end - start for start, end in steps]
    outside = [after[0] - before[1] for before, after in itertools.pairwise(times)]
    return {
        "step_s": statistics.median(inside),
        "outside_s": statistics.median(outside),
        # Of totals, since some of the work around a step is done ahead, for many at once.
        "outside_share": sum(outside) / (sum(inside) + sum(outside)),
        "end_to_end_tokens_per_second": made.new_tokens / total,
    }


def measure(engine: str, folder: Path, threads: int) -> dict[str, float]:
    """One engine in a process of its own: torch would starve beside onnxruntime's threads."""
    command = [sys.executable, __file__, "--child", engine, str(folder), str(threads)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        engine, folder, threads = arguments.child
        if engine == "torch":
            result = measure_torch(Path(folder), int(threads))
        else:
            result = measure_onnx(Path(folder, f"{engine}.onnx"), int(threads))
        print(json.dumps(result))
        return

    engines = ("torch", "fp32", "int8")
    cores = os.cpu_count() or 1
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        sizes = {engine: (folder / f"{engine}.onnx").stat().st_size for engine in engines[1:]}
        for _ in range(arguments.rounds):
            for engine in engines:
                for threads in sorted({1, min(2, cores)}):
                    result = measure(engine, folder, threads)
                    runs.setdefault((engine, threads), []).append(result)

    best: dict[str, dict[str, float]] = {}
    for (engine, threads), results in runs.items():
        row = {key: statistics.median(r[key] for r in results) for key in results[0]}
        if engine not in best or row["step_s"] < best[engine]["step_s"]:
            best[engine] = {"threads": threads, **row}
    overhead = best["int8"]["outside_share"]
    summary = {
        "engines": best,
        "int8_over_torch": best["torch"]["step_s"] / best["int8"]["step_s"],
        "int8_over_fp32": best["fp32"]["step_s"] / best["int8"]["step_s"],
        "outside_share_of_int8_step": overhead,
        "int8_bytes_over_fp32": sizes["int8"] / sizes["fp32"],
        "machine": f"{platform.processor() or platform.machine()}, {cores} cores",
        "versions": {p: metadata.version(p) for p in ("torch", "onnxruntime", "numpy")},
    }
    if arguments.json:
        print(json.dumps(summary))
        return
    print(
        f"{N_LAYER} x {N_EMBD}, vocabulary {VOCAB_SIZE}, block {BLOCK_SIZE}, batch 1, depth "
        f"{PROMPT_TOKENS}-{PROMPT_TOKENS + NEW_TOKENS}, medians of {arguments.rounds} rounds"
    )
    print(f"{summary['machine']}; {summary['versions']}\n")
    print("| engine | threads | step, us | tokens/s | around the step, us |")
    print("|---|---|---|---|---|")
    for engine, row in best.items():
        outside = f"{1e6 * row['outside_s']:.0f}" if "outside_s" in row else ""
        print(
            f"| {engine} | {row['threads']} | {1e6 * row['step_s']:.0f} | "
            f"{1 / row['step_s']:.0f} | {outside} |"
        )
    print(
        f"\nint8 decodes {summary['int8_over_torch']:.1f} x torch eager, "
        f"{summary['int8_over_fp32']:.1f} x fp32; outside the session call: "
        f"{100 * overhead:.1f} % of a step; file {summary['int8_bytes_over_fp32']:.3f} of fp32"
    )


if __name__ == "__main__":
    main()
