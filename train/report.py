"""What a run says and leaves to read: the terminal, the result, `metrics.jsonl`, `samples.txt`.

Knows nothing of torch. On a terminal the progress line is rewritten in place, elsewhere there are
plain lines; no colours anywhere.

Try: `Reporter(sys.stderr).say("hello")`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pico_edge import publish

# Between plain progress lines, where none can be rewritten.
LINE_EVERY_S = 30.0
REWRITE_EVERY_S = 0.2
# A sample of the best model so far, up to the line above the next one.
SAMPLE = (
    r"(?:^|\n\n)=== iteration \d+, held-out loss [\d.]+, best so far\n"
    r"(.*?)(?=\n\n=== iteration \d+, held-out loss |\Z)"
)


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

    @property
    def columns(self) -> int | None:
        """Columns of a line that the terminal does not wrap; None where there is no terminal."""
        if not self._stream.isatty():
            return None
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            columns = 0
        # The last one stays free: some terminals wrap as soon as it is filled. 0: not known.
        return max(1, (columns or 80) - 1)

    def progress(self, line: str | Callable[[int | None], str]) -> None:
        """Show the newest progress, now and then: line(columns) is called only when it is time."""
        now = time.monotonic()
        every = REWRITE_EVERY_S if self._rewrites else LINE_EVERY_S
        if self._quiet or now - self._printed_at < every:
            return
        text = line if isinstance(line, str) else line(self.columns)
        self._printed_at = time.monotonic()
        if not self._rewrites:
            print(text, file=self._stream, flush=True)
            return
        if self.columns:
            text = text[: self.columns]
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
    verdict: a word of `verdict.WORDS`; advice: what to change next, one line.
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
    verdict: str
    advice: str


def append_metrics(path: Path, values: Mapping[str, Any]) -> None:
    """Add one evaluation to `metrics.jsonl`: one JSON object, one line, readable at once.

    On a line of its own even where a full disk cut the one before short.
    """
    with path.open("a+", encoding="utf-8") as file:
        if file.tell():
            file.seek(file.tell() - 1)
            if file.read(1) != "\n":
                file.write("\n")
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


def append_sample(path: Path, step: int, text: str, *, val_loss: float, is_best: bool) -> None:
    """Add one sample to `samples.txt` under a line that names iteration and held-out loss.

    is_best: no earlier evaluation found a lower loss; the last one so marked is of the best model.
    """
    best = ", best so far" if is_best else ""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(f"=== iteration {step}, held-out loss {val_loss:.4f}{best}\n{text}\n\n")


def best_sample(path: Path) -> str | None:
    """The last sample marked as best in `samples.txt`, or None."""
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.findall(SAMPLE, text, re.DOTALL)
    return found[-1].rstrip("\n") if found else None


def cut_file(path: Path, n_bytes: int) -> None:
    """Cut a file that grew after a checkpoint back to what it was then."""
    if path.exists() and path.stat().st_size > n_bytes:
        os.truncate(path, n_bytes)


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


def size(n_bytes: float) -> str:
    """Example: 512_000_000 -> "512 MB", 1_234_000_000 -> "1.23 GB", 2_700 -> "2.7 kB"."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= limit:
            return f"{n_bytes / limit:.3g} {unit}"
    return f"{n_bytes:.0f} bytes"


def one_line(text: str) -> str:
    """A text for one line of a terminal: white space is a blank, what moves the cursor a dot."""
    return visible(" ".join(text.split()))


def visible(text: str) -> str:
    """The text with a dot for each character that would move the cursor or command a terminal."""
    joiner = "\N{ZERO WIDTH JOINER}"  # not printable, and part of many emoji
    return "".join(c if c.isprintable() or c == joiner else "\N{MIDDLE DOT}" for c in text)


def quote(argument: str) -> str:
    """An argument as the shell of this system wants it typed."""
    return subprocess.list2cmdline([argument]) if os.name == "nt" else shlex.quote(argument)
