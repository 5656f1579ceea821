"""One trainer to a run folder: an operating-system lock that dies with its process.

The file beside the lock's content names the holder, so that a second trainer can say who runs. The
lock itself is the kernel's: a killed process leaves its name behind, never its lock.

Try: `with run_lock(folder): ...`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from pico_edge.errors import PicoEdgeError

LOCK_NAME = "lock"
# Windows locks ranges of bytes and forbids to read them: one far behind the holder's name.
WINDOWS_LOCK_OFFSET = 1 << 20


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[str | None]:
    """Hold the lock of a run folder. Yields who died holding it ("process 12 on host"), or None.

    Raises PicoEdgeError, naming process and host, while another process holds it.
    """
    path = folder / LOCK_NAME
    # The file is never deleted: whoever waits for it must see the same inode.
    fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        try:
            _lock(fd)
        except OSError as error:
            holder = _holder(fd) or "another process"
            raise PicoEdgeError(
                f"{folder}: {holder} trains here: wait for it, stop it, or choose another --out"
            ) from error
        dead = _holder(fd)
        _write(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        try:
            yield dead
        finally:
            _write(fd, b"")  # an empty file: the holder left by itself
    finally:
        os.close(fd)


def _holder(fd: int) -> str | None:
    """Who wrote the lock file; None if nobody is named in it."""
    os.lseek(fd, 0, os.SEEK_SET)
    data = os.read(fd, 4096)
    if not data:
        return None
    try:
        values = json.loads(data)
        return f"process {int(values['pid'])} on {values['host']}"
    except (ValueError, KeyError, TypeError):
        return "an unknown process"


def _write(fd: int, data: bytes) -> None:
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, data)


if sys.platform == "win32":
    import msvcrt

    def _lock(fd: int) -> None:
        os.lseek(fd, WINDOWS_LOCK_OFFSET, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
