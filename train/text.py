"""Files -> documents: what is read, how it is decoded, and what is refused.

Text is streamed: neither a file nor a document needs to fit in memory. Knows nothing of tokens.

Try: `list(read_documents(find_files(["data.txt"])))`.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import itertools
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.publish import Writable, publish, remove_stale
from pico_edge.tokenizer import PIECE_CHARACTERS, piece_end
from pico_edge.train.lock import LOCK_NAME
from pico_edge.train.report import Reporter
from pico_edge.train.throughput import Throughput

STDIN = "-"  # as a path of the data: standard input
MODEL_SUFFIXES = (".pt", ".onnx")  # of what runs and exports write
# Every run folder has one of these; another folder whose name ends in .run has text, perhaps.
RUN_FILES = (LOCK_NAME, "last.pt", "last.prev.pt", "tokens.bin")

_CHUNK_BYTES = 1 << 20
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


# Files


def spool_stdin(
    data: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    resume: bool,
    reporter: Reporter,
) -> list[str | os.PathLike[str]]:
    """The data with "-" replaced by `path`, into which standard input is copied first.

    Text is read more than once, standard input only once. resume: an existing copy is the text that
    the run began with, and nothing is read. The copy is whole or not there; it stays with the run.
    Raises UsageError if there is no standard input.
    """
    path = Path(path)
    if STDIN not in data:
        return list(data)
    if not (resume and path.exists()):
        if sys.stdin is None or sys.stdin.closed:
            raise UsageError("no standard input: name a text file instead of -")
        if sys.stdin.isatty():
            reporter.say("reading the text from this terminal: end it with Ctrl-D")
        remove_stale(path)
        publish(path, _Copy(sys.stdin.buffer, reporter))
    return [path if given == STDIN else given for given in data]


class _Copy:
    """What `publish` calls to copy a stream; not twice, as the stream cannot be read again."""

    def __init__(self, stream: BinaryIO, reporter: Reporter) -> None:
        self._stream = stream
        self._reporter = reporter
        self._started = False

    def __call__(self, file: Writable) -> None:
        if self._started:
            raise PicoEdgeError("standard input could not be copied: give the text again")
        self._started = True
        throughput = Throughput(self._reporter, "reading standard input")
        while chunk := self._stream.read(_CHUNK_BYTES):
            file.write(chunk)
            throughput.add(len(chunk))
        self._reporter.end_progress()


def find_files(
    paths: Iterable[str | os.PathLike[str]], *, exclude: Iterable[Path] = ()
) -> list[Path]:
    """The files named: files, folders (all below, sorted, hidden ones not), globs; each once.

    What folders and globs hold of runs (their folders, .pt and .onnx files) is no text and left
    out, and so is `exclude`: the files and folders that this run writes. Raises ArtefactError
    naming a path that is missing, or a folder or glob without files, UsageError for an empty path.
    """
    excluded = {path.resolve() for path in exclude}
    files: dict[tuple[int, int], Path] = {}  # by device and inode
    for given in paths:
        if not os.fspath(given):
            raise UsageError("an empty path is among the data: name a text file, folder or glob")
        path = Path(given)
        try:
            matches = [path] if path.exists() else _glob(os.fspath(given), excluded)
            found = [file for match in matches for file in _files_at(match, excluded)]
            if not matches:
                raise ArtefactError(
                    f"{given} does not exist: expected a text file, a folder or a glob"
                )
        except OSError as error:  # a name that is too long
            raise ArtefactError(f"{given}: {error.strerror}: expected a text file") from error
        if not found:
            raise ArtefactError(f"{given}: no files in it: expected text files")
        for file in found:
            status = file.stat()
            files.setdefault((status.st_dev, status.st_ino), file)
    if not files:
        raise UsageError("no data given: name at least one text file, folder or glob")
    return list(files.values())


def _glob(pattern: str, excluded: Container[Path]) -> list[Path]:
    if not glob.has_magic(pattern):
        return []
    named = Path(pattern).parts  # the folder of another run among these is meant
    return [
        path
        for path in map(Path, sorted(glob.glob(pattern, recursive=True)))
        if not any(
            part.resolve() in excluded or (part.name not in named and _is_of_a_run(part))
            for part in (path, *path.parents)
        )
    ]


def _is_of_a_run(path: Path) -> bool:
    """Whether a run or an export has written this: a model, or the folder of a run."""
    if path.suffix == ".run":
        return any((path / name).exists() for name in RUN_FILES)
    return path.suffix in MODEL_SUFFIXES


def _may_be_text(path: Path, excluded: Container[Path]) -> bool:
    """Whether what was found, not named, may be data."""
    return not _is_of_a_run(path) and path.resolve() not in excluded


def _files_at(path: Path, excluded: Container[Path] = ()) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ArtefactError(
            f"{path} is not a regular file: expected one; save its content to a file"
        )
    files: list[Path] = []
    if path.resolve() in excluded:
        return files
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and _may_be_text(Path(folder, name), excluded)
        )
        candidates = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        files.extend(file for file in candidates if file.is_file() and _may_be_text(file, excluded))
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
    files: Iterable[Path],
    *,
    encoding: str | None = None,
    text_field: str = "text",
    on_read: Callable[[int], object] | None = None,
) -> Iterator[Piece]:
    """Documents in bounded pieces, lossless: one per file, or per line of .jsonl, also inside .gz.

    encoding: of all the files; None is UTF-8, or what a byte order mark says. text_field: of the
    objects in .jsonl. on_read: told the bytes taken from the disk, up to the sum of the files'
    sizes. Documents without a character are left out. Raises ArtefactError with the byte offset or
    line of what cannot be read, UsageError for an encoding that Python lacks.
    """
    if encoding is not None:
        _check_encoding(encoding)
    for path in files:
        chunks = _decode(path, encoding, on_read)
        if _is_jsonl(path):
            for text in _json_lines(path, chunks, text_field):
                yield from _cut([text])
        else:
            yield from _cut(chunks)


def _check_encoding(encoding: str) -> None:
    try:
        "".encode(encoding)  # refuses codecs that are no encodings of text, such as base64
        codecs.getincrementaldecoder(encoding)
    except (LookupError, UnicodeError) as error:
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


def _read_chunks(path: Path, on_read: Callable[[int], object] | None) -> Iterator[bytes]:
    with open(path, "rb") as raw:
        file = cast("BinaryIO", gzip.GzipFile(fileobj=raw)) if _is_gzip(path) else raw
        position = 0  # in the compressed file, where it is one
        while True:
            try:
                chunk = file.read(_CHUNK_BYTES)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ArtefactError(
                    f"{path}: not a whole gzip file: {error}: copy it again"
                ) from error
            if on_read is not None:
                on_read(raw.tell() - position)
                position = raw.tell()
            if not chunk:
                return
            yield chunk


def _decode(
    path: Path, encoding: str | None, on_read: Callable[[int], object] | None
) -> Iterator[str]:
    """The text of a file in chunks. Its byte order mark, if any, is not part of it."""
    chunks = _read_chunks(path, on_read)
    first = next(chunks, b"")
    offset = 0  # bytes given to the decoder so far
    mark, name = _byte_order_mark(first)
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
        except UnicodeError as error:  # says no more than this
            advice = "name its encoding with --encoding, such as latin-1"
            if (wide := codecs.lookup(name).name) in ("utf-16", "utf-32"):
                advice = f"name its byte order too: --encoding {wide}-le or {wide}-be"
            raise ArtefactError(f"{path}: not {name}: {error}: {advice}") from error
        if encoding is not None:  # some codecs, such as unicode_escape, make half a character
            text = without_surrogates(text)
        offset += len(chunk)
        if at_start and text:
            text = text.removeprefix("\ufeff") if encoding is not None else text
            at_start = False
        yield text


def _byte_order_mark(first: bytes) -> tuple[bytes, str]:
    """The mark that the bytes begin with, and the encoding it says: without one UTF-8."""
    return next((m for m in _BYTE_ORDER_MARKS if first.startswith(m[0])), (b"", "utf-8"))


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
        yield without_surrogates(text)


def without_surrogates(text: str) -> str:
    """The text with U+FFFD in the place of lone surrogates, which are no characters."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def utf8_bytes(files: Sequence[Path], *, encoding: str | None, text_field: str) -> int:
    """UTF-8 bytes of the text, but for marks: file sizes where these say it, else all is read."""
    if encoding is None and not any(map(_is_jsonl, files)):
        marks = [_byte_order_mark(next(_read_chunks(file, None), b"")) for file in files]
        if all(name == "utf-8" for _, name in marks):
            return text_bytes(files) - sum(len(mark) for mark, _ in marks)
    documents = read_documents(files, encoding=encoding, text_field=text_field)
    return sum(len(text.encode()) for text, _ in documents)


def _is_jsonl(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(".jsonl")


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    parts: list[str] = []
    for chunk in chunks:
        first, *rest = chunk.split("\n")
        parts.append(first)
        for text in rest:
            yield "".join(parts)
            parts = [text]
    yield "".join(parts)
