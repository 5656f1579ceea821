"""What a run came to, judged from its evaluations: one word, why, and what to change next.

Pure functions of the rows of `metrics.jsonl` and a few facts: knows nothing of torch, files or
terminals.

Try: `judge(read_metrics(paths.metrics), facts).advice`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from pico_edge.train.report import TrainResult, count, duration, quote, size, visible
from pico_edge.train.settings import PRESETS

WORDS = (
    "unfinished",  # stopped by a signal
    "short",  # too few evaluations to say more
    "diverging",  # the training loss rises
    "learnt_nothing",  # no better than the frequencies of the tokens
    "tiny",  # learnt by heart, because there is so little text
    "overfit",  # learnt by heart, though there is some more
    "improving",  # more time would help
    "converged",
)
MIN_EVALUATIONS = 3
TINY_BYTES = 10_000  # five pages: no model learns a language from these
TEXT_FOR_ADVICE = "100 kB"  # where PRESET_BELOW_BYTES ends nano
# Relative changes of a loss. An evaluation of a small text is noisy by half a percent or so.
NOISE = 0.01
GAP = 0.1  # training this far below held out is more than the noise between two parts of a text
WIDE_GAP = 0.3
STEEP = 0.08  # lost in the last quarter, when the learning rate is small: far from the end
RISE = 0.15  # of the training loss above its lowest
LEARNT = 0.03  # below the baseline
SAMPLE_LINES = 6

SizedBy = Literal["preset", "flags", "target", "checkpoint"]


@dataclass(frozen=True)
class Facts:
    """What the rows do not say. minutes: of the schedule, None where iterations were asked for.

    sized_by: what decided how large the model is; advice on its size must not contradict that.
    baseline_bits_per_byte: held out, of `baseline`. train_bytes: of the text trained on.
    """

    stopped: str
    preset: str
    sized_by: SizedBy
    dropout: float
    minutes: float | None
    max_iters: int
    tokens_per_epoch: int
    train_bytes: int
    baseline_bits_per_byte: float
    learning_rate: float
    resume_command: str


class Verdict(NamedTuple):
    """word: one of WORDS. finding, advice: a line each."""

    word: str
    finding: str
    advice: str


class Curve(NamedTuple):
    """The end of a run. Losses in nats per token; fall: a share of the held-out loss, over the
    last_iters iterations of its last quarter."""

    best_val_loss: float
    best_bits_per_byte: float
    best_iter: int
    lowest_train_loss: float
    train_loss: float
    val_loss: float
    fall: float
    last_iters: int


def judge(rows: Sequence[Mapping[str, Any]], facts: Facts) -> Verdict:
    """What the evaluations say, in the order of their iterations."""
    if facts.stopped == "signal":
        return Verdict("unfinished", "stopped before its end", facts.resume_command)
    if len(rows) < MIN_EVALUATIONS:
        finding = f"evaluated too seldom to judge ({len(rows)}, of at least {MIN_EVALUATIONS})"
        return Verdict("short", finding, _faster(facts))
    curve = summarize(rows)
    by_heart = _by_heart(curve)
    if (
        curve.train_loss > (1 + RISE) * curve.lowest_train_loss
        and curve.val_loss > (1 + RISE) * curve.best_val_loss
    ):
        return Verdict(
            "diverging",
            f"the training loss itself rose, from {curve.lowest_train_loss:.3f} to "
            f"{curve.train_loss:.3f}",
            f"smaller steps: --learning-rate {facts.learning_rate / 4:.1g} --force",
        )
    if curve.best_bits_per_byte > (1 - LEARNT) * facts.baseline_bits_per_byte and not by_heart:
        return _learnt_nothing(rows, curve, facts)
    if by_heart:
        return _memorised(rows, curve, facts)
    if curve.fall > NOISE:
        return _improving(curve, facts)
    return _converged(curve, facts)


def summarize(rows: Sequence[Mapping[str, Any]]) -> Curve:
    """The numbers that `judge` looks at; the end is the mean of the last two evaluations."""
    best = min(rows, key=lambda row: float(row["val_loss"]))
    last = rows[-max(3, math.ceil(len(rows) / 4)) :]  # a quarter
    steps = np.array([row["iter"] for row in last], dtype=np.float64)
    losses = np.array([row["val_loss"] for row in last], dtype=np.float64)
    slope = np.polyfit(steps - steps[0], losses, 1)[0]
    return Curve(
        best_val_loss=best["val_loss"],
        best_bits_per_byte=best["val_bits_per_byte"],
        best_iter=best["iter"],
        lowest_train_loss=min(row["train_loss"] for row in rows),
        train_loss=sum(row["train_loss"] for row in rows[-2:]) / 2,
        val_loss=sum(row["val_loss"] for row in rows[-2:]) / 2,
        fall=float(-slope * (steps[-1] - steps[0]) / losses.mean()),
        last_iters=int(steps[-1] - steps[0]),
    )


def _by_heart(curve: Curve) -> bool:
    """Training far below held out, while held out rises, or without any gain."""
    if curve.val_loss > (1 + NOISE) * curve.best_val_loss:
        return curve.train_loss < (1 - GAP) * curve.val_loss
    return curve.fall <= NOISE and curve.train_loss < (1 - WIDE_GAP) * curve.val_loss


def _learnt_nothing(rows: Sequence[Mapping[str, Any]], curve: Curve, facts: Facts) -> Verdict:
    finding = (
        f"nothing learnt yet: {curve.best_bits_per_byte:.2f} bits/byte, and guessing by how often "
        f"each token occurs gives {facts.baseline_bits_per_byte:.2f}"
    )
    if curve.fall > NOISE or rows[-1]["tokens"] < facts.tokens_per_epoch:
        return Verdict("learnt_nothing", finding, _faster(facts))
    advice = "look at the text: compressed, encrypted or random data has no pattern to learn"
    return Verdict("learnt_nothing", finding, advice)


def _memorised(rows: Sequence[Mapping[str, Any]], curve: Curve, facts: Facts) -> Verdict:
    passes = rows[-1]["tokens"] / facts.tokens_per_epoch
    if facts.train_bytes < TINY_BYTES:
        return Verdict(
            "tiny",
            f"this text is too small to learn a language from: {size(facts.train_bytes)}, read "
            f"{count(passes)} times; after iteration {curve.best_iter} it was only learnt by heart",
            f"{TEXT_FOR_ADVICE} or more of such text, or start from a trained model with "
            "--init-from CKPT",
        )
    finding = (
        f"overfits: since iteration {curve.best_iter} it learns the {size(facts.train_bytes)} by "
        f"heart, {curve.train_loss:.2f} on these, {curve.val_loss:.2f} held out"
    )
    smaller = _other_size(facts, -1)
    if facts.dropout < 0.1:
        other = "; else --dropout 0.2 --force"
    elif smaller is not None:
        other = f"; else a smaller model: {smaller} --force"
    else:
        other = ""
    return Verdict("overfit", finding, f"more text of this kind{other}")


def _improving(curve: Curve, facts: Facts) -> Verdict:
    finding = (
        f"still improving: the held-out loss fell by {100 * curve.fall:.1f} % over the last "
        f"{curve.last_iters} iterations"
    )
    advice = _faster(facts) if curve.fall > STEEP else f"more time: {_more_time(facts, 2)}"
    return Verdict("improving", finding, advice)


def _converged(curve: Curve, facts: Facts) -> Verdict:
    finding = "converged: the held-out loss has stopped falling"
    larger = _other_size(facts, 1)
    if curve.train_loss < (1 - GAP) * curve.val_loss:
        return Verdict("converged", finding, "more text of this kind")
    if larger is None:
        anew = facts.sized_by == "checkpoint"
        larger = "a larger model, trained anew" if anew else "a wider model: --n-embd"
        return Verdict("converged", finding, f"more text, and {larger}")
    return Verdict("converged", finding, f"a larger model: {larger} {_more_time(facts, 2)}")


def _faster(facts: Facts) -> str:
    """For a run that ended far from the end of what it can learn."""
    smaller = _other_size(facts, -1)
    other = "" if smaller is None else f"; or a model that learns faster: {smaller} --force"
    return f"more time: {_more_time(facts, 4)}{other}"


def _more_time(facts: Facts, factor: int) -> str:
    if facts.minutes is None:
        return f"--max-iters {factor * facts.max_iters} --force"
    return f"--minutes {factor * facts.minutes:.3g} --force"


def _other_size(facts: Facts, step: Literal[1, -1]) -> str | None:
    """Flags of the next larger (1) or smaller (-1) model; None where there is none, or no flag."""
    names = list(PRESETS)
    place = names.index(facts.preset) + step
    more, less = ("higher", "lower") if step > 0 else ("lower", "higher")
    return {
        "preset": f"--preset {names[place]}" if 0 <= place < len(names) else None,
        "flags": f"a {more} --n-layer or --n-embd,",
        "target": f"a {more} --target-bytes or a {less} --target-tokens-per-second,",
        "checkpoint": None,
    }[facts.sized_by]


def baseline(train: np.ndarray, val: np.ndarray, *, n_vocab: int, n_val_bytes: int) -> float:
    """Bits per byte of `val` for who only knows how often each token occurs in `train`.

    train, val: token ids, (N,) and (M,). n_val_bytes: UTF-8 bytes of `val`. Each token counts once
    more than it occurs, so that none is impossible.
    """
    counts = np.bincount(train, minlength=n_vocab) + 1.0
    nats = -np.log(counts / counts.sum())[val]  # (M,)
    return float(nats.sum() / (math.log(2) * max(1, n_val_bytes)))


def closing_lines(
    result: TrainResult, verdict: Verdict, *, patience: int, sample: str | None
) -> list[str]:
    """The lines that end a run: how good it is, what to change, a sample, where it is, what next.

    sample: text of the best model.
    """
    lines = [
        f"trained {count(result.parameters)} parameters on {count(result.tokens)} tokens "
        f"in {duration(result.elapsed_s)}, {result.iter} of {result.max_iters} iterations"
    ]
    if result.stopped == "patience":
        lines.append(
            f"stopped early: the held-out loss has not improved for {patience} evaluations; "
            f"the best model, of iteration {result.best_iter}, is kept"
        )
    if result.val_loss is not None and result.val_bits_per_byte is not None:
        lines.append(
            f"best held-out loss {result.val_loss:.4f} nats/token, "
            f"{result.val_bits_per_byte:.3f} bits/byte, at iteration {result.best_iter}"
        )
    if result.stopped == "signal":
        lines.append(f"stopped by signal {result.signal}, all is saved; to continue exactly:")
        lines.append(f"  {result.resume_command}")
        return lines
    lines.append(f"verdict: {verdict.finding}")
    lines.append(f"advice: {verdict.advice}")
    if sample is not None:
        lines.append("the best model writes:")
        lines += ["  " + visible(line.expandtabs(4)) for line in sample_lines(sample)]
    if result.file is not None:
        lines.append(f"wrote {result.file}")
        lines.append(f"next: pico-edge export {quote(result.file)} --quantize")
    elif result.best_iter is not None:
        lines.append("the best model is not where it was saved: train again, with --force")
    return lines


def sample_lines(text: str) -> list[str]:
    """The first few lines of a text that are not empty."""
    return [line for line in text.splitlines() if line.strip()][:SAMPLE_LINES]
