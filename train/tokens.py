"""Documents -> one array of token ids on disk, made once, read by slices ever after.

Streamed, on all cores: text is decoded and cut here, encoded by threads (tiktoken works outside
Python's lock; two processes were slower than two threads), and written in order. Knows nothing of
models.

Try: `prepare_tokens(find_files(["data.txt"]), SimpleTokenizer(), "ckpt.run", block_size=64)`.
"""

from __future__ import annotations

import collections
import io
import itertools
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from pico_edge.artefact import HELD_OUT_BYTES
from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.publish import Writable, publish, remove_stale
from pico_edge.tokenizer import (
    PIECE_CHARACTERS,
    SimpleTokenizer,
    Tokenizer,
    tokenizer_hash,
)
from pico_edge.train.report import Reporter
from pico_edge.train.text import Piece, fingerprint, read_documents
from pico_edge.train.throughput import Throughput

CACHE_VERSION = 2  # of tokens.bin and its sidecar: raised when the same text gives others

IdArray = NDArray[np.unsignedinteger[Any]]

_CHECK_TOKENS = 1 << 20  # ids looked at in one go
_MARK_TOKENS = 1 << 20  # tokens between two marks of the sidecar
_AHEAD = 4  # batches of text per thread that wait or are done, at most


class _TokenFile(io.FileIO):
    """Open until the last Tokens that reads it is gone."""

    def __del__(self) -> None:
        self.close()


class Tokens:
    """Token ids in a file: `len(tokens)`, `tokens[start:stop]` -> array of uint16 or uint32.

    Reads instead of mapping: a file cut meanwhile is an ArtefactError, not a SIGBUS, and pages read
    are not memory of the process. Every id read is checked to be under n_vocab, or ArtefactError.
    The file stays open, whatever becomes of its name.
    """

    def __init__(
        self, file: io.FileIO, dtype: np.dtype[Any], start: int, stop: int, n_vocab: int
    ) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._start = start
        self._length = stop - start
        self._n_vocab = n_vocab
        self.dtype = dtype

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, window: slice) -> IdArray:
        start, stop, step = window.indices(self._length)
        ids = np.empty(max(0, stop - start), self.dtype)
        view = memoryview(cast("bytes", ids)).cast("B")
        offset = (self._start + start) * self.dtype.itemsize
        with self._lock:  # one position for all who read
            self._file.seek(offset)
            n_read = 0
            while n_read < len(view):
                n = self._file.readinto(view[n_read:])
                if not n:
                    raise ArtefactError(
                        f"{self._file.name}: cut to {offset + n_read} bytes or less while in use, "
                        f"expected at least {offset + len(view)}: start again, it is made anew"
                    )
                n_read += n
        if len(ids) and (highest := int(ids.max())) >= self._n_vocab:
            raise ArtefactError(
                f"{self._file.name} has token id {highest}: expected under {self._n_vocab}: "
                "delete it and start again, it is made anew"
            )
        return ids[::step]


@dataclass(frozen=True)
class TokenData:
    """Tokens to train on and those held out.

    n_val_bytes: UTF-8 bytes of the validation part, end-of-text counts none: bits per byte =
    loss * len(val) / (ln 2 * n_val_bytes) for a mean loss in nats per token. held_out: text, at
    most 64 KiB, from the start of the validation part. fingerprint: equal for equal data: "bytes",
    "sha256_sampled", "files", and "val", the same of the validation files where they were given.
    """

    train: Tokens
    val: Tokens
    n_val_bytes: int
    held_out: str
    fingerprint: dict[str, Any]


class Mark(NamedTuple):
    """So many tokens from the start of the cache are so many bytes of UTF-8."""

    n_tokens: int
    n_bytes: int


class _Cache(NamedTuple):
    """The open cache: tokens of each part, and a mark about every _MARK_TOKENS, the end one too."""

    file: io.FileIO
    counts: list[int]
    marks: list[Mark]


def prepare_tokens(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    *,
    block_size: int,
    val_fraction: float = 0.1,
    val_files: Sequence[Path] | None = None,
    encoding: str | None = None,
    text_field: str = "text",
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> TokenData:
    """Token ids of the files, cached in `folder` (made if missing) while nothing changes.

    Between documents stands the end-of-text id. val_files: validation text; without it the last
    val_fraction of the tokens is held out, or block_size + 1 where that is more. threads: that
    encode, one per core if None; the ids are the same. A damaged cache is made again, with a
    notice. Raises ArtefactError (tokens found and needed) for too little data.
    """
    if not 0.0 < val_fraction < 1.0:
        raise UsageError(f"val_fraction is {val_fraction}: expected more than 0 and less than 1")
    reporter = Reporter(quiet=True) if reporter is None else reporter
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    data = fingerprint(files)
    if val_files is not None:
        data["val"] = fingerprint(val_files)
    key = {
        "version": CACHE_VERSION,
        "data": data,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "encoding": encoding,
        "text_field": text_field,
    }
    path, sidecar = folder / "tokens.bin", folder / "tokens.json"
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
    cache = _open_cache(path, sidecar, key, dtype, tokenizer.n_vocab, reporter)
    if cache is None:
        sources = [files] if val_files is None else [files, val_files]
        n_bytes = sum(file.stat().st_size for source in sources for file in source)
        throughput = Throughput(reporter, "tokenizing", n_bytes)
        documents = [
            read_documents(s, encoding=encoding, text_field=text_field, on_read=throughput.add)
            for s in sources
        ]
        marks = _write_cache(
            path, sidecar, key, dtype, documents, tokenizer, threads or _core_count()
        )
        throughput.end(marks[-1].n_bytes)
        cache = _open_cache(path, sidecar, key, dtype, tokenizer.n_vocab, reporter)
        if cache is None:
            raise PicoEdgeError(f"{path} changed while it was made: does another program write it?")
    n_total, needed = sum(cache.counts), block_size + 1
    if val_files is None:
        # nanoGPT's split: int(0.9 * n) to train on.
        n_train = min(int(n_total * (1 - val_fraction)), n_total - needed)
        if n_train < needed <= n_total // 2:
            raise ArtefactError(
                f"val_fraction {val_fraction:g} leaves {n_train} of {n_total} tokens to train on, "
                f"needed {needed} (block_size + 1): lower --val-fraction, or --block-size"
            )
        if n_train < needed:
            raise ArtefactError(
                f"too little data: found {n_total} tokens, needed {2 * needed} (block_size + 1 to "
                "train on and as many held out): add text, or lower --block-size"
            )
    else:
        n_train = cache.counts[0]
        for name, count in zip(("data", "validation data"), cache.counts, strict=True):
            if count < needed:
                raise ArtefactError(
                    f"too little {name}: found {count} tokens, needed {needed} (block_size + 1): "
                    "add text, or lower --block-size"
                )
    whole = Tokens(cache.file, dtype, 0, n_total, tokenizer.n_vocab)
    val = Tokens(cache.file, dtype, n_train, n_total, tokenizer.n_vocab)
    return TokenData(
        train=Tokens(cache.file, dtype, 0, n_train, tokenizer.n_vocab),
        val=val,
        n_val_bytes=cache.marks[-1].n_bytes - _bytes_before(n_train, whole, cache.marks, tokenizer),
        held_out=_held_out(val, tokenizer),
        fingerprint=data,
    )


def _core_count() -> int:
    # Those that this process may use, where the system can tell.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _write_cache(
    path: Path,
    sidecar: Path,
    key: dict[str, Any],
    dtype: np.dtype[Any],
    parts: Sequence[Iterator[Piece]],
    tokenizer: Tokenizer,
    threads: int,
) -> list[Mark]:
    """Publish the ids of the parts, one after the other, then what describes them: the marks."""
    remove_stale(path)
    remove_stale(sidecar)
    # Killed between the two, the new ids must not be taken for what an older sidecar says.
    sidecar.unlink(missing_ok=True)
    counts: list[int] = []
    marks = [Mark(0, 0)]

    def write(file: Writable) -> None:
        counts.clear()
        del marks[1:]
        end = marks[0]
        for documents in parts:
            start = end.n_tokens
            for ids, n_bytes in _encode(documents, tokenizer, dtype, threads):
                file.write(ids)
                end = Mark(end.n_tokens + len(ids) // dtype.itemsize, end.n_bytes + n_bytes)
                if end.n_tokens - marks[-1].n_tokens >= _MARK_TOKENS:
                    marks.append(end)
            counts.append(end.n_tokens - start)
        marks.append(end)

    publish(path, write)
    description = json.dumps(
        {
            "key": key,
            "dtype": dtype.str,
            "counts": counts,
            "marks": marks,
            "mtime_ns": path.stat().st_mtime_ns,
        }
    )
    publish(sidecar, lambda file: file.write(description.encode()))
    return marks


def _encode(
    documents: Iterator[Piece], tokenizer: Tokenizer, dtype: np.dtype[Any], threads: int
) -> Iterator[tuple[bytes, int]]:
    """Token ids as bytes and the UTF-8 bytes they stand for, in chunks and in order.

    The end-of-text id stands between documents, not after the last. An error of a thread is raised
    here; the threads are gone when this ends, however it ends.
    """
    batches = _batches(documents)
    if threads == 1 or isinstance(tokenizer, SimpleTokenizer):  # bytes: nothing to compute
        for batch in batches:
            yield _encode_batch(batch, tokenizer, dtype)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")
    try:
        pending: collections.deque[Future[tuple[bytes, int]]] = collections.deque()
        for batch in batches:
            pending.append(pool.submit(_encode_batch, batch, tokenizer, dtype))
            if len(pending) >= _AHEAD * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# Texts with whether an end-of-text id stands before each.
_Batch = list[tuple[bool, str]]


def _batches(documents: Iterator[Piece]) -> Iterator[_Batch]:
    """Pieces in batches of about PIECE_CHARACTERS: documents may be short, a task has a price."""
    batch: _Batch = []
    n_characters = 0
    between = False
    for text, end in documents:
        batch.append((between, text))
        between = end
        n_characters += len(text)
        if n_characters >= PIECE_CHARACTERS // 2:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _encode_batch(batch: _Batch, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> tuple[bytes, int]:
    """The ids of a batch as bytes, and how many bytes its texts are."""
    eot = np.array([tokenizer.eot_id], dtype).tobytes()
    parts: list[bytes] = []
    n_bytes = 0
    for between, text in batch:
        if between:
            parts.append(eot)
        encoded = text.encode()
        n_bytes += len(encoded)
        ids: IdArray
        if isinstance(tokenizer, SimpleTokenizer):  # the ids of its encode, without a list
            ids = np.frombuffer(encoded, np.uint8)
        else:
            ids = tokenizer.encode_piece(text)
        parts.append(ids.astype(dtype).tobytes())
    return b"".join(parts), n_bytes


def _open_cache(
    path: Path,
    sidecar: Path,
    key: dict[str, Any],
    dtype: np.dtype[Any],
    n_vocab: int,
    reporter: Reporter,
) -> _Cache | None:
    """The open cache; None if there is none for this key.

    A cache that does not hold what its sidecar says is reported and counts as none.
    """
    if not (path.exists() and sidecar.exists()):
        return None
    file = _TokenFile(path)
    try:
        cache = _check_cache(file, sidecar, key, dtype, n_vocab)
    except ArtefactError as error:
        reporter.say(f"warning: {error}: the token cache is made again")
        cache = None
    if cache is None:
        file.close()
    return cache


def _check_cache(
    file: io.FileIO, sidecar: Path, key: dict[str, Any], dtype: np.dtype[Any], n_vocab: int
) -> _Cache | None:
    """The cache, None if it is of another key. Raises ArtefactError for a damaged one."""
    try:
        found = json.loads(sidecar.read_bytes())
        if (found["key"], found["dtype"]) != (key, dtype.str):
            return None
        counts, mtime_ns = found["counts"], found["mtime_ns"]
        marks = [Mark(n_tokens, n_bytes) for n_tokens, n_bytes in found["marks"]]
    except (ValueError, LookupError, TypeError) as error:
        raise ArtefactError(f"{sidecar} is damaged: {error!r}") from error
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        raise ArtefactError(f"{sidecar} is damaged: counts are {counts!r}")
    n_tokens = sum(counts)
    _check_marks(marks, n_tokens, sidecar)
    status = os.fstat(file.fileno())
    expected = n_tokens * dtype.itemsize
    if status.st_size != expected:
        raise ArtefactError(f"{file.name} has {status.st_size} bytes: expected {expected}")
    if status.st_mtime_ns != mtime_ns:  # someone wrote or copied it: all ids are read once
        tokens = Tokens(file, dtype, 0, n_tokens, 1 << 32)
        for start in range(0, n_tokens, _CHECK_TOKENS):
            highest = int(tokens[start : start + _CHECK_TOKENS].max())
            if highest >= n_vocab:
                raise ArtefactError(f"{file.name} has token id {highest}: expected under {n_vocab}")
    return _Cache(file, counts, marks)


def _check_marks(marks: list[Mark], n_tokens: int, sidecar: Path) -> None:
    numbers = [number for mark in marks for number in mark]
    if not all(type(number) is int for number in numbers):
        raise ArtefactError(f"{sidecar} is damaged: marks that are no integers")
    rising = all(
        a.n_tokens <= b.n_tokens and a.n_bytes <= b.n_bytes for a, b in itertools.pairwise(marks)
    )
    if not rising or marks[:1] != [Mark(0, 0)] or marks[-1].n_tokens != n_tokens:
        raise ArtefactError(f"{sidecar} is damaged: its marks do not rise from 0 to {n_tokens}")


def _bytes_before(position: int, tokens: Tokens, marks: list[Mark], tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the tokens before a position: those of the last mark, the rest counted."""
    if isinstance(tokenizer, SimpleTokenizer):
        lengths = np.ones(tokenizer.n_vocab, np.int64)
    else:
        lengths = np.array([*map(len, tokenizer.bytes_of)], np.int64)
    lengths[tokenizer.eot_id] = 0
    mark = max(mark for mark in marks if mark.n_tokens <= position)
    rest = tokens[mark.n_tokens : position]
    return mark.n_bytes + int(lengths[rest].sum())


def _held_out(tokens: Tokens, tokenizer: Tokenizer) -> str:
    # A token has at least one byte, all but the end of text.
    ids = tokens[: 2 * HELD_OUT_BYTES].tolist()
    # The text is valid: "ignore" drops only a character that a cut went through, at either end.
    return tokenizer.decode_bytes(ids)[:HELD_OUT_BYTES].decode("utf-8", "ignore")
