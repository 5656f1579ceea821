"""Move outlier channels out of the way of quantization, without changing what the model computes.

A channel of an activation may be divided by any number if the weights that read it are multiplied
by the same. Where a norm or a linear layer makes the channel, its own weights do the dividing, so
the graph stays as it is. Source: SmoothQuant (arXiv 2211.10438). Try: `smooth(model, statistics)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pico_edge.export.calibrate import Inputs, Statistics
from pico_edge.train.model import GPT, Block

# Share of a channel's range that moves from the activation into the weights that read it.
STRENGTH = 0.5
# Factors beyond this would trade one outlier for another.
MAX_FACTOR = 32.0


@torch.no_grad()
def smooth(model: GPT, statistics: Statistics, strength: float = STRENGTH) -> Statistics:
    """Even out the channels that linear layers read and the cache stores, in place.

    Returns the statistics of the model as it then is: those of its text, divided likewise.

    Inputs of c_attn and c_fc: the norms before them pay. Keys: the queries pay, entirely, so that
    one scale fits all keys of a layer. Values: attn.c_proj pays. What mlp.c_proj reads comes out of
    GELU, which nothing can be moved through.
    """
    inputs, keys, values = dict(statistics.inputs), list[Tensor](), list[Tensor]()
    for i, block in enumerate(model.transformer.h):
        assert isinstance(block, Block)
        name = f"transformer.h.{i}"
        for norm, linear, path in (
            (block.ln_1, block.attn.c_attn, f"{name}.attn.c_attn"),
            (block.ln_2, block.mlp.c_fc, f"{name}.mlp.c_fc"),
        ):
            largest = statistics.inputs[path].largest
            factor = _factor(largest, linear.weight.abs().amax(0), strength)
            _divide(norm, factor)
            linear.weight.mul_(factor)
            inputs[path] = _divided(inputs[path], factor)
        q, k, v = (slice(j * factor.numel(), (j + 1) * factor.numel()) for j in range(3))
        factor = _factor(statistics.keys[i], torch.ones_like(factor), 1.0)
        _divide(block.attn.c_attn, factor, k)
        _divide(block.attn.c_attn, 1 / factor, q)
        keys.append(statistics.keys[i] / factor)
        reads, path = block.attn.c_proj, f"{name}.attn.c_proj"
        factor = _factor(statistics.values[i], reads.weight.abs().amax(0), strength)
        _divide(block.attn.c_attn, factor, v)
        reads.weight.mul_(factor)
        values.append(statistics.values[i] / factor)
        inputs[path] = _divided(inputs[path], factor)  # averages of values
    return Statistics(statistics.tokens, inputs, keys, values)


def _factor(activation: Tensor, weight: Tensor, strength: float) -> Tensor:
    """(K) what to divide each channel by; 1 on (geometric) average, and for dead channels."""
    tiny = torch.finfo(torch.float32).tiny
    factor = activation.clamp_min(tiny).pow(strength) / weight.clamp_min(tiny).pow(1 - strength)
    alive = (activation > 0) & (weight > 0)
    if not alive.any():
        return torch.ones_like(factor)
    factor = factor / factor[alive].log().mean().exp()
    return torch.where(alive, factor.clamp(1 / MAX_FACTOR, MAX_FACTOR), torch.ones_like(factor))


def _divided(inputs: Inputs, factor: Tensor) -> Inputs:
    moments = inputs.moments
    if moments is not None:
        moments = moments / torch.outer(factor, factor)
    return Inputs(inputs.largest / factor, moments)


def _divide(layer: nn.LayerNorm | nn.Linear, factor: Tensor, rows: slice = slice(None)) -> None:
    """Divide outputs of a layer: all its weights and biases of these channels."""
    weight = layer.weight[rows]
    weight.div_(factor if weight.dim() == 1 else factor[:, None])
    if layer.bias is not None:
        layer.bias[rows].div_(factor)
