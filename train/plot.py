"""`loss.png`: training and held-out loss by iteration, drawn again while the run goes on.

Knows nothing of torch. Without matplotlib there is no picture, and no error.

Try: `draw_losses(Path("ckpt.run/metrics.jsonl"), Path("loss.png"))`.
"""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np

from pico_edge import publish
from pico_edge.train.report import read_metrics

EVERY_S = 30.0
SHARE = 0.02  # of the run's time, at most
# Import and first drawing, before any was timed. Measured on two cores of an EPYC: 0.3, then 0.08.
FIRST_S = 1.0


class LossPlot:
    """The picture of one run, and what drawing it has cost in this process."""

    def __init__(self, metrics: Path, image: Path) -> None:
        self._metrics, self._image = metrics, image
        self._begin = self._drawn_at = time.monotonic()
        self._spent_s = 0.0
        self._next_s = FIRST_S

    def refresh(self) -> None:
        """Draw if it has been a while and costs next to nothing. Raises OSError."""
        now = time.monotonic()
        run_s, since_s = now - self._begin, now - self._drawn_at
        if not is_due(run_s=run_s, since_s=since_s, spent_s=self._spent_s, next_s=self._next_s):
            return
        draw_losses(self._metrics, self._image)
        self._drawn_at = time.monotonic()
        self._next_s = self._drawn_at - now
        self._spent_s += self._next_s


def is_due(*, run_s: float, since_s: float, spent_s: float, next_s: float) -> bool:
    """Whether to draw now: run_s into the run, since_s after the last, for another next_s."""
    return since_s >= EVERY_S and spent_s + next_s <= SHARE * run_s


def draw_losses(metrics: Path, image: Path) -> bool:
    """Draw the picture. False without matplotlib or with fewer than two evaluations."""
    rows = read_metrics(metrics)
    if len(rows) < 2:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("matplotlib"):
            raise
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [row["iter"] for row in rows]
    best = min(rows, key=lambda row: row["val_loss"])
    axes.plot(steps, [row["train_loss"] for row in rows], label="training")
    (held_out,) = axes.plot(steps, [row["val_loss"] for row in rows], label="held out")
    axes.plot(
        [best["iter"]],
        [best["val_loss"]],
        "o",
        color=held_out.get_color(),
        label=f"best: {best['val_loss']:.3f}, {best['val_bits_per_byte']:.3f} bits/byte",
    )
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    # One factor for all rows: it only depends on the bytes of a held-out token.
    factor = best["val_bits_per_byte"] / best["val_loss"] if best["val_loss"] > 0 else 1.0
    right = axes.secondary_yaxis(
        "right",
        functions=(lambda loss: np.multiply(loss, factor), lambda bits: np.divide(bits, factor)),
    )
    right.set_ylabel("bits per byte")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    publish.publish(image, lambda file: file.write(buffer.getvalue()))
    return True
