"""Cost of drawing a token, by itself and in the loop of a model, for each kind of sampling.

    python benchmarks/sampler_speed.py [MODEL] [--tokens 400]

By itself: logits of a vocabulary of 4096 and of 50,304, peaked (as of a trained model that is sure
of itself), spread, and flat (as of random weights), a new array for each draw; medians. With a
MODEL also in its loop, where caches are cold: median time between two session calls, everything in
it. One thread draws; run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from pico_edge.runtime import Model
from pico_edge.runtime.adjust import Adjuster
from pico_edge.runtime.philox import uniform
from pico_edge.runtime.sampling import Sampler, Sampling
from pico_edge.runtime.threads import physical_cores

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-k 50 (default)": {},
    "top-k 50, top-p 0.9": {"top_p": 0.9},
    "top-k 50, typical-p 0.9": {"typical_p": 0.9},
    "all tokens": {"top_k": 0},
    "top-p 0.9": {"top_k": 0, "top_p": 0.9},
    "min-p 0.05": {"top_k": 0, "min_p": 0.05},
    "top-p 0.9, min-p 0.02": {"top_k": 0, "top_p": 0.9, "min_p": 0.02},
    "typical-p 0.9": {"top_k": 0, "typical_p": 0.9},
    "top-k 50, penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.1},
    "top-k 50, no-repeat-ngram 3": {"no_repeat_ngram_size": 3},
}
SPREADS = {"peaked": 5.0, "spread": 2.0, "flat": 0.3}
ARRAYS = 40


def draw_alone(size: int, spread: float, changes: dict[str, Any], tokens: int) -> float:
    """Median seconds of a draw with its adjustments."""
    rng = np.random.default_rng(0)
    sampling = Sampling(**changes)
    sampler = Sampler(sampling)
    adjuster = Adjuster(sampling, [1, 2, 3], size, eot_id=0)
    adjusts = sampling.penalizes or sampling.no_repeat_ngram_size
    arrays = [(rng.normal(size=size) * spread).astype(np.float32) for _ in range(ARRAYS)]
    times = []
    for i in range(tokens):
        u, again = uniform(0, i), functools.partial(uniform, 0, i, 0)
        logits = arrays[i % ARRAYS]
        start = time.perf_counter()
        token_id = sampler.draw(adjuster.adjust(logits) if adjusts else logits, u, again)
        if adjusts:
            adjuster.add(token_id)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def draw_in_loop(model: Model, changes: dict[str, Any], tokens: int) -> tuple[float, float]:
    """Median seconds between two session calls, and inside one."""
    run, times = model.session.ort.run_with_iobinding, []

    def timed(binding: Any) -> None:
        start = time.perf_counter()
        run(binding)
        times.append((start, time.perf_counter()))

    model.session.ort.run_with_iobinding = timed
    try:
        for seed in (0, 1):  # the first warms up
            times.clear()
            model.generate("Once", max_new_tokens=tokens, speculate="off", seed=seed, **changes)
    finally:
        model.session.ort.run_with_iobinding = run
    outside = [after[0] - before[1] for before, after in itertools.pairwise(times)]
    return statistics.median(outside), statistics.median(end - start for start, end in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=400)
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, numpy {np.__version__}; us per token\n")
    sizes = (4096, 50_304)
    heads = [f"{size} {name}" for size in sizes for name in SPREADS]
    print(f"| by itself | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for kind, changes in KINDS.items():
        cells = [
            draw_alone(size, spread, changes, arguments.tokens)
            for size in sizes
            for spread in SPREADS.values()
        ]
        print(f"| {kind} | {' | '.join(f'{1e6 * cell:.0f}' for cell in cells)} |")
    if arguments.model is None:
        return
    # A fixed number: what is measured is one session of onnxruntime, which auto would leave.
    model = Model(arguments.model, threads=physical_cores())
    n = model.tokenizer.n_vocab
    print(f"\n| in the loop of {arguments.model.name}, {n} tokens | around a step | step |")
    print("|---|---|---|")
    new = min(arguments.tokens, model.config.block_size - 8)
    for kind, changes in KINDS.items():
        outside, inside = draw_in_loop(model, changes, new)
        print(f"| {kind} | {1e6 * outside:.0f} | {1e6 * inside:.0f} |")


if __name__ == "__main__":
    main()
