"""Tokens on disk are those of the text, however they are made, kept and read."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
import threading
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pico_edge.artefact import HELD_OUT_BYTES
from pico_edge.errors import ArtefactError, UsageError
from pico_edge.tokenizer import PIECE_CHARACTERS, BPETokenizer, SimpleTokenizer
from pico_edge.train import report, throughput
from pico_edge.train import tokens as tokens_module
from pico_edge.train.batches import batch
from pico_edge.train.bpe import choose_tokenizer, train_bpe
from pico_edge.train.report import Reporter
from pico_edge.train.text import fingerprint, read_documents
from pico_edge.train.tokens import TokenData, Tokens, prepare_tokens

ENGLISH = "It was the best of times, it was the worst of times; isn't it 1859?\n\n"
CHINESE = "道可道，非常道。名可名，非常名。無名天地之始；有名萬物之母。\n"  # noqa: RUF001
EMOJI = "👩‍👩‍👧‍👦🏳️‍🌈👍🏽☃️"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_large_file_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    with open(path, "wb") as file:
        for _ in range(20):
            file.write(ENGLISH.encode() * 15_000)  # 1 MB; 20 in all
    tracemalloc.start()
    prepare_tokens([path], SimpleTokenizer(), tmp_path / "run", block_size=64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12_000_000


@pytest.mark.parametrize("text", ["a" * 50_000_000, "^" * 1_000_000, EMOJI * 20_000])
def test_one_long_line_is_lossless(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", text)
    data = prepare_tokens([path], SimpleTokenizer(), tmp_path / "run", block_size=64)
    ids = np.concatenate([data.train[:], data.val[:]])
    assert ids.astype(np.uint8).tobytes() == text.encode()


def tokens_of(tokens: Tokens | np.ndarray) -> list[int]:
    return tokens[:].tolist()


def prepare(path: Path | Sequence[Path], folder: Path, **options: Any) -> TokenData:
    files = [path] if isinstance(path, Path) else path
    return prepare_tokens(files, SimpleTokenizer(), folder, **{"block_size": 64, **options})


def test_one_document_is_split_as_nanogpt_splits_it(tmp_path: Path) -> None:
    text = (ENGLISH * 100)[:6543]
    data = prepare(write(tmp_path / "a.txt", text), tmp_path / "run")
    n = len(text)
    assert bytes(tokens_of(data.train)).decode() == text[: int(n * 0.9)]
    assert bytes(tokens_of(data.val)).decode() == text[int(n * 0.9) :] == data.held_out
    assert data.n_val_bytes == n - int(n * 0.9)
    assert data.train.dtype == np.uint16
    assert data.fingerprint == fingerprint([tmp_path / "a.txt"])


def test_documents_are_separated_by_the_end_of_text(tmp_path: Path) -> None:
    texts = [ENGLISH * 10, "<|endoftext|>", CHINESE * 10]
    files = [write(tmp_path / f"{i}.txt", text) for i, text in enumerate(texts)]
    data = prepare([files[0], write(tmp_path / "empty.txt", ""), *files[1:]], tmp_path / "run")
    tokenizer = SimpleTokenizer()
    first, second, third = map(tokenizer.encode, texts)
    expected = [*first, 256, *second, 256, *third]
    assert tokens_of(data.train) + tokens_of(data.val) == expected
    assert data.n_val_bytes == sum(i != 256 for i in tokens_of(data.val))


@pytest.mark.parametrize("name", ["simple", "bpe"])
@pytest.mark.parametrize("text", [CHINESE, EMOJI], ids=["chinese", "emoji"])
def test_a_megabyte_of_any_script_is_tokenized_and_held_out_in_whole_characters(
    name: str, text: str, tmp_path: Path
) -> None:
    whole = text * (1_000_000 // len(text.encode()))
    path = write(tmp_path / "a.txt", whole)
    tokenizer = choose_tokenizer(name, [path], vocab_size=300)
    data = prepare_tokens([path], tokenizer, tmp_path / "run", block_size=64)
    ids = tokens_of(data.train) + tokens_of(data.val)
    assert tokenizer.decode_bytes(ids) == whole.encode()
    assert data.n_val_bytes == len(tokenizer.decode_bytes(tokens_of(data.val)))
    assert "\ufffd" not in data.held_out
    assert HELD_OUT_BYTES - 6 < len(data.held_out.encode()) <= HELD_OUT_BYTES
    start = len(tokenizer.decode_bytes(tokens_of(data.train)))
    assert whole.encode()[start : start + HELD_OUT_BYTES].decode("utf-8", "ignore") == data.held_out


def test_ids_that_need_more_than_two_bytes_get_four(tmp_path: Path) -> None:
    tokens = [bytes([i]) for i in range(256)]
    tokens += [i.to_bytes(4, "big") for i in range(1 << 16)]
    tokenizer = BPETokenizer(tokens)
    path = write(tmp_path / "a.txt", ENGLISH * 10)
    data = prepare_tokens([path], tokenizer, tmp_path / "run", block_size=8)
    assert data.train.dtype == np.uint32
    assert tokenizer.decode(tokens_of(data.train) + tokens_of(data.val)) == ENGLISH * 10


def test_validation_files_are_held_out_as_a_whole(tmp_path: Path) -> None:
    path, val = write(tmp_path / "a.txt", ENGLISH * 9), write(tmp_path / "v.txt", CHINESE * 9)
    data = prepare(path, tmp_path / "run", val_files=[val])
    assert bytes(tokens_of(data.train)).decode() == ENGLISH * 9
    assert bytes(tokens_of(data.val)).decode() == CHINESE * 9 == data.held_out
    assert data.n_val_bytes == len((CHINESE * 9).encode())
    assert data.fingerprint == fingerprint([path]) | {"val": fingerprint([val])}


def test_a_small_file_keeps_enough_to_validate_on(tmp_path: Path) -> None:
    data = prepare(write(tmp_path / "a.txt", (ENGLISH * 60)[:3000]), tmp_path / "run")
    assert (len(data.train), len(data.val)) == (2700, 300)
    data = prepare(write(tmp_path / "b.txt", (ENGLISH * 60)[:300]), tmp_path / "run")
    assert (len(data.train), len(data.val)) == (235, 65)


@pytest.mark.parametrize("size", [0, 1, 64, 65, 129])
def test_too_little_text_is_refused_with_the_tokens_found_and_needed(
    size: int, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.txt", (ENGLISH * 60)[:size])
    with pytest.raises(ArtefactError, match=rf"found {size} tokens, needed 130"):
        prepare(path, tmp_path / "run")
    long = write(tmp_path / "b.txt", ENGLISH * 60)
    if size < 65:
        with pytest.raises(ArtefactError, match=rf"validation data: found {size} .* needed 65"):
            prepare(long, tmp_path / "run", val_files=[path])
        with pytest.raises(ArtefactError, match=rf"too little data: found {size} .* needed 65"):
            prepare(path, tmp_path / "run", val_files=[long])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_that_leaves_nothing_is_refused(fraction: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="val_fraction"):
        prepare(write(tmp_path / "a.txt", ENGLISH), tmp_path / "run", val_fraction=fraction)


def test_the_cache_is_reused_until_something_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = write(tmp_path / "a.txt", ENGLISH * 100), tmp_path / "run"
    bpe = train_bpe([ENGLISH * 100], 260)
    made = []

    def cache_of(tokenizer: Any = None, **options: Any) -> bool:
        """Whether the cache was made by this call."""
        prepare_tokens([path], tokenizer or SimpleTokenizer(), run, block_size=64, **options)
        made.append((run / "tokens.bin").stat().st_ino)
        return len(made) < 2 or made[-1] != made[-2]

    assert cache_of()
    assert not cache_of()
    assert not cache_of(val_fraction=0.3)  # the split is not part of it
    assert cache_of(bpe)
    assert not cache_of(bpe)
    assert cache_of()
    assert cache_of(encoding="latin-1")
    assert cache_of(val_files=[path])
    write(path, ENGLISH * 100 + "!")
    assert cache_of()
    assert not cache_of()
    assert capsys.readouterr().err == ""
    assert sorted(entry.name for entry in run.iterdir()) == ["tokens.bin", "tokens.json"]


def test_a_damaged_cache_is_made_again_with_a_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = write(tmp_path / "a.txt", ENGLISH * 100), tmp_path / "run"
    right = tokens_of(prepare(path, run).train)
    ids, sidecar = run / "tokens.bin", run / "tokens.json"
    whole, description = ids.read_bytes(), json.loads(sidecar.read_bytes())
    negative = description | {"counts": [-1]}
    for target, content, notice in (
        (ids, whole[:-1], f"{len(whole) - 1} bytes: expected {len(whole)}"),
        (ids, whole[:-2], f"{len(whole) - 2} bytes"),
        (ids, whole + b"\0\0", f"{len(whole) + 2} bytes"),
        (ids, b"", "0 bytes"),
        (ids, whole[:-2] + b"\xff\xff", "token id 65535: expected under 257"),
        (sidecar, b"", "tokens.json is damaged"),
        (sidecar, b"[]", "tokens.json is damaged"),
        (sidecar, b"\xff", "tokens.json is damaged"),
        (sidecar, json.dumps(negative).encode(), "counts are [-1]"),
    ):
        target.write_bytes(content)
        assert tokens_of(prepare(path, run, reporter=Reporter()).train) == right
        warning = capsys.readouterr().err
        assert notice in warning and "made again" in warning and warning.count("\n") == 1
    for missing in (ids, sidecar):
        missing.unlink()
        assert tokens_of(prepare(path, run, reporter=Reporter()).train) == right
    assert capsys.readouterr().err == ""


def test_new_ids_are_never_taken_for_those_of_an_older_sidecar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between the two files, with texts of equal length."""
    run = tmp_path / "run"
    a, b = write(tmp_path / "a.txt", "a" * 500), write(tmp_path / "b.txt", "b" * 500)
    prepare(a, run)
    real = tokens_module.publish

    def stop_before_the_sidecar(path: Path, write: Any) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        real(path, write)

    monkeypatch.setattr(tokens_module, "publish", stop_before_the_sidecar)
    with pytest.raises(KeyboardInterrupt):
        prepare(b, run)
    monkeypatch.undo()
    assert set(tokens_of(prepare(a, run).train)) == {ord("a")}


def test_a_cache_cut_while_in_use_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ENGLISH * 100)
    data = prepare(path, tmp_path / "run")
    os.truncate(tmp_path / "run" / "tokens.bin", 1001)
    with pytest.raises(ArtefactError, match=r"tokens\.bin: cut to 1001 bytes .* while in use"):
        tokens_of(data.train)


def test_tokens_are_read_as_an_array_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ENGLISH * 10)
    data = prepare(path, tmp_path / "run", block_size=8)
    whole = np.array(SimpleTokenizer().encode(ENGLISH * 10), np.uint16)
    split = len(data.train)
    for window in (slice(3, 9), slice(None), slice(-5, None), slice(9, 3), slice(5, 10**9)):
        assert np.array_equal(data.train[window], whole[:split][window])
        assert np.array_equal(data.val[window], whole[split:][window])
    assert len(data.val) == len(whole) - split


def test_batches_from_the_file_are_those_from_memory(tmp_path: Path) -> None:
    data = prepare(write(tmp_path / "a.txt", ENGLISH * 100), tmp_path / "run")
    memory = data.train[:]

    def draw(tokens: Tokens | np.ndarray, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return batch(tokens, seed=1, step=step, slot=3, batch_size=16, block_size=32)

    for step in range(5):
        for a, b in zip(draw(data.train, step), draw(memory, step), strict=True):
            assert torch.equal(a, b)


# On all cores


def awkward_files(folder: Path) -> list[Path]:
    """Short documents, long ones, some that are a piece exactly, and end-of-text as plain text."""
    texts = [ENGLISH, CHINESE, EMOJI, "<|endoftext|>", "\r\n", "x", "a" * PIECE_CHARACTERS]
    lines = "\n".join(json.dumps({"text": texts[i % 7] * (i % 5 + 1)}) for i in range(70))
    files = [write(folder / "a.jsonl", lines), write(folder / "b.txt", ENGLISH * 8000)]
    files += [write(folder / "c.txt", CHINESE * 3000), write(folder / "d.txt", "")]
    return [*files, write(folder / "e.txt", "a" * PIECE_CHARACTERS)]


def test_the_ids_are_the_same_on_any_number_of_threads(tmp_path: Path) -> None:
    files = awkward_files(tmp_path)
    texts = ["".join(piece for piece, _ in read_documents([file])) for file in files[1:]]
    bpe = train_bpe([ENGLISH, CHINESE, "<|endoftext|>" * 9], 340)
    for tokenizer in (SimpleTokenizer(), bpe):
        made = []
        for threads in (1, 2, 5, None):
            run = tmp_path / f"{tokenizer.kind}{threads}"
            options = {"block_size": 64, "threads": threads, "val_files": [files[1]]}
            data = prepare_tokens(files, tokenizer, run, **options)
            made.append((run / "tokens.bin").read_bytes())
            assert data.n_val_bytes == len(ENGLISH) * 8000
        assert made.count(made[0]) == 4
        expected: list[int] = []
        for line in files[0].read_text(encoding="utf-8").splitlines():
            expected += [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eot_id]
        documents = [tokenizer.encode(text) for text in (*texts[:2], *texts[3:])]
        expected += [i for ids in documents for i in (*ids, tokenizer.eot_id)][:-1]
        assert data.train[:].tolist() == expected


@pytest.mark.parametrize("fails_at", [1, 3, 40])
def test_an_error_in_a_thread_ends_it_all_and_leaves_nothing(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count(1)
    real = BPETokenizer.encode_piece

    def failing(self: BPETokenizer, text: str) -> Any:
        if next(calls) == fails_at:
            raise MemoryError("no more")
        return real(self, text)

    monkeypatch.setattr(BPETokenizer, "encode_piece", failing)
    path = write(tmp_path / "a.txt", ENGLISH * 60_000)
    with pytest.raises(MemoryError, match="no more"):
        prepare_tokens([path], train_bpe([ENGLISH], 260), tmp_path / "run", block_size=8, threads=3)
    assert list((tmp_path / "run").iterdir()) == []
    assert not [t.name for t in threading.enumerate() if t.name.startswith("tokenize")]
    assert next(calls) < fails_at + 16  # what waited is not done any more


def test_bad_text_far_into_a_file_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", (ENGLISH * 60_000).encode() + b"\xff")
    bpe = train_bpe([ENGLISH], 260)
    with pytest.raises(ArtefactError, match=f"byte offset {len(ENGLISH) * 60_000}: ff"):
        prepare_tokens([path], bpe, tmp_path / "run", block_size=8, threads=2)
    assert list((tmp_path / "run").iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    left = write(tmp_path / "run" / ".tokens.bin.tmp-999999", "half")
    prepare(write(tmp_path / "a.txt", ENGLISH * 10), tmp_path / "run", block_size=8)
    assert not left.exists()


# A second start


def test_an_unchanged_cache_is_opened_almost_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "_MARK_TOKENS", 100_000)
    path, run = write(tmp_path / "a.txt", ENGLISH * 30_000), tmp_path / "run"
    bpe = train_bpe([ENGLISH], 280)
    first = prepare_tokens([path], bpe, run, block_size=64)
    read = []
    real = tokens_module._TokenFile.readinto

    def counting(self: Any, view: Any) -> int:
        read.append(len(view))
        return real(self, view)

    monkeypatch.setattr(tokens_module._TokenFile, "readinto", counting)
    for fraction in (0.1, 0.5, 0.01, 0.97):
        read.clear()
        data = prepare_tokens([path], bpe, run, block_size=64, val_fraction=fraction)
        held_out = min(2 * HELD_OUT_BYTES, len(data.val))
        assert sum(read) <= 2 * (100_000 + PIECE_CHARACTERS + held_out)
        assert data.n_val_bytes == len(bpe.decode_bytes(tokens_of(data.val)))
    assert len(first.train) + len(first.val) == len(data.train) + len(data.val) > 400_000


def test_ids_that_are_none_are_seen_whenever_they_are_read(tmp_path: Path) -> None:
    """Changed under the same time stamp, or while in use: each read looks."""
    path, run = write(tmp_path / "a.txt", ENGLISH * 100), tmp_path / "run"
    data = prepare(path, run)
    status = (run / "tokens.bin").stat()
    with open(run / "tokens.bin", "r+b") as file:
        file.seek(2 * 100)
        file.write(b"\x01\x01")
    with pytest.raises(ArtefactError, match=r"tokens\.bin has token id 257: expected under 257"):
        batch(data.train, seed=1, step=0, slot=0, batch_size=400, block_size=64)
    os.utime(run / "tokens.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ArtefactError, match="token id 257: expected under 257: delete it"):
        prepare(path, run)
    os.utime(run / "tokens.bin")
    assert 257 not in tokens_of(prepare(path, run).train)  # all was read, and made again


@pytest.mark.parametrize(
    "marks",
    [[], [[0, 0]], [[1, 0], [7100, 7100]], [[0, 0], [9, 9], [3, 3], [7100, 7100]], [[0, 0], [7100]],
     [[0, 0], [7100.0, 7100]], [[0, 0], [5, 9], [7100, 3]], 7],
)  # fmt: skip
def test_damaged_marks_are_not_believed(
    marks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = write(tmp_path / "a.txt", ENGLISH * 100), tmp_path / "run"
    n_val_bytes = prepare(path, run).n_val_bytes
    description = json.loads((run / "tokens.json").read_bytes())
    assert description["marks"][-1] == [len(ENGLISH) * 100] * 2
    changed = json.loads(json.dumps(marks).replace("7100", str(len(ENGLISH) * 100)))
    write(run / "tokens.json", json.dumps(description | {"marks": changed}))
    assert prepare(path, run, reporter=Reporter()).n_val_bytes == n_val_bytes
    assert "tokens.json is damaged" in capsys.readouterr().err


# What is said


def test_progress_is_said_now_and_then_and_not_by_a_quiet_reporter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(throughput, "SAY_FROM_S", 0.0)
    files = [write(tmp_path / "a.txt", ENGLISH * 30_000)]
    files.append(write(tmp_path / "b.txt.gz", gzip.compress((ENGLISH * 30_000).encode())))
    said = []
    for quiet in (False, True):
        stream = io.StringIO()
        reporter = report.Reporter(stream, quiet=quiet)
        run = tmp_path / str(quiet)
        tokenizer = choose_tokenizer("bpe", files, vocab_size=260, folder=run, reporter=reporter)
        prepare_tokens(files, tokenizer, run, block_size=64, reporter=reporter)
        said.append(stream.getvalue())
    lines = said[0].splitlines()
    parts = [re.match(r"tokenizing (\d+)% of \S+B \| \S+ MB/s \| \d+:\d\d left$", x) for x in lines]
    percent = [int(part[1]) for part in parts if part]
    assert len(percent) > 4 and percent == sorted(percent) and percent[-1] == 100
    assert re.match(r"tokenizing: \S+B in 0:\d\d, \S+ MB/s$", lines[-1])
    assert any(re.match(r"reading for the tokenizer \d+% of", x) for x in lines)
    assert "training a tokenizer of 260 tokens on the text" in lines
    assert any(x.startswith("tokenizer: counting words") for x in lines)
    assert "tokenizer: merging pairs to 260 tokens" in lines
    assert said[1] == "" and "\r" not in said[0]
