"""A checkpoint comes back value by value or is refused; never silently wrong, never code."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import gzip
import io
import math
import os
import pickle
import random
import signal
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pico_edge import publish as publish_module
from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError
from pico_edge.ngrams import NGrams
from pico_edge.publish import remove_stale
from pico_edge.tokenizer import BPETokenizer, SimpleTokenizer, tokenizer_hash
from pico_edge.train import checkpoint as checkpoint_module
from pico_edge.train.checkpoint import (
    FORMAT_VERSION,
    Checkpoint,
    build_model,
    library_versions,
    load_checkpoint,
    model_state,
    save_checkpoint,
    weight_shapes,
)
from pico_edge.train.model import GPT
from pico_edge.train.ngrams import count_ngrams

IDS = np.arange(60, dtype=np.uint16) % 7
CONFIG = GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=16, bias=False)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes")


def make_checkpoint(seed: int = 0, **changes: Any) -> Checkpoint:
    torch.manual_seed(seed)
    checkpoint = Checkpoint(
        config=CONFIG,
        tokenizer=SimpleTokenizer(),
        model=model_state(GPT(CONFIG)),
        held_out="Held out. 保留 ☃",
        iter=100 + seed,
        tokens=6400,
        train_loss=2.5,
        val_loss=2.625,
        val_bits_per_byte=3.75,
        settings={"seed": seed, "learning_rate": 1e-3, "betas": (0.9, 0.95), "resume": None},
        data={"bytes": 1000, "sha256_sampled": "ab" * 32, "files": 1},
        versions=library_versions(),
        resume=None,
    )
    return dataclasses.replace(checkpoint, **changes)


def assert_equal(a: object, b: object) -> None:
    """Same types, same values, tensors bit by bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (
            a.contiguous()
            .flatten()
            .view(torch.uint8)
            .equal(b.contiguous().flatten().view(torch.uint8))
        )
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, float):
        assert a.hex() == b.hex()
    elif isinstance(a, Checkpoint):
        for field in dataclasses.fields(a):
            assert_equal(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, SimpleTokenizer | BPETokenizer):
        assert tokenizer_hash(a) == tokenizer_hash(b)
    elif isinstance(a, NGrams):
        assert_equal(a.to_dict(), b.to_dict())
    else:
        assert a == b


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt.pt"
    save_checkpoint(path, make_checkpoint())
    return path.read_bytes()


def refusal(path: Path) -> str:
    with pytest.raises(ArtefactError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path))
    assert "weights_only" not in message
    return message


# The whole and its parts


def test_a_checkpoint_comes_back_value_by_value(tmp_path: Path) -> None:
    made = make_checkpoint()
    save_checkpoint(tmp_path / "ckpt.pt", made)
    assert_equal(load_checkpoint(tmp_path / "ckpt.pt"), made)


def test_ngrams_come_back_are_checked_and_may_be_missing_in_an_earlier_file(
    tmp_path: Path,
) -> None:
    path, made = tmp_path / "ckpt.pt", make_checkpoint(ngrams=count_ngrams(IDS, 257))
    save_checkpoint(path, made)
    assert_equal(load_checkpoint(path), made)
    assert made.ngrams is not None and len(made.ngrams) > 0
    rewrite(path, lambda content: content["ngrams"].update(max_order=99))
    assert "ngrams max_order is 99" in refusal(path)
    save_checkpoint(path, make_checkpoint(ngrams=count_ngrams(IDS, 258)))
    assert "ngrams of 258 tokens, the tokenizer has 257" in refusal(path)
    save_checkpoint(path, make_checkpoint())
    rewrite(path, lambda content: content.pop("ngrams"))
    assert_equal(load_checkpoint(path), make_checkpoint())


def test_a_bpe_tokenizer_and_a_resumable_state_come_back(tmp_path: Path) -> None:
    tokenizer = BPETokenizer([bytes([i]) for i in range(256)] + [b"he", b"hel", b"\xff\xfe"])
    config = dataclasses.replace(CONFIG, vocab_size=272, bias=True, gelu="erf", dropout=0.25)
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))[1].backward()
    optimizer.step()
    resume = {
        "optimizer": optimizer.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "python_rng": random.getstate(),
        "half": torch.randn(3, 5).half().T,
        "brain": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "nothing": torch.empty(0, 4),
        "world_size": 1,
        "big": 2**70,
        "not a number": [math.nan, math.inf, -0.0],
    }
    made = make_checkpoint(
        config=config, tokenizer=tokenizer, model=model_state(model), resume=resume, val_loss=None
    )
    save_checkpoint(tmp_path / "last.pt", made)
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert_equal(loaded, made)
    other = torch.optim.AdamW(build_model(loaded).parameters(), lr=1.0)
    other.load_state_dict(loaded.resume["optimizer"])
    assert_equal(other.state_dict(), optimizer.state_dict())


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_subnormal=True)
    | st.text()
    | st.text(alphabet="\ud800\udcff\x00\n"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(settings_=st.dictionaries(st.text(), plain, max_size=4))
def test_any_plain_value_comes_back(
    tmp_path_factory: pytest.TempPathFactory, settings_: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("plain") / "ckpt.pt"
    save_checkpoint(path, make_checkpoint(settings=settings_))
    assert_equal(load_checkpoint(path).settings, settings_)


@pytest.mark.parametrize(
    "value", [Path("data.txt"), {1, 2}, b"", object(), {"deep": [1, {"er": 2j}]}]
)
def test_what_is_not_plain_is_an_error_of_the_caller(value: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"checkpoint\.settings\.it"):
        save_checkpoint(tmp_path / "ckpt.pt", make_checkpoint(settings={"it": value}))
    assert list(tmp_path.iterdir()) == []


def test_the_built_model_is_the_one_that_was_saved(tmp_path: Path) -> None:
    model = GPT(CONFIG).eval()
    save_checkpoint(tmp_path / "ckpt.pt", make_checkpoint(model=model_state(model)))
    state = torch.get_rng_state()
    loaded = load_checkpoint(tmp_path / "ckpt.pt")
    built = build_model(loaded)
    assert torch.equal(torch.get_rng_state(), state)
    assert not built.training
    assert built.lm_head.weight is built.transformer.wte.weight
    idx = torch.arange(8)[None]
    assert torch.equal(built(idx)[0], model(idx)[0])
    with torch.no_grad():
        built.lm_head.weight.add_(1.0)
    assert torch.equal(loaded.model["lm_head.weight"], model.lm_head.weight)


def test_the_state_taken_of_a_model_does_not_follow_its_training() -> None:
    model = GPT(CONFIG)
    state = model_state(model)
    before = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert_equal(state, before)


def test_the_tied_table_is_stored_once_and_a_view_without_what_it_is_a_view_of(
    tmp_path: Path,
) -> None:
    table_bytes = 257 * 16 * 4
    save_checkpoint(tmp_path / "ckpt.pt", make_checkpoint(resume={"v": torch.zeros(10**6)[:3]}))
    with zipfile.ZipFile(tmp_path / "ckpt.pt") as archive:
        assert [e.file_size for e in archive.infolist()].count(table_bytes) == 1
    assert (tmp_path / "ckpt.pt").stat().st_size < 100_000


@pytest.mark.parametrize("bias", [True, False])
def test_the_listed_weights_are_those_of_the_model(bias: bool) -> None:
    config = GPTConfig(block_size=8, vocab_size=257, n_layer=3, n_head=2, n_embd=16, bias=bias)
    state = GPT(config).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == weight_shapes(config)


def test_the_file_replaced_stays_under_the_previous_name(tmp_path: Path) -> None:
    path, previous = tmp_path / "last.pt", tmp_path / "last.prev.pt"
    for seed in range(3):
        save_checkpoint(path, make_checkpoint(seed), previous=previous)
    # Row 22: what a file is follows from the step inside it, not from its times or its name.
    os.utime(path, (0, 0))
    assert load_checkpoint(path).iter == 102
    assert load_checkpoint(previous).iter == 101


# Damage


def test_a_checkpoint_cut_at_any_length_is_refused(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(saved)
    known = saved.index(b"file_bytes") + 64
    for length in range(len(saved) - 1, -1, -1):
        os.truncate(path, length)
        # Past the first kilobyte every cut is told by the recorded size alone: a few stand for all.
        if length > 2048 and length % 16 and length < len(saved) - 64:
            continue
        message = refusal(path)
        if length >= known:
            assert f"truncated: expected {len(saved)} bytes, got {length}" in message
        elif length:
            assert "truncated" in message
    assert "empty (0 bytes)" in message


def test_a_checkpoint_with_something_behind_it_is_refused(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(saved + b"\0")
    assert f"expected {len(saved)} bytes, got {len(saved) + 1}" in refusal(path)


def test_damage_is_told_before_anything_is_unpickled(saved: bytes, tmp_path: Path) -> None:
    for part in (b"archive/data.pkl", b"archive/data/0"):
        damaged = bytearray(saved)
        damaged[saved.index(part) + 200] ^= 1
        (tmp_path / "ckpt.pt").write_bytes(damaged)
        assert f"the checksum of '{part.decode()}' is wrong" in refusal(tmp_path / "ckpt.pt")


def flip_and_load(saved: bytes, path: Path, offsets: range, made: Checkpoint) -> tuple[int, int]:
    """How many flips of one bit were refused and how many changed no value; fails for any other."""
    refused = equal = 0
    rng = random.Random(1)
    with open(path, "wb") as file:
        file.write(saved)
    for offset in offsets:
        flipped = bytes([saved[offset] ^ 1 << rng.randrange(8)])
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(flipped)
        try:
            loaded = load_checkpoint(path)
        except ArtefactError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert_equal(loaded, made)
            equal += 1
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(saved[offset : offset + 1])
    return refused, equal


def test_a_flipped_bit_is_never_silently_wrong(saved: bytes, tmp_path: Path) -> None:
    made = make_checkpoint()
    path = tmp_path / "ckpt.pt"
    # Dense where structure is (the pickle in front, the directory behind), thin in the weights.
    start, end = saved.index(b"archive/data/0"), saved.index(b"PK\x01\x02")
    for offsets, least in (
        (range(0, start, 4), 0.5),
        (range(start, end, 53), 0.9),
        (range(end, len(saved), 3), 0.5),
    ):
        refused, equal = flip_and_load(saved, path, offsets, made)
        assert refused + equal == len(offsets)
        assert refused > least * len(offsets)


@pytest.mark.slow
def test_no_flipped_bit_anywhere_is_silently_wrong(saved: bytes, tmp_path: Path) -> None:
    flip_and_load(saved, tmp_path / "ckpt.pt", range(len(saved)), make_checkpoint())


def test_the_sha256_refuses_what_no_checksum_of_the_zip_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value changed before it was written: a zip in order, with other content."""
    monkeypatch.setattr(checkpoint_module, "_sha256", lambda content: "0" * 64)
    save_checkpoint(tmp_path / "ckpt.pt", make_checkpoint())
    monkeypatch.undo()
    assert "SHA-256" in refusal(tmp_path / "ckpt.pt")


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A checkpoint with changed content and a SHA-256 and size that fit it again."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, buffer := io.BytesIO())
    content["file_bytes"] = f"{buffer.tell():020d}"
    if "sha256" in content:
        with contextlib.suppress(TypeError):  # of what is not plain there is none
            content["sha256"] = checkpoint_module._sha256(content)
    torch.save(content, buffer := io.BytesIO())  # a path would go into the names of the parts
    path.write_bytes(buffer.getvalue())
    return path


@pytest.fixture
def changed(saved: bytes, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], str]:
    def change_and_load(change: Callable[[dict[str, Any]], None]) -> str:
        path = tmp_path / "ckpt.pt"
        path.write_bytes(saved)
        return refusal(rewrite(path, change))

    return change_and_load


def test_rewriting_without_a_change_is_accepted(saved: bytes, tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(saved)
    load_checkpoint(rewrite(tmp_path / "ckpt.pt", lambda content: None))


def test_a_newer_format_names_both_versions(changed: Any) -> None:
    message = changed(lambda content: content.update(format_version=FORMAT_VERSION + 1))
    assert f"format {FORMAT_VERSION + 1}, this pico-edge reads {FORMAT_VERSION}" in message
    assert "upgrade pico-edge" in message

    def newer(content: dict[str, Any]) -> None:  # whatever fields it may have
        content.update(format_version=9, new_field=1)
        del content["sha256"]

    assert "format 9" in changed(newer)
    assert "format 0: expected 1" in changed(lambda content: content.update(format_version=0))
    assert "format '1'" in changed(lambda content: content.update(format_version="1"))


def weight(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model"].__setitem__(name, value)


def test_weights_that_are_not_those_of_the_config_are_named(changed: Any) -> None:
    fc = "transformer.h.0.mlp.c_fc.weight"
    message = changed(weight(fc, torch.zeros(64, 17)))
    assert f"{fc} has shape (64, 17): expected (64, 16)" in message
    assert f"{fc} is torch.float16" in changed(weight(fc, torch.zeros(64, 16).half()))
    assert f"{fc} is str" in changed(weight(fc, "weights"))
    assert f"missing: {fc}" in changed(lambda content: content["model"].pop(fc))
    assert "not of this model: extra" in changed(weight("extra", torch.zeros(1)))
    assert "differ: expected one tied" in changed(weight("lm_head.weight", torch.zeros(257, 16)))
    assert "more than dense tensors" in changed(weight(fc, torch.zeros(16, 64).T))
    assert "more than dense tensors" in changed(weight(fc, torch.zeros(1).expand(64, 16)))
    message = changed(lambda content: content["config"].update(n_layer=10**6))
    assert "1000000 layers, but" in message


def test_an_architecture_tokenizer_or_field_that_does_not_fit_is_named(changed: Any) -> None:
    assert "n_head" in changed(lambda content: content["config"].update(n_head=3))
    assert "['rotary']" in changed(lambda content: content["config"].update(rotary=True))
    message = changed(lambda content: content.update(tokenizer_sha256="f" * 64))
    assert tokenizer_hash(SimpleTokenizer())[:12] in message and "f" * 12 in message

    def other_tokenizer(content: dict[str, Any]) -> None:
        tokenizer = BPETokenizer([bytes([i]) for i in range(256)] + [b"he", b"hel"])
        content["tokenizer"] = tokenizer.to_dict()
        content["tokenizer_sha256"] = tokenizer_hash(tokenizer)

    assert "259 tokens, the model 257" in changed(other_tokenizer)
    assert "iter is a str: expected int" in changed(lambda content: content.update(iter="3"))
    assert "iter is a bool: expected int" in changed(lambda content: content.update(iter=True))
    assert "iter is -1: expected 0 or more" in changed(lambda content: content.update(iter=-1))
    assert "lacks fields ['settings']" in changed(lambda content: content.pop("settings"))
    assert "unknown ['extra']" in changed(lambda content: content.update(extra=1))


def test_values_that_contain_themselves_are_refused(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(saved)
    content = torch.load(path, weights_only=True)
    content["settings"]["self"] = content["settings"]
    content["file_bytes"] = "no digits"
    torch.save(content, path)
    assert "plain values" in refusal(path)


# Files of others


class Payload:
    """What runs `touch marker` when it is unpickled without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_hostile_pickle_is_refused_and_does_not_run(
    saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, marker = tmp_path / "ckpt.pt", tmp_path / "marker"
    payload = Payload(marker)

    torch.save({"kind": "pico-edge checkpoint", "model": payload}, path)
    assert "more than tensors and plain values" in refusal(path)

    torch.save(payload, path, _use_new_zipfile_serialization=False)
    assert "bare pickle" in refusal(path)

    path.write_bytes(pickle.dumps(payload))
    assert "bare pickle" in refusal(path)

    content = pickle.dumps(payload)
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert "bare pickle" in refusal(path)

    # Hidden in an otherwise whole checkpoint, every checksum of the zip in order.
    with zipfile.ZipFile(io.BytesIO(saved)) as archive, zipfile.ZipFile(path, "w") as other:
        for entry in archive.infolist():
            data = archive.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = pickle.dumps({"kind": payload}, protocol=2)
            other.writestr(entry.filename, data)
    assert "more than tensors and plain values" in refusal(path)

    assert not marker.exists()
    pickle.loads(pickle.dumps(payload))
    assert marker.exists()  # the payload does work


def test_zips_of_strange_structure_are_refused(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"

    def repack(**options: Any) -> zipfile.ZipFile:
        other = zipfile.ZipFile(path, "w", **options)
        with zipfile.ZipFile(io.BytesIO(saved)) as archive:
            for entry in archive.infolist():
                other.writestr(entry.filename, archive.read(entry))
        return other

    repack(compression=zipfile.ZIP_DEFLATED).close()
    assert "a compressed zip" in refusal(path)

    with repack() as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, about the duplicate
        archive.writestr("archive/data/0", b"another")
    assert "parts do not fit" in refusal(path) or "expected" in refusal(path)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "a text")
    assert "a zip without torch data" in refusal(path)


def test_a_checkpoint_of_nanogpt_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    model = {f"_orig_mod.{name}": tensor for name, tensor in GPT(CONFIG).state_dict().items()}
    args = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 8, "vocab_size": 50304}
    best = torch.tensor(2.0)
    torch.save(
        {"model": model, "optimizer": {}, "model_args": args, "iter_num": 3, "best_val_loss": best},
        path,
    )
    assert "a nanoGPT checkpoint" in refusal(path)
    torch.save({"model": model}, path)
    assert "a torch file of another program" in refusal(path)
    torch.save(torch.zeros(3), path)
    assert "a torch file of another program" in refusal(path)


@pytest.mark.parametrize(
    ("content", "guess"),
    [
        (b"\x08\x0a\x12\x07pytorch\x1a\x052.13.0:\x10", "an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"<html><body>404", "a web page"),
        # Without a time in it: the content is in the test's name, on which all workers must agree.
        (gzip.compress(b"text", mtime=0), "compressed (gzip)"),
        (bytes(100_000), "100000 bytes that begin with zeros"),
        (b"To be, or not to be", "neither a checkpoint nor anything known"),
        (b"", "empty (0 bytes)"),
    ],
)
def test_a_file_of_another_kind_is_guessed(content: bytes, guess: str, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(content)
    assert guess in refusal(path)


def test_a_folder_is_refused_and_a_missing_file_is_one(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "ckpt.pt")


# The disk


class FailingCall:
    """Lets the number-th call of the system fail. See tests/core/test_publish.py for every kind."""

    def __init__(self, kind: str, number: int) -> None:
        self.kind, self.number, self.count = kind, number, 0
        self.real = {
            name: getattr(os, name)
            for name in ("open", "write", "fsync", "close", "link", "replace", "unlink")
        }

    def __enter__(self) -> FailingCall:
        for name, real in self.real.items():
            setattr(os, name, functools.partial(self.call, name, real))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self.real.items():
            setattr(os, name, real)

    def call(self, name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count == self.number:
            if self.kind in ("ENOSPC", "EIO"):
                number = getattr(errno, self.kind)
                raise OSError(number, os.strerror(number))
            if self.kind == "killed half way" and name == "write":
                real(args[0], bytes(args[1])[: max(1, len(args[1]) // 2)])
            if self.kind == "killed after":
                real(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        # The death of a process loses nothing that is written: no need to wait for the disk.
        return None if name == "fsync" else real(*args, **kwargs)


def save_with_failing_call(kind: str, number: int, save: Callable[[], None]) -> str:
    """What comes of a save: "untouched" by the failure, "done" despite it, "failed", "killed"."""
    with FailingCall(kind, number) as failing:
        try:
            save()
        except OSError:
            return "failed"
        return "done" if failing.count >= number else "untouched"


def save_in_child(kind: str, number: int, save: Callable[[], None]) -> str:
    """The same in a process of its own, for the kinds that kill it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads that stay idle
        child = os.fork()
    if child == 0:
        code = 9
        try:
            code = ("untouched", "done", "failed").index(save_with_failing_call(kind, number, save))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "killed"
    return ("untouched", "done", "failed")[os.WEXITSTATUS(status)]


def fail_every_call(kind: str, folder: Path, states: list[Checkpoint]) -> list[str]:
    """Save states[2] over states[1], whose predecessor is states[0], with each call failing once.

    Asserts that what is found afterwards is the old or the new, and returns what came of each save.
    """
    older, old, new = states
    attempt = save_in_child if kind.startswith("killed") else save_with_failing_call
    path, previous = folder / "last.pt", folder / "last.prev.pt"
    save_checkpoint(path, older)
    older_bytes = path.read_bytes()
    save_checkpoint(path, old)
    old_bytes = path.read_bytes()
    outcomes = []
    for number in range(1, 10_000):
        previous.write_bytes(older_bytes)
        path.write_bytes(old_bytes)
        outcome = attempt(kind, number, lambda: save_checkpoint(path, new, previous=previous))
        outcomes.append(outcome)
        if outcome == "killed":
            remove_stale(path)
            remove_stale(previous)
        assert {entry.name for entry in folder.iterdir()} == {path.name, previous.name}, number
        kept = previous.read_bytes()
        if path.read_bytes() == old_bytes:
            assert outcome in ("failed", "killed"), number
            assert kept in (older_bytes, old_bytes), number
        else:
            assert_equal(load_checkpoint(path), new)
            assert kept == old_bytes, number
        if outcome == "untouched":
            break
    assert outcomes[-1] == "untouched"
    assert {"ENOSPC": "failed", "EIO": "done"}.get(kind, "killed") in outcomes
    return outcomes


# "Killed before" is "killed after" the call before it.
FAILURES = ["ENOSPC", "EIO", "killed after", "killed half way"]


@needs_fork
@pytest.mark.parametrize("kind", FAILURES)
def test_a_save_that_fails_at_any_call_leaves_the_old_checkpoint_or_the_new(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 1, with four tensors: which weights there are is not what this is about."""
    monkeypatch.setattr(checkpoint_module, "_check_weights", lambda *_: None)
    monkeypatch.setattr(publish_module, "PAUSES_S", (0.0, 0.0))
    states = [
        make_checkpoint(seed, model={name: torch.full((5,), float(seed)) for name in "abcd"})
        for seed in range(3)
    ]
    # So many writes torch.save makes at least, and each one was failed.
    assert len(fail_every_call(kind, tmp_path, states)) > 30


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FAILURES, "killed before"])
def test_a_whole_resumable_state_survives_the_failure_of_any_call(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 1 with all there is in a last.pt: weights, moments, random states."""
    monkeypatch.setattr(publish_module, "PAUSES_S", (0.0, 0.0))
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = GPT(dataclasses.replace(CONFIG, bias=True))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids = torch.arange(8)[None]
        model(ids, ids)[1].backward()
        optimizer.step()
        resume = {"optimizers": [optimizer.state_dict()], "random": {"cpu": torch.get_rng_state()}}
        states.append(
            make_checkpoint(seed, config=model.config, model=model_state(model), resume=resume)
        )
    n_tensors = sum(
        isinstance(v, torch.Tensor)
        for s in states[2].resume["optimizers"][0]["state"].values()
        for v in s.values()
    ) + len(states[2].model)
    assert n_tensors > 36
    assert len(fail_every_call(kind, tmp_path, states)) > 200


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save itself reports "unexpected pos"."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, make_checkpoint(0))
    content, real, written = path.read_bytes(), os.write, [0]

    def full(fd: int, data: bytes) -> int:
        written[0] += len(data)
        if written[0] > 10_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        save_checkpoint(path, make_checkpoint(1))
    monkeypatch.undo()
    assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]
