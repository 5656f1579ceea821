"""What takes minutes: 200 kills at random instants, every call of a whole save, a full disk."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings

import pytest

from pico_edge.errors import PicoEdgeError
from pico_edge.train.checkpoint import load_checkpoint
from pico_edge.train.loop import train
from pico_edge.train.report import Reporter
from pico_edge.train.settings import TrainSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its processes"),
]

TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer. " for i in range(200))
RUN = TrainSettings(
    preset="nano",
    n_layer=2,
    n_head=2,
    n_embd=32,
    block_size=16,
    dropout=0.2,
    batch_size=4,
    grad_accum=2,
    max_iters=600,
    eval_interval=6,
    eval_iters=2,
    threads=1,
    dtype="float32",  # timed anew, a busy machine may choose another
)
KILLS, PARTS = 200, 4
LONGEST_LIFE_S = 0.9


def weights_hash(path):
    digest = hashlib.sha256()
    for name, tensor in sorted(load_checkpoint(path).model.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def metrics(folder):
    """The rows without what depends on the clock."""
    lines = (folder / "ckpt.run" / "metrics.jsonl").read_text().splitlines()
    times = ("elapsed_s", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]


def fork_trainer(data, settings):
    """A trainer in a process of its own, which need not import torch again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads that stay idle
        child = os.fork()
    if child == 0:
        code = 1
        try:
            train([data], settings, reporter=Reporter(io.StringIO(), quiet=True))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended_within(child, seconds):
    """Whether the process ended by itself, well; else it is killed."""
    deadline = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            return True
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            # It may have ended between the two calls.
            assert os.waitstatus_to_exitcode(status) in (-signal.SIGKILL, 0)
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.001)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The text, and the folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "data.txt").write_text(TEXT)
    settings = dataclasses.replace(RUN, out=str(folder / "ckpt.pt"))
    train([folder / "data.txt"], settings, reporter=Reporter(io.StringIO(), quiet=True))
    return folder


@pytest.mark.parametrize("part", range(PARTS))
def test_200_kills_at_random_instants_change_no_bit(part, whole, tmp_path):
    """Rows 1, 2 and 22: no temporary file, no gap and no repeat is left either."""
    rng = random.Random(part)
    data = whole / "data.txt"
    kills = n_runs = 0
    while kills < KILLS // PARTS:
        folder = tmp_path / str(n_runs)
        folder.mkdir()
        n_runs += 1
        settings = dataclasses.replace(RUN, out=str(folder / "ckpt.pt"))
        while True:
            # Killed between its first two saves, a run has a best model and nothing to resume.
            started = (folder / "ckpt.run" / "last.pt").exists()
            force = not started and (folder / "ckpt.pt").exists()
            child = fork_trainer(data, dataclasses.replace(settings, resume=started, force=force))
            # After the last kill the run goes on to its end.
            left = kills < KILLS // PARTS
            if ended_within(child, rng.uniform(0, LONGEST_LIFE_S) if left else 600):
                break
            kills += 1
        for name in ("ckpt.pt", "ckpt.run/last.pt"):
            assert weights_hash(folder / name) == weights_hash(whole / name)
        assert metrics(folder) == metrics(whole)
        samples = "ckpt.run/samples.txt"
        assert (folder / samples).read_bytes() == (whole / samples).read_bytes()
        assert not [path for path in folder.rglob(".*")]
        previous = load_checkpoint(folder / "ckpt.run" / "last.prev.pt")
        assert previous.iter == RUN.max_iters - RUN.eval_interval
    print(f"{kills} kills in {n_runs} runs")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    yield folder
    # Lazily: the token cache may still be open in a traceback.
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full_costs_no_checkpoint(small_disk, tmp_path):
    """Row 4, without a stand-in: something else fills the disk while a run goes on."""
    (tmp_path / "data.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    out = small_disk / "ckpt.pt"
    settings = TrainSettings(
        out=str(out),
        preset="nano",
        n_layer=1,
        n_head=1,
        n_embd=16,
        block_size=8,
        batch_size=2,
        max_iters=40,
        eval_interval=10,
        threads=1,
    )
    ballast = small_disk / "ballast"

    class Filler(Reporter):
        lines = []  # noqa: RUF012

        def say(self, text):
            self.lines.append(text)
            if text.startswith("iter 20/"):
                with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))

    with pytest.raises(PicoEdgeError, match=r"could not be saved: No space left"):
        train([tmp_path / "data.txt"], settings, reporter=Filler(io.StringIO()))
    warned = [line for line in Filler.lines if "No space left" in line]
    assert warned and all("training goes on" in line for line in warned)
    assert shutil.disk_usage(small_disk).free < 32 << 10
    assert load_checkpoint(small_disk / "ckpt.run" / "last.pt").iter == 10
    assert not [path for path in small_disk.rglob(".*")]

    ballast.unlink()
    resumed = dataclasses.replace(settings, resume=True)
    quiet = Reporter(io.StringIO(), quiet=True)
    assert train([tmp_path / "data.txt"], resumed, reporter=quiet).iter == 40
    rows = metrics(small_disk)
    assert [row["iter"] for row in rows] == [10, 20, 30, 40]


def test_a_disk_too_small_for_the_model_is_refused_before_the_first_step(small_disk, tmp_path):
    (tmp_path / "data.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    settings = TrainSettings(out=str(small_disk / "ckpt.pt"), preset="nano", max_iters=1, threads=1)
    with pytest.raises(PicoEdgeError, match=r"bytes free, the checkpoints of this model need") as e:
        train([tmp_path / "data.txt"], settings, reporter=Reporter(io.StringIO()))
    assert e.value.exit_code == 2
