"""Optimizers and the learning-rate schedule.

Matrices decay, vectors (biases, LayerNorm) do not. AdamW for everything, or Muon for the matrices
inside the blocks and AdamW for the rest. Knows nothing of data, losses or checkpoints.

Try: `learning_rate(0, peak=1e-3, min_lr=1e-4, warmup_iters=100, max_iters=2000)` -> 1e-05.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pico_edge.train.muon import Muon
from pico_edge.train.settings import Recipe


def learning_rate(
    step: int, *, peak: float, min_lr: float, warmup_iters: int, max_iters: int
) -> float:
    """Rate of the update that ends step `step`: a linear rise, then a linear fall to min_lr.

    The first of warmup_iters updates has peak / warmup_iters, the last of max_iters has min_lr.
    """
    if step < warmup_iters:
        return peak * (step + 1) / warmup_iters
    if step + 1 >= max_iters:
        return min_lr
    progress = (step - warmup_iters) / max(1, max_iters - 1 - warmup_iters)
    return peak + progress * (min_lr - peak)


def rate_at(recipe: Recipe, step: int) -> float:
    """Rate of the update that ends step `step` of a run; only the recipe in force then has it."""
    return learning_rate(
        step,
        peak=recipe.decay_rate,
        min_lr=recipe.min_lr,
        warmup_iters=recipe.decay_iter,
        max_iters=recipe.max_iters,
    )


def make_optimizers(
    model: nn.Module, recipe: Recipe, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Optimizers that together hold every parameter of a model once.

    dtype: of the matrix products of training; Muon's are made in bfloat16 where those are.
    """
    parameters = dict(model.named_parameters())  # a tied table appears once
    matrices = {name: p for name, p in parameters.items() if p.dim() >= 2}
    vectors = [p for p in parameters.values() if p.dim() < 2]
    hidden: dict[str, nn.Parameter] = {}
    if recipe.optimizer == "muon":
        hidden = {n: p for n, p in matrices.items() if n.startswith("transformer.h.")}
        matrices = {n: p for n, p in matrices.items() if n not in hidden}
    adamw = torch.optim.AdamW(
        [
            {"params": list(matrices.values()), "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        fused=True,  # one kernel for all parameters: on CPU, CUDA and MPS
    )
    if not hidden:
        return [adamw]
    fused = [p for name, p in hidden.items() if name.endswith("attn.c_attn.weight")]
    single = [p for name, p in hidden.items() if not name.endswith("attn.c_attn.weight")]
    groups: list[dict[str, Any]] = [{"params": fused, "parts": 3}, {"params": single}]
    muon = Muon(
        groups,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
    )
    return [adamw, muon]


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """Give every parameter group this rate for the next update."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def optimizer_states(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """What `load_optimizer_states` needs: plain values, and tensors shared with the optimizer."""
    return [optimizer.state_dict() for optimizer in optimizers]


def load_optimizer_states(
    optimizers: Sequence[torch.optim.Optimizer], states: Sequence[dict[str, Any]]
) -> None:
    """The inverse of `optimizer_states`, on optimizers made for the same model and recipe.

    Raises ValueError when they were made for others.
    """
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
