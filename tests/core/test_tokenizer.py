"""Tokenizers: every text comes back, none is out of vocabulary, bad files are refused by name."""

import base64
import json
import re
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pico_edge import tokenizer as tokenizer_module
from pico_edge.errors import ArtefactError, UsageError
from pico_edge.tokenizer import (
    EOT,
    BPETokenizer,
    SimpleTokenizer,
    TextStream,
    Tokenizer,
    padded_vocab_size,
    parse_ranks,
    tokenizer_from_dict,
    tokenizer_hash,
)

BYTES = [bytes([byte]) for byte in range(256)]
CORPUS = """
def the_theme(self):\n        return self.theme  # the other theme\n\n\n
안녕하세요 안녕 세상아, hello hello world! It's the world's 2,024th theme... 😀😀😀
👩\u200d👩\u200d👧
    \t\t  don't!!!!    we'll   12345 12345\n
"""


def train_ranks(text: str, n_merges: int) -> list[bytes]:
    """Byte-pair encoding: again and again, join the most frequent pair within a word."""
    words = Counter(
        tuple(bytes([byte]) for byte in word.encode())
        for word in re.findall(r" ?\w+|\s+| ?[^\w\s]+", text)
    )
    tokens = list(BYTES)
    for _ in range(n_merges):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        if left + right not in tokens:
            tokens.append(left + right)
        words = Counter({merge(word, left, right): count for word, count in words.items()})
    return tokens


def merge(word: tuple[bytes, ...], left: bytes, right: bytes) -> tuple[bytes, ...]:
    merged: list[bytes] = []
    for part in word:
        if merged and merged[-1] == left and part == right:
            merged[-1] = left + right
        else:
            merged.append(part)
    return tuple(merged)


SIMPLE = SimpleTokenizer()
BPE = BPETokenizer(train_ranks(CORPUS, 150))
both = pytest.mark.parametrize("tokenizer", [SIMPLE, BPE], ids=["simple", "bpe"])

# All of Unicode, the alphabet of CORPUS, lone surrogates, and much white space of every kind.
WHITE = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2009\u2028\u202f\u3000\u200b\ufeff"
any_text = st.text() | st.text(alphabet=CORPUS + WHITE) | st.sampled_from(["", "\n", "😀", "안녕"])
surrogates = st.integers(0xD800, 0xDFFF).map(chr)  # st.text leaves them out
surrogate_text = st.lists(st.characters() | surrogates).map("".join)


def test_hello_world_is_its_bytes() -> None:
    assert SIMPLE.encode("Hello world") == [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]
    assert (SIMPLE.n_vocab, SIMPLE.eot_id) == (257, 256)


def test_the_vocabulary_is_padded_to_a_multiple_of_16() -> None:
    assert [padded_vocab_size(n) for n in (1, 16, 17, 257, 4097, 50257)] == [
        *(16, 16, 32, 272, 4112, 50272)
    ]
    assert padded_vocab_size(50257, 64) == 50304


def test_the_merges_of_a_trained_bpe_are_used() -> None:
    ids = BPE.encode("hello hello world")
    assert len(ids) < len("hello hello world") / 2
    assert BPE.n_vocab == len(BPE.tokens) + 1
    assert BPE.eot_id == len(BPE.tokens)


def test_bpe_joins_the_pair_of_lowest_rank_first() -> None:
    # By hand: "abc" has the pairs ab (257) and bc (256); bc is joined first, a + bc is no token.
    bpe = BPETokenizer([*BYTES, b"bc", b"ab", b"abcd"])
    assert bpe.encode("abc") == [97, 256]
    assert bpe.encode("ab") == [257]
    assert bpe.encode("abcd") == [258]  # a whole word that is a token needs no merges


@both
@given(any_text)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(0 <= i < tokenizer.n_vocab and i != tokenizer.eot_id for i in ids)


@both
@given(text=surrogate_text, allow_special=st.booleans())
def test_lone_surrogates_become_the_replacement_character(
    tokenizer: Tokenizer, text: str, allow_special: bool
) -> None:
    # A pair of surrogates is the character they stand for, as in UTF-16; a lone one has none.
    paired = re.sub(
        "[\ud800-\udbff][\udc00-\udfff]",
        lambda pair: pair.group().encode("utf-16", "surrogatepass").decode("utf-16"),
        text,
    )
    expected = re.sub("[\ud800-\udfff]", "\ufffd", paired)
    assert tokenizer.decode(tokenizer.encode(text, allow_special=allow_special)) == expected


@both
def test_an_argument_that_is_not_utf8_is_encoded(tokenizer: Tokenizer) -> None:
    argument = b"caf\xe9 \xf0\x9f".decode("utf-8", "surrogateescape")
    assert tokenizer.decode(tokenizer.encode(argument)) == "caf\ufffd \ufffd\ufffd"


@both
def test_special_tokens_are_plain_text_unless_asked_for(tokenizer: Tokenizer) -> None:
    text = f"one{EOT}two{EOT}{EOT}"
    plain = tokenizer.encode(text)
    assert tokenizer.eot_id not in plain
    assert tokenizer.decode(plain) == text
    special = tokenizer.encode(text, allow_special=True)
    assert special == [
        *tokenizer.encode("one"),
        tokenizer.eot_id,
        *tokenizer.encode("two"),
        tokenizer.eot_id,
        tokenizer.eot_id,
    ]
    assert tokenizer.decode(special) == "onetwo"
    assert tokenizer.encode("<|endoftex|>", allow_special=True) == tokenizer.encode("<|endoftex|>")


@both
@pytest.mark.parametrize("offset", [0, 15, 2**63])
def test_padded_and_negative_ids_have_no_text(tokenizer: Tokenizer, offset: int) -> None:
    beyond = tokenizer.n_vocab + offset
    with pytest.raises(UsageError, match=f"token id {beyond} is not in the vocabulary"):
        tokenizer.decode([72, beyond])
    with pytest.raises(ValueError, match="token id -1"):
        tokenizer.decode_bytes([-1])


@both
@given(st.data())
def test_a_stream_of_any_ids_in_any_chunks_is_the_decoding_of_the_whole(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    any_ids = st.lists(st.integers(0, tokenizer.n_vocab - 1))
    ids = data.draw(any_ids | any_text.map(tokenizer.encode))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)))))
    stream = TextStream(tokenizer)
    pieces = [stream.feed(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@given(any_text)
def test_a_stream_of_whole_text_never_shows_a_replacement_character(text: str) -> None:
    stream = TextStream(SIMPLE)
    pieces = [stream.feed([i]) for i in SIMPLE.encode(text)]
    assert stream.flush() == ""
    assert [piece for piece in pieces if piece] == list(text)


def test_a_stream_waits_for_the_last_byte_of_a_character() -> None:
    stream = TextStream(SIMPLE)
    assert [stream.feed([i]) for i in "a😀".encode()] == ["a", "", "", "", "😀"]
    assert stream.feed([0xF0, 0x9F]) == ""
    assert stream.feed([0x41]) == "\ufffdA"
    assert stream.feed([0xE2, 0x82]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.feed([0x41]) == "A"  # nothing is left behind


def whole(text: str) -> list[int]:
    return BPE._encoding.encode_ordinary(text)


white_heavy = st.text(alphabet=" \n\ta!'s7é안\x1c\u3000") | st.text(alphabet="  \na!")


@settings(max_examples=500)
@given(text=white_heavy, size=st.integers(1, 12))
def test_text_cut_into_pieces_encodes_as_the_whole(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE_CHARACTERS", size)
        pieces = list(tokenizer_module.pieces(text))
        ids = BPE.encode(text)
    assert "".join(pieces) == text
    assert all(len(piece) <= size for piece in pieces)
    # Words with the white space before them; only one that is longer than a piece may be cut.
    words = re.findall(r"(?:(?![\x1c-\x1f])\s)*(?:[\x1c-\x1f]|\S)*", text)
    if max(map(len, words)) <= size:
        assert ids == whole(text)
    assert BPE.decode(ids) == text


def test_long_text_in_pieces_of_the_real_size_encodes_as_the_whole() -> None:
    text = CORPUS * (2 * tokenizer_module.PIECE_CHARACTERS // len(CORPUS) + 1)
    assert len(list(tokenizer_module.pieces(text))) > 2
    assert BPE.encode(text) == whole(text)


@pytest.mark.parametrize("separator", "\x1c\x1d\x1e\x1f")
def test_separators_are_no_white_space_to_the_pattern(separator: str) -> None:
    # str.isspace says they are; a cut before one would lose the token that crosses it.
    bpe = BPETokenizer([*BYTES, f"!{separator}".encode()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE_CHARACTERS", 4)
        ids = bpe.encode(f"! !{separator}! !{separator}!")
    assert ids.count(256) == 2


@both
@pytest.mark.parametrize(
    "text",
    ["a" * 10**6, " " * 10**6, "^" * 10**6, "\u200d".join("👨" * 10**5)],
    ids=["a", "space", "caret", "joined emoji"],
)
def test_a_million_of_one_character_ends(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@both
def test_a_tokenizer_survives_json(tokenizer: Tokenizer) -> None:
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert type(again) is type(tokenizer)
    assert again.to_dict() == tokenizer.to_dict()
    assert (again.n_vocab, again.eot_id) == (tokenizer.n_vocab, tokenizer.eot_id)
    assert again.encode(CORPUS + EOT, allow_special=True) == tokenizer.encode(
        CORPUS + EOT, allow_special=True
    )


def test_equal_tokenizers_have_equal_hashes_and_others_do_not() -> None:
    fewer = BPETokenizer(BPE.tokens[:-1])
    swapped = BPETokenizer([*BPE.tokens[:-2], BPE.tokens[-1], BPE.tokens[-2]])
    assert tokenizer_hash(BPE) == tokenizer_hash(BPETokenizer(BPE.tokens))
    assert len({tokenizer_hash(t) for t in (SIMPLE, BPE, fewer, swapped)}) == 4


PLAIN = {"kind": "bpe", "pattern": "gpt2", "tokens": BPETokenizer(BYTES).to_dict()["tokens"]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "tokenizer is a NoneType: expected an object"),
        ([], "tokenizer is a list"),
        ({}, "tokenizer kind None: expected 'simple' or 'bpe'"),
        ({"kind": "wordpiece"}, "tokenizer kind 'wordpiece'"),
        ({"kind": ["bpe"]}, "tokenizer kind"),
        ({"kind": "simple", "pattern": "gpt2"}, "tokenizer has fields ['kind', 'pattern']"),
        ({"kind": "bpe"}, "tokenizer has fields ['kind']"),
        ({**PLAIN, "regex": "(a+)+$"}, "tokenizer has fields"),
        ({**PLAIN, "pattern": "(a+)+$"}, "tokenizer pattern '(a+)+$': expected one of ['gpt2']"),
        ({**PLAIN, "pattern": None}, "tokenizer: expected a list of tokens"),
        ({**PLAIN, "tokens": "YQ=="}, "tokenizer: expected a list of tokens"),
        ({**PLAIN, "tokens": {}}, "tokenizer: expected a list of tokens"),
        ({**PLAIN, "tokens": []}, "tokenizer lacks 256 of the 256 single bytes"),
        ({**PLAIN, "tokens": PLAIN["tokens"][1:]}, "tokenizer lacks 1 of the 256 single bytes"),
        ({**PLAIN, "tokens": [*PLAIN["tokens"], "YQ=="]}, "tokenizer has 1 duplicate ranks"),
        ({**PLAIN, "tokens": [*PLAIN["tokens"], ""]}, "tokenizer has an empty token"),
        ({**PLAIN, "tokens": [*PLAIN["tokens"], "YQ"]}, "tokenizer token 'YQ' is not base64"),
        ({**PLAIN, "tokens": [*PLAIN["tokens"], "Y Q="]}, "tokenizer token 'Y Q=' is not base64"),
        ({**PLAIN, "tokens": [*PLAIN["tokens"], "가"]}, "tokenizer token '가' is not base64"),
        ({**PLAIN, "tokens": [*PLAIN["tokens"], 7]}, "tokenizer token is a int"),
    ],
)
def test_what_is_no_tokenizer_is_refused(values: Any, message: str) -> None:
    with pytest.raises(ArtefactError) as error:
        tokenizer_from_dict(values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_too_many_ranks_are_refused_before_they_are_looked_at() -> None:
    with pytest.raises(ArtefactError, match="tokenizer has 10000000 ranks: expected at most"):
        tokenizer_from_dict({**PLAIN, "tokens": [None] * 10**7})
    with pytest.raises(
        ArtefactError, match="tokenizer has 1000001 ranks: expected at most 1000000"
    ):
        BPETokenizer([b"a"] * (tokenizer_module.MAX_RANKS + 1))


def ranks_file(tokens: list[bytes]) -> bytes:
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    return b"\n".join(lines) + b"\n"


def test_a_ranks_file_gives_its_tokens_in_rank_order() -> None:
    data = ranks_file(BPE.tokens)
    assert parse_ranks(data, name="my.tiktoken") == BPE.tokens
    backwards = b"\r\n\r\n".join(reversed(data.splitlines()))
    assert parse_ranks(backwards, name="my.tiktoken") == BPE.tokens


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no ranks found: expected lines of 'base64 rank'"),
        (b"\n\n", "no ranks found"),
        (b"<!DOCTYPE html>\n", "line 1 is not 'base64 rank': expected tiktoken ranks"),
        (b"YQ== 0 0\n", "line 1 is not 'base64 rank'"),
        (b"YQ== 0\nYg==\n", "line 2 is not 'base64 rank'"),
        (b"YQ== -1\n", "line 1 is not 'base64 rank'"),
        (b"YQ== 1.0\n", "line 1 is not 'base64 rank'"),
        (b"YQ== " + b"9" * 5000, "line 1 is not 'base64 rank'"),
        (b"YQ== \xd9\xa1\n", "line 1 is not 'base64 rank'"),
        (b"YQ== 0\nYg== 0\n", "line 2 repeats rank 0"),
        (b"YQ== 0\nYg== 2\n", "rank 1 is missing: expected 0 to 1"),
        (b"YQ== 1\n", "rank 0 is missing: expected 0 to 0"),
        (b"YQ== 0\nYQ 1\n", "line 2: tokenizer token 'YQ' is not base64"),
        (b"\xff\xfe 0\n", "line 1: tokenizer token"),
    ],
)
def test_a_bad_ranks_file_is_refused_by_its_name(data: bytes, message: str) -> None:
    with pytest.raises(ArtefactError) as error:
        parse_ranks(data, name="my.tiktoken")
    assert str(error.value).startswith(f"my.tiktoken: {message}")
    assert "\n" not in str(error.value)


def test_a_ranks_file_of_too_many_lines_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "MAX_RANKS", 10)
    with pytest.raises(ArtefactError, match=r"my\.tiktoken: more than 10 ranks"):
        parse_ranks(ranks_file(BYTES), name="my.tiktoken")


@given(st.binary())
def test_any_bytes_are_ranks_or_a_refusal(data: bytes) -> None:
    try:
        tokens = parse_ranks(data, name="my.tiktoken")
    except ArtefactError:
        return
    assert tokens


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {"kind": st.sampled_from(["simple", "bpe"]) | json_values},
        optional={"pattern": st.just("gpt2") | json_values, "tokens": json_values},
    )
    | json_values
)
def test_any_json_is_a_tokenizer_or_a_refusal(values: object) -> None:
    try:
        tokenizer = tokenizer_from_dict(values)
    except ArtefactError:
        return
    assert tokenizer.to_dict() == values
