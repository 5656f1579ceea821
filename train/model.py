"""The GPT of pico-edge in PyTorch: the readable reference that every other path is held to.

Does not know about tokenizers, files or ONNX. Weight names and initialisation are those of GPT-2
and nanoGPT. Shapes: B batch, T new tokens, P cached tokens, C n_embd, H n_head, D head_dim, V
vocab_size.

Try: `GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=272))`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pico_edge.config import GPTConfig

# Longer windows go to the flash kernel: their scores would take T * T * 2 bytes per head and layer.
PRODUCTS_UP_TO = 512


class KV(NamedTuple):
    """Keys and values of one layer for the positions seen so far, each (B, H, P, D)."""

    key: Tensor
    value: Tensor


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Causal attention as two matrix products and a softmax; q, k, v and the result (B, H, T, D).

    What scaled_dot_product_attention computes, at a third of its time, forward and back, on a CPU
    with native bfloat16, whose flash kernel works in float32 there: 2.3 ms instead of 9.4 at B 12,
    H 4, T 128, D 64.
    """
    B, H, T, D = q.shape
    mask = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    with torch.autocast(q.device.type, enabled=False):  # which would have the softmax in float32
        scores = torch.baddbmm(
            mask.expand(B * H, T, T),
            q.reshape(B * H, T, D),
            k.reshape(B * H, T, D).mT,
            alpha=1 / math.sqrt(D),
        )  # (B * H, T, T)
        weights = F.dropout(scores.softmax(dim=-1), dropout_p)
        return torch.bmm(weights, v.reshape(B * H, T, D)).view(B, H, T, D)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and those before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, past: KV | None = None) -> tuple[Tensor, KV]:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        if past is not None:
            k = torch.cat((past.key, k), dim=2)  # (B, H, P+T, D)
            v = torch.cat((past.value, v), dim=2)  # (B, H, P+T, D)
        P = k.size(2) - T
        dropout_p = self.dropout if self.training else 0.0
        if P == 0 and q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= PRODUCTS_UP_TO:
            y = attend_by_products(q, k, v, dropout_p)  # (B, H, T, D)
        else:
            # is_causal alone would align the mask at the first key; with a past it must end at the
            # last one.
            mask = None
            if P and T > 1:
                mask = torch.ones(T, P + T, dtype=torch.bool, device=x.device).tril(P)
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=P == 0 and T > 1
            )  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y)), KV(k, v)


class MLP(nn.Module):
    """Two linear layers with GELU between them, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gelu = config.gelu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh" if self.gelu == "tanh" else "none")
        x = self.dropout(self.c_proj(x))
        return x


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, past: KV | None = None) -> tuple[Tensor, KV]:
        attended, present = self.attn(self.ln_1(x), past)
        x = x + attended
        x = x + self.mlp(self.ln_2(x))
        return x, present


class Transformer(nn.Module):
    """The layers between tokens and logits, named as in GPT-2's checkpoints."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)


class GPT(nn.Module):
    """Decoder-only transformer: learned positions, output head tied to the token table."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)
        # GPT-2: what writes into the residual stream starts smaller the more writers there are.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def num_parameters(self) -> int:
        """Parameters of the model, the tied table counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits of every position and, given targets, the mean cross-entropy in nats per token.

        idx, targets: (B, T) int64, T <= block_size; a target of -1 is not counted.
        Returns logits (B, T, V) and the loss, a scalar, or None without targets.
        """
        x, _ = self._hidden(idx, None)
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits, loss

    def forward_cached(self, idx: Tensor, past: list[KV] | None = None) -> tuple[Tensor, list[KV]]:
        """The same logits for new tokens only, given the keys and values of those before them.

        idx: (B, T) int64. past: one KV per layer, as the last call returned it; None at the start.
        Returns logits (B, T, V) and the present KVs of length P + T <= block_size.
        """
        x, present = self._hidden(idx, past)
        return self.lm_head(x), present

    def _hidden(self, idx: Tensor, past: list[KV] | None) -> tuple[Tensor, list[KV]]:
        T = idx.size(1)
        P = 0 if past is None else past[0].key.size(2)
        end = P + T
        if end > self.config.block_size:
            raise ValueError(f"{end} positions: the model has {self.config.block_size}")
        positions = torch.arange(P, end, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        present = []
        for i, block in enumerate(self.transformer.h):
            x, kv = block(x, None if past is None else past[i])
            present.append(kv)
        return self.transformer.ln_f(x), present

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        n_vocab: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The reference sampler: temperature, top-k, multinomial, the whole window at each step.

        idx: (B, T) int64. temperature 0 takes the most likely token. n_vocab: tokens that may be
        drawn, where vocab_size is padded. Past block_size the window is its newest block_size
        tokens. Returns (B, T + max_new_tokens). Slow on purpose: no cache, nothing to get wrong.
        """
        was_training = self.training
        self.eval()
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :])
            logits = logits[:, -1, :n_vocab].float()  # (B, V)
            if temperature == 0:
                token = logits.argmax(dim=-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                token = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
            idx = torch.cat((idx, token), dim=1)
        self.train(was_training)
        return idx
