"""Which size of model to train where no flag says: the largest that text, time and device can feed.

The text sets the most, since a model too large for it only learns it by heart. Within that, a few
steps on random tokens tell how many tokens the time left is worth; a model that would see few of
them for its parameters learns less than a smaller one. A target for the exported file decides by
itself. Knows nothing of files or schedules.

Try: `int8_bytes(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=272), 257)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from pico_edge.artefact import POSITION_BLOCK, SCALE_BLOCK, fine_blocks
from pico_edge.config import GPTConfig
from pico_edge.errors import UsageError
from pico_edge.tokenizer import SimpleTokenizer
from pico_edge.train.model import GPT
from pico_edge.train.optim import make_optimizers
from pico_edge.train.report import count, duration
from pico_edge.train.settings import PRESETS, Recipe
from pico_edge.train.step import Trainer, train_step

# Two minutes of Muon on tiny shakespeare, bits per byte held out, two cores with native bfloat16:
# 4 x 128 2.27 with 4.8 tokens to a parameter, 4 x 192 2.210 with 1.4, 4 x 256 2.206 with 0.48.
TOKENS_PER_PARAMETER = 0.4
MEASURE_S = 0.4  # of each size that is tried
# Evaluations, saves and imports take the rest.
STEPPING_SHARE = 0.9
# Shapes that a target for the device chooses from: layers, heads, width, smallest file first.
TARGET_SHAPES = (
    (2, 2, 64),
    (3, 3, 96),
    (4, 4, 128),
    (4, 6, 192),
    (4, 4, 256),
    (6, 5, 320),
    (6, 6, 384),
    (8, 7, 448),
    (8, 8, 512),
    (10, 10, 640),
    (12, 12, 768),
)
# An int8 file: a byte to a weight of a matrix, a float32 for every scale and all else.
BYTES_PER_WEIGHT = 1 + 4 / SCALE_BLOCK
GRAPH_BYTES_PER_LAYER, GRAPH_BYTES = 4_000, 20_000
BYTES_PER_TOKEN = 14  # of a vocabulary, in base64 and JSON
# A step of the runtime beside reading its weights: most of the 90 us of 4 x 128 on a laptop.
STEP_S, STEP_PER_LAYER_S = 30e-6, 12e-6


class Size(NamedTuple):
    """A preset, why it was chosen, as the second half of a sentence, and the tokens it will see.

    tokens: None where the speed was not measured.
    """

    preset: str
    reason: str
    tokens: float | None = None


def choose_size(
    most: str,
    why_most: str,
    *,
    seconds: float | None,
    n_parameters: Callable[[str], int],
    tokens_per_second: Callable[[str], float],
) -> Size:
    """The largest preset up to `most` that sees TOKENS_PER_PARAMETER in the time, else the least.

    seconds: to train in; None where a number of iterations is given instead. n_parameters and
    tokens_per_second: of a preset, the second measured when asked.
    """
    names = list(PRESETS)[: list(PRESETS).index(most) + 1]
    if seconds is None:
        return Size(most, why_most)
    reason = why_most
    for name in reversed(names[1:]):
        tokens = tokens_per_second(name) * seconds * STEPPING_SHARE
        if tokens >= TOKENS_PER_PARAMETER * n_parameters(name):
            return Size(name, reason, tokens)
        reason = (
            f"{name} ({count(n_parameters(name))}) would see only {count(tokens)} tokens in "
            f"{duration(seconds)} here"
        )
    return Size(names[0], reason)


def dropout_for(passes: float) -> float:
    """Dropout for a text that is read so many times over.

    Ten minutes of 4 x 256 on tiny shakespeare, 8.9 passes, without: 2.159 bits per byte held out
    after 7.5 of them, then worse, and the training loss at two thirds of it.
    """
    if passes < 4:
        return 0.0
    return 0.1 if passes < 12 else 0.2


def measure_tokens_per_second(
    config: GPTConfig, recipe: Recipe, device: torch.device, dtype: torch.dtype
) -> float:
    """Training speed of a model of this shape, by a few steps on random tokens."""
    ids = np.random.default_rng(0).integers(0, 256, 4 * config.block_size + 1, dtype=np.uint16)
    with torch.random.fork_rng(devices=[]):
        model = GPT(config).to(device).train()
        trainer = Trainer(
            model=model,
            forward=model,
            optimizers=make_optimizers(model, recipe, dtype),
            scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
            recipe=recipe,
            tokens=ids,
            device=device,
            dtype=dtype,
        )
        train_step(trainer, 0, 0.0)  # allocates
        steps, begin = 0, time.perf_counter()
        while not steps or time.perf_counter() - begin < MEASURE_S:
            train_step(trainer, steps, 0.0)
            steps += 1
    return steps * trainer.tokens_per_iter / (time.perf_counter() - begin)


def shape_for_target(
    config_for: Callable[[int, int, int], GPTConfig],
    *,
    target_bytes: int | None,
    target_tokens_per_second: float | None,
    n_vocab: int,
    bytes_per_second: Callable[[], float],
) -> tuple[GPTConfig, str]:
    """The largest of TARGET_SHAPES whose int8 file meets the targets, and how near it comes.

    config_for: the configuration of layers, heads, width. bytes_per_second: at which a device like
    this one reads weights. Raises UsageError when even the smallest misses a target.
    """
    speed = bytes_per_second() if target_tokens_per_second is not None else 1.0
    found: tuple[GPTConfig, str] | None = None
    said = ""
    for shape in TARGET_SHAPES:
        config = config_for(*shape)
        size = int8_bytes(config, n_vocab)
        rate = decode_tokens_per_second(config, size, speed)
        said = f"about {count(size)}B as int8"
        if target_tokens_per_second is not None:
            said += f", {rate:,.0f} tokens/s on a device like this one"
        if target_bytes is not None and size > target_bytes:
            break
        if target_tokens_per_second is not None and rate < target_tokens_per_second:
            break
        found = config, said
    if found is None:
        raise UsageError(
            f"target: the smallest model, 2 layers x 64, is {said}: "
            "ask for more bytes or fewer tokens per second, or a smaller --vocab-size"
        )
    return found


def int8_bytes(config: GPTConfig, n_vocab: int) -> int:
    """Size of `pico-edge export --quantize` for a model of this shape, within a few percent."""
    tables = config.vocab_size + config.block_size
    matrices = config.n_embd * (tables + 12 * config.n_embd * config.n_layer)
    floats = config.n_embd * (13 * config.n_layer + 2)
    tokenizer = BYTES_PER_TOKEN * n_vocab if n_vocab > SimpleTokenizer.n_vocab else 0
    graph = GRAPH_BYTES + GRAPH_BYTES_PER_LAYER * config.n_layer
    # Scales beyond one for SCALE_BLOCK weights.
    positions = config.block_size * config.n_embd
    finer = positions // POSITION_BLOCK - positions // SCALE_BLOCK
    for name, block in fine_blocks(config).items():
        rows = config.vocab_size if name == "lm_head" else 4 * config.n_embd
        finer += rows * config.n_embd * (SCALE_BLOCK // block - 1) // SCALE_BLOCK
    scaled = round(matrices * BYTES_PER_WEIGHT) + 4 * finer
    return scaled + 4 * floats + tokenizer + graph


def decode_tokens_per_second(config: GPTConfig, n_bytes: int, bytes_per_second: float) -> float:
    """Speed of generation, by the bytes that a token reads and the time of the calls around."""
    step_s = STEP_S + STEP_PER_LAYER_S * config.n_layer + n_bytes / bytes_per_second
    return 1 / step_s


def measure_bytes_per_second(n_bytes: int = 64 << 20, rounds: int = 5) -> float:
    """How fast this machine reads memory, over all threads of torch; the best of some rounds."""
    weights = torch.ones(n_bytes // 4)
    times: list[float] = []
    for _ in range(rounds):
        begin = time.perf_counter()
        weights.sum()
        times.append(time.perf_counter() - begin)
    return n_bytes / min(times)
