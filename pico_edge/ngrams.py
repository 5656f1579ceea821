"""What usually follows a few tokens: a table to draft from, for lossless speculative decoding.

Contexts are hashes, so a draft may be wrong: whoever uses one checks it with the model. Knows
nothing of texts or models; `pico_edge.train.ngrams` makes the table.

Try: `NGrams.from_dict(values).draft([72, 101, 108], 4)` -> ids that may follow, at most 4.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pico_edge.artefact import MAX_NGRAMS_BYTES as MAX_BYTES  # of the JSON of to_dict
from pico_edge.errors import ArtefactError

MAX_ORDER = 16
# A context is known by the last 24 bits of its hash; the highest 8 of these are not stored, the
# entries are sorted by them and counted instead.
BITS = 24
_LOW_BITS = 16
_BUCKETS = 1 << (BITS - _LOW_BITS)
_JSON_BYTES = 300  # more than what to_dict has around its base64

MULTIPLIER = 0x9E3779B97F4A7C15
SHIFT = 29
_MASK = (1 << 64) - 1
_SHIFT_TO_KEY = 64 - BITS


class NGrams:
    """A table from contexts of min_order to max_order tokens to the token that mostly follows.

    keys: (n,) uint32, rising, context hashes of BITS bits. following: (n,) uint32 token ids under
    n_vocab.
    """

    def __init__(
        self,
        keys: NDArray[np.uint32],
        following: NDArray[np.uint32],
        *,
        min_order: int,
        max_order: int,
        n_vocab: int,
    ) -> None:
        self.keys = keys
        self.following = following
        self.min_order = min_order
        self.max_order = max_order
        self.n_vocab = n_vocab
        self._next: dict[int, int] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def draft(self, ids: Sequence[int], n: int) -> list[int]:
        """At most n ids that may follow these; fewer, or none, where the table has no opinion."""
        recent = list(ids[-self.max_order :])
        drafted: list[int] = []
        while len(drafted) < n and (found := self.next(recent)):
            drafted.append(found[0])
            recent.append(found[0])
        return drafted

    def next(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """The id that may follow these, and the length of the longest known context, which decides.

        None where no context is known. Takes 2 us, and 5 ms at the first call.
        """
        if self._next is None:
            self._next = dict(zip(self.keys.tolist(), self.following.tolist(), strict=True))
        get, key, found, longest = self._next.get, 0, None, 0
        for order, token_id in enumerate(ids[: -self.max_order - 1 : -1], start=1):
            key = (key + token_id + 1) * MULTIPLIER & _MASK
            key ^= key >> SHIFT
            if order >= self.min_order and (known := get(key >> _SHIFT_TO_KEY)) is not None:
                found, longest = known, order
        return None if found is None else (found, longest)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of at most MAX_BYTES; `from_dict` is the inverse."""
        counts = np.bincount(self.keys >> _LOW_BITS, minlength=_BUCKETS)
        return {
            "version": 1,
            "min_order": self.min_order,
            "max_order": self.max_order,
            "n_vocab": self.n_vocab,
            "counts": _to_base64(counts, "<u2"),
            "keys": _to_base64(self.keys & ((1 << _LOW_BITS) - 1), "<u2"),
            "following": _to_base64(self.following, _id_dtype(self.n_vocab)),
        }

    @classmethod
    def from_dict(cls, values: object) -> NGrams:
        """The table that `to_dict` described. Raises ArtefactError for anything else."""
        if not isinstance(values, dict):
            raise ArtefactError(f"ngrams is a {type(values).__name__}: expected an object")
        if values.get("version") != 1:
            raise ArtefactError(f"ngrams version {values.get('version')!r}: expected 1")
        numbers = {}
        for name, lowest, highest in (
            ("min_order", 1, MAX_ORDER),
            ("max_order", 1, MAX_ORDER),
            ("n_vocab", 1, 1 << 31),
        ):
            value = values.get(name)
            if type(value) is not int or not lowest <= value <= highest:
                raise ArtefactError(f"ngrams {name} is {value!r}: expected {lowest} to {highest}")
            numbers[name] = value
        counts = _from_base64(values, "counts", "<u2").astype(np.int64)
        low = _from_base64(values, "keys", "<u2").astype(np.uint32)
        following = _from_base64(values, "following", _id_dtype(numbers["n_vocab"]))
        if len(counts) != _BUCKETS or not counts.sum() == len(low) == len(following):
            raise ArtefactError(
                f"ngrams has {len(counts)} counts that add up to {counts.sum()}, {len(low)} keys "
                f"and {len(following)} following: expected {_BUCKETS}, then three equal numbers"
            )
        if len(following) and int(following.max()) >= numbers["n_vocab"]:
            raise ArtefactError(
                f"ngrams has token id {following.max()}: expected under {numbers['n_vocab']}"
            )
        high = np.repeat(np.arange(_BUCKETS, dtype=np.uint32), counts)
        keys = (high << _LOW_BITS | low).astype(np.uint32)
        return cls(keys, following.astype(np.uint32), **numbers)


def max_entries(n_vocab: int) -> int:
    """Entries that keep the JSON under MAX_BYTES. Example: 257 -> 48967."""
    n_bytes = (MAX_BYTES - _JSON_BYTES) // 4 * 3 - 2 * _BUCKETS
    return n_bytes // (2 + np.dtype(_id_dtype(n_vocab)).itemsize)


def _id_dtype(n_vocab: int) -> str:
    return "<u2" if n_vocab <= 1 << 16 else "<u4"


def _to_base64(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode("ascii")


def _from_base64(values: dict[Any, Any], name: str, dtype: str) -> NDArray[Any]:
    text = values.get(name)
    if not isinstance(text, str) or len(text) > MAX_BYTES:
        raise ArtefactError(f"ngrams {name}: expected base64 text of at most {MAX_BYTES} bytes")
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype)
    except (binascii.Error, ValueError) as error:
        raise ArtefactError(f"ngrams {name} is not base64 of {dtype}: {error}") from error
