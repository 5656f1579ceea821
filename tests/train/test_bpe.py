"""The tokenizer fits the text, and trained encodings are those of the definition."""

from __future__ import annotations

import base64
import codecs
import collections
import hashlib
import io
import itertools
import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.tokenizer import BPETokenizer
from pico_edge.train import bpe as bpe_module
from pico_edge.train.bpe import choose_tokenizer, default_tokenizer, sample_texts, train_bpe
from pico_edge.train.report import Reporter
from pico_edge.train.settings import TrainSettings
from pico_edge.train.setup import _tokenizer
from pico_edge.train.text import text_bytes

ENGLISH = "It was the best of times, it was the worst of times; isn't it 1859?\n\n"
CHINESE = "道可道，非常道。名可名，非常名。無名天地之始；有名萬物之母。\n"  # noqa: RUF001
EMOJI = "👩‍👩‍👧‍👦🏳️‍🌈👍🏽☃️"
AWKWARD = "nul \0 crlf \r\n cr \r tab \t \x1c \x85 \u2028 \ufeff " + EMOJI + CHINESE + "end"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


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


@pytest.mark.parametrize("kind", ["txt", "jsonl", "utf-16", "latin-1"])
def test_what_is_held_out_trains_no_tokenizer_in_any_format(kind: str, tmp_path: Path) -> None:
    text = ENGLISH * 100 + "Zqxwvutrstu " * (ENGLISH.count("") * 100 // 9 // 12)
    path, options = tmp_path / "a.txt", {}
    if kind == "jsonl":
        path = tmp_path / "a.jsonl"
        lines = [json.dumps({"text": line, "meta": "x" * 300}) for line in text.splitlines(True)]
        write(path, "\n".join(lines))
    elif kind == "utf-16":
        write(path, codecs.BOM_UTF16_LE + text.encode("utf-16-le"))
    else:
        write(path, text)
        options = {"encoding": kind} if kind == "latin-1" else {}
    made = choose_tokenizer("bpe", [path], vocab_size=1000, val_fraction=0.12, **options)
    assert isinstance(made, BPETokenizer)
    assert not any(b"Zq" in token for token in made.tokens)


def test_marks_of_many_files_move_no_text_out_of_the_tail(tmp_path: Path) -> None:
    texts = [
        "It was the best of times" if i < 900 else "Zqxwvutrstu Zqxwvutrstu " for i in range(1000)
    ]
    files = [write(tmp_path / f"{i:04}.txt", "\ufeff" + text) for i, text in enumerate(texts)]
    made = choose_tokenizer("bpe", files, vocab_size=1000, val_fraction=0.1)
    assert isinstance(made, BPETokenizer)
    assert not any(b"Zq" in token for token in made.tokens)


def test_a_file_of_ranks_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for name in ("x" * 300, "missing"):
        with pytest.raises(ArtefactError, match=f"{name}: .*: expected a file of ranks"):
            choose_tokenizer("gpt2", [], ranks=tmp_path / name)


def test_tokenizers_are_chosen_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ENGLISH * 100)
    assert choose_tokenizer("simple", [path]).kind == "simple"
    settings = TrainSettings(tokenizer="bpe")  # its size then follows from the text
    found, rows = _tokenizer([path], settings, tmp_path / "run", Reporter(quiet=True))
    assert found.kind == "bpe"
    assert 257 < found.n_vocab <= rows <= 512
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


# GPT-2 without a network


def tiktokens_cache(ranks: Path, folder: Path) -> None:
    """The two files that tiktoken downloads for gpt2, byte for byte, made of their ranks again."""
    tokens = [base64.b64decode(line.split()[0]) for line in ranks.read_bytes().splitlines()]
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    byte_of = bpe_module._bytes_of_characters()
    character = {byte: c for c, byte in byte_of.items()}

    def spelled(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    merges = ["#version: 0.2"]
    for rank, token in enumerate(tokens[256:], start=256):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            made = [rank_of.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            at = made.index(min(made))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        merges.append(" ".join(map(spelled, parts)))
    encoder = {spelled(token): rank for token, rank in rank_of.items()} | {"<|endoftext|>": 50256}
    site = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for name, content in (
        ("vocab.bpe", "\n".join(merges) + "\n"),
        ("encoder.json", json.dumps(encoder)),
    ):
        write(folder / hashlib.sha1((site + name).encode()).hexdigest(), content)


def test_gpt2_needs_no_network_once_it_was_fetched_or_with_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Path(os.environ.get("PICO_EDGE_DATA", "no such folder"), "gpt2.tiktoken")
    if not ranks.exists():
        pytest.skip("PICO_EDGE_DATA names no folder with gpt2.tiktoken")
    import tiktoken.registry

    sockets = []

    def no_network(*arguments: object, **_: object) -> None:
        sockets.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    tiktokens_cache(ranks, tmp_path)
    fetched = choose_tokenizer("gpt2", [])
    given = choose_tokenizer("gpt2", [], ranks=ranks)
    assert isinstance(fetched, BPETokenizer) and isinstance(given, BPETokenizer)
    assert fetched.tokens == given.tokens and fetched.n_vocab == 50257
    assert fetched.encode("Hello world") == [15496, 995]
    assert sockets == []


# Large texts


def test_a_large_text_is_sampled_from_first_to_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe_module, "SAMPLE_BYTES", 10_000)
    texts = [f"{i:04} " * 20 for i in range(1000)]  # 100 bytes each
    sample = sample_texts(texts, 100_000)
    numbers = [int(text[:4]) for text in sample]
    assert numbers == sorted(numbers) and 95 <= len(numbers) <= 100
    assert numbers[0] < 20 and numbers[-1] > 980
    assert max(b - a for a, b in itertools.pairwise(numbers)) <= 20
    assert sample_texts(iter(texts), 100_000) == sample
    assert sample_texts(texts[:100], 10_000) == texts[:100]  # few: all
    # A size that is not known well: never more than the limit, never nothing.
    assert 95 <= len(sample_texts(texts, 1)) <= 100
    assert sample_texts(texts, 10**9) == texts[:1]
    assert sample_texts([], 0) == []


def test_words_that_all_differ_are_bounded_and_still_spread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bpe_module, "DISTINCT_BYTES", 1000)
    texts = ["".join(f"{i:03}{j} " for j in range(10)) for i in range(100)]  # 40 bytes of words
    numbers = [int(text[:3]) for text in sample_texts(texts, 5000)]
    assert len(numbers) == 25
    assert max(b - a for a, b in itertools.pairwise([0, *numbers, 99])) <= 8
    assert sample_texts(["common words " * 5] * 100, 6500) == ["common words " * 5] * 100
    assert sample_texts(["x" * 5000], 5000) == ["x" * 5000]  # one text is needed


def test_what_was_sampled_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe_module, "SAMPLE_BYTES", 100_000)
    path = write(tmp_path / "a.txt", "".join(f"{ENGLISH}{i}" for i in range(20_000)))
    stream = io.StringIO()
    tokenizer = choose_tokenizer("bpe", [path], vocab_size=300, reporter=Reporter(stream))
    assert tokenizer.n_vocab == 300
    expected = r"training a tokenizer of 300 tokens on [\d.]+kB spread over 1.\d+MB of text\n"
    assert re.fullmatch(expected, stream.getvalue())


def test_a_trained_tokenizer_is_kept_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = write(tmp_path / "a.txt", ENGLISH * 100), tmp_path / "run"
    trained, said = [], io.StringIO()
    real = bpe_module.train_bpe

    def counting(*arguments: Any, **options: Any) -> BPETokenizer:
        trained.append(options)
        return real(*arguments, **options)

    monkeypatch.setattr(bpe_module, "train_bpe", counting)

    def tokens(**options: Any) -> list[bytes]:
        options = {"vocab_size": 270, "reporter": Reporter(said), **options}
        made = choose_tokenizer("bpe", [path], folder=run, **options)
        assert isinstance(made, BPETokenizer)
        return made.tokens

    first = tokens()
    assert tokens() == first and len(trained) == 1
    assert len(tokens(vocab_size=265)) == 264 and len(trained) == 2
    assert tokens(val_fraction=0.5) and tokens(encoding="latin-1") and len(trained) == 4
    write(path, CHINESE * 100)
    assert tokens() != first and len(trained) == 5
    whole = (run / "bpe.json").read_bytes()
    for damage in (b"", b"[]", whole[:-9], whole.replace(b'"bpe"', b'"bqe"')):
        write(run / "bpe.json", damage)
        assert tokens()
    assert len(trained) == 9
    assert said.getvalue().count("is damaged") == 4
    assert [file.name for file in run.iterdir()] == ["bpe.json"]
