"""What the engine saves: batches whose texts end at different times, prompts that share a start,
refills of a full context.

    python benchmarks/engine_speed.py MODEL [--threads N]

Prints best times of a few runs each, in one process: run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from pico_edge.artefact import tokens_kept
from pico_edge.runtime import Model

ROWS, RUNS = 8, 4
PROMPT = "The following identifiers are used as reserved words, or keywords of the language. "


def measure_batch(model: Model) -> None:
    """Tokens per second of one text and of eight, whose lengths are equal, spread and all but one
    short."""
    most = model.config.block_size // 2
    lengths = {
        "1 text": [most],
        "8 of equal length": [most] * ROWS,
        "8 of lengths 1/8 to 8/8": [most * (i + 1) // ROWS for i in range(ROWS)],
        "7 of 1/8 and one whole": [most // ROWS] * (ROWS - 1) + [most],
    }
    for name, wanted in lengths.items():
        times = []
        for _ in range(RUNS):
            start = time.perf_counter()
            model.generate(
                ["Once"] * len(wanted), max_new_tokens=wanted, min_new_tokens=most, seed=1
            )
            times.append(time.perf_counter() - start)
        rate = sum(wanted) / min(times)
        print(f"| batch: {name} | {1e3 * min(times):.0f} ms, {rate:.0f} tokens/s |")


def measure_prefix(model: Model, threads: str) -> None:
    """Time to the first token of a conversation that grows by 8 tokens a turn."""
    reusing = Model(model.session.path, threads=threads, reuse_prefix=True)
    for name, each in (("without", model), ("with", reusing)):
        ids = model.tokenizer.encode(PROMPT * 99)[: model.config.block_size * 5 // 8]
        text, times = model.tokenizer.decode(ids), []
        for _ in range(8):
            made = each.generate(text, max_new_tokens=6, min_new_tokens=6, temperature=0)
            text += made.text + "x "
            times.append(made.time_to_first_token_s)
        after = 1e3 * statistics.median(times[1:])
        print(f"| first token after {made.prompt_tokens} tokens, {name} reuse | {after:.2f} ms |")


def measure_refill(model: Model) -> None:
    """Time of a refill in percent of the decoding between two of them."""
    window = model.config.block_size
    ids = np.random.default_rng(0).integers(0, model.tokenizer.n_vocab, window).tolist()
    cache = model.session.new_cache()
    steps = [float("inf")] * window
    for _ in range(RUNS):
        cache.reset()
        cache.prefill([ids[:1]])
        for at in range(1, window):
            start = time.perf_counter()
            cache.decode([ids[at]])
            steps[at] = min(steps[at], time.perf_counter() - start)
    print(f"| kept of a full context | {tokens_kept(window)} of {window} tokens |")
    for name, keep in (
        ("1/4", window // 4),
        ("1/3", window // 3),
        ("1/2", window // 2),
    ):
        times = []
        for _ in range(3 * RUNS):
            cache.reset()
            start = time.perf_counter()
            cache.append(0, ids[: keep - 1])
            times.append(time.perf_counter() - start)
            cache.decode([1])
        between = sum(steps[keep - 1 :])
        print(
            f"| refill of {keep} of {window} tokens ({name}) | {1e3 * min(times):.2f} ms, "
            f"{100 * min(times) / between:.0f} % of {1e3 * between:.1f} ms of steps |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", default="auto")
    arguments = parser.parse_args()
    model = Model(arguments.model, threads=arguments.threads)
    config = model.config
    print(
        f"| {config.n_layer} x {config.n_embd}, block {config.block_size}, "
        f"{model.session.export.get('precision')}, threads {model.session.threads} | |\n|---|---|"
    )
    measure_refill(model)
    measure_batch(model)
    measure_prefix(model, arguments.threads)


if __name__ == "__main__":
    main()
