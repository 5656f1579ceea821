"""Hold an exported file to the torch model, by every way in which the runtime reaches a position.

Runs onnxruntime through the same Session and Cache that generate uses. Makes the parity record that
the file carries. Try: `measure_parity(model, Session("model.onnx"), ids)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pico_edge.errors import PicoEdgeError
from pico_edge.runtime.digests import digests
from pico_edge.runtime.evaluate import evaluate
from pico_edge.runtime.preflight import read_model_file
from pico_edge.runtime.session import Session
from pico_edge.train.model import GPT

# Largest difference of a logit from torch's, for logits of up to 10 in size and in proportion
# above: float32 rounding grows with them. Measured on trained models of 4 to 12 layers: 1e-5 to
# 4e-5.
FP32_TOLERANCE = 1e-4
TOLERANCE_SCALE = 10.0
# Of a float16 file, over the largest logit.
FP16_TOLERANCE = 2e-2
GREEDY_TOKENS = 64
PROMPT_TOKENS = 32
RECORDED_LOGITS = 16
# Steps decoded one by one at each end of the context; the middle is covered by chunks.
STEPS = 24
# Lengths of the chunks that a window is fed in, after an empty cache: 1, odd, a power of two, the
# rest.
CHUNKS = (1, 7, 16)

# Of the sample whose loss is in the file: a few hundred bytes there, some milliseconds to replay.
SAMPLE_TOKENS = 256


class Tolerance(NamedTuple):
    """How far a file may be off its own record on another machine.

    logits: absolute, for logits up to TOLERANCE_SCALE. loss_percent: of the sample's bits per byte.
    """

    logits: float
    loss_percent: float


# Sums in another order move a float by its rounding; where an activation lies between two codes,
# that moves it by a whole step, and the difference is then of the size of the quantization error.
# Measured between the kernels for VNNI and for AVX2: see tests/export/test_parity.py.
REPLAY_TOLERANCES = {
    "fp32": Tolerance(1e-4, 0.001),
    "fp16": Tolerance(FP16_TOLERANCE * TOLERANCE_SCALE, 0.2),
    "int8": Tolerance(0.1, 0.2),
    "int4": Tolerance(0.1, 0.2),
}

FloatArray = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Parity:
    """Distance of a file from torch over all checks, in logits."""

    max_abs_error: float
    max_rel_error: float  # over the largest logit of the reference
    greedy_match_tokens: int  # of GREEDY_TOKENS, up to the first that differs
    worst: str  # the check with the largest error


def measure_parity(model: GPT, session: Session, ids: Sequence[int]) -> Parity:
    """Compare prefill, single steps, chunks and a ragged batch with torch's full forward.

    ids: at least block_size tokens. Cache lengths 0, 1, up to block_size are reached by steps at
    both ends of the context and by chunks between.
    """
    block_size = model.config.block_size
    window = np.asarray(ids[:block_size], dtype=np.int64)
    if len(window) < block_size:
        raise ValueError(f"{len(window)} tokens: parity needs block_size, {block_size}")
    expected = _torch_logits(model, window)
    errors = {
        "one prefill": _error(_prefill(session, window), expected[-1:]),
        "chunks": _error(_chunked(session, window), expected),
        "steps from an empty cache": _error(*_steps(session, window, expected, 0)),
        "steps to the end of the context": _error(
            *_steps(session, window, expected, max(0, block_size - STEPS))
        ),
        "a ragged batch": _batch_error(model, session, window),
    }
    worst = max(errors, key=lambda name: errors[name])
    prompt = window[: _prompt_tokens(block_size)]
    return Parity(
        max_abs_error=errors[worst],
        max_rel_error=errors[worst] / (float(np.abs(expected).max()) or 1.0),
        greedy_match_tokens=_greedy_match(model, session, prompt),
        worst=worst,
    )


def check_parity(parity: Parity, *, relative: float | None = None) -> None:
    """Raise PicoEdgeError unless a file is torch's equal.

    Within FP32_TOLERANCE, or within `relative` of the largest logit.
    """
    largest_logit = parity.max_abs_error / max(parity.max_rel_error, 1e-30)
    tolerance = FP32_TOLERANCE * max(1.0, largest_logit / TOLERANCE_SCALE)
    if relative is not None:
        tolerance = relative * largest_logit
    if not parity.max_abs_error <= tolerance:  # also true for nan
        raise PicoEdgeError(
            f"the exported graph differs from PyTorch by {parity.max_abs_error:.2g} in a logit "
            f"({parity.worst}): expected at most {tolerance:.2g}; no file was written: "
            "please report this with the versions that pico-edge --version prints"
        )


def parity_record(
    session: Session, ids: Sequence[int], sample: Sequence[int], parity: Parity
) -> dict[str, Any]:
    """What `pico_edge.runtime.verify` repeats on the device, without torch.

    A prompt, its greedy continuation by this very file on this machine, the largest logits after
    the prompt, and the loss of a sample of text, each with how far another machine may be off; and
    the digests of weights, nodes and metadata. session: on a file that holds all but this record.
    """
    sample = [int(i) for i in sample[:SAMPLE_TOKENS]]
    tolerance = REPLAY_TOLERANCES[session.export["precision"]]
    prompt = [int(i) for i in ids[: _prompt_tokens(session.config.block_size)]]
    n_vocab = session.tokenizer.n_vocab
    logits = session.new_cache().prefill([prompt])[0, :n_vocab]
    order = np.argsort(-logits, kind="stable")[:RECORDED_LOGITS]
    return {
        "prompt_ids": prompt,
        "greedy_ids": _greedy(session, prompt),
        "logits": {
            "ids": [int(i) for i in order],
            "values": [round(float(logits[i]), 6) for i in order],
            "tolerance": tolerance.logits * max(1.0, float(np.abs(logits).max()) / TOLERANCE_SCALE),
        },
        "sample": {
            "ids": sample,
            "bits_per_byte": evaluate(session, sample).bits_per_byte,
            "tolerance_percent": tolerance.loss_percent,
        },
        "digests": digests(read_model_file(session.path)),
        "max_abs_error": parity.max_abs_error,
        "max_rel_error": parity.max_rel_error,
        "greedy_match_tokens": parity.greedy_match_tokens,
    }


def _prefill(session: Session, window: npt.NDArray[np.int64]) -> FloatArray:
    return session.new_cache().prefill([window])


def _chunked(session: Session, window: npt.NDArray[np.int64]) -> FloatArray:
    cache, parts, at = session.new_cache(), [], 0
    for size in (*CHUNKS, len(window)):
        chunk = window[at : at + size]
        if len(chunk):
            parts.append(cache.append(0, chunk, all_logits=True))
        at += len(chunk)
    return np.concatenate(parts)


def _steps(
    session: Session, window: npt.NDArray[np.int64], expected: FloatArray, start: int
) -> tuple[FloatArray, FloatArray]:
    """Logits of single steps after `start` tokens, and what they should be."""
    cache = session.new_cache()
    end = min(start + STEPS, len(window))
    if start:
        cache.append(0, window[:start])
    got = np.concatenate([cache.decode(window[i : i + 1]).copy() for i in range(start, end)])
    return got, expected[start:end]


def _batch_error(model: GPT, session: Session, window: npt.NDArray[np.int64]) -> float:
    """Three prompts of different lengths in one batch, then two tokens for each."""
    n = len(window)
    rows = [window[: max(1, n // 2)], window[1 : max(2, n // 4)], window[2:4]]
    rows = [row if len(row) else window[:1] for row in rows]
    follow = window[:2]
    cache = session.new_cache(batch=len(rows))
    got = [cache.prefill(rows).copy()]
    room = min(n - max(len(row) for row in rows), len(follow))
    got += [cache.decode(np.repeat(token, len(rows))).copy() for token in follow[:room]]
    worst = 0.0
    for i, row in enumerate(rows):
        expected = _torch_logits(model, np.concatenate((row, follow[:room])))
        for step, logits in enumerate(got):
            worst = max(worst, _error(logits[i], expected[len(row) - 1 + step]))
    return worst


def _greedy_match(model: GPT, session: Session, prompt: npt.NDArray[np.int64]) -> int:
    """Tokens until torch would take another one.

    Up to there both have the same text before them, so one pass over the file's text tells.
    """
    got = _greedy(session, prompt.tolist())
    logits = _torch_logits(model, np.array([*prompt, *got[:-1]]))
    expected = logits[len(prompt) - 1 :, : session.tokenizer.n_vocab].argmax(1)
    return next(
        (i for i, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]),
        len(got),
    )


def _greedy(session: Session, prompt: Sequence[int]) -> list[int]:
    cache, n_vocab = session.new_cache(), session.tokenizer.n_vocab
    logits = cache.prefill([prompt])
    ids = [int(logits[0, :n_vocab].argmax())]
    while len(ids) < _greedy_steps(session, len(prompt)):
        ids.append(int(cache.decode(ids[-1:])[0, :n_vocab].argmax()))
    return ids


def _prompt_tokens(block_size: int) -> int:
    return max(1, min(PROMPT_TOKENS, block_size // 2))


def _greedy_steps(session: Session, n_prompt: int) -> int:
    """As many as fit: the last token made is never fed back."""
    return min(GREEDY_TOKENS, session.config.block_size - n_prompt + 1)


@torch.no_grad()
def _torch_logits(model: GPT, window: npt.NDArray[np.int64]) -> FloatArray:
    logits, _ = model(torch.from_numpy(np.ascontiguousarray(window))[None])
    return logits[0].numpy()  # type: ignore[no-any-return]


def _error(got: FloatArray, expected: FloatArray) -> float:
    return float(np.abs(got - expected).max())
