"""The table of n-grams on its way from the checkpoint into the file and to the runtime."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from pico_edge import artefact
from pico_edge.errors import ArtefactError
from pico_edge.export.pipeline import export
from pico_edge.ngrams import MAX_BYTES, NGrams
from pico_edge.runtime import Model
from pico_edge.runtime.session import Session
from pico_edge.train.checkpoint import load_checkpoint, save_checkpoint
from pico_edge.train.ngrams import count_ngrams

from .conftest import TEXT


@pytest.fixture(scope="module")
def table() -> NGrams:
    return count_ngrams(np.frombuffer(TEXT.encode(), np.uint8).astype(np.uint16), 257)


@pytest.fixture(scope="module")
def with_table(checkpoint_path: Path, folder: Path, table: NGrams) -> Path:
    path = folder / "ngrams.pt"
    save_checkpoint(path, dataclasses.replace(load_checkpoint(checkpoint_path), ngrams=table))
    return path


@pytest.fixture(scope="module")
def path(with_table: Path, folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artefact, "MIN_DRAFTING_WEIGHTS", 0)  # the model of these tests is smaller
        export(with_table, folder / "ngrams.onnx")
    return folder / "ngrams.onnx"


def test_the_table_reaches_the_runtime(path: Path, table: NGrams) -> None:
    found = Session(path, provider="cpu").ngrams
    assert found is not None and found.to_dict() == table.to_dict()
    (value,) = (p.value for p in onnx.load(path).metadata_props if p.key == artefact.NGRAMS_KEY)
    assert 1000 < len(value.encode()) <= MAX_BYTES == artefact.MAX_NGRAMS_BYTES
    made = Model(path).generate(TEXT[:40], speculate="on", temperature=0, max_new_tokens=100)
    assert made.text == Model(path).generate(TEXT[:40], temperature=0, max_new_tokens=100).text
    assert made.drafted_tokens


@pytest.mark.parametrize("target", ["cpu", "web", "portable"])  # cpu: too small a model
def test_files_that_cannot_use_a_table_have_none(
    with_table: Path, tmp_path: Path, target: str
) -> None:
    export(with_table, tmp_path / "model.onnx", target=target)
    session = Session(tmp_path / "model.onnx", provider="cpu")
    assert session.ngrams is None


def test_a_checkpoint_without_a_table_makes_a_file_without(fp32_path: Path) -> None:
    assert Session(fp32_path, provider="cpu").ngrams is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda values: json.dumps(values | {"x": "y" * MAX_BYTES}), "bytes: expected at most"),
        (lambda values: "[]", "is not an object"),
        (lambda values: json.dumps(values | {"version": 9}), "ngrams version 9"),
        (lambda values: json.dumps(values | {"n_vocab": 300}), "ngrams of 300 tokens"),
    ],
)
def test_a_damaged_table_is_refused(
    path: Path, tmp_path: Path, change: Callable[[dict[str, object]], str], expected: str
) -> None:
    model = onnx.load(path)
    for prop in model.metadata_props:
        if prop.key == artefact.NGRAMS_KEY:
            prop.value = change(json.loads(prop.value))
    onnx.save(model, tmp_path / "damaged.onnx")
    with pytest.raises(ArtefactError, match=expected):
        assert Session(tmp_path / "damaged.onnx", provider="cpu").ngrams


def test_text_of_the_form_of_wide_models_is_that_of_plain_decoding(
    wide_report: dict[str, object],
) -> None:
    """Integer sums: steps and calls of several tokens agree but for float rounding."""
    model = Model(str(wide_report["file"]), provider="cpu")
    accepted = 0
    for temperature in (0, 0.7):
        options = {"temperature": temperature, "seed": 3, "max_new_tokens": 150}
        plain, drafted = (
            model.generate(TEXT[:30], speculate=how, **options) for how in ("off", "on")
        )
        assert drafted.token_ids == plain.token_ids
        accepted += drafted.accepted_tokens
    assert accepted
    assert dataclasses.asdict(plain).keys() == dataclasses.asdict(drafted).keys()
