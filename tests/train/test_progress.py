"""Progress fits the terminal, and the terminal is written to as it should be."""

import fcntl
import io
import os
import pty
import re
import struct
import termios

import pytest

from pico_edge.train.progress import cut, evaluation_line, fit, progress_line, width
from pico_edge.train.report import (
    Reporter,
    append_metrics,
    append_sample,
    best_sample,
    read_metrics,
    size,
)

VALUES = {
    "step": 120,
    "max_iters": 963,
    "loss": 1.834,
    "val_loss": 1.902,
    "bits_per_byte": 2.744,
    "tokens_per_second": 9120.4,
    "utilization": "61 % of matmul speed",
    "memory_bytes": 512_000_000,
    "left_s": 80.0,
}
FULL = (
    "iter 120/963 | loss 1.834 | held out 1.902 | 2.744 bits/byte | 9,120 tokens/s | "
    "61 % of matmul speed | 512 MB | 1:20 left"
)


def test_the_whole_progress_line():
    assert progress_line(**VALUES, columns=None) == FULL
    assert progress_line(**VALUES, columns=len(FULL)) == FULL


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (100, FULL.replace(" | 512 MB", "").replace(" | 61 % of matmul speed", "")),
        (59, "iter 120/963 | loss 1.834 | held out 1.902 | 1:20 left"),
        (40, "iter 120/963 | loss 1.834 | 1:20 left"),
        (24, "iter 120/963 | 1:20 left"),
        (12, "iter 120/963"),
        (6, "iter …"),
    ],
)
def test_what_matters_least_goes_first(columns, expected):
    assert progress_line(**VALUES, columns=columns) == expected


def test_what_is_not_known_is_left_out():
    unknown = dict.fromkeys(
        ["val_loss", "bits_per_byte", "tokens_per_second", "utilization", "memory_bytes"]
    )
    line = progress_line(**VALUES | unknown, columns=None)
    assert line == "iter 120/963 | loss 1.834 | 1:20 left"


def test_an_evaluation_keeps_iteration_and_held_out_loss_longest():
    values = {
        "step": 120,
        "max_iters": 963,
        "train_loss": 1.8,
        "val_loss": 1.9,
        "bits_per_byte": 2.744,
        "tokens_per_second": 9120.4,
        "elapsed_s": 75.0,
        "is_best": True,
    }
    assert evaluation_line(**values, columns=None) == (
        "iter 120/963 | train 1.8000 | held out 1.9000 | 2.744 bits/byte | 9,120 tokens/s | 1:15 "
        "| best"
    )
    short = evaluation_line(**values, columns=59)
    assert short == "iter 120/963 | train 1.8000 | held out 1.9000 | best"


def test_nothing_is_wider_than_the_terminal():
    for columns in range(1, 140):
        assert width(progress_line(**VALUES, columns=columns)) <= columns
        assert width(cut("床前e\N{COMBINING ACUTE ACCENT}明月" * 9, columns)) <= columns
    assert cut("床前明月", 8) == "床前明月" and cut("床前明月", 7) == "床前明…"
    assert fit([], 10) == ""


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(900, "900 bytes"), (2_700, "2.7 kB"), (1.234e9, "1.23 GB")]
)
def test_sizes(n_bytes, text):
    assert size(n_bytes) == text


def terminal(columns):
    """A pseudo-terminal of that width: the end to read, and a stream that writes to it."""
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return reading, os.fdopen(writing, "w", encoding="utf-8")


def read(fd):
    return os.read(fd, 100_000).decode()


@pytest.mark.parametrize(("columns", "usable"), [(60, 59), (200, 199), (0, 79)])
def test_on_a_terminal_the_line_is_rewritten_in_its_width(columns, usable, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("pico_edge.train.report.REWRITE_EVERY_S", 0.0)
    fd, stream = terminal(columns)
    with stream:
        reporter = Reporter(stream)
        assert reporter.columns == usable
        reporter.progress(lambda columns: progress_line(**VALUES, columns=columns))
        first = read(fd)
        assert "\n" not in first and re.fullmatch(r"\riter 120/963 .*", first)
        assert len(first) <= usable + 1
        reporter.progress(lambda columns: "short")
        assert read(fd) == "\r" + "short".ljust(len(first) - 1)
        reporter.say("stays")  # after wiping the line: two writes, which may be read apart
        last = read(fd)
        while not last.endswith("\n"):
            last += read(fd)
        assert last.endswith("\rstays\r\n")
    os.close(fd)


def test_elsewhere_there_are_plain_lines_now_and_then(monkeypatch):
    stream = io.StringIO()
    reporter = Reporter(stream)
    assert reporter.columns is None
    reporter.progress(lambda columns: pytest.fail("asked for too early"))
    monkeypatch.setattr("pico_edge.train.report.LINE_EVERY_S", 0.0)
    reporter.progress(lambda columns: f"line {columns}")
    assert stream.getvalue() == "line None\n"
    Reporter(stream, quiet=True).progress(lambda columns: pytest.fail("asked for in vain"))


def test_the_sample_of_the_best_model_is_found_again(tmp_path):
    path = tmp_path / "samples.txt"
    assert best_sample(path) is None
    append_sample(path, 20, "\nfirst\n\n=== iteration 3\n\n", val_loss=2.0, is_best=True)
    assert best_sample(path) == "\nfirst\n\n=== iteration 3"
    append_sample(path, 40, "better\n\nstill", val_loss=1.5, is_best=True)
    append_sample(path, 60, "worse", val_loss=1.6, is_best=False)
    assert best_sample(path) == "better\n\nstill"
    assert "=== iteration 40, held-out loss 1.5000, best so far\n" in path.read_text()
    assert "=== iteration 60, held-out loss 1.6000\n" in path.read_text()


def test_metrics_after_a_line_cut_short_stand_on_a_line_of_their_own(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"iter": 1, "val_loss": 3.0})
    path.write_bytes(path.read_bytes() + b'{"iter": 2, "val_')
    append_metrics(path, {"iter": 3, "val_loss": 2.0})
    append_metrics(path, {"iter": 4, "val_loss": 1.0})
    assert [row["iter"] for row in read_metrics(path)] == [1, 3, 4]
    assert path.read_bytes().count(b"\n") == 4
