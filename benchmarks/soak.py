"""Millions of tokens from one loaded model: no leak, and no text that is not the plain one.

    python benchmarks/soak.py model.onnx [--tokens 10_000_000] [--seed 0]

Random prompts, lengths, seeds, samplers, batch sizes, streams that are left early, cancellations
and errors, all on one Model; between them, texts are made again by a fresh Model, one at a time,
and must be equal. Prints the resident memory after each million tokens; exit 1 where it grew by
more than 5 % after the first million, or where a text differs.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

from pico_edge.errors import UsageError
from pico_edge.runtime import Generation, Model

WORDS = ["the", "and", "of", "light", "0x3f", "é", "漢字", "\n", "def", "if", ":", ",", "(a)", "🙂"]
CHECK_EVERY = 50
LIMIT = 1.05

Made = tuple[str, dict[str, Any], Generation]  # prompt, options, what came


def resident_bytes() -> int:
    """Of this process; Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def options_for(rng: random.Random) -> dict[str, Any]:
    return {
        "max_new_tokens": rng.choice((1, 7, 40, 120, 400)),
        "temperature": rng.choice((0.0, 0.5, 0.8, 1.3)),
        "top_k": rng.choice((0, 1, 5, 50)),
        "top_p": rng.choice((1.0, 1.0, 0.9)),
        "min_p": rng.choice((0.0, 0.0, 0.05)),
        "repetition_penalty": rng.choice((1.0, 1.0, 1.2)),
        "stop": rng.choice((None, None, ["\n\n"], ["e ", "."])),
        "seed": rng.randrange(1 << 40),
        "speculate": rng.choice(("auto", "off")),
    }


def one(
    model: Model, rng: random.Random
) -> tuple[int, list[tuple[str, dict[str, Any], Generation]]]:
    """Use the model once; the tokens made, and texts that can be made again."""
    prompt = " ".join(rng.choices(WORDS, k=rng.choice((0, 1, 3, 20, 90))))
    options = options_for(rng)
    kind = rng.random()
    if kind < 0.4:
        made = model.generate(prompt, **options)
        return made.new_tokens, [(prompt, options, made)]
    if kind < 0.7:
        prompts = [prompt, *(" ".join(rng.choices(WORDS, k=rng.randrange(30))) for _ in range(7))]
        prompts = prompts[: rng.randint(1, 8)]
        batch = model.generate(prompts, **options)
        return sum(made.new_tokens for made in batch), []
    if kind < 0.9:
        stream = model.stream(prompt, **options)
        for _, _piece in zip(range(rng.randrange(60)), stream, strict=False):
            pass
        stream.close()
        return stream.result.new_tokens, []
    left = rng.randrange(30)
    if kind < 0.97:
        asked = iter(range(left + 1))
        made = model.generate(prompt, **options, cancel=lambda: next(asked, None) is None)
        return made.new_tokens, []
    try:
        model.generate(prompt, top_p=2.0)
    except UsageError:
        return 0, []
    raise AssertionError("top_p 2 was accepted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, model = random.Random(arguments.seed), Model(arguments.model)
    made, calls, checked, first, started = 0, 0, 0, 0, time.perf_counter()
    while made < arguments.tokens:
        n, again = one(model, rng)
        before, made, calls = made, made + n, calls + 1
        if calls % CHECK_EVERY == 0:
            for prompt, options, text in again:
                fresh = Model(arguments.model).generate(prompt, **options)
                checked += 1
                if fresh.text != text.text:
                    sys.exit(f"{prompt!r}, {options}: {text.text!r} is {fresh.text!r} when fresh")
        if before // 1_000_000 != made // 1_000_000:
            now = resident_bytes()
            first = first or now
            print(
                f"{made // 1_000_000} M tokens, {calls} calls, {checked} texts made again, "
                f"{now / 1e6:.1f} MB, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
            if now > LIMIT * first:
                sys.exit(f"resident memory rose from {first / 1e6:.1f} to {now / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
