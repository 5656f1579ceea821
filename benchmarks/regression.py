"""Has anything become slower? A few speeds against a fixed kernel of numpy, and the last result.

    python benchmarks/regression.py             # exit code 1, and the names, beyond a 10 % loss
    python benchmarks/regression.py --update    # and make this the result to compare with

Under three minutes. Each speed is quoted as a ratio: its time over that of the kernel, timed before
and after it in the same process, so that a slower machine is no regression; on another processor
the ratios differ nonetheless, and the result is only printed. One thread everywhere: two are faster
and vary more. Random weights, vocabularies of bytes. Needs pico-edge[all]. Run it while nothing
else runs; whoever changes what is fast on purpose commits regression.json anew.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # read when numpy and torch are imported

import numpy as np  # noqa: E402

RESULT = Path(__file__).with_name("regression.json")
LIMIT = 1.10
ROUNDS = 9
# n_layer, n_head, n_embd, vocab_size, block_size
SHAPES = {"4x128": (4, 4, 128, 272, 64), "6x384": (6, 6, 384, 4096, 256)}
FILES = (("4x128", "fp32"), ("4x128", "int8"), ("6x384", "fp32"), ("6x384", "int8"))
BITS = {"fp32": None, "int8": 8}
STEPS, PROMPT_TOKENS = 40, 128


def reference() -> Callable[[], float]:
    """Seconds of sums of products over 4 MB, without BLAS, whose kernels depend on settings."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((1024, 1024), np.float32)
    vector = rng.standard_normal(1024, np.float32)

    def kernel() -> float:
        start = time.perf_counter()
        for _ in range(20):
            np.einsum("ij,j->i", matrix, vector)
        return time.perf_counter() - start

    return kernel


def make_files(folder: Path) -> None:
    """FILES as SHAPE-PRECISION.onnx, of models with random weights."""
    import torch
    from random_model import save_random

    from pico_edge.config import GPTConfig
    from pico_edge.export.pipeline import export
    from pico_edge.tokenizer import SimpleTokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, (n_layer, n_head, n_embd, vocab_size, block_size) in SHAPES.items():
        config = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd)
        save_random(
            folder / f"{name}.pt",
            config,
            SimpleTokenizer(),
            "\n".join(pydoc_data.topics.topics.values())[:4000],
        )
    for name, precision in FILES:
        if (folder / f"{name}-{precision}.onnx").exists():
            continue
        print(f"exporting {name} {precision}", file=sys.stderr, flush=True)
        export(
            folder / f"{name}.pt",
            folder / f"{name}-{precision}.onnx",
            bits=BITS[precision],
            max_loss_increase=1e9,
        )


def measurements(folder: Path) -> dict[str, Callable[[], float]]:
    """name -> what takes the time, in seconds; set up and warm."""
    from pico_edge.runtime import Model, Session
    from pico_edge.runtime.bench import some_ids, time_decode, time_prefill

    found: dict[str, Callable[[], float]] = {}
    for shape, precision in FILES:
        path = folder / f"{shape}-{precision}.onnx"
        cache = Session(path, threads=1).new_cache()
        label = f"{shape} {precision}"
        prompt = some_ids(256, min(PROMPT_TOKENS, cache.capacity))

        def decode(cache: Any = cache, depth: int = 16) -> float:
            return time_decode(cache, some_ids(256, depth), STEPS)

        def prefill(cache: Any = cache, prompt: list[int] = prompt) -> float:
            return min(time_prefill(cache, prompt) for _ in range(3))

        found[f"decode {label}"] = decode
        found[f"prompt {label}"] = prefill
        if shape == "6x384":
            found[f"decode {label} at depth 200"] = lambda cache=cache: time_decode(
                cache, some_ids(256, 200), STEPS
            )
    model = Model(folder / "6x384-int8.onnx", threads=1)

    def generate() -> float:
        start = time.perf_counter()
        model.generate(
            "The following", max_new_tokens=STEPS, min_new_tokens=STEPS, seed=1, speculate="off"
        )
        return time.perf_counter() - start

    def load() -> float:
        start = time.perf_counter()
        Session(folder / "6x384-int8.onnx", threads=1)
        return time.perf_counter() - start

    found["generate 6x384 int8"] = generate
    found["load 6x384 int8"] = load
    found["train step 4x128"] = _train_step()
    found["tokenize"] = _tokenize()
    return found


def _train_step() -> Callable[[], float]:
    """Forward and backward of 4 windows of 64 tokens, in float32."""
    import torch

    from pico_edge.config import GPTConfig
    from pico_edge.train.model import GPT

    n_layer, n_head, n_embd, vocab_size, block_size = SHAPES["4x128"]
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd))
    idx = torch.randint(256, (4, block_size), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        start = time.perf_counter()
        _, loss = model(idx, idx)
        assert loss is not None
        loss.backward()
        return time.perf_counter() - start

    return step


def _tokenize() -> Callable[[], float]:
    """100 kB of text with 1024 tokens trained on it."""
    from pico_edge.train.bpe import train_bpe

    text = "\n".join(pydoc_data.topics.topics.values())[:100_000]
    tokenizer = train_bpe([text], 1024)

    def encode() -> float:
        start = time.perf_counter()
        tokenizer.encode(text)
        return time.perf_counter() - start

    return encode


def measure(found: dict[str, Callable[[], float]], kernel: Callable[[], float]) -> dict[str, float]:
    """Medians over rounds of time over the kernel's time, before and after; the first is warm-up.

    The smaller of two runs each: what disturbs only ever adds.
    """
    ratios: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(ROUNDS + 1):
        print(f"round {turn} of {ROUNDS}", file=sys.stderr, flush=True)
        for name, run in found.items():
            before = min(kernel(), kernel())
            seconds = min(run(), run())
            after = min(kernel(), kernel())
            if turn:
                ratios[name].append(seconds / min(before, after))
    return {name: statistics.median(values) for name, values in ratios.items()}


def compare(now: dict[str, float], last: dict[str, float]) -> tuple[list[str], list[str]]:
    """Lines of a table, and the names of what became slower by more than LIMIT."""
    lines = ["| what | time over the kernel's | last | change |", "|---|---:|---:|---:|"]
    slower = []
    for name, ratio in now.items():
        before = last.get(name)
        cells = [name, f"{ratio:.3f}", "", ""]
        if before is not None:
            cells[2:] = [f"{before:.3f}", f"{100 * (ratio / before - 1):+.1f} %"]
            if ratio > LIMIT * before:
                slower.append(f"{name}: {100 * (ratio / before - 1):.0f} % slower")
        lines.append("| " + " | ".join(cells) + " |")
    slower += [f"{name}: not measured any more" for name in last if name not in now]
    return lines, slower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write regression.json")
    parser.add_argument("--folder", type=Path, help="keep the model files here, and take them")
    parser.add_argument("--prepare", action="store_true", help="only make the model files")
    arguments = parser.parse_args()
    from pico_edge.runtime.bench import cpu_name, versions

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        make_files(folder)
        if arguments.prepare:
            return
        now = measure(measurements(folder), reference())
    last = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    lines, slower = compare(now, last.get("ratios", {}))
    same_cpu = last.get("cpu") in (None, cpu_name())
    print("\n".join(lines))
    print(f"\n{cpu_name()}, {time.strftime('%Y-%m-%d')}, {time.perf_counter() - start:.0f} s")
    if arguments.update:
        result = {
            "command": "python benchmarks/regression.py --update",
            "date": time.strftime("%Y-%m-%d"),
            "cpu": cpu_name(),
            "versions": versions(),
            "ratios": {name: round(ratio, 4) for name, ratio in now.items()},
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {RESULT}")
    elif not last:
        print(f"nothing to compare with: --update writes {RESULT}")
    elif not same_cpu:
        print(f"the last result is of another processor, {last['cpu']}: no verdict")
    elif slower:
        print("slower than the last result:\n" + "\n".join(f"  {line}" for line in slower))
        sys.exit(1)
    else:
        print("nothing is slower by 10 % or more")


if __name__ == "__main__":
    main()
