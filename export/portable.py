"""GPT -> ONNX in standard operators only: for any runtime that knows ONNX, with the names of
Hugging Face's exports.

The cache grows by Concat: `past_key_values.{i}.key|value` (B, H, P, D) go in, `present.{i}.*`
(B, H, P + S, D) come out. Slower than the graph of `pico_edge.export.trace`, which needs
onnxruntime's own operators. `pico_edge.runtime.portable` runs it.

Knows nothing of quantization, tokenizers or files. Try: `trace_portable(model)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from pico_edge import artefact
from pico_edge.export.trace import run_exporter
from pico_edge.train.model import GPT, Block

if TYPE_CHECKING:
    import onnx_ir as ir

# Of a place that must not be seen. Finite, as in Hugging Face's GPT-2: a row that may see nothing
# (the padding in front of a prompt) must not become NaN.
HIDDEN = torch.finfo(torch.float32).min


class _PortableGPT(nn.Module):
    """The forward pass on a cache that grows, in the inputs and outputs of `artefact`."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        config, parts = self.model.config, self.model.transformer
        blocks = cast("list[Block]", list(parts.h))
        B, S = input_ids.shape
        T = attention_mask.shape[1]  # P + S
        x = parts.wte(input_ids) + parts.wpe(position_ids)  # (B, S, C)
        place = torch.arange(T)
        causal = place[None, :] <= place[T - S :, None]  # (S, T)
        seen = causal & (attention_mask[:, None, None, :] > 0)  # (B, 1, S, T)
        bias = torch.where(seen, 0.0, HIDDEN)
        present = []
        for block, (past_key, past_value) in zip(blocks, past, strict=True):
            q, k, v = (
                part.reshape(B, S, config.n_head, config.head_dim).transpose(1, 2)
                for part in block.attn.c_attn(block.ln_1(x)).split(config.n_embd, dim=-1)
            )
            key, value = _concat(past_key, k, T), _concat(past_value, v, T)  # (B, H, T, D)
            present.append((key, value))
            scores = (q * config.head_dim**-0.5) @ key.transpose(2, 3) + bias  # (B, H, S, T)
            a = torch.softmax(scores, dim=-1) @ value
            x = x + block.attn.c_proj(a.transpose(1, 2).reshape(B, S, config.n_embd))
            x = x + block.mlp.c_proj(_gelu(block.mlp.c_fc(block.ln_2(x)), config.gelu))
        # On 2-D rows torch writes Gemm(transB=1) on the one table; a Transpose of it would be
        # folded into a second one.
        logits = self.model.lm_head(parts.ln_f(x).reshape(-1, config.n_embd))
        return logits.reshape(B, S, config.vocab_size), present


def _concat(past: Tensor, new: Tensor, length: int) -> Tensor:
    """past and new along the tokens: (B, H, length, D).

    A symbolic op because torch.export would otherwise ask that the sizes of two inputs add up to
    that of a third, which it cannot express (pytorch#172903).
    """
    B, H, _, D = past.shape
    return torch.onnx.ops.symbolic(
        "Concat", (past, new), {"axis": 2}, dtype=past.dtype, shape=(B, H, length, D)
    )


def _gelu(x: Tensor, form: str) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh" if form == "tanh" else "none")


def trace_portable(model: GPT) -> ir.Model:
    """The traced fp32 graph of a model: `artefact.portable_input_names`, logits (B, S, V).

    Tracing the same weights twice gives the same bytes.
    """
    config = model.config
    # Example sizes of 0 or 1 would be taken for constants (pytorch#148886).
    B, S, P = 2, 3, 5
    past = [
        tuple(torch.zeros(B, config.n_head, P, config.head_dim) for _ in range(2))
        for _ in range(config.n_layer)
    ]
    example = (
        torch.zeros(B, S, dtype=torch.int64),
        torch.ones(B, P + S, dtype=torch.int64),
        torch.zeros(B, S, dtype=torch.int64),
        past,
    )
    batch, seq, past_seq, total = (
        torch.export.Dim(name) for name in ("batch", "seq", "past_seq", "total_seq")
    )
    cache_axes = {0: batch, 2: past_seq}
    dynamic_shapes = (
        {0: batch, 1: seq},
        {0: batch, 1: total},
        {0: batch, 1: seq},
        [(cache_axes, cache_axes)] * config.n_layer,
    )
    names = artefact.portable_input_names(config.n_layer)
    return run_exporter(_PortableGPT(model), example, dynamic_shapes, names, config.n_layer)
