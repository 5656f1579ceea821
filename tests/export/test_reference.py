"""A checkpoint and the file made of it have one loss, which is that of a plain loop in torch."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pico_edge.train.model import GPT

TEXT = "Boolean operations are described in the section about comparisons: ö, 語, 🙂.\n" * 9


def evaluated(*arguments: str | Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "pico_edge", "eval", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@torch.no_grad()
def bits_per_byte(model: GPT, data: bytes) -> float:
    """Bytes as tokens, windows of block_size that do not overlap."""
    ids = torch.tensor(list(data))
    block_size, nats = model.config.block_size, 0.0
    for start in range(0, len(ids) - 1, block_size):
        x, y = ids[start : start + block_size], ids[start + 1 : start + 1 + block_size]
        logits, _ = model(x[None, : len(y)])
        nats += float(F.cross_entropy(logits[0, :, :257].double(), y, reduction="sum"))
    return nats / math.log(2) / (len(data) - 1)


@pytest.mark.parametrize("stride", [None, 100])
def test_checkpoint_and_file_have_one_loss(
    tmp_path: Path, checkpoint_path: Path, fp32_path: Path, model: GPT, stride: int | None
) -> None:
    text = tmp_path / "held_out.txt"
    text.write_bytes(TEXT.encode())
    flags = [] if stride is None else ["--stride", str(stride)]
    torch_says = evaluated(checkpoint_path, text, *flags)
    onnx_says = evaluated(fp32_path, text, *flags)
    assert onnx_says["loss"] == pytest.approx(torch_says["loss"], abs=1e-4)
    for key in ("tokens", "bytes", "block_size", "stride", "sha256"):
        assert onnx_says[key] == torch_says[key]
    if stride is None:
        expected = bits_per_byte(model, TEXT.encode())
        assert onnx_says["bits_per_byte"] == pytest.approx(expected, abs=1e-4)
        assert torch_says["bits_per_byte"] == pytest.approx(expected, abs=1e-4)


def test_a_file_is_compared_with_its_checkpoint(
    tmp_path: Path, checkpoint_path: Path, int8_path: Path
) -> None:
    text = tmp_path / "held_out.txt"
    text.write_bytes(TEXT.encode())
    result = evaluated(int8_path, text, "--compare", checkpoint_path)
    assert 0 < result["kl_divergence"] < 0.01
    assert result["top1_agreement"] > 0.9
    assert abs(result["loss_increase_percent"]) < 1
