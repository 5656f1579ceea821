"""Utilization: PaLM's formula, the table of peaks, and what is measured where there is none."""

import types

import pytest
import torch

from pico_edge.config import GPTConfig
from pico_edge.train import mfu

GPT2 = GPTConfig(block_size=1024, vocab_size=50_304, n_layer=12, n_head=12, n_embd=768)


def test_the_flop_of_a_gpt2_token():
    # 6 * 124.4e6 + 12 * 12 * 768 * 1024
    assert mfu.flops_per_token(124_400_000, GPT2) == pytest.approx(859.6e6, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce GTX 1050", None),
        (None, None),
    ],
)
def test_peaks_by_the_name_of_the_device(name, flops):
    assert mfu.known_peak(name, torch.bfloat16) == flops
    assert mfu.known_peak(name, torch.float32) is None


def trainer(world_size=1):
    model = types.SimpleNamespace(num_parameters=lambda: 124_400_000, config=GPT2)
    return types.SimpleNamespace(
        model=model, device=torch.device("cpu"), dtype=torch.float32, world_size=world_size
    )


def test_a_cpu_is_measured_once_and_leaves_no_trace_in_the_random_state(monkeypatch):
    state = torch.get_rng_state()
    meter = mfu.Meter(trainer())
    share = meter.utilization(0.01)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(mfu, "measured_peak", lambda *_: pytest.fail("measured twice"))
    assert 0 < share < 1
    assert meter.utilization(0.02) == pytest.approx(2 * share)
    assert meter.text(0.0) == "0 % of matmul speed"
    assert meter.text(1e9) == "100 % of matmul speed"  # what was reached is possible


def test_a_known_device_says_mfu_and_every_rank_has_one(monkeypatch):
    monkeypatch.setattr(mfu, "known_peak", lambda *_: 100e12)
    tokens_per_second = 50e12 / mfu.flops_per_token(124_400_000, GPT2)
    assert mfu.Meter(trainer()).text(tokens_per_second) == "MFU 50 %"
    assert mfu.Meter(trainer(world_size=2)).text(tokens_per_second) == "MFU 25 %"


def test_memory_is_that_of_this_process():
    peak = mfu.peak_memory_bytes(torch.device("cpu"))
    assert 50e6 < peak < 100e9  # torch alone is more than the one
