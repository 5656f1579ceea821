"""The tokenizer fits the text, and trained encodings are those of the definition."""

from __future__ import annotations

import base64
import collections
import itertools
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.tokenizer import BPETokenizer
from pico_edge.train.bpe import choose_tokenizer, default_tokenizer, train_bpe
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
