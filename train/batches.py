"""Token ids -> batches that depend on (seed, step, slot) alone, and all of the held-out part once.

Knows nothing of text.

Try: `batch(tokens, seed=1, step=0, slot=0, batch_size=16, block_size=64)`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pico_edge.train.tokens import IdArray, Tokens


def batch(
    tokens: Tokens | IdArray,
    *,
    seed: int,
    step: int,
    slot: int,
    batch_size: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one micro-step, a pure function of its arguments.

    slot = micro-step x world size + rank. Returns x, y: (B, T) int64 on the CPU, y one token later.
    """
    # NOTE step in the high word of the counter: in the low one, neighbouring steps share draws.
    rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, slot, step]))
    starts = rng.integers(0, len(tokens) - block_size, size=batch_size)
    windows = np.stack([tokens[start : start + block_size + 1] for start in starts.tolist()])
    return _shifted(windows)


def val_batches(
    tokens: Tokens | IdArray, block_size: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows that predict every token but the first exactly once, in order.

    Yields x, y: (B, T) int64 with B <= batch_size and T = block_size; the last one (1, T) may be
    shorter: weigh losses by y.numel().
    """
    n_targets = len(tokens) - 1
    n_windows = n_targets // block_size
    for first in range(0, n_windows, batch_size):
        starts = range(
            first * block_size, min(first + batch_size, n_windows) * block_size, block_size
        )
        yield _shifted(np.stack([tokens[start : start + block_size + 1] for start in starts]))
    if n_targets % block_size:
        yield _shifted(tokens[n_windows * block_size :][None, :])


def _shifted(windows: IdArray) -> tuple[Tensor, Tensor]:
    """(B, T + 1) ids -> x, y: (B, T) int64."""
    ids = windows.astype(np.int64)
    return (
        torch.from_numpy(np.ascontiguousarray(ids[:, :-1])),
        torch.from_numpy(np.ascontiguousarray(ids[:, 1:])),
    )
