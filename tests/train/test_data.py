"""Text goes in losslessly or is refused by name; tokens, splits and batches are what they say."""

from __future__ import annotations

import base64
import codecs
import collections
import gzip
import itertools
import json
import os
import re
import socket
import tracemalloc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.tokenizer import PIECE_CHARACTERS, BPETokenizer, SimpleTokenizer
from pico_edge.train import data as data_module
from pico_edge.train.data import (
    HELD_OUT_BYTES,
    TokenData,
    Tokens,
    batch,
    choose_tokenizer,
    default_tokenizer,
    find_files,
    fingerprint,
    prepare_tokens,
    read_documents,
    text_bytes,
    train_bpe,
    val_batches,
)

ENGLISH = "It was the best of times, it was the worst of times; isn't it 1859?\n\n"
CHINESE = "道可道，非常道。名可名，非常名。無名天地之始；有名萬物之母。\n"  # noqa: RUF001
EMOJI = "👩‍👩‍👧‍👦🏳️‍🌈👍🏽☃️"


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


# Files


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


# Text


AWKWARD = "nul \0 crlf \r\n cr \r tab \t \x1c \x85 \u2028 \ufeff " + EMOJI + CHINESE + "end"


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
    monkeypatch.setattr(data_module, "_CHUNK_BYTES", chunk_bytes)
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
    monkeypatch.setattr(data_module, "_CHUNK_BYTES", 10_007)
    tokenizer = BPETokenizer([bytes([i]) for i in range(256)] + [b"th", b" th", b"  ", b"\n\n"])
    for text in (ENGLISH * 4000, CHINESE * 6000, "a" * 200_000, " " * 200_000, "a  " * 70_000):
        path = write(tmp_path / "a.txt", text)
        pieces = list(read_documents([path]))
        assert len(pieces) > 2
        assert [end for _, end in pieces] == [False] * (len(pieces) - 1) + [True]
        ids = [i for piece, _ in pieces for i in tokenizer.encode(piece)]
        assert ids == tokenizer.encode(text)


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


# Tokenizers


def test_the_tokenizer_follows_the_size_of_the_text() -> None:
    assert default_tokenizer(3_000) == ("simple", 257)
    assert default_tokenizer(1_999_999) == ("simple", 257)
    assert default_tokenizer(2_000_000) == ("bpe", 4096)
    assert default_tokenizer(50_000_000) == ("bpe", 16384)


# GPT-2's split pattern in the words of `re`, for texts of ASCII.
ASCII_SPLIT = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
)


def count_pairs(words: dict[tuple[bytes, ...], int]) -> collections.Counter[tuple[bytes, bytes]]:
    pairs: collections.Counter[tuple[bytes, bytes]] = collections.Counter()
    for word, n in words.items():
        for pair in itertools.pairwise(word):
            pairs[pair] += n
    return pairs


def merge(word: tuple[bytes, ...], token: bytes, pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    merged, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            merged.append(token)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return tuple(merged)


def encode_by_ranks(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding as its definition says, slowly."""
    ids = []
    for match in ASCII_SPLIT.finditer(text):
        word = tuple(bytes([b]) for b in match[0].encode())
        while True:
            pairs = [p for p in itertools.pairwise(word) if p[0] + p[1] in ranks]
            if not pairs:
                break
            best = min(pairs, key=lambda pair: ranks[pair[0] + pair[1]])
            word = merge(word, best[0] + best[1], best)
        ids.extend(ranks[part] for part in word)
    return ids


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(alphabet="aab bc'st\n 12!", min_size=1, max_size=300),
    vocab_size=st.integers(257, 300),
)
def test_each_merge_is_of_a_most_frequent_pair(text: str, vocab_size: int) -> None:
    """Ties may be broken either way: each step is judged by the counts that the last ones left."""
    tokenizer = train_bpe([text], vocab_size)
    assert tokenizer.tokens[:256] == [bytes([i]) for i in range(256)]
    words = collections.Counter(
        tuple(bytes([b]) for b in match[0].encode()) for match in ASCII_SPLIT.finditer(text)
    )
    for token in tokenizer.tokens[256:]:
        pairs = count_pairs(words)
        most = max(pairs.values())
        candidates = [p for p, n in pairs.items() if p[0] + p[1] == token and n == most]
        assert candidates and most >= 2
        # The same token by two pairs of equal count ("a" "aa", "aa" "a") would need a search.
        if len(candidates) > 1:
            return
        merged: collections.Counter[tuple[bytes, ...]] = collections.Counter()
        for word, n in words.items():
            merged[merge(word, token, candidates[0])] += n
        words = merged
    if tokenizer.n_vocab < vocab_size:  # it stopped by itself: nothing was left to merge
        assert max(count_pairs(words).values(), default=0) < 2
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    assert tokenizer.encode(text) == encode_by_ranks(text, ranks)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_trained_tokenizer_has_the_size_asked_for_and_is_deterministic() -> None:
    import pydoc_data.topics

    text = "".join(pydoc_data.topics.topics.values())[:300_000]
    tokenizer = train_bpe([text], 512)
    assert tokenizer.n_vocab == 512 and tokenizer.eot_id == 511
    assert tokenizer.tokens == train_bpe(iter([text]), 512).tokens
    assert b" the" in tokenizer.tokens
    assert len(tokenizer.encode(text)) < 0.6 * len(text)
    for other in (text, CHINESE * 50, EMOJI, AWKWARD, ""):
        assert tokenizer.decode(tokenizer.encode(other)) == other
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    ascii_text = text[:20_000].encode("ascii", "ignore").decode()
    assert tokenizer.encode(ascii_text) == encode_by_ranks(ascii_text, ranks)


def test_chinese_and_emoji_get_tokens_of_whole_characters() -> None:
    tokens = train_bpe([CHINESE * 200 + EMOJI * 200], 400).tokens
    assert {"道".encode(), "非常".encode()} <= set(tokens)
    assert any(EMOJI.encode().find(token) >= 0 and len(token) > 4 for token in tokens)


def test_a_text_without_spaces_does_not_slow_the_trainer(tmp_path: Path) -> None:
    tokenizer = train_bpe(["ab" * 200_000], 300)
    assert b"abab" in tokenizer.tokens


def test_a_small_text_gives_a_smaller_vocabulary_and_a_small_vocabulary_is_refused() -> None:
    assert train_bpe(["no two"], 1000).n_vocab == 257
    assert train_bpe([], 1000).n_vocab == 257
    with pytest.raises(UsageError, match=r"vocab_size is 256: expected at least 257"):
        train_bpe(["text"], 256)


def test_the_tokenizer_is_not_trained_on_the_tail_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ENGLISH * 900 + "zqzq " * (7 * 1800))
    assert text_bytes([path]) > 63_000 * 2 - 1000
    half = choose_tokenizer("bpe", [path], vocab_size=300, val_fraction=0.6)
    whole = choose_tokenizer("bpe", [path], vocab_size=300, val_fraction=0.0)
    assert isinstance(half, BPETokenizer) and isinstance(whole, BPETokenizer)
    assert b"zq" in whole.tokens and b"zq" not in half.tokens


def test_tokenizers_are_chosen_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ENGLISH * 100)
    assert choose_tokenizer("simple", [path]).kind == "simple"
    assert 257 < choose_tokenizer("bpe", [path]).n_vocab <= 4096
    with pytest.raises(UsageError, match="tokenizer 'words': expected simple, bpe or gpt2"):
        choose_tokenizer("words", [path])


def test_gpt2_takes_its_ranks_from_a_file(tmp_path: Path) -> None:
    tokens = [bytes([i]) for i in range(256)] + [b"he", b"hel"]
    lines = [base64.b64encode(t).decode() + f" {rank}" for rank, t in enumerate(tokens)]
    ranks = write(tmp_path / "gpt2.tiktoken", "\n".join(lines))
    tokenizer = choose_tokenizer("gpt2", [], ranks=ranks)
    assert isinstance(tokenizer, BPETokenizer) and tokenizer.tokens == tokens
    with pytest.raises(ArtefactError, match=r"gpt2\.tiktoken: line 1"):
        choose_tokenizer("gpt2", [], ranks=write(ranks, "no ranks"))


def test_gpt2_without_a_network_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiktoken.registry

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(PicoEdgeError, match="--ranks FILE") as caught:
        choose_tokenizer("gpt2", [])
    assert "\n" not in str(caught.value)


# Tokens


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


# The cache


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
        assert tokens_of(prepare(path, run).train) == right
        warning = capsys.readouterr().err
        assert notice in warning and "made again" in warning and warning.count("\n") == 1
    for missing in (ids, sidecar):
        missing.unlink()
        assert tokens_of(prepare(path, run).train) == right
    assert capsys.readouterr().err == ""


def test_new_ids_are_never_taken_for_those_of_an_older_sidecar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between the two files, with texts of equal length."""
    run = tmp_path / "run"
    a, b = write(tmp_path / "a.txt", "a" * 500), write(tmp_path / "b.txt", "b" * 500)
    prepare(a, run)
    real = data_module.publish

    def stop_before_the_sidecar(path: Path, write: Any) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        real(path, write)

    monkeypatch.setattr(data_module, "publish", stop_before_the_sidecar)
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


# Batches


IDS = (np.arange(1000) % 257).astype(np.uint16)
MANY = np.arange(60_000).astype(np.uint16)


def draw(tokens: Any = MANY, **changes: int) -> tuple[torch.Tensor, torch.Tensor]:
    where = {"seed": 1, "step": 2, "slot": 3, "batch_size": 16, "block_size": 32} | changes
    return batch(tokens, **where)


def test_a_batch_is_a_pure_function_of_seed_step_and_slot() -> None:
    x, y = draw()
    assert x.shape == y.shape == (16, 32)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(x + 1, y)
    np.random.seed(0)
    torch.manual_seed(0)
    draw(step=9)
    assert torch.equal(draw()[0], x)
    for other in (draw(seed=2), draw(step=3), draw(slot=4), draw(step=3, slot=2)):
        assert len(set(other[0][:, 0].tolist()) & set(x[:, 0].tolist())) <= 2
    # One process with two micro-steps draws what two processes draw: the slot alone tells.
    starts = np.random.Generator(np.random.Philox(key=1, counter=[0, 0, 3, 2])).integers(
        0, 60_000 - 32, size=16
    )
    assert x[:, 0].tolist() == starts.tolist()


def test_neighbouring_steps_share_no_draws() -> None:
    starts = [draw(step=step, batch_size=64)[0][:, 0].tolist() for step in range(20)]
    for a, b in itertools.pairwise(starts):
        assert len(set(a) & set(b)) < 3


def test_every_window_is_drawn_and_none_beyond_the_end() -> None:
    tokens = np.arange(10).astype(np.uint16)
    x, y = draw(tokens, batch_size=500, block_size=8)
    assert set(x[:, 0].tolist()) == {0, 1}
    assert int(y.max()) == 9
    x, _ = draw(tokens, batch_size=4, block_size=9)
    assert x[:, 0].tolist() == [0, 0, 0, 0]


def test_batches_from_the_file_are_those_from_memory(tmp_path: Path) -> None:
    data = prepare(write(tmp_path / "a.txt", ENGLISH * 100), tmp_path / "run")
    memory = data.train[:]
    for step in range(5):
        for a, b in zip(draw(data.train, step=step), draw(memory, step=step), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("n", [2, 8, 9, 10, 16, 17, 100, 1000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_validation_predicts_every_token_but_the_first_once(n: int, batch_size: int) -> None:
    tokens = IDS[:n]
    inputs, targets = [], []
    batches = list(val_batches(tokens, 8, batch_size))
    for x, y in batches:
        assert x.shape == y.shape and x.size(0) <= batch_size and x.dtype == torch.int64
        inputs += x.flatten().tolist()
        targets += y.flatten().tolist()
    assert inputs == tokens[:-1].tolist()
    assert targets == tokens[1:].tolist()
    assert all(x.size(1) == 8 for x, _ in batches[:-1])
