from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from pico_edge.export.blocks import quantize_matrix


@given(
    weight=st_numpy.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.sampled_from([16, 32, 64])),
        elements=st.floats(-1e3, 1e3, width=32),
    ),
)
def test_every_weight_is_within_half_a_step(weight: np.ndarray) -> None:
    quantized = quantize_matrix(torch.from_numpy(weight), 8, 16)
    error = np.abs(quantized.restore().numpy() - weight)
    # The code 128 is missing: a weight equal and opposite to the largest loses a whole step.
    step = quantized.scales.abs().repeat_interleave(16, 1).numpy()
    assert (error <= step * 1.0001 + 1e-30).all()
    inside = np.abs(weight / step) <= 127
    assert (error[inside] <= (0.5001 * step + 1e-30)[inside]).all()


def test_the_largest_weight_of_a_block_is_exact() -> None:
    codes, scales = quantize_matrix(torch.tensor([[0.5, -2.0, *[0.1] * 14]]), 8, 16)
    assert codes[0, 1] == -128
    assert scales[0, 0] == 2.0 / 128


def test_rows_use_codes_that_have_a_negative() -> None:
    codes, scales = quantize_matrix(torch.randn(5, 48), 8, None)
    assert scales.shape == (5, 1)
    assert (scales > 0).all()
    assert codes.abs().max() == 127


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block_size", [16, None])
def test_zeros_stay_zeros(bits: int, block_size: int | None) -> None:
    for moments in (None, torch.zeros(32, 32)):
        codes, scales = quantize_matrix(torch.zeros(2, 32), bits, block_size, moments)
        assert not codes.any()
        assert scales.isfinite().all()


def test_blocks_that_do_not_divide_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 40 weights"):
        quantize_matrix(torch.zeros(2, 40), 8, 16)


def _output_error(weight: torch.Tensor, restored: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (restored - weight).T).square().mean())


@pytest.mark.parametrize(("bits", "block_size"), [(8, None), (8, 32), (4, 32)])
def test_error_feedback_lowers_the_error_of_outputs(bits: int, block_size: int | None) -> None:
    """Inputs whose channels go together, as those of a model do; fresh ones to measure on."""
    torch.manual_seed(0)
    mix = torch.randn(256, 256) * torch.logspace(0, -2, 256)[:, None]
    seen, fresh = torch.randn(2, 2000, 256) @ mix
    weight = torch.randn(64, 256)
    moments = seen.T @ seen / len(seen)
    plain = quantize_matrix(weight, bits, block_size)
    fed = quantize_matrix(weight, bits, block_size, moments)
    before = _output_error(weight, plain.restore(), fresh)
    assert _output_error(weight, fed.restore(), fresh) < 0.5 * before


def test_the_scale_search_lowers_the_error_at_4_bits() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    searched = quantize_matrix(weight, 4, 32).restore()
    reach = weight.reshape(64, 4, 32).abs().amax(2, keepdim=True) / 8
    plain = (weight.reshape(64, 4, 32) / reach).round().clamp(-8, 7) * reach
    assert (searched - weight).square().mean() < 0.95 * (
        plain.reshape(64, 128) - weight
    ).square().mean()
