"""Weights that onnxruntime takes out of the file: the same logits, and nothing left mapped."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from pico_edge.config import GPTConfig
from pico_edge.export import align as align_module
from pico_edge.export.align import ALIGNMENT, align
from pico_edge.export.pipeline import export
from pico_edge.runtime import cache as cache_module
from pico_edge.runtime import session as session_module
from pico_edge.runtime import weights as weights_module
from pico_edge.runtime.preflight import Tensor, read_model_file
from pico_edge.runtime.session import Session
from pico_edge.runtime.weights import LARGE_BYTES, Weights

pytestmark = pytest.mark.skipif(os.name != "posix", reason="files are loaded by path there")

SMALL = 256  # bytes of a tensor that counts as large here, in models of a few kB
FORMS = {
    "fp32": {},
    "int8": {"quantize": True},
    "int4": {"bits": 4},
    "web": {"target": "web", "quantize": True},
    "portable": {"target": "portable", "quantize": True},
    "cuda": {"target": "cuda"},
}


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (weights_module, align_module):
        monkeypatch.setattr(module, "LARGE_BYTES", SMALL)


def logits_of(path: Path) -> tuple[Session, np.ndarray]:
    session = Session(path, provider="cpu", threads=1)
    ids = list(range(40, 80))
    cache = session.new_cache()
    return session, np.concatenate([cache.prefill([ids]), cache.decode([65])])


def by_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    with monkeypatch.context() as patch:
        patch.setattr(session_module.Weights, "of", lambda *_, **__: None)
        session, logits = logits_of(path)
        assert session._weights is None
    return logits


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_logits_of_a_session_by_path(
    form: str,
    small_is_large: None,
    checkpoint_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "model.onnx"
    export(checkpoint_path, path, **FORMS[form])
    session, logits = logits_of(path)
    assert session._weights is not None
    positions = "transformer.wpe.weight"
    assert {positions, f"{positions}.blocks"} & session._weights.shared.keys()
    np.testing.assert_array_equal(logits, by_path(path, monkeypatch))


def test_a_real_file_leaves_no_map_and_may_be_overwritten(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Of a model whose layers are large by themselves; nothing here is patched."""
    path = tmp_path / "model.onnx"
    export(make_checkpoint(GPTConfig(64, 272, 2, 4, 256)), path, quantize=True)
    model_file = read_model_file(path)
    large = [tensor for tensor in model_file.initializers if tensor.n_bytes >= LARGE_BYTES]
    assert len(large) >= 4
    assert [tensor.contents % ALIGNMENT for tensor in large] == [0] * len(large)
    weights = Weights.of(model_file)
    assert weights is not None
    assert len(weights.graphs["few"].model) < model_file.size / 4
    session, logits = logits_of(path)
    if sys.platform == "linux":
        assert str(path) not in Path("/proc/self/maps").read_text()
    path.write_bytes(bytes(model_file.size))  # in place: the same inode
    cache = session.new_cache()
    again = np.concatenate([cache.prefill([list(range(40, 80))]), cache.decode([65])])
    np.testing.assert_array_equal(again, logits)


@pytest.mark.parametrize(
    "name", ["with space.onnx", "ümläut \N{SNOWMAN}.onnx", "a\\b%41\n.onnx", "x"]
)
def test_names_and_links_lead_to_the_file(
    name: str,
    small_is_large: None,
    int8_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proto = onnx.load(int8_path)
    align(proto)
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / name
    path.write_bytes(proto.SerializeToString())
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    monkeypatch.chdir(tmp_path)
    _, expected = logits_of(int8_path)
    for found in (path, link, Path("deep") / name, Path("link.onnx")):
        session, logits = logits_of(found)
        assert session._weights is not None
        np.testing.assert_array_equal(logits, expected)


def test_a_name_that_is_no_utf8_is_loaded_by_path(
    small_is_large: None, int8_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.onnx")
    path.write_bytes(int8_path.read_bytes())
    session, _ = logits_of(path)
    assert session._weights is None


def test_floats_at_odd_places_are_loaded_by_path(
    small_is_large: None, fp32_path: Path, tmp_path: Path
) -> None:
    proto = onnx.load(fp32_path)
    path = tmp_path / "model.onnx"
    found = set()
    for n in range(4):  # moves all that comes after it
        proto.producer_version = "1" * (n + 1)
        path.write_bytes(proto.SerializeToString())
        session, logits = logits_of(path)
        found.add(session._weights is None)
        np.testing.assert_array_equal(logits, logits_of(fp32_path)[1])
    assert True in found


def test_a_file_that_is_not_the_one_that_was_checked_is_left_to_its_path(
    small_is_large: None, int8_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(int8_path.read_bytes())
    model_file = read_model_file(path)
    path.write_bytes(path.read_bytes() + b"\x42\x00")
    assert Weights.of(model_file) is None
    path.unlink()
    assert Weights.of(model_file) is None


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no names of open files here")
def test_a_deleted_file_that_is_still_open_is_loaded(
    small_is_large: None, int8_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(int8_path.read_bytes())
    with open(path, "rb") as file:
        path.unlink()
        _, logits = logits_of(Path(f"/proc/self/fd/{file.fileno()}"))
    np.testing.assert_array_equal(logits, logits_of(int8_path)[1])


def test_sessions_share_what_stays_in_use(
    small_is_large: None, int8_path: Path, tmp_path: Path
) -> None:
    proto = onnx.load(int8_path)
    align(proto)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    session, logits = logits_of(path)
    assert session._weights is not None
    table = session._weights.shared["transformer.wte.weight.blocks"]
    cache = cache_module.Cache(session, 1, 64, ort_session=session.with_threads(2))
    ids = list(range(40, 80))
    np.testing.assert_array_equal(cache.prefill([ids]), logits[:1])
    table[:] = 0  # every session embeds by this very memory
    for threads in (1, 2):
        cache = cache_module.Cache(session, 1, 64, ort_session=session.with_threads(threads))
        assert np.abs(cache.prefill([ids]) - logits[:1]).max() > 1e-3


def test_tensors_say_where_their_contents_are(int8_path: Path) -> None:
    data = int8_path.read_bytes()
    proto = onnx.load(int8_path)
    found: list[Tensor] = read_model_file(int8_path).initializers
    for tensor, expected in zip(found, proto.graph.initializer, strict=True):
        raw = data[tensor.contents : tensor.contents + tensor.n_bytes]
        assert raw == expected.raw_data
