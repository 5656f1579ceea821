"""What the activations of a model look like on held-out text: the statistics quantization needs.

Runs the torch model, so the figures are those of float32. Knows nothing of rounding or of ONNX.
Try: `calibrate(model, ids).inputs["transformer.h.0.attn.c_attn"].largest`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pico_edge.train.model import GPT

# At 12 x 768 each 1,000 tokens take two seconds.
MAX_TOKENS = 8192
CALIBRATION_SHARE = 0.25
MIN_TOKENS = 16  # of a part: shorter texts serve for both


@dataclass(frozen=True)
class Inputs:
    """Inputs (K channels) of one linear layer over all calibration tokens.

    largest: (K) absolute values. moments: (K, K) mean of the outer products x x^T, or None.
    """

    largest: Tensor
    moments: Tensor | None


@dataclass(frozen=True)
class Statistics:
    """What a model does to a text of `tokens` ids.

    inputs: of the linear layers but the head, by module name, "transformer.h.0.mlp.c_fc". keys,
    values: per layer, (C) largest absolute values.
    """

    tokens: int

    inputs: dict[str, Inputs]
    keys: list[Tensor]
    values: list[Tensor]


def split_ids(ids: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """The head of a text to calibrate on and the rest to measure on, which thus stays unseen.

    A text too short for two parts is both.
    """
    n = int(len(ids) * CALIBRATION_SHARE)
    if n < MIN_TOKENS:
        return ids, ids
    return ids[:n], ids[n:]


@torch.no_grad()
def calibrate(model: GPT, ids: Sequence[int], *, moments: bool = False) -> Statistics:
    """Run the first MAX_TOKENS of a text in windows of block_size, and look at what is multiplied.

    moments: also collect x x^T, which error feedback at 4 bits needs. Raises ValueError without
    ids.
    """
    if not ids:
        raise ValueError("no tokens: calibration needs 1 or more")
    block_size, C = model.config.block_size, model.config.n_embd
    sums: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    projected: dict[str, Tensor] = {}  # largest |q|, |k|, |v| side by side, of each c_attn

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def look(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            x = args[0].flatten(0, 1)  # (B * T, K)
            _raise_to(largest, name, x)
            if name.endswith("c_attn"):
                _raise_to(projected, name, output.flatten(0, 1))
            if moments:
                products = x.T @ x
                sums[name] = sums[name].add_(products) if name in sums else products

        return look

    linears = {
        name: part
        for name, part in model.transformer.named_modules(prefix="transformer")
        if isinstance(part, nn.Linear)
    }
    handles = [part.register_forward_hook(watch(name)) for name, part in linears.items()]
    tokens = torch.tensor(list(ids[:MAX_TOKENS]))
    try:
        for window in torch.split(tokens, block_size):
            model._hidden(window[None], None)  # without the head, a third of the work at 12 x 768
    finally:
        for handle in handles:
            handle.remove()
    inputs = {
        name: Inputs(largest[name], sums[name] / len(tokens) if moments else None)
        for name in linears
    }
    spans = [torch.split(projected[name], C) for name in linears if name.endswith("c_attn")]
    return Statistics(len(tokens), inputs, [k for _, k, _ in spans], [v for _, _, v in spans])


def _raise_to(largest: dict[str, Tensor], name: str, x: Tensor) -> None:
    found = x.abs().amax(0)
    largest[name] = torch.maximum(largest[name], found) if name in largest else found
