"""Batches are a pure function of seed, step and slot; validation covers everything once."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from pico_edge.train.batches import batch, val_batches

IDS = (np.arange(1000) % 257).astype(np.uint16)
MANY = np.arange(60_000).astype(np.uint16)


def draw(tokens: Any = MANY, **changes: int) -> tuple[torch.Tensor, torch.Tensor]:
    where = {"seed": 1, "step": 2, "slot": 3, "batch_size": 16, "block_size": 32} | changes
    return batch(tokens, **where)


def test_a_batch_is_a_pure_function_of_seed_step_and_slot() -> None:
    x, y = draw()
    assert x.shape == y.shape == (16, 32)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(x + 1, y)
    np.random.seed(0)
    torch.manual_seed(0)
    draw(step=9)
    assert torch.equal(draw()[0], x)
    for other in (draw(seed=2), draw(step=3), draw(slot=4), draw(step=3, slot=2)):
        assert len(set(other[0][:, 0].tolist()) & set(x[:, 0].tolist())) <= 2
    # One process with two micro-steps draws what two processes draw: the slot alone tells.
    starts = np.random.Generator(np.random.Philox(key=1, counter=[0, 0, 3, 2])).integers(
        0, 60_000 - 32, size=16
    )
    assert x[:, 0].tolist() == starts.tolist()


def test_neighbouring_steps_share_no_draws() -> None:
    starts = [draw(step=step, batch_size=64)[0][:, 0].tolist() for step in range(20)]
    for a, b in itertools.pairwise(starts):
        assert len(set(a) & set(b)) < 3


def test_every_window_is_drawn_and_none_beyond_the_end() -> None:
    tokens = np.arange(10).astype(np.uint16)
    x, y = draw(tokens, batch_size=500, block_size=8)
    assert set(x[:, 0].tolist()) == {0, 1}
    assert int(y.max()) == 9
    x, _ = draw(tokens, batch_size=4, block_size=9)
    assert x[:, 0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("n", [2, 8, 9, 10, 16, 17, 100, 1000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_validation_predicts_every_token_but_the_first_once(n: int, batch_size: int) -> None:
    tokens = IDS[:n]
    inputs, targets = [], []
    batches = list(val_batches(tokens, 8, batch_size))
    for x, y in batches:
        assert x.shape == y.shape and x.size(0) <= batch_size and x.dtype == torch.int64
        inputs += x.flatten().tolist()
        targets += y.flatten().tolist()
    assert inputs == tokens[:-1].tolist()
    assert targets == tokens[1:].tolist()
    assert all(x.size(1) == 8 for x, _ in batches[:-1])
