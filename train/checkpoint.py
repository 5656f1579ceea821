"""`ckpt.pt` and `last.pt`: written whole or not at all, and believed only after every check.

Both have one format: a `torch.save` file of tensors and plain values, closed by a SHA-256 of all of
it, read with `weights_only=True` and never without. Does not know how to train.

Try: `build_model(load_checkpoint("ckpt.pt"))`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from pico_edge import __version__
from pico_edge.artefact import CHECKPOINT_MAGIC, HELD_OUT_BYTES
from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError
from pico_edge.ngrams import NGrams
from pico_edge.publish import Writable, publish
from pico_edge.tokenizer import Tokenizer, tokenizer_from_dict, tokenizer_hash
from pico_edge.train.model import GPT

FORMAT_VERSION = 1

_KIND = "pico-edge checkpoint"
# The size of the whole file, in a fixed number of digits, stands near its start: what is left of a
# zip that was cut cannot tell, its directory being last and its entries streamed without a size.
_SIZE_DIGITS = 20
_SIZE_PATTERN = re.compile(rb"file_bytes.{1,16}?(\d{%d})" % _SIZE_DIGITS, re.DOTALL)
_HEAD_BYTES = 1024

_FIELDS: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "file_bytes": (str,),
    "format_version": (int,),
    "config": (dict,),
    "tokenizer": (dict,),
    "tokenizer_sha256": (str,),
    "held_out": (str,),
    "iter": (int,),
    "tokens": (int,),
    "train_loss": (float, type(None)),
    "val_loss": (float, type(None)),
    "val_bits_per_byte": (float, type(None)),
    "settings": (dict,),
    "data": (dict,),
    "versions": (dict,),
    "model": (dict,),
    "ngrams": (dict, type(None)),
    "resume": (dict, type(None)),
    "sha256": (str,),
}
# Fields that a checkpoint of an earlier pico-edge may lack.
_OPTIONAL = frozenset({"ngrams"})


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. Plain means None, bool, int, float, str, list, tuple, dict.

    model: the state dict of GPT(config), float32 on the CPU (`model_state` makes it). held_out: at
    most 64 KiB of text. ngrams: of the training text, None in earlier checkpoints. Losses in nats
    per token. settings, data, versions: plain. resume: plain values and tensors, in last.pt only:
    what it takes to go on as if never stopped.
    """

    config: GPTConfig
    tokenizer: Tokenizer
    model: dict[str, Tensor]
    held_out: str
    iter: int
    tokens: int
    train_loss: float | None
    val_loss: float | None
    val_bits_per_byte: float | None
    settings: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    ngrams: NGrams | None = None
    resume: dict[str, Any] | None = None


def model_state(model: GPT) -> dict[str, Tensor]:
    """Float32 CPU copies of the weights, which later steps leave alone; tied tables stay one."""
    state = {
        name: value.detach().to("cpu", torch.float32, copy=True)
        for name, value in model.state_dict().items()
    }
    state["transformer.wte.weight"] = state["lm_head.weight"]
    return state


def weight_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of GPT(config).state_dict(), without making one, in its order."""
    C = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config.vocab_size, C),
        "transformer.wpe.weight": (config.block_size, C),
    }

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        if config.bias:
            shapes[f"{name}.bias"] = shape[:1]

    for i in range(config.n_layer):
        layer = f"transformer.h.{i}"
        add(f"{layer}.ln_1", C)
        add(f"{layer}.attn.c_attn", 3 * C, C)
        add(f"{layer}.attn.c_proj", C, C)
        add(f"{layer}.ln_2", C)
        add(f"{layer}.mlp.c_fc", 4 * C, C)
        add(f"{layer}.mlp.c_proj", C, 4 * C)
    add("transformer.ln_f", C)
    shapes["lm_head.weight"] = (config.vocab_size, C)
    return shapes


def library_versions() -> dict[str, str]:
    """Versions of pico-edge, Python, torch and numpy here, for Checkpoint.versions."""
    return {
        "pico_edge": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def save_checkpoint(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    *,
    previous: str | os.PathLike[str] | None = None,
) -> None:
    """Publish a checkpoint: at every instant `path` holds the old one or the new one, whole.

    previous: a name under which the file that is replaced stays (last.prev.pt). Raises OSError when
    the disk refuses, TypeError for a value that is neither a tensor nor plain.
    """
    if len(checkpoint.held_out.encode()) > HELD_OUT_BYTES:
        raise ValueError(f"held_out is over {HELD_OUT_BYTES} bytes of UTF-8")
    content = {
        "kind": _KIND,
        "file_bytes": "0" * _SIZE_DIGITS,
        "format_version": FORMAT_VERSION,
        "config": checkpoint.config.to_dict(),
        "tokenizer": checkpoint.tokenizer.to_dict(),
        "tokenizer_sha256": tokenizer_hash(checkpoint.tokenizer),
        "held_out": checkpoint.held_out,
        "iter": checkpoint.iter,
        "tokens": checkpoint.tokens,
        "train_loss": checkpoint.train_loss,
        "val_loss": checkpoint.val_loss,
        "val_bits_per_byte": checkpoint.val_bits_per_byte,
        "settings": checkpoint.settings,
        "data": checkpoint.data,
        "versions": checkpoint.versions,
        "model": checkpoint.model,
        "ngrams": None if checkpoint.ngrams is None else checkpoint.ngrams.to_dict(),
        "resume": checkpoint.resume,
    }
    content = cast("dict[str, Any]", _storable(content, {}))
    content["sha256"] = "?" * 64  # not digits: pickle would share an equal string of the content
    sizer = _Sizer()
    torch.save(content, cast("IO[bytes]", sizer))
    content["file_bytes"] = f"{sizer.n_bytes:0{_SIZE_DIGITS}d}"
    content["sha256"] = _sha256(content)

    def write(file: Writable) -> None:
        torch.save(content, cast("IO[bytes]", file))

    publish(path, write, previous=previous)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read and check a checkpoint; tensors on the CPU. Raises ArtefactError if it is refused."""
    path = Path(path)
    if path.is_dir():
        raise ArtefactError(f"{path} is a folder: expected a checkpoint such as ckpt.pt")
    if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
        raise ArtefactError(f"{path} is a device or a pipe: expected a checkpoint such as ckpt.pt")
    # One open file for every step: the name may be replaced meanwhile.
    with open(path, "rb") as file:
        _check_zip(file, path)
        content = _unpickle(file, path)
    _check_kind(content, path)
    if content["sha256"] != _stored_sha256(content, path):
        raise ArtefactError(f"{path}: damaged: its SHA-256 is not that of its content: {_AGAIN}")
    return _checkpoint(content, path)


def build_model(checkpoint: Checkpoint) -> GPT:
    """The model of a checkpoint, in eval mode on the CPU, sharing no memory with it."""
    with torch.random.fork_rng(devices=[]):  # what it draws is replaced: leave no trace of it
        model = GPT(checkpoint.config)
    model.load_state_dict(checkpoint.model)
    return model.eval()


_AGAIN = "copy it again, or use another checkpoint"


class _Sizer:
    """A file that only counts."""

    def __init__(self) -> None:
        self.n_bytes = 0

    def write(self, data: bytes) -> int:
        size = memoryview(data).nbytes
        self.n_bytes += size
        return size

    def flush(self) -> None:
        """Nothing is buffered here."""


def _storable(value: object, seen: dict[int, Tensor], where: str = "checkpoint") -> object:
    """A copy of dicts, lists and tuples in which every tensor is dense and on the CPU.

    seen: the tensors made so far, by id, so that one given twice is stored once.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = _dense(value)
        return seen[id(value)]
    if isinstance(value, dict):
        items = value.items()
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{where} has the key {key!r}: expected str or int")
        return {key: _storable(item, seen, f"{where}.{key}") for key, item in items}
    if type(value) in (list, tuple):
        parts = cast("list[object] | tuple[object, ...]", value)
        made = [_storable(item, seen, f"{where}.{i}") for i, item in enumerate(parts)]
        return made if isinstance(value, list) else tuple(made)
    raise TypeError(f"{where} is a {type(value).__name__}: expected a tensor or a plain value")


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    # A view would take the whole of what it is a view of into the file.
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _sha256(content: dict[str, Any]) -> str:
    """SHA-256 of all of a checkpoint but "sha256": its tensors in order, then the rest as JSON."""
    digest = hashlib.sha256()
    plain = _plain({key: value for key, value in content.items() if key != "sha256"}, digest)
    digest.update(json.dumps(plain, separators=(",", ":")).encode())
    return digest.hexdigest()


def _plain(value: object, digest: Any) -> object:
    """JSON that differs where values, types or the order of keys do; tensors go to the digest."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or not value.is_contiguous():
            raise TypeError("a tensor that is not dense")
        head = f"{value.dtype} {tuple(value.shape)}"
        digest.update(head.encode())
        digest.update(value.detach().reshape(-1).view(torch.uint8).numpy())
        return {"tensor": head}
    if isinstance(value, dict):
        return {
            "dict": [[_plain(key, digest), _plain(item, digest)] for key, item in value.items()]
        }
    if type(value) in (list, tuple):
        parts = cast("list[object] | tuple[object, ...]", value)
        return {type(value).__name__: [_plain(item, digest) for item in parts]}
    if isinstance(value, float):
        return {"float": value.hex()}  # nan and -0.0 too
    if isinstance(value, int) and not isinstance(value, bool):
        return {"int": hex(value)}  # no limit of digits
    if value is None or type(value) in (bool, str):
        return value
    raise TypeError(f"a {type(value).__name__}")


def _check_zip(file: IO[bytes], path: Path) -> None:
    """Structure and CRC of the zip that torch.save writes; torch.load checks neither."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(_HEAD_BYTES)
    found = _SIZE_PATTERN.search(head)
    if found and int(found[1]) != size:
        what = "truncated" if size < int(found[1]) else "damaged"
        raise ArtefactError(f"{path}: {what}: expected {int(found[1])} bytes, got {size}: {_AGAIN}")
    if head[:4] != CHECKPOINT_MAGIC:
        raise ArtefactError(f"{path}: {_guess(head, size)}: expected a checkpoint such as ckpt.pt")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ArtefactError(
                    f"{path}: a compressed zip: expected a checkpoint as it was made"
                )
            names = {entry.filename for entry in entries}
            starts = [entry.header_offset for entry in entries]
            ends = [entry.header_offset + entry.compress_size for entry in entries]
            sizes = sum(entry.compress_size for entry in entries)
            if (
                len(names) < len(entries)
                or min(starts, default=0) < 0
                or max([sizes, *ends]) > size
            ):
                raise ArtefactError(
                    f"{path}: damaged: its {len(entries)} parts do not fit in it: {_AGAIN}"
                )
            if any(entry.compress_size != entry.file_size for entry in entries):
                raise ArtefactError(f"{path}: damaged: a stored part has two sizes: {_AGAIN}")
            broken = archive.testzip()
    except _ZIP_ERRORS as error:
        raise ArtefactError(f"{path}: truncated or damaged ({size} bytes): {_AGAIN}") from error
    if broken is not None:
        raise ArtefactError(f"{path}: damaged: the checksum of {broken!r} is wrong: {_AGAIN}")
    if not any(name.endswith("/data.pkl") for name in names):
        raise ArtefactError(
            f"{path}: a zip without torch data: expected a checkpoint such as ckpt.pt"
        )


# What zipfile raises for bytes that are not a zip it can read, apart from the disk's own OSError.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    EOFError,
    KeyError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
    struct.error,
)


def _guess(head: bytes, size: int) -> str:
    """What a file that is no checkpoint seems to be."""
    start = head.lstrip()[:20].lower()
    if size == 0:
        return "empty (0 bytes)"
    if CHECKPOINT_MAGIC.startswith(head[:4]):
        return f"truncated: got {size} bytes"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (run `git lfs pull`)"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not the file itself"
    # ir_version, then producer_name: the first two fields of an ONNX model.
    if re.match(rb"\x08[\x01-\x7f][\x12:]", head):
        return "an ONNX model (`pico-edge generate` runs it)"
    if head[257:262] == b"ustar" or head.startswith(b"\x80"):
        return "a bare pickle or a checkpoint of torch before 1.6, which are not loaded"
    if head.startswith(b"\x1f\x8b"):
        return "compressed (gzip)"
    if not any(head[:_HEAD_BYTES]):
        return f"{size} bytes that begin with zeros"
    return "neither a checkpoint nor anything known"


def _unpickle(file: IO[bytes], path: Path) -> dict[str, Any]:
    file.seek(0)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever it is, and its text, which advises weights_only=False
        raise ArtefactError(
            f"{path}: not loaded: it holds more than tensors and plain values, or is damaged: "
            "expected a checkpoint made by `pico-edge train`"
        ) from error
    if isinstance(content, dict) and "model_args" in content and "model" in content:
        raise ArtefactError(
            f"{path}: a nanoGPT checkpoint, without its tokenizer: expected one made by "
            "`pico-edge train`: train on the same text again"
        )
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise ArtefactError(
            f"{path}: a torch file of another program: expected one made by `pico-edge train`"
        )
    return content


def _check_kind(content: dict[str, Any], path: Path) -> None:
    version = content.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        # Before the SHA-256, of which a newer format may have another idea.
        raise ArtefactError(
            f"{path}: checkpoint format {version}, this pico-edge reads {FORMAT_VERSION}: "
            "upgrade pico-edge"
        )
    if type(version) is not int or version < 1:
        raise ArtefactError(f"{path}: checkpoint format {version!r}: expected {FORMAT_VERSION}")
    if content.keys() | _OPTIONAL != _FIELDS.keys():
        missing = sorted(_FIELDS.keys() - content.keys() - _OPTIONAL)
        unknown = sorted(map(str, content.keys() - _FIELDS.keys()))
        raise ArtefactError(f"{path}: checkpoint lacks fields {missing}, has unknown {unknown}")
    for name, kinds in _FIELDS.items():
        if name in content and type(content[name]) not in kinds:
            found = type(content[name]).__name__
            raise ArtefactError(f"{path}: {name} is a {found}: expected {kinds[0].__name__}")


def _stored_sha256(content: dict[str, Any], path: Path) -> str:
    try:
        return _sha256(content)
    except (TypeError, RecursionError) as error:
        raise ArtefactError(
            f"{path}: holds more than dense tensors and plain values ({error}): "
            "expected a checkpoint made by `pico-edge train`"
        ) from error


def _checkpoint(content: dict[str, Any], path: Path) -> Checkpoint:
    """The checked content. That it is what was written is known; that it makes a model is not."""
    try:
        config = GPTConfig.from_dict(content["config"])
        tokenizer = tokenizer_from_dict(content["tokenizer"])
        stored = content.get("ngrams")
        ngrams = None if stored is None else NGrams.from_dict(stored)
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error}") from error
    if tokenizer_hash(tokenizer) != content["tokenizer_sha256"]:
        raise ArtefactError(
            f"{path}: the tokenizer has SHA-256 {tokenizer_hash(tokenizer)[:12]}, the model was "
            f"trained with {content['tokenizer_sha256'][:12]}: {_AGAIN}"
        )
    if tokenizer.n_vocab > config.vocab_size:
        raise ArtefactError(
            f"{path}: the tokenizer has {tokenizer.n_vocab} tokens, the model {config.vocab_size}: "
            f"{_AGAIN}"
        )
    if ngrams is not None and ngrams.n_vocab != tokenizer.n_vocab:
        raise ArtefactError(
            f"{path}: ngrams of {ngrams.n_vocab} tokens, the tokenizer has {tokenizer.n_vocab}: "
            f"{_AGAIN}"
        )
    _check_weights(content["model"], config, path)
    for name in ("iter", "tokens"):
        if content[name] < 0:
            raise ArtefactError(f"{path}: {name} is {content[name]}: expected 0 or more")
    return Checkpoint(
        config=config,
        tokenizer=tokenizer,
        model=content["model"],
        held_out=content["held_out"],
        iter=content["iter"],
        tokens=content["tokens"],
        train_loss=content["train_loss"],
        val_loss=content["val_loss"],
        val_bits_per_byte=content["val_bits_per_byte"],
        settings=content["settings"],
        data=content["data"],
        versions=content["versions"],
        ngrams=ngrams,
        resume=content["resume"],
    )


def _check_weights(weights: dict[Any, Any], config: GPTConfig, path: Path) -> None:
    if config.n_layer > len(weights):  # before so many layers are listed to compare with
        raise ArtefactError(
            f"{path}: {config.n_layer} layers, but {len(weights)} weights: {_AGAIN}"
        )
    expected = weight_shapes(config)
    if weights.keys() != expected.keys():
        missing = sorted(expected.keys() - weights.keys())
        unknown = sorted(map(str, weights.keys() - expected.keys()))
        raise ArtefactError(
            f"{path}: weights missing: {_some(missing)}; not of this model: {_some(unknown)}: "
            f"expected those of {config}"
        )
    for name, shape in expected.items():
        value = weights[name]
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ArtefactError(f"{path}: {name} is {found}: expected torch.float32")
        if tuple(value.shape) != shape:
            raise ArtefactError(f"{path}: {name} has shape {tuple(value.shape)}: expected {shape}")
    if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise ArtefactError(f"{path}: lm_head and wte differ: expected one tied table")


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
