"""The contexts of the training text that best foretell the next token, for `pico_edge.ngrams`.

One pass over the training tokens, or over windows spread over many of them; the same tokens give
the same table. Never sees the held-out part.

Measured on tiny shakespeare, the first 90 % counted, drafts of at most 4 / 8 tokens from the true
text of the rest (a model's own text is easier to foretell), per draft:

    bytes     contexts of 2 to 8, 48967 entries: 0.96 / 1.03 tokens right of 1.94 / 2.37 drafted
              contexts of 2 to 6, 37066 entries: 0.91 / 0.97 of 1.70 / 1.95
    bpe-4096  contexts of 1 to 5, 12056 entries: 0.27 / 0.28 of 0.48 / 0.52

Half of the time as the least confidence was best where a wrong token costs 0.15 of a step: with 0.4
bytes get 1.10 right of 3.1, with 0.6 0.92 of 1.7. A confidence for each entry, to end drafts by
their product, gained nothing over that. 0.25 s for MAX_TOKENS.

Try: `count_ngrams(data.train, 257)`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pico_edge.ngrams import BITS, MULTIPLIER, SHIFT, NGrams, max_entries
from pico_edge.tokenizer import SimpleTokenizer
from pico_edge.train.tokens import IdArray, Tokens

# Shortest and longest context: bytes say less each than the tokens of a larger vocabulary.
BYTE_ORDERS = (2, 8)
BPE_ORDERS = (1, 5)
# A context counts if the same token follows it this often, and half of the time at least: each
# wrong token of a draft costs a part of a step.
MIN_COUNT = 2
MAX_TOKENS = 1 << 20
_WINDOWS = 32

_Ints = NDArray[np.int64]
# What is sorted: hash of the context, the token after it, whether a shorter context foretold that.
_ID_BITS = 21
_HASH_BITS = 64 - _ID_BITS - 1
_NOTHING = np.int32(-1)


def count_ngrams(tokens: Tokens | IdArray, n_vocab: int) -> NGrams:
    """The table of the tokens: the contexts that foretell most, as many as its size limit allows.

    A longer context is in it only for the tokens that it foretells and a shorter one does not.
    """
    ids = _sample(tokens)
    min_order, max_order = BYTE_ORDERS if n_vocab <= SimpleTokenizer.n_vocab else BPE_ORDERS
    table = np.full(1 << BITS, _NOTHING)  # what the orders so far foretell, by key
    hashes = np.zeros(len(ids), np.uint64)  # of the `order` tokens before each position
    plus_one = ids.astype(np.uint64) + np.uint64(1)
    foretold = np.full(len(ids), _NOTHING)
    parts: list[tuple[_Ints, _Ints, _Ints]] = []
    for order in range(1, min(max_order, len(ids) - 1) + 1):
        # For positions order, order + 1, ...; from the newest token of a context to its oldest.
        hashes = (hashes[1:] + plus_one[: len(ids) - order]) * np.uint64(MULTIPLIER)
        hashes ^= hashes >> np.uint64(SHIFT)
        if order < min_order:
            continue
        following = ids[order:]
        hits = foretold[order:] == following
        gains, keys, best = _best(hashes, following, hits)
        parts.append((gains, keys, best))
        table[keys] = best
        now = table[(hashes >> np.uint64(64 - BITS)).astype(np.int64)]
        foretold[order:] = np.where(now == _NOTHING, foretold[order:], now)
    return _largest(parts, min_order=min_order, max_order=max_order, n_vocab=n_vocab)


def _sample(tokens: Tokens | IdArray) -> IdArray:
    """All tokens, or MAX_TOKENS of them in windows from the first to the last."""
    if len(tokens) <= MAX_TOKENS:
        return tokens[:]
    size = MAX_TOKENS // _WINDOWS
    starts = [i * (len(tokens) - size) // (_WINDOWS - 1) for i in range(_WINDOWS)]
    return np.concatenate([tokens[start : start + size] for start in starts])


def _best(
    hashes: NDArray[np.uint64], following: IdArray, hits: NDArray[np.bool_]
) -> tuple[_Ints, _Ints, _Ints]:
    """Contexts worth an entry: gain (tokens newly foretold), key, the token that mostly follows.

    hashes, following, hits: of each position its context's hash, its token, whether a shorter
    context foretold it.
    """
    packed = hashes >> np.uint64(64 - _HASH_BITS) << np.uint64(_ID_BITS + 1)
    packed |= following.astype(np.uint64) << np.uint64(1)
    packed |= hits
    packed.sort()
    n_hits = packed & np.uint64(1)
    packed >>= np.uint64(1)
    pairs = _starts(packed)  # of the runs of one context and one token
    counts = np.diff(np.append(pairs, len(packed)))
    ids = (packed[pairs] & np.uint64((1 << _ID_BITS) - 1)).astype(np.int64)
    contexts = packed[pairs] >> np.uint64(_ID_BITS)
    groups = _starts(contexts)  # of the runs, in `pairs`, of one context
    most = np.maximum.reduceat(counts, groups)
    seen = np.add.reduceat(counts, groups)
    gains = most - np.add.reduceat(n_hits, pairs[groups]).astype(np.int64)
    chosen = (most >= MIN_COUNT) & (2 * most >= seen) & (gains > 0)
    # The lowest of the tokens that follow most often.
    is_most = counts == np.repeat(most, np.diff(np.append(groups, len(pairs))))
    where = np.where(is_most, np.arange(len(pairs)), len(pairs))
    first = np.minimum.reduceat(where, groups)[chosen]
    keys = (contexts[groups][chosen] >> np.uint64(_HASH_BITS - BITS)).astype(np.int64)
    return gains[chosen], keys, ids[first]


def _starts(values: NDArray[np.uint64]) -> _Ints:
    """Where each run of equal values begins."""
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    return np.concatenate([np.zeros(1, np.int64), changes])


def _largest(parts: list[tuple[_Ints, _Ints, _Ints]], **shape: Any) -> NGrams:
    """The table of the entries with the largest gains, each key once."""
    gains, keys, best = (
        np.concatenate([np.zeros(0, np.int64), *(part[i] for part in parts)]) for i in range(3)
    )
    order = np.lexsort((keys, -gains))
    _, first = np.unique(keys[order], return_index=True)  # the first: of the largest gain
    kept = order[np.sort(first)[: max_entries(shape["n_vocab"])]]
    kept = kept[np.argsort(keys[kept])]
    return NGrams(keys[kept].astype(np.uint32), best[kept].astype(np.uint32), **shape)
