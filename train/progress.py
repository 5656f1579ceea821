"""The lines that follow a run, cut to the terminal: what matters least goes first.

Pure functions of plain values: knows nothing of torch, clocks or streams.

Try: `fit([(0, "iter 3/9"), (1, "loss 2.1")], columns=12)` -> "iter 3/9".
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from pico_edge.train.report import duration, size

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
SEPARATOR = " | "


def progress_line(
    *,
    step: int,
    max_iters: int,
    loss: float,
    val_loss: float | None,
    bits_per_byte: float | None,
    tokens_per_second: float | None,
    utilization: str | None,
    memory_bytes: int | None,
    left_s: float,
    columns: int | None,
) -> str:
    """Where a run stands between two evaluations. Losses in nats per token; None is left out.

    val_loss, bits_per_byte: of the last evaluation. utilization: as `mfu.Meter.text` says it.
    columns: of the terminal, None for no limit.
    Example: "iter 120/963 | loss 1.834 | held out 1.902 | 1:20 left" in 60 columns.
    """
    parts = [(0, f"iter {step}/{max_iters}"), (2, f"loss {loss:.3f}")]
    if val_loss is not None:
        parts.append((3, f"held out {val_loss:.3f}"))
    if bits_per_byte is not None:
        parts.append((4, f"{bits_per_byte:.3f} bits/byte"))
    if tokens_per_second:
        parts.append((5, f"{tokens_per_second:,.0f} tokens/s"))
    if utilization is not None:
        parts.append((6, utilization))
    if memory_bytes is not None:
        parts.append((7, size(memory_bytes)))
    parts.append((1, f"{duration(left_s)} left"))
    return fit(parts, columns)


def evaluation_line(
    *,
    step: int,
    max_iters: int,
    train_loss: float,
    val_loss: float,
    bits_per_byte: float,
    tokens_per_second: float,
    elapsed_s: float,
    is_best: bool,
    columns: int | None,
) -> str:
    """What an evaluation found. Losses in nats per token; columns as in `progress_line`."""
    parts = [
        (0, f"iter {step}/{max_iters}"),
        (3, f"train {train_loss:.4f}"),
        (1, f"held out {val_loss:.4f}"),
        (4, f"{bits_per_byte:.3f} bits/byte"),
        (6, f"{tokens_per_second:,.0f} tokens/s"),
        (5, duration(elapsed_s)),
    ]
    if is_best:
        parts.append((2, "best"))
    return fit(parts, columns)


def fit(parts: Sequence[tuple[int, str]], columns: int | None) -> str:
    """Parts (rank, text) in one line, without those of the highest ranks where they do not fit."""
    for limit in sorted((rank for rank, _ in parts), reverse=True):
        line = SEPARATOR.join(text for rank, text in parts if rank <= limit)
        if columns is None or width(line) <= columns:
            return line
    return cut(line, columns) if parts else ""


def cut(text: str, columns: int | None) -> str:
    """The text, ended by an ellipsis where it is wider than that. Example: ("abcd", 3) -> "ab…"."""
    if columns is None or width(text) <= columns:
        return text
    kept, used = "", width(ELLIPSIS)
    for char in text:
        used += width(char)
        if used > columns:
            break
        kept += char
    return kept + ELLIPSIS


def width(text: str) -> int:
    """Columns of a terminal that a line takes: two for a wide character, none for a mark above."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )
