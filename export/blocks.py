"""A float matrix -> small integers with scales: rounding, scale search, error feedback.

Knows matrices only, no graphs and no models. Try: `quantize_matrix(torch.randn(8, 64), 4, 32)`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Candidates for a scale, as shares of the one that reaches the block's largest weight: clipping it
# a little lowers the error of all others. At 8 bits nothing is gained.
SHARES = [1.0 - 0.04 * i for i in range(12)]
# Added to the diagonal of the moments, as a share of its mean: keeps channels that calibration
# hardly saw from being bent without limit.
DAMPING = 0.01
# Columns are updated after each has been rounded among LAZIER, after these among LAZY, and then all
# that are left; any numbers give the same result but for rounding. 3072 x 768 takes 0.15 s.
LAZIER, LAZY = 16, 128


class Quantized(NamedTuple):
    """codes: (N, K) int8, from -2^(bits-1). scales: (N, K / block_size). weight ~ codes * scales"""

    codes: Tensor
    scales: Tensor

    def restore(self) -> Tensor:
        """The float matrix (N, K) that these stand for."""
        block_size = self.codes.shape[1] // self.scales.shape[1]
        return self.codes * self.scales.repeat_interleave(block_size, 1)


def quantize_matrix(
    weight: Tensor, bits: int, block_size: int | None, moments: Tensor | None = None
) -> Quantized:
    """Round (N, K) to `bits` bits with a scale per block_size weights of a row, or per row (None).

    Scales of blocks have the sign that lets the largest weight take the one code that has no
    negative, -2^(bits-1); scales of rows are positive and leave that code out, so that 8-bit codes
    times unsigned bytes stay in 16 bits by pairs as often as they can.
    moments: (K, K) mean of x x^T over the inputs that the matrix will see. With it, the error of
    each column is made up for by the columns after it (GPTQ, arXiv 2210.17323), and scales are
    searched by the error they leave. Raises ValueError where block_size does not divide K.
    """
    n, k = weight.shape
    group = block_size or k
    if k % group:
        raise ValueError(f"rows of {k} weights: blocks of {group} do not divide them")
    weight = weight.detach().float()
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    if block_size is None:
        low = -high
    importance = torch.ones(k) if moments is None else moments.diagonal().clamp_min(1e-12)

    def scale(w: Tensor, at: int) -> Tensor:
        weights = importance[at : at + group]
        return _scale(w, weights, low, high, search=bits < 8)

    if moments is None:
        scales = torch.stack([scale(weight[:, i : i + group], i) for i in range(0, k, group)], 1)
        codes = (weight / scales.repeat_interleave(group, 1)).round().clamp(low, high)
        return Quantized(codes.to(torch.int8), scales)

    factor = _feedback(moments)  # (K, K), upper
    # A column of the weight is a row here, in one piece: each goes through the cache once.
    rest, errors = weight.T.contiguous(), torch.empty(k, n)
    codes, scales = torch.empty(k, n, dtype=torch.int8), torch.empty(k // group, n)
    for start in range(0, k, LAZY):
        stop = min(start + LAZY, k)
        for first in range(start, stop, LAZIER):
            last = min(first + LAZIER, stop)
            for j in range(first, last):
                if j % group == 0:
                    # A scale per row is found before any feedback: the row would drift towards it.
                    scales[j // group] = scale(rest[j : j + group].T, j)
                s = scales[j // group]
                code = (rest[j] / s).round_().clamp_(low, high)
                codes[j] = code
                torch.addcmul(rest[j], code, s, value=-1, out=errors[j]).div_(factor[j, j])
                rest[j + 1 : last].addr_(factor[j, j + 1 : last], errors[j], alpha=-1)
            done = slice(first, last)
            rest[last:stop].addmm_(factor[done, last:stop].T, errors[done], alpha=-1)
        done = slice(start, stop)
        rest[stop:].addmm_(factor[done, stop:].T, errors[done], alpha=-1)
    return Quantized(codes.T.contiguous(), scales.T.contiguous())


def _scale(w: Tensor, importance: Tensor, low: int, high: int, *, search: bool) -> Tensor:
    """(N) scales for a block w (N, G) of which importance (G) weighs the squared errors."""
    at = w.abs().argmax(1, keepdim=True)
    reach = w.gather(1, at)[:, 0]  # signed
    full = reach / low if low != -high else reach.abs() / high
    full = torch.where(full == 0, torch.ones_like(full), full)  # zeros: any scale gives them back
    if not search:
        return full
    best, least = full, torch.full_like(full, torch.inf)
    for share in SHARES:
        candidate = full * share
        steps = w / candidate[:, None]
        error = ((steps.round().clamp_(low, high) - steps).square_() @ importance) * candidate**2
        better = error < least
        best = torch.where(better, candidate, best)
        least = torch.where(better, error, least)
    return best


def _feedback(moments: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse moments: row j says how later columns make up for j."""
    damped = moments.double().clone()
    diagonal = damped.diagonal()
    diagonal[diagonal <= 0] = 1.0  # a channel that is always 0: its weights do not matter
    diagonal.add_(DAMPING * diagonal.mean())
    # moments = R R^T with R upper, by way of both orders reversed; then their inverse is U^T U of
    # U = R^-1, and is never made: 0.7 of the time at 3072.
    reverse = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(damped), dtype=damped.dtype)
    factor: Tensor = torch.linalg.solve_triangular(reverse, identity, upper=True)
    return factor.float()
