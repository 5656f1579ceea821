"""Publish a file whole or not at all: written under a temporary name, flushed, then renamed.

Used for every file that pico-edge leaves behind. Knows nothing of what is in them.
Changes things through os.open, write, fsync, close, link, replace and unlink alone, so that a test
can make the N-th of these fail (`tests/core/test_publish.py`).

Try: `publish(path, lambda file: file.write(b"all of it"))`.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from pico_edge.errors import UsageError

# Errors that may pass by themselves (a network disk, a quota being raised): tried again.
TRANSIENT = frozenset({errno.EIO, errno.EAGAIN, errno.EINTR, errno.EDQUOT, errno.ETIMEDOUT})
PAUSES_S = (0.1, 0.5)
# What fsync of a folder says on file systems that have no such thing.
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP})


class Writable(Protocol):
    """What a writer is given: enough of a binary file for torch.save and for bytes."""

    def write(self, data: bytes) -> int: ...

    def flush(self) -> None: ...


class _File:
    """A raw file that remembers its first OSError: torch.save hides it behind a RuntimeError."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._fd = os.open(path, flags, 0o666)
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        written = 0
        try:
            while written < len(view):
                written += os.write(self._fd, view[written:])
        except OSError as error:
            self.error = self.error or error
            raise
        return written

    def flush(self) -> None:
        """Nothing is buffered here."""

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def publish(
    path: str | os.PathLike[str],
    write: Callable[[Writable], object],
    *,
    previous: str | os.PathLike[str] | None = None,
) -> None:
    """Write a file so that at every instant its name holds the old content or the new, whole.

    write: called with the open file, and called again from the start if a transient error passes.
    previous: name under which the file that is replaced stays available.
    A symbolic link stays, and what it names is replaced. Raises the OSError that stopped it, with
    the path; then the old file is as it was, or, where only the flush of the folder failed, the new
    one is in place; no temporary file is left.
    """
    path = _target(path)
    _retry(path, lambda: _replace(path, write, None if previous is None else Path(previous)))
    # Apart from the rename: done twice, that would let `previous` name the new file.
    _retry(path, lambda: _sync_folder(path.parent))


def _target(path: str | os.PathLike[str]) -> Path:
    """The file that is to be replaced: where a symbolic link leads, else the path as it is."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def _retry(path: Path, act: Callable[[], None]) -> None:
    for attempt in range(len(PAUSES_S) + 1):
        try:
            act()
            return
        except OSError as error:
            if error.errno not in TRANSIENT or attempt == len(PAUSES_S):
                raise
            if attempt == 0 and sys.stderr is not None:
                print(f"warning: {path}: {error.strerror}: trying again", file=sys.stderr)
            time.sleep(PAUSES_S[attempt])


def _replace(path: Path, write: Callable[[Writable], object], previous: Path | None) -> None:
    temporary = temporary_name(path)
    _unlink_if_there(temporary)  # of a killed process that had our id, as in containers
    file = _File(temporary)
    try:
        try:
            write(file)
            if file.error is not None:
                raise file.error
            file.sync()  # or the rename could reach the disk before the data
        except Exception as error:
            if file.error is None:
                raise
            file.error.filename = str(path)
            if error is not file.error:
                raise file.error from error
            raise
        finally:
            file.close()
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(temporary, path)
    except BaseException:
        _unlink_if_there(temporary)
        raise


def temporary_name(path: Path) -> Path:
    """Where `publish` of this process writes before the rename: hidden, beside the file."""
    # A name of 255 bytes, the limit of most file systems, works: the temporary one is shorter.
    stem = path.name if len(os.fsencode(path.name)) <= 200 else path.name[:40]
    return path.with_name(f".{stem}.tmp-{os.getpid()}")


def remove_stale(path: str | os.PathLike[str]) -> list[Path]:
    """Delete what killed processes left of a file; that no live one writes it is for the caller."""
    path = _target(path)
    prefix = temporary_name(path).name.rpartition("-")[0] + "-"
    stale = [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]
    for entry in stale:
        _unlink_if_there(entry)
    return stale


def check_output(
    path: str | os.PathLike[str], *, force: bool, inputs: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Refuse an output path before any work is done for it.

    inputs: files that are read, which it must not replace, force or not. Raises UsageError for one
    of these, for a folder that is missing or cannot be written, for a path that is a folder, a
    device or a pipe, and for one that exists if force is False.
    """
    given, path = path, _target(path)
    folder = path.parent
    try:
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise UsageError(
                f"{given}: the folder {folder} {what}: make it, or choose another --out"
            )
        if path.is_dir():
            raise UsageError(f"{given} is a folder: expected the name of a file to write")
        if path.exists() and not path.is_file():
            raise UsageError(f"{given} is a device or a pipe: expected the name of a file to write")
        for read in inputs:
            if path.exists() and os.path.exists(read) and os.path.samefile(path, read):
                raise UsageError(
                    f"{given} is read, so it cannot be --out too: choose another --out"
                )
        if path.exists() and not force:
            raise UsageError(f"{given} exists: choose another --out, or add --force to replace it")
    except OSError as error:  # a name that is too long
        raise UsageError(f"{given}: {error.strerror}: choose another --out") from error
    probe = temporary_name(path)
    try:  # os.access is wrong for root, for read-only mounts and on Windows
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT, 0o666))
        os.unlink(probe)
    except OSError as error:
        raise UsageError(f"{given}: cannot write in {folder}: {error.strerror}") from error


def _keep(path: Path, previous: Path) -> None:
    """Let `previous` name the file that `path` names, without a moment in which neither exists."""
    if previous.exists() and os.path.samefile(path, previous):
        return  # an earlier try came this far; POSIX renames a link over its twin by doing nothing
    link = temporary_name(previous)
    _unlink_if_there(link)
    try:
        os.link(path, link)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno in TRANSIENT | {errno.ENOSPC}:
            raise
        os.replace(path, previous)  # a file system without hard links, such as exFAT
        return
    try:
        os.replace(link, previous)
    except BaseException:
        _unlink_if_there(link)
        raise


def _unlink_if_there(path: Path) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        if sys.stderr is not None:
            print(f"warning: {path} could not be removed: {error.strerror}", file=sys.stderr)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; POSIX only, Windows has no such call."""
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(fd)
