"""One small trained checkpoint and its two exports, made once for all tests of this folder."""

from __future__ import annotations

import dataclasses
import pydoc_data.topics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from pico_edge.config import GPTConfig  # noqa: E402
from pico_edge.export import quantize  # noqa: E402
from pico_edge.export.pipeline import export  # noqa: E402
from pico_edge.runtime.session import Session  # noqa: E402
from pico_edge.tokenizer import SimpleTokenizer  # noqa: E402
from pico_edge.train.checkpoint import (  # noqa: E402
    Checkpoint,
    build_model,
    library_versions,
    load_checkpoint,
    model_state,
    save_checkpoint,
)
from pico_edge.train.model import GPT  # noqa: E402

TOPICS = pydoc_data.topics.topics
TEXT = "\n".join(TOPICS[name] for name in sorted(TOPICS))[:100_000]
# Room for a prompt and 256 greedy tokens; heads of 16 channels.
CONFIG = GPTConfig(block_size=288, vocab_size=272, n_layer=2, n_head=2, n_embd=32)


def train_a_little(config: GPTConfig, steps: int = 60) -> GPT:
    """A model that has left its initial weights, where biases are 0 and norms are 1."""
    torch.manual_seed(1)
    model = GPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "ln_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.tensor(SimpleTokenizer().encode(TEXT))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    window = min(64, config.block_size)
    for _ in range(steps):
        starts = torch.randint(len(ids) - window - 1, (8,)).tolist()
        idx = torch.stack([ids[i : i + window] for i in starts])
        targets = torch.stack([ids[i + 1 : i + 1 + window] for i in starts])
        _, loss = model(idx, targets)
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def checkpoint_of(model: GPT, held_out: str = TEXT[-4000:]) -> Checkpoint:
    return Checkpoint(
        config=model.config,
        tokenizer=SimpleTokenizer(),
        model=model_state(model),
        held_out=held_out,
        iter=60,
        tokens=60 * 8 * 64,
        train_loss=3.0,
        val_loss=3.1,
        val_bits_per_byte=4.4,
        settings={},
        data={"sha256": "0" * 64},
        versions=library_versions(),
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="session")
def checkpoint_path(folder: Path) -> Path:
    path = folder / "ckpt.pt"
    save_checkpoint(path, checkpoint_of(train_a_little(CONFIG)))
    return path


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """make_checkpoint(config, held_out=...) -> the path of a checkpoint trained for a few steps."""

    def make(config: GPTConfig, **changes: Any) -> Path:
        checkpoint = checkpoint_of(train_a_little(config, steps=5))
        save_checkpoint(tmp_path / "ckpt.pt", dataclasses.replace(checkpoint, **changes))
        return tmp_path / "ckpt.pt"

    return make


@pytest.fixture(scope="session")
def model(checkpoint_path: Path) -> GPT:
    return build_model(load_checkpoint(checkpoint_path))


@pytest.fixture(scope="session")
def fp32_report(folder: Path, checkpoint_path: Path) -> dict[str, Any]:
    return export(checkpoint_path, folder / "fp32.onnx")


@pytest.fixture(scope="session")
def int8_report(folder: Path, checkpoint_path: Path) -> dict[str, Any]:
    return export(checkpoint_path, folder / "int8.onnx", quantize=True)


@pytest.fixture(scope="session")
def int4_report(folder: Path, checkpoint_path: Path) -> dict[str, Any]:
    return export(checkpoint_path, folder / "int4.onnx", bits=4)


@pytest.fixture(scope="session")
def wide_report(folder: Path, checkpoint_path: Path) -> dict[str, Any]:
    """int8 in the form that wide models take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "ROWS_MIN_WIDTH", 32)
        return export(checkpoint_path, folder / "wide.onnx", quantize=True)


@pytest.fixture(scope="session")
def fp32_path(fp32_report: dict[str, Any]) -> Path:
    return Path(fp32_report["file"])


@pytest.fixture(scope="session")
def int8_path(int8_report: dict[str, Any]) -> Path:
    return Path(int8_report["file"])


@pytest.fixture(scope="session")
def fp32(fp32_path: Path) -> Session:
    return Session(fp32_path, threads=1)


@pytest.fixture(scope="session")
def int8(int8_path: Path) -> Session:
    return Session(int8_path, threads=1)


@pytest.fixture(scope="session")
def wide(wide_report: dict[str, Any]) -> Session:
    return Session(wide_report["file"], threads=1)


@pytest.fixture(scope="session")
def int4(int4_report: dict[str, Any]) -> Session:
    return Session(int4_report["file"], threads=1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """onnxruntime's spinning threads would slow torch's down many times over."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
