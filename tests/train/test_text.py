"""Text goes in losslessly, or is refused by name and place."""

from __future__ import annotations

import codecs
import errno
import gzip
import io
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.tokenizer import PIECE_CHARACTERS, BPETokenizer
from pico_edge.train import text as text_module
from pico_edge.train.report import Reporter
from pico_edge.train.text import (
    find_files,
    fingerprint,
    read_documents,
    spool_stdin,
    text_bytes,
)

ENGLISH = "It was the best of times, it was the worst of times; isn't it 1859?\n\n"
CHINESE = "道可道，非常道。名可名，非常名。無名天地之始；有名萬物之母。\n"  # noqa: RUF001
EMOJI = "👩‍👩‍👧‍👦🏳️‍🌈👍🏽☃️"
AWKWARD = "nul \0 crlf \r\n cr \r tab \t \x1c \x85 \u2028 \ufeff " + EMOJI + CHINESE + "end"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def documents(files: Iterable[Path], **options: Any) -> list[str]:
    """The documents, put together again."""
    parts, found = [], []
    for text, end in read_documents(files, **options):
        assert 0 < len(text) <= PIECE_CHARACTERS
        parts.append(text)
        if end:
            found.append("".join(parts))
            parts = []
    assert parts == []
    return found


def test_files_folders_and_globs_are_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", ".hidden", "sub/d.txt", "sub/deep/e.txt", ".git/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, name)
    write(tmp_path / "weird [1].txt", "a name that looks like a glob")

    def names(*paths: str) -> list[str]:
        found = find_files([tmp_path / path for path in paths])
        return [file.relative_to(tmp_path).as_posix() for file in found]

    assert names("c.md", "a.txt") == ["c.md", "a.txt"]
    assert names("") == [
        "a.txt", "b.txt", "c.md", "weird [1].txt", "sub/d.txt", "sub/deep/e.txt",
    ]  # fmt: skip
    assert names("[ab].txt", "a.txt") == ["a.txt", "b.txt"]
    assert names("**/*e.txt") == ["sub/deep/e.txt"]
    assert names("s*b") == ["sub/d.txt", "sub/deep/e.txt"]
    assert names("weird [1].txt") == ["weird [1].txt"]
    assert names(".hidden") == [".hidden"]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("missing.txt", "does not exist"),
        ("*.txt", "does not exist"),
        ("empty", "no files in it"),
    ):
        with pytest.raises(ArtefactError, match=message) as caught:
            find_files([tmp_path / name])
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(UsageError, match="no data given"):
        find_files([])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtefactError, match="not a regular file"):
        find_files([tmp_path / "pipe"])


def test_the_size_of_compressed_text_is_what_it_unpacks_to(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.txt", ENGLISH * 100)
    packed = write(tmp_path / "b.txt.gz", gzip.compress((ENGLISH * 100).encode()))
    assert text_bytes([plain]) == text_bytes([packed]) == len(ENGLISH) * 100
    assert text_bytes([plain, packed]) == len(ENGLISH) * 200
    assert text_bytes([write(tmp_path / "c.gz", b"short")]) == 5


def test_the_fingerprint_follows_the_content_and_not_the_names(tmp_path: Path) -> None:
    content = bytearray(os.urandom(3_000_000))
    a = write(tmp_path / "a", bytes(content))
    first = fingerprint([a])
    assert first["bytes"] == 3_000_000 and first["files"] == 1
    assert fingerprint([write(tmp_path / "b", bytes(content))]) == first
    assert fingerprint([a, a]) != first
    for offset in (0, 3_000_000 - 1):
        changed = bytearray(content)
        changed[offset] ^= 1
        assert fingerprint([write(tmp_path / "b", bytes(changed))]) != first
    assert fingerprint([write(tmp_path / "b", bytes(content) + b"x")]) != first
    small = fingerprint([write(tmp_path / "c", ENGLISH * 20)])
    middle = (ENGLISH * 10 + "x" + (ENGLISH * 10)[1:]).encode()
    assert fingerprint([write(tmp_path / "c", middle)]) != small
    parts = [write(tmp_path / "p", "ab"), write(tmp_path / "q", "c")]
    others = [write(tmp_path / "r", "a"), write(tmp_path / "s", "bc")]
    assert fingerprint(parts) != fingerprint(others)


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode(),
        lambda text: codecs.BOM_UTF8 + text.encode(),
        lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
        lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
        lambda text: codecs.BOM_UTF32_LE + text.encode("utf-32-le"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [4, 7, 1 << 20])
def test_text_is_read_without_loss(
    encode: Any, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "_CHUNK_BYTES", chunk_bytes)
    path = write(tmp_path / "a.txt", encode(AWKWARD))
    assert documents([path]) == [AWKWARD]
    packed = write(tmp_path / "a.txt.gz", gzip.compress(encode(AWKWARD)))
    assert documents([packed, path]) == [AWKWARD, AWKWARD]


def test_a_declared_encoding_is_used(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "Müller ½".encode("latin-1"))
    assert documents([path], encoding="latin-1") == ["Müller ½"]
    path = write(tmp_path / "b.txt", "Привет".encode("utf-16-be"))
    assert documents([path], encoding="utf-16-be") == ["Привет"]
    path = write(tmp_path / "c.txt", codecs.BOM_UTF8 + b"text")
    assert documents([path], encoding="utf-8") == ["text"]
    for name in ("klingon", "base64", "rot13"):
        with pytest.raises(UsageError, match=name):
            documents([path], encoding=name)


@pytest.mark.parametrize("before", [0, 1, 100, (1 << 20) - 1, 1 << 20, 3_000_001])
def test_a_byte_that_is_not_text_is_named_by_its_offset(before: int, tmp_path: Path) -> None:
    content = ("é" * (before // 2)).encode() + b"x" * (before % 2)
    path = write(tmp_path / "a.txt", content + b"\xff and more")
    with pytest.raises(ArtefactError, match=rf"byte offset {before}: ff .*--encoding"):
        documents([path])
    path = write(tmp_path / "b.txt", codecs.BOM_UTF8 + content + b"\xe9")  # cut in a character
    with pytest.raises(ArtefactError, match=rf"byte offset {before + 3}: e9"):
        documents([path])


def test_utf_16_without_a_mark_is_refused_and_a_few_nul_are_not(tmp_path: Path) -> None:
    for name, offset in (("utf-16-le", 1), ("utf-16-be", 0)):
        path = write(tmp_path / "a.txt", ENGLISH.encode(name))
        with pytest.raises(ArtefactError, match=rf"byte offset {offset}: .*--encoding {name}"):
            documents([path])
        assert documents([path], encoding=name) == [ENGLISH]
    for text in ("\0", "a\0", "\0\0\0\0\0\0\0\0", "a\0\0b\0" * 100, "ab\0" * 100, ENGLISH + "\0"):
        assert documents([write(tmp_path / "b.txt", text)]) == [text]


def test_a_broken_gzip_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress((ENGLISH * 1000).encode())
    flipped = bytearray(whole)
    flipped[-6] ^= 1
    for content in (whole[:-9], whole[:100], b"no gzip at all, but a text", bytes(flipped)):
        with pytest.raises(ArtefactError, match=r"a\.gz: not a whole gzip file"):
            documents([write(tmp_path / "a.gz", content)])


def test_every_line_of_jsonl_is_a_document(tmp_path: Path) -> None:
    texts = ["one", "two\nlines \u2028 \x85", EMOJI, "x" * 100_000, " "]
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    plain = write(tmp_path / "a.jsonl", "\n".join(lines))
    assert documents([plain]) == texts
    spaced = write(tmp_path / "b.jsonl.gz", gzip.compress(("\r\n\n".join(lines) + "\n").encode()))
    assert documents([spaced, plain]) == texts + texts
    other = write(tmp_path / "c.jsonl", '{"body": "hi"}\n{"body": ""}\n{"body": "\\ud83d"}')
    assert documents([other], text_field="body") == ["hi", "\ufffd"]
    for line, message in (
        ('{"body": 1}', "line 2 has no text in a field 'text'"),
        ("[1, 2]", "line 2 has no text in a field 'text'"),
        ("{'text': 1}", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
    ):
        path = write(tmp_path / "d.jsonl", '{"text": "fine"}\n' + line)
        with pytest.raises(ArtefactError, match=re.escape(message)):
            documents([path])


def test_files_without_a_character_are_no_documents(tmp_path: Path) -> None:
    files = [write(tmp_path / "a", ""), write(tmp_path / "b", codecs.BOM_UTF8)]
    assert documents(files) == []
    assert documents([*files, write(tmp_path / "c", "c")]) == ["c"]


def test_pieces_of_a_stream_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut where the whole text is cut, so a stream has the ids of the text at once."""
    monkeypatch.setattr(text_module, "_CHUNK_BYTES", 10_007)
    tokenizer = BPETokenizer([bytes([i]) for i in range(256)] + [b"th", b" th", b"  ", b"\n\n"])
    for text in (ENGLISH * 4000, CHINESE * 6000, "a" * 200_000, " " * 200_000, "a  " * 70_000):
        path = write(tmp_path / "a.txt", text)
        pieces = list(read_documents([path]))
        assert len(pieces) > 2
        assert [end for _, end in pieces] == [False] * (len(pieces) - 1) + [True]
        ids = [i for piece, _ in pieces for i in tokenizer.encode(piece)]
        assert ids == tokenizer.encode(text)


# Standard input


def spool(content: bytes, path: Path, *, resume: bool = False, data: Any = ("-",)) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        return spool_stdin(data, path, resume=resume, reporter=Reporter(quiet=True))


def test_standard_input_is_kept_byte_by_byte_in_its_place_among_the_files(tmp_path: Path) -> None:
    path = tmp_path / "stdin.txt"
    content = codecs.BOM_UTF16_LE + (AWKWARD * 90_000).encode("utf-16-le")
    assert len(content) > 3 << 20
    assert spool(content, path, data=["a.txt", "-", "b.txt", "-"]) == ["a.txt", path, "b.txt", path]
    assert path.read_bytes() == content
    assert documents(find_files([path, path])) == [AWKWARD * 90_000]
    assert spool(b"other", path, data=["./-"]) == ["./-"]  # a file of that name
    assert path.read_bytes() == content


def test_a_resume_has_the_text_that_was_kept_and_reads_again_only_without_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "stdin.txt"
    spool(b"the first", path)
    spool(b"not read", path, resume=True)
    assert path.read_bytes() == b"the first"
    path.unlink()
    spool(b"given again", path, resume=True)
    assert path.read_bytes() == b"given again"
    spool(b"a new run", path)
    assert path.read_bytes() == b"a new run"


def test_standard_input_that_ends_badly_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 100:
                raise OSError(errno.EIO, "broken pipe to a disk")
            return super().read(60)

    path = write(tmp_path / "stdin.txt", "old")
    write(tmp_path / ".stdin.txt.tmp-99999", "of a killed process")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(Broken(b"x" * 1000)))
    with pytest.raises(PicoEdgeError, match="standard input could not be copied"):
        spool_stdin(["-"], path, resume=False, reporter=Reporter(quiet=True))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [
        ("stdin.txt", b"old")
    ]
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UsageError, match="no standard input: name a text file instead of -"):
        spool_stdin(["-"], path, resume=False, reporter=Reporter(quiet=True))


def test_reading_tells_the_bytes_taken_from_the_disk(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.txt", ENGLISH * 60_000), write(tmp_path / "b.txt", "b")]
    files.append(write(tmp_path / "c.gz", gzip.compress(os.urandom(1 << 21).hex().encode())))
    told: list[int] = []
    for _ in read_documents(files, on_read=told.append):
        pass
    assert sum(told) == sum(file.stat().st_size for file in files)
    assert max(told) <= (1 << 20) + (1 << 17)


def test_what_runs_write_is_no_data_unless_it_is_named(tmp_path: Path) -> None:
    data = write(tmp_path / "data.txt", ENGLISH)
    out, run = write(tmp_path / "mine", b"PK"), tmp_path / "mine.d"
    run.mkdir()
    write(run / "lock", "{}")
    write(tmp_path / "old.pt", b"PK")
    write(tmp_path / "model.onnx", b"\x08")
    (tmp_path / "old.run").mkdir()
    write(tmp_path / "old.run" / "lock", "")
    kept = write(tmp_path / "old.run" / "stdin.txt", ENGLISH)
    for given in (tmp_path, tmp_path / "*", tmp_path / "**"):
        assert find_files([given], exclude=[out, run]) == [data]
    assert kept in find_files([tmp_path / "old.run"])
    assert find_files([tmp_path / "old.run" / "*.txt"]) == [kept]
    assert find_files([kept, run / "lock"], exclude=[run]) == [kept, run / "lock"]


@pytest.mark.parametrize("given", ["mine.run", "mine.run/*"])
def test_the_folder_of_this_run_is_no_data_even_if_named(given: str, tmp_path: Path) -> None:
    (tmp_path / "mine.run").mkdir()
    write(tmp_path / "mine.run" / "metrics.jsonl", "{}")
    with pytest.raises(ArtefactError, match=r"no files in it|does not exist"):
        find_files([tmp_path / given], exclude=[tmp_path / "mine.run"])


def test_a_folder_that_is_only_named_like_that_of_a_run_is_data(tmp_path: Path) -> None:
    (tmp_path / "marathon.run").mkdir()
    data = write(tmp_path / "marathon.run" / "data.txt", ENGLISH)
    for given in (tmp_path, tmp_path / "**" / "*.txt"):
        assert find_files([given]) == [data]


def test_a_file_counts_once_by_whatever_name(tmp_path: Path) -> None:
    data = write(tmp_path / "data.txt", ENGLISH)
    os.link(data, tmp_path / "twin.txt")
    (tmp_path / "link.txt").symlink_to("data.txt")
    assert find_files([data, tmp_path, tmp_path / "link.txt"]) == [data]


def test_names_that_are_none_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "data.txt", ENGLISH)
    with pytest.raises(UsageError, match="an empty path is among the data"):
        find_files([tmp_path, ""])
    with pytest.raises(ArtefactError, match=os.strerror(errno.ENAMETOOLONG)):
        find_files([tmp_path / ("x" * 300)])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_byte_order_that_is_not_told_is_asked_for(encoding: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ENGLISH.encode(f"{encoding}-le"))
    advice = f"name its byte order too: --encoding {encoding}-le or {encoding}-be"
    for name in (encoding, encoding.upper().replace("-", "_")):
        with pytest.raises(ArtefactError, match=rf"a\.txt: not {name}: .*: {advice}"):
            documents([path], encoding=name)
    assert documents([path], encoding=f"{encoding}-le") == [ENGLISH]


def test_encodings_that_are_none_and_half_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", r"a\ud800b")
    with pytest.raises(UsageError, match="encoding 'undefined'"):
        documents([path], encoding="undefined")
    assert documents([path], encoding="unicode_escape") == ["a\ufffdb"]
    with pytest.raises(ArtefactError, match=r"not punycode: .*: name its encoding with"):
        documents([write(path, "no code-no code")], encoding="punycode")
