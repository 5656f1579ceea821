"""Stopping on request: a first signal lets the step end, a second Ctrl-C leaves at once.

Handlers only set a flag. Knows nothing of what is being trained.

Try: `with stop_requests() as stop: ...; if stop.signum is not None: ...`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

# Windows has neither SIGUSR1 nor SIGHUP.
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


@dataclass
class StopRequest:
    """The first stop signal that arrived, or None."""

    signum: int | None = None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn stop signals into a flag for the time of the block; the old handlers come back after it.

    After the first signal a SIGINT raises KeyboardInterrupt. A SIGHUP that was ignored before
    (nohup) stays ignored. Outside the main thread, where Python allows no handlers, signals act as
    they did.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        if request.signum is None:
            request.signum = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {}
    for name in STOP_SIGNALS:
        signum = getattr(signal, name, None)
        if signum is None:
            continue
        if name == "SIGHUP" and signal.getsignal(signum) == signal.SIG_IGN:
            continue
        before[signum] = signal.signal(signum, handle)
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
