"""Decoding with drafts against plain decoding, on prompts that training held out.

    python benchmarks/speculation.py MODEL.onnx TEXT [--threads 2] [--rounds 5] [--json]

TEXT: the file that the model was trained on; prompts are taken from its last tenth, which training
holds out. Plain and drafted texts alternate, prompt by prompt; quoted are medians over rounds
of the ratio of their decode times, greedy and at temperature 0.8. First what one call of several
tokens costs, in steps. Run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from pico_edge.runtime import Model

PROMPT_TOKENS, PROMPTS = 48, 8
CALLS = 40  # per number of tokens
SIZES = (2, 3, 4, 6, 8, 16)


def verification_costs(model: Model, ids: list[int]) -> dict[str, float]:
    """Seconds of a step, and of a call by its number of tokens in steps, at half of the context."""
    cache = model.session.new_cache()
    depth = model.config.block_size // 2
    cache.prefill([(ids * (depth // len(ids) + 1))[:depth]])
    times: dict[int, list[float]] = {n: [] for n in (1, *SIZES)}
    for _ in range(CALLS):
        for n in times:
            # Two of each: the first finds the caches of the processor as the call before left them.
            for _ in range(2):
                start = time.perf_counter()
                if n == 1:
                    cache.decode(ids[:1])
                else:
                    cache.verify(ids[:n])  # type: ignore[union-attr]
                elapsed = time.perf_counter() - start
                cache.truncate(0, depth)
            times[n].append(elapsed)
    step = statistics.median(times[1])
    costs = {f"cost_of_{n}": statistics.median(times[n]) / step for n in SIZES}
    return {"step_us": 1e6 * step, **costs}


def measure(
    model: Model, prompts: list[str], temperature: float, tokens: int, rounds: int
) -> dict[str, float]:
    """Ratio of decode times and what was drafted, over all prompts."""
    ratios, plain_rates, rates = [], [], []
    drafted = accepted = made = same = 0
    for number in range(rounds):
        seconds = {"off": 0.0, "auto": 0.0}
        new = dict.fromkeys(seconds, 0)
        for i, prompt in enumerate(prompts):
            order = ("off", "auto") if (number + i) % 2 else ("auto", "off")
            texts = {}
            for how in order:
                result = model.generate(
                    prompt,
                    temperature=temperature,
                    seed=i,
                    max_new_tokens=tokens,
                    speculate=how,  # type: ignore[arg-type]
                )
                if result.new_tokens > 1:
                    seconds[how] += (result.new_tokens - 1) / result.decode_tokens_per_second
                    new[how] += result.new_tokens - 1
                texts[how] = result
            made += texts["auto"].new_tokens
            drafted += texts["auto"].drafted_tokens
            accepted += texts["auto"].accepted_tokens
            same += texts["auto"].text == texts["off"].text
        plain_rates.append(new["off"] / seconds["off"])
        rates.append(new["auto"] / seconds["auto"])
        ratios.append(rates[-1] / plain_rates[-1])
    return {
        "temperature": temperature,
        "plain_tokens_per_second": statistics.median(plain_rates),
        "tokens_per_second": statistics.median(rates),
        "ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
        "largest_ratio": max(ratios),
        "drafted_per_token": drafted / made,
        "accepted_per_token": accepted / made,
        "same_texts": same / (rounds * len(prompts)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--threads", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=190)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    model = Model(arguments.model, threads=arguments.threads)
    text = arguments.text.read_text(encoding="utf-8")
    held_out = text[len(text) * 9 // 10 + 1000 :]
    at = random.Random(1)
    prompts = []
    for _ in range(PROMPTS):
        start = at.randrange(len(held_out) - 8 * PROMPT_TOKENS)
        ids = model.tokenizer.encode(held_out[start : start + 8 * PROMPT_TOKENS])
        prompts.append(model.tokenizer.decode(ids[:PROMPT_TOKENS]))
    costs = verification_costs(model, model.tokenizer.encode(prompts[0]))
    model.generate(prompts[0], max_new_tokens=60, speculate="on", seed=0)  # builds the table
    rows: list[dict[str, Any]] = [
        measure(model, prompts, temperature, arguments.tokens, arguments.rounds)
        for temperature in (0.0, 0.8)
    ]
    if arguments.json:
        print(json.dumps({"threads": model.session.threads, "costs": costs, "texts": rows}))
        return
    config = model.config
    print(
        f"{arguments.model.name}: {config.n_layer} x {config.n_embd}, {model.session.threads} "
        f"threads, {arguments.text.name}, {PROMPTS} prompts of {PROMPT_TOKENS} tokens, "
        f"{arguments.tokens} new, {arguments.rounds} rounds"
    )
    shown = ", ".join(f"{n} tokens {costs[f'cost_of_{n}']:.2f}" for n in SIZES)
    print(f"a step {costs['step_us']:.0f} us; a call of {shown} steps\n")
    print(
        "| temperature | plain, tokens/s | drafted | ratio | drafted, accepted per token | same |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['temperature']:g} | {row['plain_tokens_per_second']:.0f} | "
            f"{row['tokens_per_second']:.0f} | {row['ratio']:.2f} "
            f"({row['least_ratio']:.2f}-{row['largest_ratio']:.2f}) | "
            f"{row['drafted_per_token']:.2f}, {row['accepted_per_token']:.2f} | "
            f"{row['same_texts']:.2f} |"
        )


if __name__ == "__main__":
    main()
