"""The table drafts what was put in, travels as JSON of bounded size, and damage is refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

from pico_edge.errors import ArtefactError
from pico_edge.ngrams import BITS, MAX_BYTES, MULTIPLIER, SHIFT, NGrams, max_entries


def key(context: list[int]) -> int:
    """The hash as its definition says."""
    value = 0
    for token_id in reversed(context):
        value = (value + token_id + 1) * MULTIPLIER % 2**64
        value ^= value >> SHIFT
    return value >> (64 - BITS)


def table(entries: dict[tuple[int, ...], int], n_vocab: int = 257) -> NGrams:
    found = sorted((key(list(context)), token_id) for context, token_id in entries.items())
    keys, following = (np.array(column, np.uint32) for column in zip(*found, strict=True))
    orders = [len(context) for context in entries]
    return NGrams(keys, following, min_order=min(orders), max_order=max(orders), n_vocab=n_vocab)


CHAIN = {(1, 2): 3, (2, 3): 4, (3, 4): 1, (4, 1): 2, (9, 2, 3): 7}


def test_a_draft_follows_the_longest_context_known_and_ends_where_none_is() -> None:
    made = table(CHAIN)
    assert made.draft([1, 2], 3) == [3, 4, 1]
    assert made.draft([5, 1, 2], 6) == [3, 4, 1, 2, 3, 4]
    assert made.draft([9, 2, 3], 4) == [7]
    assert made.draft([8, 2, 3], 1) == [4]
    assert made.draft([2, 1], 4) == made.draft([2], 4) == made.draft([], 4) == []
    assert made.draft([1, 2], 0) == []


def test_a_table_comes_back_from_json_and_leaves_the_ids_alone() -> None:
    for n_vocab in (257, 1 << 16, (1 << 16) + 1):
        made = table(CHAIN | {(7, 7): n_vocab - 1}, n_vocab)
        again = NGrams.from_dict(json.loads(json.dumps(made.to_dict())))
        assert again.to_dict() == made.to_dict() and len(again) == 6
        ids = [1, 2]
        assert again.draft(ids, 8) == made.draft(ids, 8) != []
        assert again.draft([7, 7], 1) == [n_vocab - 1]
        assert ids == [1, 2]


@pytest.mark.parametrize("n_vocab", [257, 4096, 1 << 16, 100_000])
def test_the_largest_table_stays_within_its_bytes(n_vocab: int) -> None:
    n = max_entries(n_vocab)
    keys = np.linspace(0, 2**BITS - 1, n).astype(np.uint32)
    made = NGrams(keys, keys % n_vocab, min_order=10, max_order=16, n_vocab=n_vocab)
    size = len(json.dumps(made.to_dict()))
    assert MAX_BYTES - 500 < size <= MAX_BYTES
    assert len(NGrams.from_dict(made.to_dict())) == n


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "ngrams version 2: expected 1"),
        ({"max_order": 10**9}, "max_order is 1000000000: expected 1 to 16"),
        ({"min_order": True}, "min_order is True"),
        ({"n_vocab": 4}, "token id 7: expected under 4"),
        ({"keys": 5}, "keys: expected base64"),
        ({"keys": "?"}, "keys is not base64"),
        ({"keys": "AA=="}, "keys is not base64"),
        ({"keys": "A" * (MAX_BYTES + 4)}, "keys: expected base64 text of at most"),
        ({"keys": "AAA="}, "expected 256, then three equal numbers"),
        ({"counts": "AAA="}, "has 1 counts"),
        ({"following": ""}, "0 following"),
        ({"counts": base64.b64encode(b"\xff\xff" * 256).decode()}, "add up to 16776960"),
    ],
)
def test_what_is_no_table_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtefactError, match="ngrams") as caught:
        NGrams.from_dict(table(CHAIN).to_dict() | change)
    assert message in str(caught.value)
    with pytest.raises(ArtefactError, match="ngrams is a list: expected an object"):
        NGrams.from_dict([])
