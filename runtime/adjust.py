"""Steps 1 to 3 of a draw: what the text so far, biases and bans do to the logits.

The order of all steps is in `pico_edge.runtime.sampling`. Knows token ids, not text but for
`token_of`, which finds the id of a token that is given as text. V is the number of tokens.

Try: `Adjuster(Sampling(no_repeat_ngram_size=2), [1, 2, 1], 4, eot_id=3).adjust(logits)[2]` -> -inf.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pico_edge.errors import PicoEdgeError, UsageError
from pico_edge.runtime.sampling import (
    MAX_LOGIT,
    Logits,
    Sampling,
    check_finite,
    check_number,
    penalize,
)
from pico_edge.tokenizer import Tokenizer

Token = int | str  # an id, or the text of one token


class Adjuster:
    """The adjustments of one text; `add` tells it each token drawn. Not thread-safe."""

    def __init__(
        self,
        sampling: Sampling,
        ids: Sequence[int],
        n_vocab: int,
        *,
        eot_id: int,
        bias: Mapping[int, float] | None = None,
        banned: Sequence[int] = (),
    ) -> None:
        """ids: the prompt, n_vocab: V, bias and banned: ids below V."""
        self._sampling = sampling
        self._eot_id = eot_id
        self._n_drawn = 0
        self._bias_ids = np.array(list(bias or ()), np.intp)
        self._bias = np.array(list((bias or {}).values()), np.float64)
        self._banned = np.array(banned, np.intp)
        self._seen = np.zeros(n_vocab, np.bool_)
        self._seen[list(ids)] = True
        self._counts = np.zeros(n_vocab, np.int64)
        self._n = sampling.no_repeat_ngram_size
        self._last: tuple[int, ...] = ()  # the n - 1 last tokens, fewer at the start
        self._followers: dict[tuple[int, ...], set[int]] = {}  # what came after n - 1 tokens
        for token_id in ids:
            self._extend(token_id)

    def adjust(self, logits: Logits) -> Logits:
        """A copy of logits (V,) as float32, adjusted.

        Raises PicoEdgeError if no token is left, and for logits as `sampling.sample` does.
        """
        sampling = self._sampling
        check_finite(float(logits.max()))
        if sampling.penalizes:
            adjusted = penalize(logits, self._seen, self._counts, sampling)
        else:
            adjusted = logits.astype(np.float32)
        if self._bias.size:
            biased = adjusted[self._bias_ids] + self._bias
            adjusted[self._bias_ids] = np.clip(biased, -MAX_LOGIT, MAX_LOGIT)
        adjusted[self._banned] = -np.inf
        if self._n and len(self._last) == self._n - 1:
            adjusted[list(self._followers.get(self._last, ()))] = -np.inf
        if self._n_drawn < sampling.min_new_tokens:
            adjusted[self._eot_id] = -np.inf
        if adjusted.max() == -np.inf:
            raise PicoEdgeError(
                f"after {self._n_drawn} tokens every token is banned: expected one at least; take "
                "less of banned_tokens, no_repeat_ngram_size or min_new_tokens"
            )
        return adjusted

    def add(self, token_id: int) -> None:
        """A token was drawn."""
        self._n_drawn += 1
        self._seen[token_id] = True
        self._counts[token_id] += 1
        self._extend(token_id)

    def _extend(self, token_id: int) -> None:
        if self._n == 0:
            return
        if len(self._last) == self._n - 1:
            self._followers.setdefault(self._last, set()).add(token_id)
        self._last = (*self._last, token_id)[-self._n + 1 :] if self._n > 1 else ()


def adjusts(sampling: Sampling, bias: Mapping[int, float], banned: Sequence[int]) -> bool:
    """Whether any of the steps 1 to 3 does anything."""
    return bool(
        sampling.penalizes
        or bias
        or banned
        or sampling.no_repeat_ngram_size
        or sampling.min_new_tokens
    )


def token_of(name: str, token: Token, tokenizer: Tokenizer) -> int:
    """The id of a token given by its id or its text; `name` is the argument's, for errors.

    `<|endoftext|>` is the token of that name. Raises UsageError for an id that the tokenizer does
    not have and for a text that is not exactly one token.
    """
    if isinstance(token, str):
        ids = tokenizer.encode(token, allow_special=True)
        if len(ids) != 1:
            raise UsageError(
                f"{name}: {token!r} is {len(ids)} tokens: expected the text of one, or an id"
            )
        return ids[0]
    if isinstance(token, bool) or not isinstance(token, numbers.Integral):
        raise UsageError(f"{name}: {token!r}: expected the id or the text of a token")
    if not 0 <= token < tokenizer.n_vocab:
        raise UsageError(f"{name}: token {token}: expected 0 to {tokenizer.n_vocab - 1}")
    return int(token)


def resolve_bias(bias: Mapping[Token, float] | None, tokenizer: Tokenizer) -> dict[int, float]:
    """logit_bias by id. Raises UsageError for what is no token and no finite number."""
    if bias is None:
        return {}
    if not isinstance(bias, Mapping):
        raise UsageError(f"logit_bias is {bias!r}: expected a mapping of tokens to numbers")
    found: dict[int, float] = {}
    for token, value in bias.items():
        token_id = token_of("logit_bias", token, tokenizer)
        if token_id in found:
            raise UsageError(f"logit_bias: {token!r} is there twice, by id and by text")
        found[token_id] = check_number(f"logit_bias of {token!r}", value, "a finite number")
    return found


def resolve_banned(banned: Sequence[Token] | Token | None, tokenizer: Tokenizer) -> list[int]:
    """banned_tokens by id; a single token may stand for a list of one. Raises UsageError."""
    if banned is None:
        return []
    tokens: Sequence[Any] = banned if isinstance(banned, list | tuple) else [banned]
    return [token_of("banned_tokens", token, tokenizer) for token in tokens]
