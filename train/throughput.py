"""How far reading or tokenizing a text is: a line now and then, the speed at the end.

Try: `Throughput(Reporter(), "tokenizing", 10**9).add(10**6)`.
"""

from __future__ import annotations

import time

from pico_edge.train.report import Reporter, count, duration

# What took less is not worth a line that stays.
SAY_FROM_S = 3.0


class Throughput:
    """Counts bytes since it was made. n_bytes: how many there will be, None if nobody knows."""

    def __init__(self, reporter: Reporter, what: str, n_bytes: int | None = None) -> None:
        self._reporter = reporter
        self._what = what
        self._n_bytes = n_bytes
        self._done = 0
        self._begin = time.monotonic()

    def add(self, n_bytes: int) -> None:
        """Count bytes and show where this stands."""
        self._done += n_bytes
        elapsed_s = time.monotonic() - self._begin
        speed = self._done / elapsed_s if elapsed_s else 0.0
        if not self._n_bytes or not self._done:
            self._reporter.progress(f"{self._what} | {count(self._done)}B")
            return
        part = min(1.0, self._done / self._n_bytes)
        self._reporter.progress(
            f"{self._what} {part:.0%} of {count(self._n_bytes)}B | {speed / 1e6:.3g} MB/s | "
            f"{duration(elapsed_s / part - elapsed_s)} left"
        )

    def end(self, n_bytes: int) -> None:
        """Clear the progress line; where it took seconds, say the speed for n_bytes of text."""
        self._reporter.end_progress()
        elapsed_s = time.monotonic() - self._begin
        if elapsed_s >= SAY_FROM_S:
            self._reporter.say(
                f"{self._what}: {count(n_bytes)}B in {duration(elapsed_s)}, "
                f"{n_bytes / elapsed_s / 1e6:.3g} MB/s"
            )
