"""Muon's update is torch.optim.Muon's, to the precision of the bfloat16 that torch uses."""

import pytest
import torch

from pico_edge.train.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_singular_values_are_near_one_and_vectors_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    made = orthogonal(matrices)
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.3
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices[1], full_matrices=False)
    diagonal = u.T @ made[1] @ v.T
    off = diagonal - torch.diag(diagonal.diagonal())
    assert off.abs().max() < 1e-4


def test_steps_are_those_of_torch():
    torch.manual_seed(0)
    start = [torch.randn(32, 32), torch.randn(32, 96), torch.randn(32, 32)]
    ours = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    optimizers = [
        Muon(ours, lr=0.01, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(5):
        gradients = [torch.randn_like(tensor) for tensor in start]
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    for a, b, s in zip(ours, theirs, start, strict=True):
        moved = (b - s).norm()
        assert (a - b).norm() < 0.05 * moved


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="expected matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
