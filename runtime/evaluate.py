"""Loss of a model file on a text, by the engine that runs it, and one file against another.

Needs no torch. Knows nothing of files of text. Try: `evaluate(Session("model.onnx"), ids)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pico_edge.runtime.session import Session
from pico_edge.tokenizer import Tokenizer

# Tokens per call: wide enough for the fast kernels, small enough that the logits of a 50,304-token
# vocabulary stay at 26 MB.
CHUNK_TOKENS = 128

FloatArray = npt.NDArray[np.floating[Any]]
Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Loss over `tokens` predictions."""

    tokens: int
    bytes: int  # UTF-8 length of the predicted tokens, special tokens excluded
    loss: float  # nats per token
    bits_per_byte: float


@dataclass(frozen=True)
class Comparison:
    """A file against a reference on the same predictions."""

    evaluation: Evaluation
    reference: Evaluation
    top1_agreement: float  # share of predictions where both find the same token likeliest
    kl_divergence: float  # mean of KL(reference || this), nats per token

    @property
    def loss_increase_percent(self) -> float:
        """Loss above the reference's, in percent of it."""
        return 100 * (self.evaluation.loss / self.reference.loss - 1)


def evaluate(session: Session, ids: Sequence[int]) -> Evaluation:
    """Loss of a text in windows of block_size that do not overlap; every id but the first counts.

    Each prediction has a context of 1 to block_size ids. Probabilities are over the tokenizer's
    vocabulary, not the padding. Raises ValueError for fewer than 2 ids.
    """
    n_vocab, nll = session.tokenizer.n_vocab, 0.0
    for targets, (logits,) in _chunks([session], ids):
        nll += _nll(log_softmax(logits[:, :n_vocab]), targets)
    return _evaluation(session.tokenizer, ids, nll)


def compare(session: Session, reference: Session, ids: Sequence[int]) -> Comparison:
    """`evaluate` of two files on the same windows, and how far their predictions are apart."""
    n_vocab, nll, reference_nll, kl, agree = session.tokenizer.n_vocab, 0.0, 0.0, 0.0, 0
    for targets, (logits, reference_logits) in _chunks([session, reference], ids):
        log_p = log_softmax(logits[:, :n_vocab])
        log_q = log_softmax(reference_logits[:, :n_vocab])
        nll += _nll(log_p, targets)
        reference_nll += _nll(log_q, targets)
        kl += float((np.exp(log_q) * (log_q - log_p)).sum())
        agree += int((log_p.argmax(1) == log_q.argmax(1)).sum())
    tokens = len(ids) - 1
    return Comparison(
        evaluation=_evaluation(session.tokenizer, ids, nll),
        reference=_evaluation(session.tokenizer, ids, reference_nll),
        top1_agreement=agree / tokens,
        kl_divergence=kl / tokens,
    )


def log_softmax(logits: FloatArray) -> Float64Array:
    """Natural-log probabilities (N, V) in float64."""
    shifted: Float64Array = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _nll(log_p: Float64Array, targets: npt.NDArray[np.int64]) -> float:
    return -float(log_p[np.arange(len(targets)), targets].sum())


def _evaluation(tokenizer: Tokenizer, ids: Sequence[int], nll: float) -> Evaluation:
    tokens = len(ids) - 1
    n_bytes = len(tokenizer.decode_bytes(ids[1:]))
    return Evaluation(
        tokens=tokens,
        bytes=n_bytes,
        loss=nll / tokens,
        bits_per_byte=nll / (math.log(2) * max(n_bytes, 1)),
    )


def _chunks(
    sessions: Sequence[Session], ids: Sequence[int]
) -> Iterator[tuple[npt.NDArray[np.int64], list[FloatArray]]]:
    """Targets and, from each session, the logits (S, V) that predict them, a chunk at a time."""
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} tokens: a loss needs 2 or more")
    block_size = sessions[0].config.block_size
    caches = [session.new_cache() for session in sessions]
    array = np.asarray(ids, dtype=np.int64)
    for start in range(0, len(array) - 1, block_size):
        for cache in caches:
            cache.reset()
        window = array[start : start + block_size + 1]
        for at in range(0, len(window) - 1, CHUNK_TOKENS):
            targets = window[at + 1 : at + 1 + CHUNK_TOKENS]
            inputs = window[at : at + len(targets)]
            yield targets, [cache.append(0, inputs, all_logits=True) for cache in caches]
