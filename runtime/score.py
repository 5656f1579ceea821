"""Log-probabilities: of a text that is there, and of tokens as they are drawn.

Those of the model itself, before temperature, filters, penalties, biases and bans; natural
logarithms. Knows ids and logits. Try: `score_ids(session, [72, 105])`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pico_edge.runtime.evaluate import CHUNK_TOKENS, log_softmax
from pico_edge.runtime.sampling import Logits
from pico_edge.runtime.session import Session


@dataclass(frozen=True)
class TokenLogprob:
    """A token drawn: its log-probability, and the likeliest ones with theirs, most likely first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class TokenScore:
    """A token of a text: its log-probability, given the `context` tokens before it."""

    token_id: int
    logprob: float
    context: int


def token_logprob(logits: Logits, token_id: int, n_top: int) -> TokenLogprob:
    """From logits (V,): of one token, and of the n_top likeliest, lower ids first among equals."""
    shifted = logits.astype(np.float64) - float(logits.max())
    total = float(np.log(np.exp(shifted).sum()))
    n_top = min(n_top, logits.size)
    top: list[tuple[int, float]] = []
    if n_top:
        lowest = np.partition(logits, logits.size - n_top)[logits.size - n_top]
        ids = (logits >= lowest).nonzero()[0]
        ids = ids[np.argsort(-shifted[ids], kind="stable")][:n_top]
        top = [(int(i), float(shifted[i]) - total) for i in ids]
    return TokenLogprob(token_id, float(shifted[token_id]) - total, top)


def score_ids(session: Session, ids: Sequence[int]) -> list[TokenScore]:
    """Log-probability of each id, the first one given end-of-text, as when a text is started.

    A text longer than the context is read in windows of block_size tokens, each of which begins
    with the second half of the one before: every token has at least half a context before it.
    """
    if len(ids) == 0:
        return []
    n_vocab, block_size = session.tokenizer.n_vocab, session.config.block_size
    ids = [session.tokenizer.eot_id, *ids]
    cache = session.new_cache(capacity=min(block_size, len(ids) - 1))
    scores: list[TokenScore] = []
    start = 0
    while len(scores) < len(ids) - 1:
        cache.reset()
        end = min(start + block_size, len(ids) - 1)  # of the tokens that are read
        for at in range(start, end, CHUNK_TOKENS):
            chunk = ids[at : min(at + CHUNK_TOKENS, end)]
            new = max(0, len(scores) - at)  # the first of them whose prediction is not there yet
            logits = cache.append(0, chunk, all_logits=True)[new:, :n_vocab]
            targets = ids[at + 1 + new : at + 1 + len(chunk)]
            log_p = log_softmax(logits)
            for i, token_id in enumerate(targets):
                scores.append(
                    TokenScore(token_id, float(log_p[i, token_id]), at + new + i + 1 - start)
                )
        start = end - block_size // 2
    return scores
