"""Prefill and decode speed, size and export time of every precision, at one shape.

    python benchmarks/precisions.py [--shape 12,12,768,50304,1024] [--rounds 7] [--json]

The shape is n_layer,n_head,n_embd,vocab_size,block_size; weights are random. Each file is measured
in a process of its own, in alternating rounds; quoted are medians. Decode is timed at fixed depths,
without tokenizing and sampling. Needs pico-edge[all]. Run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT_TOKENS, DEPTHS, STEPS = 128, (16, 128, 1000), 24
PRECISIONS = {"fp32": None, "int8": 8, "int4": 4}


def prepare(folder: Path, shape: list[int]) -> dict[str, float]:
    """ckpt.pt and a file per precision in the folder; the seconds each export took."""
    import torch

    from pico_edge.config import GPTConfig
    from pico_edge.export.pipeline import export
    from pico_edge.tokenizer import SimpleTokenizer
    from pico_edge.train.checkpoint import (
        Checkpoint,
        library_versions,
        model_state,
        save_checkpoint,
    )
    from pico_edge.train.model import GPT

    n_layer, n_head, n_embd, vocab_size, block_size = shape
    torch.manual_seed(0)
    config = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd)
    checkpoint = Checkpoint(
        config=config,
        tokenizer=SimpleTokenizer(),
        model=model_state(GPT(config)),
        held_out="\n".join(pydoc_data.topics.topics.values())[:16_000],
        iter=0,
        tokens=0,
        train_loss=None,
        val_loss=None,
        val_bits_per_byte=None,
        settings={},
        data={},
        versions=library_versions(),
    )
    save_checkpoint(folder / "ckpt.pt", checkpoint)
    seconds = {}
    for name, bits in PRECISIONS.items():
        start = time.perf_counter()
        export(folder / "ckpt.pt", folder / f"{name}.onnx", bits=bits, max_loss_increase=1e9)
        seconds[name] = time.perf_counter() - start
    return seconds


def measure_here(path: Path, threads: int) -> dict[str, float]:
    """Tokens per second: of a prompt, and of single steps at each depth."""
    from pico_edge.runtime.session import Session

    session = Session(path, threads=threads)
    cache, n_vocab = session.new_cache(), session.tokenizer.n_vocab
    prompt = [i % n_vocab for i in range(min(PROMPT_TOKENS, cache.capacity))]
    times = []
    for _ in range(6):
        cache.reset()
        start = time.perf_counter()
        cache.prefill([prompt])
        times.append(time.perf_counter() - start)
    result = {"prefill": len(prompt) / statistics.median(times[1:])}
    for depth in DEPTHS:
        if depth + STEPS > cache.capacity:
            continue
        cache.reset()
        cache.prefill([[i % n_vocab for i in range(depth)]])
        times = []
        for _ in range(STEPS):
            start = time.perf_counter()
            cache.decode([1])
            times.append(time.perf_counter() - start)
        result[f"decode at {depth}"] = 1 / statistics.median(times[2:])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="12,12,768,50304,1024")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure_here(Path(arguments.child), arguments.threads)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in PRECISIONS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = prepare(folder, [int(n) for n in arguments.shape.split(",")])
        sizes = {name: (folder / f"{name}.onnx").stat().st_size for name in PRECISIONS}
        for _ in range(arguments.rounds):
            for name in PRECISIONS:
                command = [sys.executable, __file__, "--child", str(folder / f"{name}.onnx")]
                command += ["--threads", str(arguments.threads)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs[name].append(json.loads(output))
    rows = {
        name: {
            "bytes": sizes[name],
            "of_fp32": sizes[name] / sizes["fp32"],
            "export_s": seconds[name],
            **{key: statistics.median(run[key] for run in found) for key in found[0]},
        }
        for name, found in runs.items()
    }
    if arguments.json:
        print(json.dumps(rows))
        return
    keys = [key for key in rows["fp32"] if key not in ("bytes", "of_fp32", "export_s")]
    print(f"| {arguments.shape} | MB | of fp32 | export, s | {' | '.join(keys)} |")
    print("|---" * (4 + len(keys)) + "|")
    for name, row in rows.items():
        speeds = " | ".join(f"{row[key]:.0f}" for key in keys)
        print(
            f"| {name} | {row['bytes'] / 1e6:.1f} | {row['of_fp32']:.3f} | {row['export_s']:.0f} | "
            f"{speeds} |"
        )


if __name__ == "__main__":
    main()
