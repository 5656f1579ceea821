"""A published file is the old or the new one, whatever call fails, whenever the process dies."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pico_edge import publish as publish_module
from pico_edge.errors import UsageError
from pico_edge.publish import check_output, publish, remove_stale, temporary_name

CALLS = ("open", "write", "fsync", "close", "link", "replace", "unlink")
KINDS = ("ENOSPC", "EIO once", "EIO for ever", "killed before", "killed after", "killed half way")
OLDER, OLD, NEW = b"older", b"the old content", b"the new content, which is longer"

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes")


def fail_call(kind: str, number: int, count: list[int]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Replacements of the functions in CALLS that let the number-th of all their calls fail."""

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] < number or (count[0] > number and kind != "EIO for ever"):
                return real(*args, **kwargs)
            if kind == "ENOSPC":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if kind.startswith("EIO"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if kind == "killed half way" and real is os_write and len(args[1]) > 1:
                real(args[0], args[1][: len(args[1]) // 2])
            if kind == "killed after":
                real(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    os_write = os.write
    for name in CALLS:
        yield name, failing(getattr(os, name))


def run_with_failing_call(kind: str, number: int, save: Callable[[], None]) -> str:
    """What comes of a child with a failing call: "untouched", "done", "failed", "killed"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads that stay idle
        child = os.fork()
    if child == 0:
        code = 9
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            publish_module.PAUSES_S = (0.0, 0.0)
            count = [0]
            for name, replacement in list(fail_call(kind, number, count)):
                setattr(os, name, replacement)
            try:
                save()
                code = 1 if count[0] >= number else 0
            except OSError:
                code = 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "killed"
    outcome = {0: "untouched", 1: "done", 2: "failed"}
    return outcome[os.WEXITSTATUS(status)]


@needs_fork
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_may_fail_and_the_file_is_old_or_new(kind: str, tmp_path: Path) -> None:
    path, previous = tmp_path / "last.pt", tmp_path / "last.prev.pt"

    def write(file: publish_module.Writable) -> None:
        for start in range(0, len(NEW), 8):
            file.write(NEW[start : start + 8])

    outcomes = []
    for number in range(1, 1000):
        for entry in tmp_path.iterdir():
            entry.unlink()
        path.write_bytes(OLD)
        previous.write_bytes(OLDER)
        outcome = run_with_failing_call(
            kind, number, lambda: publish(path, write, previous=previous)
        )
        outcomes.append(outcome)
        found = path.read_bytes(), previous.read_bytes()
        if outcome in ("untouched", "done"):
            assert found == (NEW, OLD), number
        else:
            # The state before, that between keeping the old and renaming the new, that after.
            assert found in [(OLD, OLDER), (OLD, OLD), (NEW, OLD)], number
        if outcome == "killed":
            remove_stale(path)
            remove_stale(previous)
        if not (outcome == "failed" and kind == "EIO for ever"):  # it cannot even unlink
            assert {entry.name for entry in tmp_path.iterdir()} == {path.name, previous.name}, (
                number
            )
        if outcome == "untouched":
            break
    assert outcomes[-1] == "untouched"
    assert len(outcomes) > 12  # the calls are seen at all: open, 4 writes, fsync, close, link, ...
    expected = {"ENOSPC": "failed", "EIO once": "done", "EIO for ever": "failed"}
    assert expected.get(kind, "killed") in outcomes


@needs_fork
@pytest.mark.parametrize("kind", KINDS)
def test_a_first_file_is_there_whole_or_not_at_all(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for number in range(1, 100):
        path.unlink(missing_ok=True)
        outcome = run_with_failing_call(
            kind, number, lambda: publish(path, lambda file: file.write(NEW))
        )
        assert not path.exists() or path.read_bytes() == NEW
        assert path.exists() or outcome in ("failed", "killed")
        remove_stale(path)
        if outcome == "untouched":
            return
    pytest.fail("the number of calls is not bounded")


def test_without_hard_links_the_previous_file_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    path, previous = tmp_path / "last.pt", tmp_path / "last.prev.pt"
    path.write_bytes(OLD)
    monkeypatch.setattr(os, "link", no_link)
    publish(path, lambda file: file.write(NEW), previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (NEW, OLD)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_error_that_passes_is_tried_again_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, left = os.write, [2]

    def write(fd: int, data: bytes) -> int:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return real(fd, data)

    path = tmp_path / "last.pt"
    monkeypatch.setattr(publish_module, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(os, "write", write)
    publish(path, lambda file: file.write(NEW))
    monkeypatch.undo()
    assert path.read_bytes() == NEW
    warned = capsys.readouterr().err
    assert warned == f"warning: {path}: {os.strerror(errno.EDQUOT)}: trying again\n"


def test_an_error_that_stays_is_raised_after_three_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries = []

    def fsync(fd: int) -> None:
        tries.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "last.pt"
    path.write_bytes(OLD)
    monkeypatch.setattr(publish_module, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        publish(path, lambda file: file.write(NEW))
    assert len(tries) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]
    assert path.read_bytes() == OLD


@pytest.mark.skipif(os.name != "posix", reason="folders are flushed on POSIX only")
def test_a_failed_flush_of_the_folder_does_not_lose_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Doing all of it again would keep the new file as the previous one."""
    real, seen = os.fsync, []

    def fsync(fd: int) -> None:
        seen.append(fd)
        if len(seen) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    path, previous = tmp_path / "last.pt", tmp_path / "last.prev.pt"
    path.write_bytes(OLD)
    monkeypatch.setattr(publish_module, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(os, "fsync", fsync)
    publish(path, lambda file: file.write(NEW), previous=previous)
    assert len(seen) == 3
    assert (path.read_bytes(), previous.read_bytes()) == (NEW, OLD)


def test_the_disk_error_behind_another_exception_is_the_one_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(file: publish_module.Writable) -> None:  # as torch.save does
        try:
            file.write(NEW)
        except OSError as error:
            raise RuntimeError("unexpected pos 64 vs 0") from error

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        publish(tmp_path / "last.pt", write)
    assert list(tmp_path.iterdir()) == []


def test_an_error_swallowed_by_the_writer_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(file: publish_module.Writable) -> None:
        with pytest.raises(OSError):
            file.write(NEW)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        publish(tmp_path / "last.pt", write)
    assert list(tmp_path.iterdir()) == []


def test_an_exception_of_the_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    def write(file: publish_module.Writable) -> None:
        file.write(NEW)
        raise KeyboardInterrupt

    path = tmp_path / "model.onnx"
    path.write_bytes(OLD)
    with pytest.raises(KeyboardInterrupt):
        publish(path, write)
    assert path.read_bytes() == OLD
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:3]))
    publish(tmp_path / "file", lambda file: file.write(NEW))
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == NEW


def test_what_a_killed_process_of_the_same_id_left_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    temporary_name(path).write_bytes(b"half")
    check_output(path, force=False)
    temporary_name(path).write_bytes(b"half")
    publish(path, lambda file: file.write(NEW))
    assert path.read_bytes() == NEW
    assert len(list(tmp_path.iterdir())) == 1


def test_only_what_was_left_of_this_file_is_removed(tmp_path: Path) -> None:
    mine = [tmp_path / ".last.pt.tmp-1", tmp_path / ".last.pt.tmp-99999"]
    others = [tmp_path / name for name in ("last.pt", ".last.pt.tmp", ".blast.pt.tmp-1", "x.tmp-1")]
    for path in mine + others:
        path.write_bytes(b"")
    assert sorted(remove_stale(tmp_path / "last.pt")) == sorted(mine)
    assert sorted(tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize("name", ["a b c.pt", "模型 é ☃.onnx", "x" * 255, "é" * 127, "-", ".pt"])
def test_names_that_file_systems_allow_work(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    check_output(path, force=False)
    for content in (OLD, NEW):
        publish(path, lambda file, content=content: file.write(content))
    assert path.read_bytes() == NEW
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_path_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    (tmp_path / "folder").mkdir()
    refused = {
        tmp_path / "file" / "ckpt.pt": "is not a folder: make it, or choose another --out",
        tmp_path / "missing" / "ckpt.pt": "does not exist: make it, or choose another --out",
        tmp_path / "folder": "is a folder: expected the name of a file to write",
        tmp_path / "file": "exists: choose another --out, or add --force to replace it",
        tmp_path / ("x" * 256): os.strerror(errno.ENAMETOOLONG),
    }
    for path, message in refused.items():
        with pytest.raises(UsageError) as caught:
            check_output(path, force=False)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]
    with pytest.raises(UsageError):
        check_output(tmp_path / "folder", force=True)
    check_output(tmp_path / "file", force=True)
    assert (tmp_path / "file").read_bytes() == OLD


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX files")
def test_neither_a_device_nor_an_input_is_replaced_and_a_link_stays(tmp_path: Path) -> None:
    fifo, data, link = tmp_path / "fifo", tmp_path / "data", tmp_path / "link"
    os.mkfifo(fifo)
    data.write_bytes(OLD)
    link.symlink_to("data")
    for path in (fifo, Path("/dev/null")):
        with pytest.raises(UsageError, match="is a device or a pipe"):
            check_output(path, force=True)
    for path in (data, link, tmp_path / "." / "data"):
        with pytest.raises(UsageError, match="is read, so it cannot be --out too"):
            check_output(path, force=True, inputs=[tmp_path / "missing", data])
    with pytest.raises(UsageError, match="link exists: choose another --out"):
        check_output(link, force=False)
    publish(link, lambda file: file.write(NEW))
    assert link.is_symlink() and data.read_bytes() == NEW
    data.unlink()
    publish(link, lambda file: file.write(NEW))  # of a link that names nothing yet
    assert link.is_symlink() and data.read_bytes() == NEW


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object) -> int:  # permissions do not stop root, a read-only disk does
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(UsageError, match=os.strerror(errno.EROFS)):
        check_output(tmp_path / "ckpt.pt", force=False)


def test_the_mode_of_a_new_file_is_that_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"")
    publish(tmp_path / "file", lambda file: file.write(NEW))
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode
