from __future__ import annotations

import copy

import pytest
import torch

from pico_edge.config import GPTConfig
from pico_edge.export.calibrate import MIN_TOKENS, calibrate, split_ids
from pico_edge.export.smooth import smooth
from pico_edge.train.model import GPT


def _model(bias: bool) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(
        block_size=16, vocab_size=272, n_layer=2, n_head=2, n_embd=32, bias=bias, dropout=0.0
    )
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.transformer.h[0].ln_1.weight[3] = 40.0  # an outlier channel
        model.transformer.h[1].ln_2.weight[5] = 0.0  # and a dead one
        if bias:
            model.transformer.h[1].ln_2.bias[5] = 0.0
    return model


IDS = list(range(200))


@pytest.mark.parametrize("bias", [True, False])
def test_smoothing_leaves_the_function_alone_and_evens_out_channels(bias: bool) -> None:
    model = _model(bias)
    smoothed = copy.deepcopy(model)
    told = smooth(smoothed, calibrate(model, IDS, moments=True))
    idx = torch.tensor([IDS[:16]])
    with torch.no_grad():
        torch.testing.assert_close(smoothed(idx)[0], model(idx)[0], rtol=1e-4, atol=1e-4)
    before, after = calibrate(model, IDS), calibrate(smoothed, IDS, moments=True)
    for name, inputs in told.inputs.items():
        same = after.inputs[name]
        torch.testing.assert_close(inputs.largest, same.largest, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs.moments, same.moments, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(told.keys + told.values, after.keys + after.values)
    name = "transformer.h.0.attn.c_attn"
    spread = [
        s.inputs[name].largest.max() / s.inputs[name].largest.median() for s in (before, after)
    ]
    assert spread[1] < 0.5 * spread[0]
    for keys in after.keys:
        assert keys.max() / keys.min() < 1.001


def test_moments_are_those_of_the_inputs() -> None:
    """Against the definition, for the first layer, whose input is easily had."""
    model = _model(bias=True)
    statistics = calibrate(model, IDS[:16], moments=True)
    with torch.no_grad():
        x = model.transformer.wte(torch.tensor(IDS[:16])) + model.transformer.wpe.weight
        x = model.transformer.h[0].ln_1(x)
    found = statistics.inputs["transformer.h.0.attn.c_attn"]
    assert found.moments is not None
    torch.testing.assert_close(found.moments, x.T @ x / 16)
    torch.testing.assert_close(found.largest, x.abs().amax(0))
    assert statistics.tokens == 16


def test_text_to_calibrate_on_is_not_measured() -> None:
    ids = list(range(1000))
    calibration, measured = split_ids(ids)
    assert [*calibration, *measured] == ids
    assert len(calibration) == 250
    short = list(range(4 * MIN_TOKENS - 1))
    assert split_ids(short) == (short, short)


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        calibrate(_model(bias=True), [])
