"""Text <-> token ids: UTF-8 bytes as they are, or byte-pair encoding by tiktoken.

Both kinds turn any text into ids and back, serialise to plain JSON, and travel inside `ckpt.pt` and
`model.onnx`. Knows nothing of models or files, and never downloads. tiktoken is imported only where
a BPETokenizer is made.

Try: `SimpleTokenizer().encode("Hello")` -> [72, 101, 108, 108, 111].
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from codecs import utf_8_decode
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pico_edge.errors import ArtefactError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EOT = "<|endoftext|>"
Ids = list[int]

# Split patterns are chosen by name and never taken from a file: a hostile regex could run for ever.
# "gpt2" is GPT-2's, in the possessive form of tiktoken_ext/openai_public.py: the same matches in
# linear time.
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
}
MAX_RANKS = 1_000_000
# One call to tiktoken gets at most this much; longer text goes in pieces.
PIECE_CHARACTERS = 1 << 16


class SimpleTokenizer:
    """UTF-8 bytes as ids 0-255 and `<|endoftext|>` as 256: no text is out of vocabulary."""

    kind = "simple"
    n_vocab = 257
    eot_id = 256
    bytes_of = (*(bytes([byte]) for byte in range(256)), b"")  # of every id; end of text has none

    def encode(self, text: str, *, allow_special: bool = False) -> Ids:
        """Ids of a text. With allow_special `<|endoftext|>` in it is one id, else plain bytes."""
        if not allow_special:
            return list(_utf8(text))
        ids: Ids = []
        for i, part in enumerate(text.split(EOT)):
            if i:
                ids.append(self.eot_id)
            ids.extend(_utf8(part))
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """UTF-8 bytes of ids, none for the end of text. UsageError for an id without text."""
        _check_ids(ids, self.n_vocab)
        return bytes(i for i in ids if i != self.eot_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `tokenizer_from_dict` is the inverse."""
        return {"kind": self.kind}


class BPETokenizer:
    """Byte-level byte-pair encoding over ranks that we hold, run by tiktoken.

    tokens: the bytes of id 0, 1, 2, ... in order of merging; all 256 single bytes are among them.
    `<|endoftext|>` gets the id after the last. pattern: a name in PATTERNS.
    Raises ArtefactError for ranks that cannot make a tokenizer.
    """

    kind = "bpe"

    def __init__(self, tokens: Sequence[bytes], *, pattern: str = "gpt2") -> None:
        if pattern not in PATTERNS:
            raise ArtefactError(
                f"tokenizer pattern {pattern!r}: expected one of {sorted(PATTERNS)}"
            )
        if len(tokens) > MAX_RANKS:
            raise ArtefactError(f"tokenizer has {len(tokens)} ranks: expected at most {MAX_RANKS}")
        ranks = {token: rank for rank, token in enumerate(tokens)}
        if len(ranks) != len(tokens):
            raise ArtefactError(f"tokenizer has {len(tokens) - len(ranks)} duplicate ranks")
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ArtefactError(f"tokenizer lacks {len(missing)} of the 256 single bytes")
        if b"" in ranks:
            raise ArtefactError("tokenizer has an empty token")
        import tiktoken

        self.pattern = pattern
        self.tokens = list(tokens)
        self.bytes_of = (*tokens, b"")  # of every id; end of text has none
        self.eot_id = len(tokens)
        self.n_vocab = len(tokens) + 1
        self._encoding = tiktoken.Encoding(
            "pico_edge",
            pat_str=PATTERNS[pattern],
            mergeable_ranks=ranks,
            special_tokens={EOT: self.eot_id},
        )

    def encode(self, text: str, *, allow_special: bool = False) -> Ids:
        """Ids of a text. With allow_special `<|endoftext|>` in it is one id, else plain text."""
        text = _without_surrogates(text)
        ids: Ids = []
        for i, part in enumerate(text.split(EOT) if allow_special else [text]):
            if i:
                ids.append(self.eot_id)
            for piece in pieces(part):
                ids.extend(self._encoding.encode_ordinary(piece))
        return ids

    def encode_piece(self, text: str) -> NDArray[np.uint32]:
        """The ids of `encode` for at most PIECE_CHARACTERS, without a list: (n,) uint32.

        Lets other threads run meanwhile. A quarter faster than through a list.
        """
        return self._encoding.encode_to_numpy(_without_surrogates(text), disallowed_special=())

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """UTF-8 bytes of ids, none for the end of text. UsageError for an id without text."""
        _check_ids(ids, self.n_vocab)
        return b"".join(self.bytes_of[i] for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `tokenizer_from_dict` is the inverse."""
        tokens = [base64.b64encode(token).decode("ascii") for token in self.tokens]
        return {"kind": self.kind, "pattern": self.pattern, "tokens": tokens}


Tokenizer = SimpleTokenizer | BPETokenizer


class TextStream:
    """Ids in, text out as soon as it is whole: a split character waits for its last byte.

    Bytes that can never become UTF-8 give U+FFFD, and only those.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.bytes_of
        self._unfinished = b""

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these ids, which must be the tokenizer's, complete; "" if none."""
        data = (
            self._bytes_of[ids[0]] if len(ids) == 1 else b"".join([self._bytes_of[i] for i in ids])
        )
        return self._decode(self._unfinished + data, final=False)

    def flush(self) -> str:
        """What is left at the end: "" or one U+FFFD for an unfinished character."""
        return self._decode(self._unfinished, final=True)

    def _decode(self, data: bytes, *, final: bool) -> str:
        text, used = utf_8_decode(data, "replace", final)
        self._unfinished = data[used:]
        return text


def tokenizer_from_dict(values: object) -> Tokenizer:
    """The tokenizer that `to_dict` described. Raises ArtefactError for anything else."""
    if not isinstance(values, dict):
        raise ArtefactError(f"tokenizer is a {type(values).__name__}: expected an object")
    kind = values.get("kind")
    if kind == SimpleTokenizer.kind:
        _check_keys(values, {"kind"})
        return SimpleTokenizer()
    if kind == BPETokenizer.kind:
        _check_keys(values, {"kind", "pattern", "tokens"})
        tokens, pattern = values["tokens"], values["pattern"]
        if not isinstance(tokens, list) or not isinstance(pattern, str):
            raise ArtefactError("tokenizer: expected a list of tokens and the name of a pattern")
        if len(tokens) > MAX_RANKS:
            raise ArtefactError(f"tokenizer has {len(tokens)} ranks: expected at most {MAX_RANKS}")
        return BPETokenizer([_base64(token) for token in tokens], pattern=pattern)
    raise ArtefactError(f"tokenizer kind {kind!r}: expected 'simple' or 'bpe'")


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of the canonical JSON form: equal hashes, equal encodings."""
    text = json.dumps(tokenizer.to_dict(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def parse_ranks(data: bytes, *, name: str) -> list[bytes]:
    """Tokens in rank order from a ranks file in tiktoken's format: lines of base64, space, rank.

    name: what to call the file in an error. Raises ArtefactError unless the ranks are 0, 1, 2, ...
    """
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        fields = line.split()
        if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) > len(str(MAX_RANKS)):
            raise ArtefactError(
                f"{name}: line {number} is not 'base64 rank': expected tiktoken ranks"
            )
        rank = int(fields[1])
        if rank in ranks:
            raise ArtefactError(f"{name}: line {number} repeats rank {rank}")
        try:
            ranks[rank] = _base64(fields[0].decode("ascii", "replace"))
        except ArtefactError as error:
            raise ArtefactError(f"{name}: line {number}: {error}") from error
        if len(ranks) > MAX_RANKS:
            raise ArtefactError(f"{name}: more than {MAX_RANKS} ranks")
    if not ranks:
        raise ArtefactError(f"{name}: no ranks found: expected lines of 'base64 rank'")
    missing = next((rank for rank in range(len(ranks)) if rank not in ranks), None)
    if missing is not None:
        raise ArtefactError(f"{name}: rank {missing} is missing: expected 0 to {len(ranks) - 1}")
    return [ranks[rank] for rank in range(len(ranks))]


def padded_vocab_size(n_vocab: int, multiple: int = 16) -> int:
    """Rows of the model's table for a tokenizer. Example: 257 -> 272."""
    return -(-n_vocab // multiple) * multiple


def _utf8(text: str) -> bytes:
    return _without_surrogates(text).encode("utf-8")


def _without_surrogates(text: str) -> str:
    """Lone surrogates, which argv can hold and UTF-8 cannot, as U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def pieces(text: str, size: int | None = None) -> Iterator[str]:
    """The text in pieces of at most `size` characters that encode to the ids of the whole.

    size: PIECE_CHARACTERS if None.
    """
    size = PIECE_CHARACTERS if size is None else size
    start = 0
    while len(text) - start > size:
        end = piece_end(text, start, size)
        yield text[start:end]
        start = end
    yield text[start:]


def piece_end(text: str, start: int, size: int) -> int:
    """Where the piece ends that begins at `start` of a text going on beyond start + size.

    Before white space that follows something else: no match of the GPT-2 pattern goes on from a
    visible character to white space. Only a run without such a place, longer than a piece, is cut
    anywhere. What comes after start + size does not matter: a stream is cut as the whole text is.
    """
    end = cut = start + size
    while cut > start and not (_is_space(text[cut]) and not _is_space(text[cut - 1])):
        cut -= 1
    return cut if cut > start else end


def _is_space(character: str) -> bool:
    """What the patterns mean by white space; str.isspace adds the separators U+001C to U+001F."""
    return character.isspace() and not "\x1c" <= character <= "\x1f"


def _check_ids(ids: Sequence[int], n_vocab: int) -> None:
    for i in ids:
        if not 0 <= i < n_vocab:
            raise UsageError(f"token id {i} is not in the vocabulary: expected 0 to {n_vocab - 1}")


def _check_keys(values: dict[Any, Any], expected: set[str]) -> None:
    if values.keys() != expected:
        found = sorted(values.keys(), key=str)
        raise ArtefactError(f"tokenizer has fields {found}: expected {sorted(expected)}")


def _base64(text: object) -> bytes:
    if not isinstance(text, str):
        raise ArtefactError(f"tokenizer token is a {type(text).__name__}: expected base64 text")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ArtefactError(f"tokenizer token {text[:40]!r} is not base64: {error}") from error
