"""Text files -> one array of token ids on disk -> batches that depend on (seed, step, slot) alone.

Text is streamed: neither a file nor its tokens need to fit in memory. Does not know about models.

Try: `prepare_tokens(find_files(["data.txt"]), SimpleTokenizer(), "ckpt.run", block_size=64)`.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import struct
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.publish import Writable, publish
from pico_edge.tokenizer import (
    PIECE_CHARACTERS,
    BPETokenizer,
    SimpleTokenizer,
    Tokenizer,
    parse_ranks,
    piece_end,
    pieces,
    tokenizer_hash,
)

HELD_OUT_BYTES = 64 << 10
CACHE_VERSION = 1  # of tokens.bin: raised when the same text gives other ids

IdArray = NDArray[np.unsignedinteger[Any]]

_CHUNK_BYTES = 1 << 20
_CHECK_TOKENS = 1 << 20  # ids looked at in one go
# A "word" of the BPE trainer is at most this long: text without spaces would be one, and each merge
# walks the words that it is in.
_BPE_WORD_CHARACTERS = 4096
# A file up to this size is hashed whole, a longer one in this many blocks spread over it.
_HASH_BLOCKS = 64
_HASH_BLOCK_BYTES = 16 << 10

# The longer mark first: that of UTF-32 begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class Piece(NamedTuple):
    """A part of a document, small enough to hold; `end` is true for the last part of a document.

    Parts are cut where they encode to the same ids as the whole document.
    """

    text: str
    end: bool


class _TokenFile(io.FileIO):
    """Open until the last Tokens that reads it is gone."""

    def __del__(self) -> None:
        self.close()


class Tokens:
    """Token ids in a file: `len(tokens)`, `tokens[start:stop]` -> array of uint16 or uint32.

    Reads instead of mapping: a file cut meanwhile is an ArtefactError, not a SIGBUS, and pages read
    are not memory of the process. The file stays open, whatever becomes of its name.
    """

    def __init__(self, file: io.FileIO, dtype: np.dtype[Any], start: int, stop: int) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._start = start
        self._length = stop - start
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


# Files


def find_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files named: files, folders (all below, sorted, hidden ones not), globs; each once.

    Raises ArtefactError naming a path that is missing, or a folder or glob without files.
    """
    files: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        matches = [path] if path.exists() else [Path(p) for p in sorted(_glob(os.fspath(given)))]
        found = [file for match in matches for file in _files_at(match)]
        if not matches:
            raise ArtefactError(f"{given} does not exist: expected a text file, a folder or a glob")
        if not found:
            raise ArtefactError(f"{given}: no files in it: expected text files")
        files.update(dict.fromkeys(found))
    if not files:
        raise UsageError("no data given: name at least one text file, folder or glob")
    return list(files)


def _glob(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True) if glob.has_magic(pattern) else []


def _files_at(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ArtefactError(
            f"{path} is not a regular file: expected one; save its content to a file"
        )
    files: list[Path] = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        candidates = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        files.extend(file for file in candidates if file.is_file())
    return files


def text_bytes(files: Sequence[Path]) -> int:
    """Size of the text in bytes, unread: file sizes, and for .gz the size that it records."""
    return sum(_gzip_text_bytes(file) if _is_gzip(file) else file.stat().st_size for file in files)


def _gzip_text_bytes(path: Path) -> int:
    # The last four bytes: size modulo 2^32 of the last member, so the file's own size is a floor.
    size = path.stat().st_size
    if size < 18:
        return size
    with open(path, "rb") as file:
        file.seek(-4, os.SEEK_END)
        return int(max(size, struct.unpack("<I", file.read(4))[0]))


def fingerprint(files: Sequence[Path]) -> dict[str, Any]:
    """{"bytes", "sha256_sampled", "files"} of data on disk: sizes and contents, no names."""
    digest = hashlib.sha256()
    n_bytes = 0
    for path in files:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size} ".encode())
            n_bytes += size
            if size <= _HASH_BLOCKS * _HASH_BLOCK_BYTES:
                digest.update(file.read())
                continue
            for i in range(_HASH_BLOCKS):
                file.seek(i * (size - _HASH_BLOCK_BYTES) // (_HASH_BLOCKS - 1))
                digest.update(file.read(_HASH_BLOCK_BYTES))
    return {"bytes": n_bytes, "sha256_sampled": digest.hexdigest(), "files": len(files)}


# Text


def read_documents(
    files: Iterable[Path], *, encoding: str | None = None, text_field: str = "text"
) -> Iterator[Piece]:
    """Documents in bounded pieces, lossless: one per file, or per line of .jsonl, also inside .gz.

    encoding: of all the files; None is UTF-8, or what a byte order mark says. text_field: of the
    objects in .jsonl. Documents without a character are left out. Raises ArtefactError with the
    byte offset or line of what cannot be read, UsageError for an encoding that Python lacks.
    """
    if encoding is not None:
        _check_encoding(encoding)
    for path in files:
        chunks = _decode(path, encoding)
        if path.name.lower().removesuffix(".gz").endswith(".jsonl"):
            for text in _json_lines(path, chunks, text_field):
                yield from _cut([text])
        else:
            yield from _cut(chunks)


def _check_encoding(encoding: str) -> None:
    try:
        "".encode(encoding)  # refuses codecs that are no encodings of text, such as base64
        codecs.getincrementaldecoder(encoding)
    except LookupError as error:
        raise UsageError(f"encoding {encoding!r}: {error}: expected one such as latin-1") from error


def _cut(chunks: Iterable[str]) -> Iterator[Piece]:
    """One document in the pieces that `pieces` makes of the whole."""
    buffer = ""
    for chunk in chunks:
        buffer += chunk
        start = 0
        while len(buffer) - start > PIECE_CHARACTERS:
            end = piece_end(buffer, start, PIECE_CHARACTERS)
            yield Piece(buffer[start:end], False)
            start = end
        buffer = buffer[start:]
    if buffer:
        yield Piece(buffer, True)


def _is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _read_chunks(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") if _is_gzip(path) else open(path, "rb") as file:
        while True:
            try:
                chunk = file.read(_CHUNK_BYTES)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ArtefactError(
                    f"{path}: not a whole gzip file: {error}: copy it again"
                ) from error
            if not chunk:
                return
            yield chunk


def _decode(path: Path, encoding: str | None) -> Iterator[str]:
    """The text of a file in chunks. Its byte order mark, if any, is not part of it."""
    chunks = _read_chunks(path)
    first = next(chunks, b"")
    offset = 0  # bytes given to the decoder so far
    mark, name = next((m for m in _BYTE_ORDER_MARKS if first.startswith(m[0])), (b"", "utf-8"))
    if encoding is not None:
        mark, name = b"", encoding
    elif mark:
        first, offset = first[len(mark) :], len(mark)
    else:
        _refuse_utf16_without_mark(path, first)
    decoder = codecs.getincrementaldecoder(name)("strict")
    at_start = True
    for chunk in itertools.chain([first], chunks, [b""]):
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            found = error.object[error.start : error.start + 4].hex(" ")
            raise ArtefactError(
                f"{path}: byte offset {offset - held + error.start}: {found} is not {name}: "
                "expected text: name its encoding with --encoding, such as latin-1"
            ) from error
        offset += len(chunk)
        if at_start and text:
            text = text.removeprefix("\ufeff") if encoding is not None else text
            at_start = False
        yield text


def _refuse_utf16_without_mark(path: Path, first: bytes) -> None:
    """English in UTF-16 is valid UTF-8 with a NUL at every other byte: not what anyone means."""
    sample = first[:4096]
    for parity, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        nul = sample[parity::2].count(0)
        if nul >= 2 and nul > len(sample) // 4 and nul > 8 * sample[1 - parity :: 2].count(0):
            raise ArtefactError(
                f"{path}: byte offset {sample.index(0)}: NUL at every other byte, as in UTF-16 "
                f"without a byte order mark: expected UTF-8: if so, add --encoding {name}"
            )


def _json_lines(path: Path, chunks: Iterable[str], text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(chunks), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArtefactError(f"{path}: line {number} is not JSON: {error}") from error
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ArtefactError(
                f"{path}: line {number} has no text in a field {text_field!r}: expected "
                f'{{"{text_field}": "..."}}: name the field with --text-field'
            )
        # JSON can spell lone surrogates, which are no characters.
        yield text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    parts: list[str] = []
    for chunk in chunks:
        first, *rest = chunk.split("\n")
        parts.append(first)
        for text in rest:
            yield "".join(parts)
            parts = [text]
    yield "".join(parts)


# Tokenizers


def default_tokenizer(n_bytes: int) -> tuple[str, int]:
    """Kind and vocabulary size for a text of n_bytes. Example: 1_000_000 -> ("simple", 257)."""
    if n_bytes < 2_000_000:
        return "simple", SimpleTokenizer.n_vocab
    return "bpe", 4096 if n_bytes < 50_000_000 else 16384


def choose_tokenizer(
    kind: str,
    files: Sequence[Path],
    *,
    vocab_size: int | None = None,
    ranks: str | os.PathLike[str] | None = None,
    encoding: str | None = None,
    text_field: str = "text",
    val_fraction: float = 0.1,
) -> Tokenizer:
    """The tokenizer of a kind: "simple", "bpe" (trained on the files but for their tail), "gpt2".

    vocab_size: for bpe, `<|endoftext|>` counted; None takes the one for the size of the text.
    ranks: for gpt2, a file instead of tiktoken's download. val_fraction: of the text, held out at
    its end and so not trained on here either; 0 where the validation text is another file.
    """
    if kind == "simple":
        return SimpleTokenizer()
    if kind == "gpt2":
        return _gpt2_tokenizer(ranks)
    if kind != "bpe":
        raise UsageError(f"tokenizer {kind!r}: expected simple, bpe or gpt2")
    n_bytes = text_bytes(files)
    if vocab_size is None:
        vocab_size = max(4096, default_tokenizer(n_bytes)[1])
    documents = read_documents(files, encoding=encoding, text_field=text_field)
    return train_bpe(_leading(documents, n_bytes - int(n_bytes * val_fraction)), vocab_size)


def _leading(documents: Iterable[Piece], n_bytes: int) -> Iterator[str]:
    for text, _ in documents:
        if n_bytes <= 0:
            return
        encoded = text.encode()
        yield encoded[:n_bytes].decode("utf-8", "ignore")  # drops at most a character cut in two
        n_bytes -= len(encoded)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Byte-level BPE with GPT-2's split; n_vocab is vocab_size, less where the text ends sooner.

    vocab_size counts the 256 bytes, which come first and in order, the merges and `<|endoftext|>`.
    Raises UsageError for a size that has no room for them.
    """
    if vocab_size < SimpleTokenizer.n_vocab:
        raise UsageError(
            f"vocab_size is {vocab_size}: expected at least {SimpleTokenizer.n_vocab}, "
            "the 256 bytes and the end-of-text token"
        )
    from tokenizers import Tokenizer as Trainable
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    trainable = Trainable(BPE())
    trainable.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)  # GPT-2's split
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,  # a pair seen once is not worth a token
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    short = (part for text in texts for part in pieces(text, _BPE_WORD_CHARACTERS))
    trainable.train_from_iterator(short, trainer)
    model = json.loads(trainable.to_str())["model"]
    byte_of = _bytes_of_characters()
    by_id = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merged = [bytes(byte_of[c] for c in token) for token in by_id if len(token) > 1]
    return BPETokenizer([bytes([byte]) for byte in range(256)] + merged)


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character stands for in GPT-2's printable spelling of bytes.

    Printable Latin-1 is itself, the rest follows 255. Source: gpt-2/src/encoder.py.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def _gpt2_tokenizer(ranks: str | os.PathLike[str] | None) -> BPETokenizer:
    if ranks is not None:
        path = Path(ranks)
        return BPETokenizer(parse_ranks(path.read_bytes(), name=str(path)))
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:  # also what requests raises without a network
        raise PicoEdgeError(
            "the gpt2 ranks are not on this machine and could not be downloaded "
            f"({type(error).__name__}): connect once, or give them with --ranks FILE"
        ) from error
    return BPETokenizer([encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)])


# The token cache


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
) -> TokenData:
    """Token ids of the files, cached in `folder` (made if missing) while nothing changes.

    Between documents stands the end-of-text id. val_files: validation text; without it the last
    val_fraction of the tokens is held out, or block_size + 1 where that is more. A damaged cache is
    made again, with a notice. Raises ArtefactError (tokens found and needed) for too little data.
    """
    if not 0.0 < val_fraction < 1.0:
        raise UsageError(f"val_fraction is {val_fraction}: expected more than 0 and less than 1")
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
    cached = _open_cache(path, sidecar, key, dtype, tokenizer.n_vocab)
    if cached is None:
        sources = [files] if val_files is None else [files, val_files]
        documents = [read_documents(s, encoding=encoding, text_field=text_field) for s in sources]
        _write_cache(path, sidecar, key, dtype, documents, tokenizer)
        cached = _open_cache(path, sidecar, key, dtype, tokenizer.n_vocab)
        if cached is None:
            raise PicoEdgeError(f"{path} changed while it was made: does another program write it?")
    file, counts = cached
    n_total, needed = sum(counts), block_size + 1
    if val_files is None:
        # nanoGPT's split: int(0.9 * n) to train on.
        n_train = min(int(n_total * (1 - val_fraction)), n_total - needed)
        if n_train < needed:
            raise ArtefactError(
                f"too little data: found {n_total} tokens, needed {2 * needed} (block_size + 1 to "
                "train on and as many held out): add text, or lower --block-size"
            )
    else:
        n_train = counts[0]
        for name, count in zip(("data", "validation data"), counts, strict=True):
            if count < needed:
                raise ArtefactError(
                    f"too little {name}: found {count} tokens, needed {needed} (block_size + 1): "
                    "add text, or lower --block-size"
                )
    val = Tokens(file, dtype, n_train, n_total)
    return TokenData(
        train=Tokens(file, dtype, 0, n_train),
        val=val,
        n_val_bytes=_count_bytes(val, tokenizer),
        held_out=_held_out(val, tokenizer),
        fingerprint=data,
    )


def _write_cache(
    path: Path,
    sidecar: Path,
    key: dict[str, Any],
    dtype: np.dtype[Any],
    parts: Sequence[Iterator[Piece]],
    tokenizer: Tokenizer,
) -> None:
    """Publish the ids of the parts, one after the other, then what describes them."""
    # Killed between the two, the new ids must not be taken for what an older sidecar says.
    sidecar.unlink(missing_ok=True)
    counts: list[int] = []

    def write(file: Writable) -> None:
        counts.clear()
        for documents in parts:
            n_bytes = 0
            for chunk in _encode(documents, tokenizer, dtype):
                n_bytes += file.write(chunk)
            counts.append(n_bytes // dtype.itemsize)

    publish(path, write)
    description = json.dumps({"key": key, "dtype": dtype.str, "counts": counts})
    publish(sidecar, lambda file: file.write(description.encode()))


def _encode(
    documents: Iterator[Piece], tokenizer: Tokenizer, dtype: np.dtype[Any]
) -> Iterator[bytes]:
    """Token ids as bytes, in chunks; the end-of-text id between documents, not after the last."""
    eot = np.array([tokenizer.eot_id], dtype).tobytes()
    between = False
    for text, end in documents:
        if between:
            yield eot
        if isinstance(
            tokenizer, SimpleTokenizer
        ):  # the same ids as its encode, without a list of them
            ids = np.frombuffer(text.encode(), np.uint8).astype(dtype)
        else:
            ids = np.array(tokenizer.encode(text), dtype)
        yield ids.tobytes()
        between = end


def _open_cache(
    path: Path, sidecar: Path, key: dict[str, Any], dtype: np.dtype[Any], n_vocab: int
) -> tuple[io.FileIO, list[int]] | None:
    """The open cache and the token count of each part; None if there is none for this key.

    A cache that does not hold what its sidecar says is named on stderr and counts as none.
    """
    if not (path.exists() and sidecar.exists()):
        return None
    file = _TokenFile(path)
    try:
        counts = _check_cache(file, sidecar, key, dtype, n_vocab)
    except ArtefactError as error:
        print(f"warning: {error}: the token cache is made again", file=sys.stderr)
        counts = None
    if counts is None:
        file.close()
        return None
    return file, counts


def _check_cache(
    file: io.FileIO, sidecar: Path, key: dict[str, Any], dtype: np.dtype[Any], n_vocab: int
) -> list[int] | None:
    """The token count of each part; None if the cache is of another key."""
    try:
        found = json.loads(sidecar.read_bytes())
        counts, same = found["counts"], (found["key"], found["dtype"]) == (key, dtype.str)
    except (ValueError, LookupError, TypeError) as error:
        raise ArtefactError(f"{sidecar} is damaged: {error!r}") from error
    if not same:
        return None
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        raise ArtefactError(f"{sidecar} is damaged: counts are {counts!r}")
    n_tokens = sum(counts)
    size, expected = os.fstat(file.fileno()).st_size, n_tokens * dtype.itemsize
    if size != expected:
        raise ArtefactError(f"{file.name} has {size} bytes: expected {expected}")
    tokens = Tokens(file, dtype, 0, n_tokens)
    for start in range(0, n_tokens, _CHECK_TOKENS):
        highest = int(tokens[start : start + _CHECK_TOKENS].max())
        if highest >= n_vocab:
            raise ArtefactError(f"{file.name} has token id {highest}: expected under {n_vocab}")
    return counts


def _count_bytes(tokens: Tokens, tokenizer: Tokenizer) -> int:
    if isinstance(tokenizer, SimpleTokenizer):
        lengths = np.ones(tokenizer.n_vocab, np.int64)
    else:
        lengths = np.array([*map(len, tokenizer.bytes_of)], np.int64)
    lengths[tokenizer.eot_id] = 0
    starts = range(0, len(tokens), _CHECK_TOKENS)
    return sum(int(lengths[tokens[start : start + _CHECK_TOKENS]].sum()) for start in starts)


def _held_out(tokens: Tokens, tokenizer: Tokenizer) -> str:
    # A token has at least one byte, all but the end of text.
    ids = tokens[: 2 * HELD_OUT_BYTES].tolist()
    # The text is valid: "ignore" drops only a character that a cut went through, at either end.
    return tokenizer.decode_bytes(ids)[:HELD_OUT_BYTES].decode("utf-8", "ignore")


# Batches


def batch(
    tokens: Tokens | IdArray,
    *,
    seed: int,
    step: int,
    slot: int,
    batch_size: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one micro-step, a pure function of its arguments.

    slot = micro-step x world size + rank. Returns x, y: (B, T) int64 on the CPU, y one token later.
    """
    # NOTE step in the high word of the counter: in the low one, neighbouring steps share draws.
    rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, slot, step]))
    starts = rng.integers(0, len(tokens) - block_size, size=batch_size)
    windows = np.stack([tokens[start : start + block_size + 1] for start in starts.tolist()])
    return _shifted(windows)


def val_batches(
    tokens: Tokens | IdArray, block_size: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows that predict every token but the first exactly once, in order.

    Yields x, y: (B, T) int64 with B <= batch_size and T = block_size; the last one (1, T) may be
    shorter: weigh losses by y.numel().
    """
    n_targets = len(tokens) - 1
    n_windows = n_targets // block_size
    for first in range(0, n_windows, batch_size):
        starts = range(
            first * block_size, min(first + batch_size, n_windows) * block_size, block_size
        )
        yield _shifted(np.stack([tokens[start : start + block_size + 1] for start in starts]))
    if n_targets % block_size:
        yield _shifted(tokens[n_windows * block_size :][None, :])


def _shifted(windows: IdArray) -> tuple[Tensor, Tensor]:
    """(B, T + 1) ids -> x, y: (B, T) int64."""
    ids = windows.astype(np.int64)
    return (
        torch.from_numpy(np.ascontiguousarray(ids[:, :-1])),
        torch.from_numpy(np.ascontiguousarray(ids[:, 1:])),
    )
