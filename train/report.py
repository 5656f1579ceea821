"""What a run says and leaves to read: progress, `metrics.jsonl`, `samples.txt`, `loss.png`.

Knows nothing of torch. On a terminal the progress line is rewritten in place, elsewhere there are
plain lines; no colours anywhere.

Try: `Reporter(sys.stderr).say("hello")`.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pico_edge import publish

# Between plain progress lines, where none can be rewritten.
LINE_EVERY_S = 30.0
REWRITE_EVERY_S = 0.2


class Reporter:
    """Prints for one run; remembers whether an unfinished progress line stands on the terminal."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._rewrites = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._width = 0
        self._printed_at = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._quiet:
            return
        self.end_progress()
        print(text, file=self._stream, flush=True)
        self._printed_at = time.monotonic()

    def progress(self, text: str) -> None:
        """Show the newest progress, now and then."""
        now = time.monotonic()
        every = REWRITE_EVERY_S if self._rewrites else LINE_EVERY_S
        if self._quiet or now - self._printed_at < every:
            return
        self._printed_at = now
        if not self._rewrites:
            print(text, file=self._stream, flush=True)
            return
        text = text[: shutil.get_terminal_size().columns - 1]
        print("\r" + text.ljust(self._width), end="", file=self._stream, flush=True)
        self._width = len(text)

    def end_progress(self) -> None:
        """Clear the progress line, before something else is printed."""
        if self._width:
            print("\r" + " " * self._width + "\r", end="", file=self._stream, flush=True)
            self._width = 0


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. Losses in nats per token, of the best model, which is in `file`.

    stopped: "max_iters", "patience" (the held-out loss no longer improved) or "signal", then with
    its number. file and the losses are None when a signal came before the first evaluation.
    """

    file: str | None
    run_folder: str
    stopped: str
    signal: int | None
    iter: int
    max_iters: int
    tokens: int
    parameters: int
    elapsed_s: float
    best_iter: int | None
    val_loss: float | None
    val_bits_per_byte: float | None
    resume_command: str


def verdict(result: TrainResult, *, patience: int) -> list[str]:
    """The lines that end a run: what was trained, how good it is, where it is, what to do next."""
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
    elif result.file is not None:
        lines.append(f"wrote {result.file}")
        lines.append(f"next: pico-edge export {quote(result.file)} --quantize")
    return lines


def append_metrics(path: Path, values: Mapping[str, Any]) -> None:
    """Add one evaluation to `metrics.jsonl`: one JSON object, one line, readable at once."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(values), allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The evaluations in `metrics.jsonl`; a line that a crash cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("iter"), int):
            rows.append(row)
    return rows


def cut_metrics(path: Path, last_iter: int) -> None:
    """Drop evaluations after last_iter: the resumed run makes them again."""
    if not path.exists():
        return
    rows = [row for row in read_metrics(path) if row["iter"] <= last_iter]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    publish.publish(path, lambda file: file.write(text.encode()))


def append_sample(path: Path, step: int, text: str) -> None:
    """Add one sample to `samples.txt` under a line that names the iteration."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(f"=== iteration {step}\n{text}\n\n")


def cut_file(path: Path, n_bytes: int) -> None:
    """Cut a file that grew after a checkpoint back to what it was then."""
    if path.exists() and path.stat().st_size > n_bytes:
        os.truncate(path, n_bytes)


def draw_losses(metrics: Path, image: Path) -> bool:
    """`loss.png`: training and held-out loss by iteration. False without matplotlib or data."""
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
    axes.plot(steps, [row["train_loss"] for row in rows], label="training")
    axes.plot(steps, [row["val_loss"] for row in rows], label="held out")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    publish.publish(image, lambda file: file.write(buffer.getvalue()))
    return True


def duration(seconds: float) -> str:
    """Example: 75.2 -> "1:15", 3700 -> "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def count(n: float) -> str:
    """Example: 812_032 -> "812k", 3_290_000 -> "3.29M", 950 -> "950"."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            return f"{n / limit:.3g}{unit}"
    return f"{n:.0f}"


def one_line(text: str) -> str:
    """A text for one line of a terminal: white space is a blank, what moves the cursor a dot."""
    joiner = "\N{ZERO WIDTH JOINER}"  # not printable, and part of many emoji
    line = " ".join(text.split())
    return "".join(c if c.isprintable() or c == joiner else "\N{MIDDLE DOT}" for c in line)


def quote(argument: str) -> str:
    """An argument as the shell of this system wants it typed."""
    return subprocess.list2cmdline([argument]) if os.name == "nt" else shlex.quote(argument)
