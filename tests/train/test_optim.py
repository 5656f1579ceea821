"""The schedule is the drawn curve; each parameter is held once; only matrices decay."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pico_edge.config import GPTConfig
from pico_edge.train.model import GPT
from pico_edge.train.optim import (
    learning_rate,
    load_optimizer_states,
    make_optimizers,
    optimizer_states,
    set_learning_rate,
)
from pico_edge.train.settings import TrainSettings

TINY = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)


def tiny_recipe(**changes):
    recipe = TrainSettings().recipe(
        "nano", gpu=False, max_iters=9, tokens_per_epoch=9, block_size=16
    )
    return dataclasses.replace(recipe, **changes)


def one_step(model, optimizers):
    torch.manual_seed(1)
    idx = torch.randint(0, TINY.vocab_size, (2, 16))
    for optimizer in optimizers:
        optimizer.zero_grad()
    model(idx, idx)[1].backward()
    for optimizer in optimizers:
        optimizer.step()


def test_warm_up_rises_in_equal_steps_and_the_decay_ends_at_min_lr():
    rates = [
        learning_rate(step, peak=1.0, min_lr=0.1, warmup_iters=4, max_iters=13)
        for step in range(13)
    ]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.55)  # half way down
    assert rates[12] == 0.1
    assert rates[4:] == sorted(rates[4:], reverse=True)


@given(max_iters=st.integers(1, 200), warmup_iters=st.integers(0, 250), min_lr=st.floats(0.0, 1e-3))
def test_the_rate_is_positive_and_at_most_the_peak(max_iters, warmup_iters, min_lr):
    for step in range(max_iters + 3):
        rate = learning_rate(
            step, peak=1e-3, min_lr=min_lr, warmup_iters=warmup_iters, max_iters=max_iters
        )
        assert math.isfinite(rate)
        assert min(min_lr, 1e-3 / (warmup_iters or 1)) <= rate <= 1e-3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_held_once_and_only_matrices_decay(name):
    model = GPT(TINY)
    groups = [
        group
        for optimizer in make_optimizers(model, tiny_recipe(optimizer=name, weight_decay=0.1))
        for group in optimizer.param_groups
    ]
    held = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.dim() >= 2 else 0.0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_at_rate_zero_changes_no_weight_and_any_other_changes_all(name):
    torch.manual_seed(0)
    model = GPT(TINY)
    optimizers = make_optimizers(model, tiny_recipe(optimizer=name))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    set_learning_rate(optimizers, 0.0)
    one_step(model, optimizers)
    assert all(map(torch.equal, before, model.parameters()))
    set_learning_rate(optimizers, 1e-2)
    one_step(model, optimizers)
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_restored_optimizers_go_on_bit_by_bit(name):
    torch.manual_seed(0)
    recipe = tiny_recipe(optimizer=name)
    model, twin = GPT(TINY), GPT(TINY)
    optimizers = make_optimizers(model, recipe)
    one_step(model, optimizers)
    twin.load_state_dict(model.state_dict())
    copied = make_optimizers(twin, recipe)
    load_optimizer_states(copied, copy.deepcopy(optimizer_states(optimizers)))
    one_step(model, optimizers)
    one_step(twin, copied)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
