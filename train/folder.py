"""Where a run keeps its files, and what it refuses or clears before it begins.

    ckpt.pt          the model with the best held-out loss
    ckpt.run/        last.pt, last.prev.pt, metrics.jsonl, samples.txt, loss.png, token cache, lock,
                     bpe.json (a trained tokenizer), stdin.txt (of `pico-edge train -`; while a
                     new run is set up, stdin.new.txt);
                     tensorboard/ where it is asked for

Try: `run_paths("ckpt.pt").last` -> ckpt.run/last.pt.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pico_edge import publish
from pico_edge.artefact import CHECKPOINT_MAGIC
from pico_edge.errors import UsageError
from pico_edge.train.board import remove_events

MAX_NAME_BYTES = 255  # of most file systems


@dataclass(frozen=True)
class RunPaths:
    """Every file of a run that has a fixed name."""

    out: Path
    folder: Path
    last: Path
    previous: Path
    damaged: Path
    metrics: Path
    samples: Path
    image: Path
    tensorboard: Path
    stdin: Path
    new_stdin: Path


def run_paths(out: str | os.PathLike[str]) -> RunPaths:
    """The paths of a run by the name of its best model. Example: a/ckpt.pt -> folder a/ckpt.run."""
    given, out, suffix = out, Path(out), ".run"
    if not out.name:
        raise UsageError(f"--out is {os.fspath(given)!r}: expected the name of a file, as ckpt.pt")
    stem = os.fsencode(out.stem)[: MAX_NAME_BYTES - len(suffix)].decode("utf-8", "ignore")
    folder = out.with_name(stem + suffix)
    return RunPaths(
        out=out,
        folder=folder,
        last=folder / "last.pt",
        previous=folder / "last.prev.pt",
        damaged=folder / "last.damaged.pt",
        metrics=folder / "metrics.jsonl",
        samples=folder / "samples.txt",
        image=folder / "loss.png",
        tensorboard=folder / "tensorboard",
        stdin=folder / "stdin.txt",
        new_stdin=folder / "stdin.new.txt",
    )


def written_paths(paths: RunPaths) -> list[Path]:
    """What a run writes and so does not read: its folder and its model.

    An output that holds something else, such as text, is not among them: where that is data,
    `open_folder` refuses to replace it.
    """
    with contextlib.suppress(OSError):
        if paths.out.is_file():  # not a pipe, which would wait
            with open(paths.out, "rb") as file:
                if file.read(len(CHECKPOINT_MAGIC)) != CHECKPOINT_MAGIC:
                    return [paths.folder]
    return [paths.folder, paths.out]


def open_folder(
    paths: RunPaths, *, resume: bool, force: bool, inputs: Sequence[str | os.PathLike[str]] = ()
) -> None:
    """Make the run folder. Raises UsageError, before any work, when nothing can be written.

    inputs: files that are read, none of which may be the output.
    """
    if paths.out.suffix == ".run":
        raise UsageError(f"{paths.out}: the name ends like a run folder: choose another --out")
    publish.check_output(paths.out, force=True, inputs=inputs)
    if paths.out.exists() and not (resume or force):
        resumable = paths.last.exists() or paths.previous.exists()
        go_on = "--resume to continue its run, " if resumable else ""
        raise UsageError(
            f"{paths.out} exists: add {go_on}--force to start over, or choose another --out"
        )
    try:
        paths.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{paths.folder}: the run folder cannot be made: {error.strerror}"
        ) from error
    publish.check_output(paths.last, force=True)


def check_old_run(paths: RunPaths, *, resume: bool, force: bool) -> None:
    """Refuse to start over a run that could be continued; hold the lock. Raises UsageError."""
    if resume or force:
        return
    for path in (paths.last, paths.previous):
        if path.exists():
            raise UsageError(
                f"{path} exists: add --resume to continue this run, or --force to start over"
            )


def remove_leftovers(paths: RunPaths) -> list[Path]:
    """Delete the temporary files of killed processes; the caller holds the lock."""
    paths.new_stdin.unlink(missing_ok=True)
    files = (paths.out, paths.last, paths.previous, paths.metrics, paths.image)
    return [stale for path in files for stale in publish.remove_stale(path)]


def clear_old_run(paths: RunPaths) -> None:
    """Delete state and records of an earlier run; its best model stays until the first new one."""
    records = (paths.metrics, paths.samples, paths.image)
    for path in (paths.last, paths.previous, paths.damaged, *records):
        path.unlink(missing_ok=True)
    remove_events(paths.tensorboard)


def check_space(paths: RunPaths, n_parameters: int) -> None:
    """Refuse a disk too small for the checkpoints of a run. Raises UsageError, with both numbers.

    In float32, weights and the optimizer's two moments: three resumable files while one is
    replaced, and the best model twice.
    """
    needed = n_parameters * 4 * (3 * 3 + 2)
    old = sum(path.stat().st_size for path in (paths.last, paths.previous) if path.exists())
    free = shutil.disk_usage(paths.folder).free + old
    if free < needed:
        raise UsageError(
            f"{paths.folder}: {free} bytes free, the checkpoints of this model need {needed}: "
            "free some space, or choose another --out or a smaller --preset"
        )
