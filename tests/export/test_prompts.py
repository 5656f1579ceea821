"""Prompts over an int8 cache: what the float32 branch stores and returns, against the kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from pico_edge.config import GPTConfig
from pico_edge.export import align as align_module
from pico_edge.export import quantize
from pico_edge.export.pipeline import export
from pico_edge.export.prompts import FEW_TOKENS
from pico_edge.runtime import weights as weights_module
from pico_edge.runtime.preflight import read_model_file
from pico_edge.runtime.session import Session
from pico_edge.runtime.speculate import MAX_DRAFT
from pico_edge.runtime.weights import Weights

Codes = npt.NDArray[np.int8]


@pytest.fixture(scope="module")
def plain(folder: Path, checkpoint_path: Path) -> Session:
    """The wide file with the kernel alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "ROWS_MIN_WIDTH", 32)
        patch.setattr(quantize, "attend_in_float", lambda graph: None)
        report = export(checkpoint_path, folder / "plain.onnx", quantize=True)
    return Session(report["file"], threads=1)


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    return np.random.default_rng(1).integers(0, 257, (3, 200)).tolist()  # type: ignore[no-any-return]


def read(session: Session, rows: list[list[int]]) -> tuple[npt.NDArray[Any], list[Codes]]:
    """Logits of each row's last token, and keys and values of the first layer, row by row."""
    cache = session.new_cache(len(rows))
    logits = cache.prefill(rows)
    stored = [
        array[row, :, : len(ids)] for array in cache._arrays[:2] for row, ids in enumerate(rows)
    ]
    return logits.copy(), [codes.copy() for codes in stored]


def test_drafts_go_through_the_kernel_of_the_steps() -> None:
    assert MAX_DRAFT + 1 <= FEW_TOKENS


def test_a_call_of_few_tokens_is_the_same_to_the_bit(
    wide: Session, plain: Session, rows: list[list[int]]
) -> None:
    few = [row[:FEW_TOKENS] for row in rows]
    for found, expected in zip(read(wide, few), read(plain, few), strict=True):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("lengths", [(FEW_TOKENS + 1,), (200,), (200, 3, 40)])
def test_a_call_of_many_tokens_stores_the_codes_of_the_kernel(
    lengths: tuple[int, ...], wide: Session, plain: Session, rows: list[list[int]]
) -> None:
    """In the first layer, whose inputs are the same to the bit. Padding is not looked at."""
    prompts = [row[:n] for row, n in zip(rows, lengths, strict=False)]
    logits, codes = read(wide, prompts)
    expected, stored = read(plain, prompts)
    for a, b in zip(codes, stored, strict=True):
        assert np.abs(b).max() > 64
        np.testing.assert_array_equal(a, b)
    if max(lengths) == 200:  # few tokens may round to the same codes throughout
        assert not np.array_equal(logits, expected), "the same branch"
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.03)


def test_pieces_of_many_tokens_agree_to_the_bit(wide: Session, rows: list[list[int]]) -> None:
    cache = wide.new_cache()
    whole = cache.append(0, rows[0], all_logits=True).copy()
    cache.reset()
    sizes = (17, 100, 83)
    ends = np.cumsum(sizes)
    parts = [
        cache.append(0, rows[0][end - size : end], all_logits=True).copy()
        for size, end in zip(sizes, ends, strict=True)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_narrow_models_and_other_targets_have_no_branches(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    config = GPTConfig(n_layer=2, n_embd=384, n_head=6)
    assert not quantize.choose_plan(config, 8).float_prompts
    path = export(make_checkpoint(GPTConfig(32, 272, 1, 2, 32)), tmp_path / "m.onnx", bits=8)
    assert "If" not in read_model_file(path["file"]).op_types


def test_a_weight_that_a_branch_reads_as_it_is_stays_in_memory(
    wide_report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the file would stay mapped; onnxruntime would see what is written over it."""
    for module in (weights_module, align_module):
        monkeypatch.setattr(module, "LARGE_BYTES", 256)
    proto = onnx.load(wide_report["file"])
    nodes = {node.op_type: node for node in proto.graph.node}
    packed = nodes["MatMulIntegerToFloat"].input[1]
    path = tmp_path / "model.onnx"
    found = []
    for also_read in (False, True):
        if also_read:
            branch = nodes["If"].attribute[0].g
            branch.node.append(onnx.helper.make_node("Identity", [packed], ["also_read"]))
        align_module.align(proto)
        path.write_bytes(proto.SerializeToString())
        weights = Weights.of(read_model_file(path))
        assert weights is not None
        found.append(packed in weights.shared)
    assert found == [False, True]
