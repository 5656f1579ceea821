"""Decode speed beside a busy process: a fixed number of threads against `auto`, which adapts.

    python benchmarks/neighbour.py model.onnx [--seconds 6] [--rounds 3]

Batch 1; each figure from a process of its own. Quiet, then with one busy process started when the
first second has gone, then again after it has ended: tokens/s of the part after each change has had
--seconds / 2 to settle. Run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

BUSY = [sys.executable, "-c", "while True: pass"]


def rate(path: Path, threads: str, seconds: float) -> dict[str, float]:
    """Tokens/s quiet, beside a neighbour, and after it; measured in this process."""
    from pico_edge.runtime.session import Session

    session = Session(path, provider="cpu", threads=threads)
    cache = session.new_cache()
    cache.prefill([[0]])

    def run(seconds: float) -> float:
        steps, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            if cache.lengths[0] == cache.capacity:
                cache.truncate(0, 1)
            cache.decode([0])
            steps += 1
        return steps / seconds

    run(1.0)
    found = {"quiet": run(seconds / 2)}
    neighbour = subprocess.Popen(BUSY)
    try:
        run(seconds / 2)
        found["beside a neighbour"] = run(seconds / 2)
    finally:
        neighbour.kill()
        neighbour.wait()
    run(seconds / 2)
    found["after it"] = run(seconds / 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(rate(arguments.model, arguments.child, arguments.seconds)))
        return
    runs: dict[str, list[dict[str, float]]] = {"1": [], "2": [], "auto": []}
    for _ in range(arguments.rounds):
        for threads, results in runs.items():
            command = [sys.executable, __file__, str(arguments.model), "--child", threads]
            command += ["--seconds", str(arguments.seconds)]
            results.append(
                json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            )
    print("| threads | quiet | beside a neighbour | after it | share kept |")
    print("|---|---|---|---|---|")
    for threads, results in runs.items():
        median = {key: statistics.median(r[key] for r in results) for key in results[0]}
        kept = median["beside a neighbour"] / median["quiet"]
        cells = " | ".join(f"{value:.0f}" for value in median.values())
        print(f"| {threads} | {cells} | {kept:.2f} |")


if __name__ == "__main__":
    main()
