"""Loss of a model on a text, by the engine that runs it, and one model against another.

Needs no torch: a model is a function from a window of ids to logits. Knows nothing of files of
text. Try: `evaluate(Session("model.onnx"), ids)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pico_edge.errors import UsageError
from pico_edge.runtime.session import Session
from pico_edge.tokenizer import Tokenizer

# Tokens per call: wide enough for the fast kernels, small enough that the logits of a 50,304-token
# vocabulary stay at 26 MB.
CHUNK_TOKENS = 128

FloatArray = npt.NDArray[np.floating[Any]]
IdArray = npt.NDArray[np.int64]
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


@dataclass(frozen=True)
class Scored:
    """A model to be evaluated.

    predict: from a window (T,) of at most block_size ids to the logits (S, V) of each of its
    places, CHUNK_TOKENS places at a time.
    """

    predict: Callable[[IdArray], Iterator[FloatArray]]
    tokenizer: Tokenizer
    block_size: int


def scored(session: Session) -> Scored:
    """A model file, through the cache that generates."""
    cache = session.new_cache()

    def predict(window: IdArray) -> Iterator[FloatArray]:
        cache.reset()
        for at in range(0, len(window), CHUNK_TOKENS):
            yield cache.append(0, window[at : at + CHUNK_TOKENS], all_logits=True)

    return Scored(predict, session.tokenizer, session.config.block_size)


def evaluate(
    model: Session | Scored,
    ids: Sequence[int],
    *,
    stride: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Loss of a text in windows of block_size ids; every id but the first counts, once.

    stride: ids between the starts of two windows, block_size (they do not overlap) if None. Each
    prediction has a context of block_size - stride + 1 to block_size ids, but for those of the
    first window. Probabilities are over the tokenizer's vocabulary, not the padding. progress: told
    how many predictions are done. Raises ValueError for fewer than 2 ids, UsageError for a stride.
    """
    if isinstance(model, Session):
        model = scored(model)
    n_vocab, nll, done = model.tokenizer.n_vocab, 0.0, 0
    for targets, (logits,) in _chunks([model], ids, stride):
        nll += _nll(log_softmax(logits[:, :n_vocab]), targets)
        done += len(targets)
        if progress is not None:
            progress(done)
    return _evaluation(model.tokenizer, ids, nll)


def compare(
    model: Session | Scored,
    reference: Session | Scored,
    ids: Sequence[int],
    *,
    stride: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Comparison:
    """`evaluate` of two models on the same windows, and how far their predictions are apart.

    The windows are those of the smaller block_size. Raises UsageError unless the vocabularies have
    one size; that they are the same is the caller's to know.
    """
    if isinstance(model, Session):
        model = scored(model)
    if isinstance(reference, Session):
        reference = scored(reference)
    n_vocab = model.tokenizer.n_vocab
    if reference.tokenizer.n_vocab != n_vocab:
        raise UsageError(
            f"the vocabularies have {n_vocab} and {reference.tokenizer.n_vocab} tokens: expected "
            "two models with one tokenizer"
        )
    nll, reference_nll, kl, agree, done = 0.0, 0.0, 0.0, 0, 0
    for targets, (logits, reference_logits) in _chunks([model, reference], ids, stride):
        log_p = log_softmax(logits[:, :n_vocab])
        log_q = log_softmax(reference_logits[:, :n_vocab])
        nll += _nll(log_p, targets)
        reference_nll += _nll(log_q, targets)
        kl += float((np.exp(log_q) * (log_q - log_p)).sum())
        agree += int((log_p.argmax(1) == log_q.argmax(1)).sum())
        done += len(targets)
        if progress is not None:
            progress(done)
    tokens = len(ids) - 1
    return Comparison(
        evaluation=_evaluation(model.tokenizer, ids, nll),
        reference=_evaluation(model.tokenizer, ids, reference_nll),
        top1_agreement=agree / tokens,
        kl_divergence=kl / tokens,
    )


def log_softmax(logits: FloatArray) -> Float64Array:
    """Natural-log probabilities (N, V) in float64."""
    shifted: Float64Array = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _nll(log_p: Float64Array, targets: IdArray) -> float:
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
    models: Sequence[Scored], ids: Sequence[int], stride: int | None
) -> Iterator[tuple[IdArray, list[FloatArray]]]:
    """Targets and, from each model, the logits (S, V) that predict them, a chunk at a time."""
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} tokens: a loss needs 2 or more")
    block_size = min(model.block_size for model in models)
    stride = block_size if stride is None else stride
    if not 1 <= stride <= block_size:
        raise UsageError(f"stride is {stride}: expected 1 to block_size, {block_size}")
    array = np.asarray(ids, dtype=np.int64)
    counted = 0  # predictions so far: ids 1 to `counted`
    for start in range(0, len(array) - 1, stride):
        window = array[start : start + block_size]
        targets = array[start + 1 : start + 1 + len(window)]
        at = 0
        for outputs in zip(*(model.predict(window) for model in models), strict=True):
            new = max(0, counted - start - at)  # those before it were counted in the last window
            n = min(len(outputs[0]), len(targets) - at)  # the last id of all predicts nothing
            if new < n:
                yield targets[at + new : at + n], [logits[new:n] for logits in outputs]
            at += len(outputs[0])
        counted = start + len(targets)
        if counted == len(array) - 1:
            return
