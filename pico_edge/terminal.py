"""What the commands share: flags, the two streams, signals, extras.

The product goes to stdout, all else to stderr. Knows no engine. Try: `say("note: on stderr")`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import sys
import textwrap
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Literal

import typer

from pico_edge.errors import PicoEdgeError, UsageError

SIGPIPE = 13  # which Windows does not name
COLUMNS = 80  # of tables for people
NO_BREAK = "\u00a0"  # keeps a number and its unit on one line; printed as a space
MAX_CHARACTERS = 2000  # of one entry of a table: a file may hold anything

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Nothing on stderr but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what exists.")]
Provider = Annotated[
    Literal["auto", "cpu", "cuda", "directml", "webgpu"], typer.Option(help="Where to run.")
]
Threads = Annotated[str, typer.Option(metavar="N|auto", help="CPU threads.")]
# Of a text to be measured on.
Encoding = Annotated[str | None, typer.Option(metavar="NAME", help="Of the text, if not UTF-8.")]
TextField = Annotated[str, typer.Option(metavar="NAME", help="Of the objects in .jsonl.")]
# Of what bench and compare measure.
PromptTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens of the prompt. Default: 128, or the context if that is less.",
        show_default=False,
    ),
]
NewTokens = Annotated[int, typer.Option(metavar="N", help="Tokens to decode.")]
Depth = Annotated[
    int, typer.Option(metavar="N", help="Tokens in the cache before the first of these.")
]


class StoppedError(Exception):
    """A signal asked the command to end."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        self.exit_code = 128 + signum


def require_extra(extra: str, *packages: str) -> None:
    """Raise UsageError naming the extra unless its packages are installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            name = "PyTorch" if package == "torch" else package
            raise UsageError(f"{extra} needs {name}: pip install 'pico-edge[{extra}]'")


def spin_briefly() -> None:
    """Before PyTorch is imported: let its threads wait for work awake for 10 us, not milliseconds.

    Nothing is lost where the machine is quiet; beside one busy process on two cores training is
    twice as fast. For OpenMP of GCC, which PyTorch has on Linux; what the user has set stays.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "3000"


def write(text: str) -> None:
    """The product, at once: a reader of the pipe sees each token as it is made."""
    if sys.stdout is None:
        raise PicoEdgeError("standard output is closed: expected a terminal, a file or a pipe")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError as error:  # not left to Typer, which makes it exit 1
        forget_stdout()
        raise StoppedError(SIGPIPE) from error


def print_json(value: object) -> None:
    write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def folded(label: str, text: str, *, indent: int) -> list[str]:
    """Lines of at most COLUMNS: label, then text from column `indent` on.

    Text out of a file must not control the terminal: what cannot be printed becomes "?".
    """
    plain = "".join(c if c.isprintable() or c == NO_BREAK else "?" for c in text[:MAX_CHARACTERS])
    lines = textwrap.wrap(
        plain,
        COLUMNS,
        initial_indent=label.ljust(indent),
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )
    return [line.replace(NO_BREAK, " ") for line in lines or [label]]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Signals:
    """SIGINT and SIGTERM as an exception at a place where one does no harm.

    An exception out of a handler breaks the import of an extension module, so at first they are
    only noted, and `check` raises; once `raise_at_once` was called, they raise wherever Python is.
    A second one raises in any case. Training has handlers of its own, which save first.
    """

    def __init__(self) -> None:
        self._noted: int | None = None
        self._at_once = False

    def __enter__(self) -> Signals:
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._at_once or self._noted is not None:
            raise StoppedError(number)
        self._noted = number

    def check(self) -> None:
        if self._noted is not None:
            raise StoppedError(self._noted)

    def raise_at_once(self) -> None:
        self._at_once = True
        self.check()


def forget_stdout() -> None:
    """Leave Python nothing to flush, and so nothing to complain of, at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def progress_bar(done: int, total: int, elapsed_s: float, unit: str) -> str:
    """How far a piece of work is. Example: "[#####     ] 50 % | 1.2k tokens/s | 0:12 left"."""
    from pico_edge.train.report import count, duration

    part = done / total if total else 1.0
    width = 24
    line = f"[{'#' * int(width * part):{width}}] {100 * part:.0f} %"
    if done and elapsed_s:
        if done >= elapsed_s:
            line += f" | {count(done / elapsed_s)} {unit}/s"
        line += f" | {duration(elapsed_s / part - elapsed_s)} left"
    return line


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A markdown table whose columns also line up as plain text; `left` columns are text."""
    widths = [max(3, *(len(row[i]) for row in (header, *rows))) for i in range(len(header))]
    rule = ["-" * (w - (i >= left)) + ":" * (i >= left) for i, w in enumerate(widths)]
    lines = []
    for row in (header, rule, *rows):
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
