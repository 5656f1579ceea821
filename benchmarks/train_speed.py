"""Time to nanoGPT's result: its README's CPU recipe against ours, same text, split and shape.

    python benchmarks/train_speed.py --nanogpt DIR --data tinyshakespeare.txt [--rounds 3]

DIR: a clone of karpathy/nanoGPT, which is left as it is (its data is made in a copy). Recipe: the
one of its README for a CPU, 4 layers x 4 heads x 128, block 64, batch 12, 2000 iterations, no
dropout, first 90 % of the text to train on. Ours: the same shape and split, bytes as tokens, 400
iterations of 16 windows with Muon. Both run as processes, in alternating rounds. What counts is
wall clock from the start of the process to the evaluation that reaches the loss, imports included.
Ours is the mean over the whole held-out part, nanoGPT's its own estimate over 20 batches. --plot
draws the curves. Needs pico-edge[train]. Run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

NANOGPT = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--log_interval=500 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
ITERS = 400
OURS = (
    "--tokenizer simple --preset nano --dropout 0 --batch-size 16 --max-iters {iters} "
    "--eval-interval {interval} --eval-iters 1000000"
)

Curve = list[tuple[float, float]]  # seconds since the start of the process, held-out nats


def prepare_nanogpt(source: Path, data: Path, folder: Path) -> Path:
    """A copy of nanoGPT with its character data set made from the text."""
    work = folder / "nanogpt"
    shutil.copytree(source, work, ignore=shutil.ignore_patterns(".git", "assets"))
    place = work / "data" / "shakespeare_char"
    shutil.copy(data, place / "input.txt")
    script = (place / "prepare.py").read_text().replace("import requests", "")
    (place / "prepare.py").write_text(script)
    subprocess.run([sys.executable, "prepare.py"], cwd=place, check=True, capture_output=True)
    return work


def run_nanogpt(work: Path) -> Curve:
    """One run of the recipe; the time at which each evaluation was printed."""
    begin, curve = time.perf_counter(), []
    command = [sys.executable, "-u", "train.py", *NANOGPT.split()]
    with subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found = re.match(r"step \d+: train loss [\d.]+, val loss ([\d.]+)", line)
            if found:
                curve.append((time.perf_counter() - begin, float(found[1])))
    if process.returncode:
        raise SystemExit(f"nanoGPT ended with {process.returncode}")
    return curve


def run_ours(data: Path, folder: Path, interval: int) -> Curve:
    """One run; wall clock of the process to the end of its last evaluation, from its own record."""
    out = folder / "ckpt.pt"
    words = OURS.format(iters=ITERS, interval=interval).split()
    command = [sys.executable, "-m", "pico_edge", "train", str(data), "-o", str(out), "--force"]
    begin = time.time()
    subprocess.run([*command, *words], check=True, capture_output=True, cwd=folder)
    rows = [json.loads(line) for line in (folder / "ckpt.run" / "metrics.jsonl").open()]
    # elapsed_s counts from the first line of the command; what Python takes before it is added.
    end = time.time() - begin
    before = max(0.0, min(end - rows[-1]["elapsed_s"], start_s()))
    return [(row["elapsed_s"] + before, row["val_loss"]) for row in rows]


def start_s() -> float:
    """Seconds that Python and the imports of the command line take before the command begins."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import pico_edge.cli"], check=True)
    return time.perf_counter() - begin


def draw(nanogpt: Curve, ours: Curve, image: Path) -> None:
    """Held-out loss against wall clock."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*nanogpt, strict=True), "o-", label="nanoGPT, its CPU recipe")
    axes.plot(*zip(*ours, strict=True), "o-", label="pico-edge, the same shape")
    axes.set_xlabel("seconds from the start of the process")
    axes.set_ylabel("held-out loss, nats per character")
    axes.set_ylim(top=3.0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="write the curves of one more run each")
    arguments = parser.parse_args()
    data = arguments.data.resolve()
    theirs: list[tuple[float, float]] = []
    mine: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = prepare_nanogpt(arguments.nanogpt.resolve(), data, folder)
        for _ in range(arguments.rounds):
            curve = run_nanogpt(work)
            theirs.append(curve[-1])
            mine.append(run_ours(data, folder, ITERS)[-1])
        if arguments.plot:
            draw(curve, run_ours(data, folder, ITERS // 16), arguments.plot)
    print(f"medians of {arguments.rounds} alternating rounds; {platform.machine()},", end=" ")
    print(f"{os.cpu_count()} cores, torch {metadata.version('torch')}\n")
    print("| | seconds to the evaluation | held-out nats | rounds, s |")
    print("|---|---|---|---|")
    for label, results in (("nanoGPT, 2000 x 768 tokens", theirs), ("pico-edge", mine)):
        seconds = [s for s, _ in results]
        loss = statistics.median(loss for _, loss in results)
        each = ", ".join(f"{s:.1f}" for s in seconds)
        print(f"| {label} | {statistics.median(seconds):.1f} | {loss:.4f} | {each} |")
    ratio = statistics.median(a[0] / b[0] for a, b in zip(mine, theirs, strict=True))
    print(f"\nratio of wall clock, round by round, median: {ratio:.3f}")


if __name__ == "__main__":
    main()
