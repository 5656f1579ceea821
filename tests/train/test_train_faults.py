"""What can go wrong in training, by the rows of faults.md: exit code, message, what is left."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pico_edge.cli import main
from pico_edge.config import GPTConfig
from pico_edge.errors import DivergedError, PicoEdgeError, UsageError
from pico_edge.train.batches import batch
from pico_edge.train.checkpoint import load_checkpoint
from pico_edge.train.lock import run_lock
from pico_edge.train.loop import resume_command, train
from pico_edge.train.model import GPT
from pico_edge.train.optim import make_optimizers
from pico_edge.train.report import Reporter
from pico_edge.train.settings import TrainSettings
from pico_edge.train.step import Trainer, memory_errors, train_step

SHAPE = ["--preset", "nano", "--n-layer", "1", "--n-head", "1", "--n-embd", "16"]
SHAPE += ["--block-size", "8", "--batch-size", "2"]
FLAGS = [*SHAPE, "--max-iters", "40", "--eval-interval", "20", "--threads", "1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with data.txt in it, and the command line standing there."""
    (tmp_path / "data.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pico_edge(capsys, *arguments):
    """Exit code, standard output and error of a command."""
    with pytest.raises(SystemExit) as done:
        main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return done.value.code or 0, out, err


def refused(capsys, code, *arguments):
    """The one error line of a training command that ends with this code."""
    found, out, err = pico_edge(capsys, "train", *arguments)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (found, out, len(errors)) == (code, "", 1), err
    return errors[0]


def leftovers(folder):
    return [path for path in folder.rglob("*") if ".tmp-" in path.name or ".probe" in path.name]


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists(), process.communicate()


# Row 3


def test_signals_give_their_exit_codes_and_the_command_that_continues(folder):
    code = "from pico_edge.cli import main; main()"
    command = [sys.executable, "-c", code, "train", "data.txt", *SHAPE, "--threads", "1"]
    command += ["--max-iters", "1000000", "--eval-interval", "5", "--out"]
    started = {}
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        started[name] = subprocess.Popen(
            [*command, f"{name}.pt"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    for name, process in started.items():
        last = folder / f"{name}.run" / "last.pt"
        wait_for(last, process)
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=120)
        assert process.returncode == 128 + getattr(signal, name), err
        assert out == ""
        resume = f"pico-edge train data.txt --out {name}.pt --threads 1 --resume"
        assert err.splitlines()[-1].strip() == resume
        assert "\r" not in err and "\x1b" not in err
        assert load_checkpoint(last).iter > 0


def test_a_second_ctrl_c_ends_a_save_at_once_and_the_checkpoint_before_it_is_whole(folder):
    """A real process whose disk is slow: the first signal waits for the save, the second does not.

    And while it runs, a second trainer is refused (row 7).
    """
    code = (
        "import os, time; from pico_edge.cli import main; real = os.fsync\n"
        "def slow(fd):\n"
        "    real(fd)\n"
        "    if os.path.exists('slow'):\n"
        "        open('saving', 'w').close(); time.sleep(600)\n"
        "os.fsync = slow; main()"
    )
    command = [sys.executable, "-c", code, "train", "data.txt", *SHAPE, "--threads", "1"]
    command += ["--max-iters", "1000000", "--eval-interval", "5"]
    last = folder / "ckpt.run" / "last.pt"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(last, process)
    again = subprocess.run([*command, "--force"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 1
    assert f"error: ckpt.run: process {process.pid} on " in again.stderr
    (folder / "slow").touch()
    wait_for(folder / "saving", process)
    before = last.read_bytes()
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, ""), err
    assert "Traceback" not in err
    assert last.read_bytes() == before and load_checkpoint(last).iter > 0
    assert not leftovers(folder)


# Row 4


@pytest.fixture
def disk(monkeypatch):
    """A disk that is full for `last.pt` while disk["full"] is true."""
    opened = set()
    state = {"full": False, "error": True, "opened": opened}
    real_open, real_write = os.open, os.write

    def open_(path, *arguments, **options):
        fd = real_open(path, *arguments, **options)
        (opened.add if ".last.pt.tmp" in os.fspath(path) else opened.discard)(fd)
        return fd

    def write(fd, data):
        if state["full"] and state["error"] and fd in opened:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(fd, data)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "write", write)
    return state


class DiskReporter(Reporter):
    """Fills the disk and empties it again when the evaluation of an iteration is printed."""

    def __init__(self, disk, changes):
        super().__init__(io.StringIO())
        self.disk, self.changes, self.lines = disk, changes, []

    def say(self, text):
        self.lines.append(text)
        for beginning, full in self.changes.items():
            if text.startswith(beginning):
                self.disk["full"] = full


TINY = TrainSettings(
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


def test_a_full_disk_at_a_periodic_save_is_a_warning_and_the_old_state_stays(folder, disk):
    reporter = DiskReporter(disk, {"iter 20/": True, "iter 40/": False})
    result = train(["data.txt"], TINY, reporter=reporter)
    assert result.iter == 40
    warnings = [line for line in reporter.lines if "No space left" in line]
    assert len(warnings) == 2 and all("training goes on" in line for line in warnings)
    assert load_checkpoint("ckpt.run/last.pt").iter == 40
    assert load_checkpoint("ckpt.run/last.prev.pt").iter == 10
    assert not leftovers(folder)


def test_a_full_disk_at_the_final_save_fails_and_the_state_before_it_stays(folder, disk):
    with pytest.raises(PicoEdgeError, match=r"last\.pt could not be saved: No space left"):
        train(["data.txt"], TINY, reporter=DiskReporter(disk, {"iter 40/": True}))
    assert load_checkpoint("ckpt.run/last.pt").iter == 30
    assert not leftovers(folder)
    disk["full"] = False
    resumed = dataclasses.replace(TINY, resume=True)
    metrics = folder / "ckpt.run" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"iter": 4')  # cut short by a crash
    assert train(["data.txt"], resumed, reporter=DiskReporter(disk, {})).iter == 40
    rows = [json.loads(line)["iter"] for line in metrics.read_text().splitlines()]
    assert rows == [10, 20, 30, 40]
    assert (folder / "ckpt.run" / "samples.txt").read_text().count("=== iteration 40") == 1


def test_too_little_space_is_said_before_the_first_step(folder, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    with pytest.raises(UsageError, match=r"1000 bytes free, .* need \d+"):
        train(["data.txt"], TINY, reporter=DiskReporter({}, {}))


# Row 5


@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT])
def test_an_error_that_passes_costs_one_warning_and_no_checkpoint(
    number, folder, disk, monkeypatch, capsys
):
    real, left = os.write, [1]

    def write(fd, data):
        if disk["full"] and fd in disk["opened"] and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    reporter = DiskReporter(disk, {"iter 20/": True})
    disk["error"] = False
    train(["data.txt"], TINY, reporter=reporter)
    warned = capsys.readouterr().err
    assert warned == f"warning: ckpt.run/last.pt: {os.strerror(number)}: trying again\n"
    assert not [line for line in reporter.lines if "could not be saved" in line]
    assert load_checkpoint("ckpt.run/last.pt").iter == 40
    assert load_checkpoint("ckpt.run/last.prev.pt").iter == 30


# Row 6


def test_an_output_that_cannot_be_written_is_refused_before_work(folder, capsys):
    (folder / "a file").write_text("")
    (folder / "a folder.pt").mkdir()
    read_only = "/proc" if os.path.isdir("/proc") else "/"
    for out, named in [
        ("missing/ckpt.pt", "does not exist"),
        ("a file/ckpt.pt", "is not a folder"),
        ("a folder.pt", "is a folder"),
        (f"{read_only}/ckpt.pt", "cannot write"),
        ("ckpt.run", "ends like a run folder"),
    ]:
        assert named in refused(capsys, 2, "data.txt", "--out", out)
    assert not leftovers(folder)


@pytest.mark.parametrize("name", ["with spaces.pt", "模型 😀.pt", "x" * 252 + ".pt", "no-suffix"])
def test_any_name_works_as_output(name, folder, capsys):
    code, _, err = pico_edge(capsys, "train", "data.txt", *FLAGS, "--out", name, "--quiet")
    assert (code, err) == (0, "")
    assert load_checkpoint(folder / name).iter in (20, 40)


# Row 7


def test_an_existing_output_is_refused_without_force(folder, capsys):
    assert pico_edge(capsys, "train", "data.txt", *FLAGS, "--quiet")[0] == 0
    before = (folder / "ckpt.pt").read_bytes()
    assert "ckpt.pt exists: add --resume" in refused(capsys, 2, "data.txt", *FLAGS)
    (folder / "ckpt.pt").rename(folder / "kept.pt")
    assert "last.pt exists: add --resume" in refused(capsys, 2, "data.txt", *FLAGS)
    (folder / "kept.pt").rename(folder / "ckpt.pt")
    assert (folder / "ckpt.pt").read_bytes() == before
    arguments = ["data.txt", *FLAGS, "--force", "--seed", "5", "--quiet"]
    assert pico_edge(capsys, "train", *arguments)[0] == 0
    assert (folder / "ckpt.pt").read_bytes() != before
    assert len((folder / "ckpt.run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_refused_run_leaves_the_old_one_as_it_was(folder, capsys):
    assert pico_edge(capsys, "train", "data.txt", *FLAGS, "--quiet")[0] == 0
    before = {path: path.read_bytes() for path in (folder / "ckpt.run").glob("*.pt")}
    (folder / "short.txt").write_text("x")
    refused(capsys, 3, "short.txt", *FLAGS, "--force")
    assert {path: path.read_bytes() for path in before} == before


def test_a_second_trainer_is_refused_with_process_and_host(folder, capsys):
    (folder / "ckpt.run").mkdir()
    with run_lock(folder / "ckpt.run") as dead:
        assert dead is None
        error = refused(capsys, 1, "data.txt", *FLAGS)
    assert f"process {os.getpid()} on " in error
    assert pico_edge(capsys, "train", "data.txt", *FLAGS, "--quiet")[0] == 0


def test_the_lock_of_a_dead_process_is_taken_over_with_a_notice(folder, capsys):
    (folder / "ckpt.run").mkdir()
    holder = '{"pid": 4194303, "host": "elsewhere"}'
    (folder / "ckpt.run" / "lock").write_text(holder)
    code, _, err = pico_edge(capsys, "train", "data.txt", *FLAGS)
    assert code == 0
    assert "took over from process 4194303 on elsewhere" in err
    assert (folder / "ckpt.run" / "lock").read_text() == ""


# Rows 8, 11 and 12 (what load_checkpoint refuses, and why: test_checkpoint.py)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("marker",)


@pytest.mark.parametrize("flag", ["--init-from", "--resume"])
def test_a_checkpoint_that_is_refused_exits_3_and_runs_nothing(flag, folder, capsys):
    assert pico_edge(capsys, "train", "data.txt", *FLAGS, "--quiet")[0] == 0
    whole = (folder / "ckpt.pt").read_bytes()
    path = folder / ("ckpt.run/last.pt" if flag == "--resume" else "ckpt.pt")
    (folder / "ckpt.run" / "last.prev.pt").unlink()
    arguments = ["--resume"] if flag == "--resume" else ["--init-from", "ckpt.pt", "-o", "new.pt"]
    whole = path.read_bytes()
    newer = torch.load(io.BytesIO(whole), weights_only=True) | {"format_version": 7}
    torch.save(newer | {"file_bytes": "?"}, path)
    assert "format 7, this pico-edge reads 1" in refused(capsys, 3, "data.txt", *arguments)
    torch.save({"kind": "pico-edge checkpoint", "model": Payload()}, path)
    assert "more than tensors" in refused(capsys, 3, "data.txt", *arguments)
    assert not (folder / "marker").exists()
    for cut in (whole[:-1], whole[:100], b""):
        path.write_bytes(cut)
        assert str(path.name) in refused(capsys, 3, "data.txt", *arguments)


# Row 13


def test_divergence_exits_4_and_leaves_checkpoints_of_finite_weights(folder, capsys):
    # A rate of 1, 2, 3, ...: some evaluations are good before the weights overflow.
    rates = ["--learning-rate", "1e9", "--warmup-iters", "1000000000", "--grad-accum", "2"]
    flags = [*SHAPE, "--max-iters", "400", "--eval-interval", "20", *rates]
    error = refused(capsys, 4, "data.txt", *flags)
    for named in ("diverged at iteration ", "learning rate", "seed 1337 step", "slots 0-1"):
        assert named in error
    rows = (folder / "ckpt.run" / "metrics.jsonl").read_text().splitlines()
    assert load_checkpoint(folder / "ckpt.run" / "last.pt").iter == json.loads(rows[-1])["iter"]
    for name in ("ckpt.pt", "ckpt.run/last.pt"):
        weights = load_checkpoint(folder / name).model.values()
        assert all(tensor.isfinite().all() for tensor in weights)


def tiny_trainer(**options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=1, n_head=1, n_embd=16))
    recipe = TINY.recipe("nano", gpu=False, max_iters=9, tokens_per_epoch=99, block_size=8)
    recipe = dataclasses.replace(recipe, grad_accum=2)
    return Trainer(
        model=model,
        forward=model,
        optimizers=make_optimizers(model, recipe),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        recipe=recipe,
        tokens=np.arange(99, dtype=np.uint16) % 31,
        device=torch.device("cpu"),
        dtype=torch.float32,
        **options,
    )


@pytest.mark.parametrize(
    ("options", "slots"), [({}, (0, 1)), ({"world_size": 2, "rank": 1}, (1, 3))]
)
def test_a_step_is_the_mean_over_the_batches_of_its_slots(options, slots):
    trainer = tiny_trainer(**options)
    losses = []
    for slot in slots:
        x, y = batch(
            trainer.tokens,
            seed=trainer.recipe.seed,
            step=5,
            slot=slot,
            batch_size=trainer.recipe.batch_size,
            block_size=8,
        )
        losses.append(trainer.model(x, y)[1])
    torch.stack(losses).mean().backward()
    parameters = list(trainer.model.parameters())
    grads = [parameter.grad for parameter in parameters]
    norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in grads]))
    found = train_step(trainer, 5, 1e-3)
    assert found.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    assert found.grad_norm == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(bad):
    trainer = tiny_trainer()
    model = trainer.model
    train_step(trainer, 0, 1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    hook = model.transformer.ln_f.weight.register_hook(lambda grad: grad * bad)
    with pytest.raises(DivergedError, match=r"iteration 8: .*gradient norm (nan|inf)"):
        train_step(trainer, 7, 1e-3)
    assert all(map(torch.equal, before, model.parameters()))
    hook.remove()
    train_step(trainer, 7, 1e-3)
    assert not any(map(torch.equal, before, model.parameters()))


# Row 14


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ("--learning-rate 0", "learning_rate"),
        ("--lr nan", "learning_rate"),
        ("--learning-rate -1", "learning_rate"),
        ("--dropout 1", "dropout"),
        ("--preset nano --n-embd 100", "n_embd"),
        ("--n-embd 100", "n_embd"),
        ("--block-size 0", "block_size"),
        ("--batch-size 0", "batch_size"),
        ("--threads 0", "threads"),
        ("--device cuda --device tpu", "device"),
    ],
)
def test_a_value_out_of_range_names_its_field_and_starts_nothing(flags, field, folder, capsys):
    error = refused(capsys, 2, "data.txt", *flags.split())
    assert error.startswith(f"error: {field} ")
    assert not (folder / "ckpt.pt").exists()


# Row 15


def test_out_of_memory_names_what_to_make_smaller():
    recipe = TINY.recipe("nano", gpu=False, max_iters=9, tokens_per_epoch=99, block_size=8)
    config = GPTConfig(block_size=8, vocab_size=32, n_layer=1, n_head=1, n_embd=16)
    named = "batch_size 2, block_size 8, grad_accum 1"
    with pytest.raises(PicoEdgeError, match=named), memory_errors(recipe, config):
        torch.empty(2**50)
    with pytest.raises(PicoEdgeError, match=named), memory_errors(recipe, config):
        np.empty(2**55)
    with pytest.raises(RuntimeError, match="must match the size"), memory_errors(recipe, config):
        torch.zeros(2) + torch.zeros(3)


def test_a_process_out_of_memory_names_what_to_make_smaller_and_leaves_its_files_whole(
    folder, capsys
):
    flags = [*FLAGS, "--batch-size", str(10**13)]
    error = refused(capsys, 1, "data.txt", *flags)
    assert "batch_size 10000000000000, block_size 8, grad_accum 1" in error
    large = ["--n-embd", str(2**24), "--vocab-size", str(2**24 - 1), "--tokenizer", "simple"]
    error = refused(capsys, 1, "data.txt", *FLAGS, *large)
    assert "layers x 16777216" in error and "--n-embd" in error
    assert not (folder / "ckpt.pt").exists() and not leftovers(folder)


# Row 16


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        (b"", ""),
        (b"x", ""),
        (b"nine byte", "--block-size 16"),
        (b"x" * 1000, "--val-data short.txt"),
    ],
)
def test_too_little_data_is_refused_with_tokens_found_and_needed(content, flags, folder, capsys):
    (folder / "data.txt").write_bytes(content)
    (folder / "short.txt").write_bytes(b"x")
    error = refused(capsys, 3, "data.txt", *FLAGS, *flags.split())
    assert any(character.isdigit() for character in error) or "empty" in error
    assert not (folder / "ckpt.pt").exists()


def test_missing_data_is_refused_and_nothing_is_made(folder, capsys):
    assert "nothing.txt" in refused(capsys, 3, "nothing.txt")
    assert [path.name for path in folder.iterdir()] == ["data.txt"]


# Row 17 (every encoding and shape of text: test_data.py)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"good " * 100 + b"\xff\xfe bad", "byte offset 500"),
        ("no mark ".encode("utf-16-le") * 99, "--encoding utf-16-le"),
    ],
)
def test_text_that_is_none_is_refused_with_offset_and_encoding(content, named, folder, capsys):
    (folder / "data.txt").write_bytes(content)
    error = refused(capsys, 3, "data.txt", *FLAGS)
    assert named in error and "--encoding" in error


# Row 18


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_token_cache_that_changes_under_a_run_ends_it_with_exit_code_3(damage, folder, capsys):
    """In a process of its own: reading a mapped file that was cut would be SIGBUS."""
    code = (
        "import os, pathlib; from pico_edge.cli import main; from pico_edge.train import report\n"
        "def say(self, text):\n"
        "    if text.startswith('iter 20/'):\n"
        "        for path in pathlib.Path('ckpt.run').glob('tokens*.bin'):\n"
        "            size = path.stat().st_size\n"
        f"            if {damage == 'cut'}: os.truncate(path, 8)\n"
        "            else: path.write_bytes(b'\\xff' * size)\n"
        "report.Reporter.say = say; main()"
    )
    command = [sys.executable, "-c", code, "train", "data.txt", *FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert load_checkpoint(folder / "ckpt.run" / "last.pt").iter == 20
    # The next start makes it again.
    code, _, err = pico_edge(capsys, "train", "data.txt", "--resume", "--threads", "1")
    assert code == 0 and "made again" in err


# Row 19


def test_changed_data_is_refused_at_a_resume(folder, capsys):
    assert pico_edge(capsys, "train", "data.txt", *FLAGS, "--quiet")[0] == 0
    with (folder / "data.txt").open("a") as file:
        file.write("more")
    assert "--init-from" in refused(capsys, 3, "data.txt", "--resume")


# Rows 8 and 22


def test_leftovers_go_and_the_state_before_is_used_when_the_last_is_gone_or_damaged(folder, capsys):
    assert pico_edge(capsys, "train", "data.txt", *FLAGS, "--quiet")[0] == 0
    last, previous = folder / "ckpt.run" / "last.pt", folder / "ckpt.run" / "last.prev.pt"
    whole = last.read_bytes()
    (folder / ".ckpt.pt.tmp-4194303").write_bytes(b"half")
    (folder / "ckpt.run" / ".last.pt.tmp-4194303").write_bytes(b"half")
    (folder / "ckpt.run" / ".last.prev.pt.tmp-4194303").write_bytes(b"half")
    for damage in (None, whole[:1000]):
        last.unlink()
        if damage is not None:
            last.write_bytes(damage)
        os.utime(previous, (0, 0))  # a clock set back decides nothing
        code, _, err = pico_edge(capsys, "train", "data.txt", "--resume", "--threads", "1")
        assert code == 0
        assert "WARNING" in err and "iteration 20" in err
        assert not leftovers(folder)
        assert load_checkpoint(last).iter == 40
        assert load_checkpoint(last).model.keys() == load_checkpoint(previous).model.keys()
        with contextlib.suppress(FileNotFoundError):
            previous.unlink()
        pico_edge(capsys, "train", "data.txt", *FLAGS, "--force", "--quiet")


def test_nothing_to_resume_is_said(folder, capsys):
    err = refused(capsys, 3, "data.txt", "--resume")
    assert "nothing to resume; train without --resume" in err
    (folder / "ckpt.pt").touch()  # of a run that was killed before its state was saved
    err = refused(capsys, 3, "data.txt", "--resume")
    assert "train with --force in place of --resume" in err


# Streams


def test_json_is_one_document_and_quiet_is_silent(folder, capsys):
    code, out, err = pico_edge(capsys, "train", "data.txt", *FLAGS, "--json", "--quiet")
    assert (code, err) == (0, "")
    values = json.loads(out)
    assert values["file"] == "ckpt.pt" and values["iter"] == 40
    assert values["val_loss"] > 0
    assert values["verdict"] == "short" and "--max-iters 160" in values["advice"]


def test_a_run_ends_with_the_next_command(folder, capsys):
    code, out, err = pico_edge(capsys, "train", "data.txt", *FLAGS)
    assert (code, out) == (0, "")
    assert err.splitlines()[-1] == "next: pico-edge export ckpt.pt --quantize"
    assert "\r" not in err


# Standard input and large texts, as typed


def test_training_from_a_pipe_is_training_from_a_file_and_resumes_without_the_pipe(
    folder, capsys, monkeypatch
):
    text = (folder / "data.txt").read_bytes()
    command = [sys.executable, "-m", "pico_edge", "train", "-", "--out", "pipe.pt", *FLAGS]
    done = subprocess.run(command, input=text, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "pipe.run" / "stdin.txt").read_bytes() == text
    code, _, err = pico_edge(capsys, "train", "data.txt", "--out", "file.pt", *FLAGS)
    assert code == 0, err
    from_pipe, from_file = load_checkpoint("pipe.pt"), load_checkpoint("file.pt")
    assert from_pipe.data == from_file.data and from_pipe.ngrams is not None
    assert from_pipe.ngrams.to_dict() == from_file.ngrams.to_dict()
    for name, weights in from_file.model.items():
        assert torch.equal(from_pipe.model[name], weights), name
    monkeypatch.setattr("sys.stdin", None)
    resume = ["train", "-", "--out", "pipe.pt", "--threads", "1", "--resume"]
    code, _, err = pico_edge(capsys, *resume)
    assert code == 0 and "this run is finished" in err, err


def test_a_lost_copy_of_standard_input_is_asked_for_again_and_compared(folder, capsys, monkeypatch):
    text = (folder / "data.txt").read_text()

    def train_on(stdin, *arguments):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        return pico_edge(capsys, "train", "-", *arguments)

    code, _, err = train_on("", *FLAGS)
    assert code == 3 and "found 0 tokens, needed 18" in err
    assert train_on(text, *FLAGS, "--force")[0] == 0
    (folder / "ckpt.run" / "stdin.txt").unlink()
    code, _, err = train_on(text + "!", "--resume", "--threads", "1")
    assert code == 3 and "the data has changed since the run began" in err
    (folder / "ckpt.run" / "stdin.txt").unlink()
    assert train_on(text, "--resume", "--threads", "1")[0] == 0


def test_ctrl_c_while_tokenizing_leaves_nothing_half_written(folder):
    words = [f"{i % 7919:x}{i % 104729:x}" for i in range(400_000)]
    (folder / "large.txt").write_text(" ".join(words) * 15)
    command = [sys.executable, "-m", "pico_edge", "train", "large.txt", *FLAGS]
    command += ["--tokenizer", "bpe", "--vocab-size", "260"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    run, deadline = folder / "ckpt.run", time.monotonic() + 120
    while not list(run.glob(".tokens.bin.tmp-*")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert leftovers(folder) == []
    assert {file.name for file in run.iterdir()} <= {"bpe.json", "lock"}


def test_a_folder_that_holds_its_own_run_is_resumed_and_begun_again(folder, capsys):
    n = (folder / "data.txt").stat().st_size
    for flags in ((), ("--resume",), ("--force",)):
        code, _, err = pico_edge(capsys, "train", ".", *FLAGS, *flags)
        assert code == 0, err
        assert (folder / "ckpt.run" / "tokens.bin").stat().st_size == 2 * n


def test_the_data_is_never_the_output(folder, capsys):
    (folder / "val.txt").write_text("over the lazy dog " * 40)
    before = (folder / "data.txt").read_bytes()
    for out in ("data.txt", "./data.txt", "val.txt"):
        flags = ("--val-data", "val.txt", "--force", "--out", out)
        assert "is read, so it cannot be --out too" in refused(
            capsys, 2, "data.txt", *FLAGS, *flags
        )
    assert (folder / "data.txt").read_bytes() == before


@pytest.mark.parametrize("out", ["", ".", "/"])
def test_an_output_without_a_name_is_refused(out, folder, capsys):
    assert "expected the name of a file" in refused(capsys, 2, "data.txt", *FLAGS, "--out", out)


@pytest.mark.parametrize("flag", ["--val-data", "--init-from"])
def test_an_empty_name_is_not_this_folder(flag, folder, capsys):
    name = flag[2:].replace("-", "_")
    assert f"{name} is empty" in refused(capsys, 2, "data.txt", *FLAGS, flag, "")
    assert "an empty path" in refused(capsys, 2, "", *FLAGS)


def test_a_failed_start_over_from_a_pipe_leaves_the_run_before_resumable(
    folder, capsys, monkeypatch
):
    def piped(content, *flags):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return pico_edge(capsys, "train", "-", *FLAGS, *flags)

    text = (folder / "data.txt").read_bytes()
    assert piped(text)[0] == 0
    assert piped(b"", "--force")[0] == 3
    assert (folder / "ckpt.run" / "stdin.txt").read_bytes() == text
    assert piped(b"", "--resume")[0] == 0
    assert piped(text[:900], "--force")[0] == 0
    assert (folder / "ckpt.run" / "stdin.txt").read_bytes() == text[:900]
    assert not (folder / "ckpt.run" / "stdin.new.txt").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dropout", "0"], "dropout is 0.0, the run to resume has 0.2: leave the flag out"),
        (["--vocab-size", "5000"], "vocab_size is 5000, the run to resume has 257"),
        (["--target-bytes", "1MB"], "a target for the device is given"),
        (["--val-fraction", "0.5"], "val_fraction is 0.5, the run to resume has 0.1"),
        (["--encoding", "latin-1"], "encoding is latin-1, the run to resume has None"),
        (["--text-field", "zz"], "text_field is zz, the run to resume has text"),
        (["--val-data", "data.txt"], "the run began without --val-data"),
    ],
)
def test_a_resume_refuses_what_it_would_not_do(flags, message, folder, capsys):
    if not (folder / "ckpt.pt").exists():
        assert pico_edge(capsys, "train", "data.txt", *FLAGS, "--dropout", "0.2")[0] == 0
    assert message in refused(capsys, 2, "data.txt", "--resume", *flags)


def test_another_split_of_a_step_is_not_called_exact(folder, capsys):
    pico_edge(capsys, "train", "data.txt", *FLAGS)
    code, _, err = pico_edge(
        capsys, "train", "data.txt", "--resume", "--batch-size", "1", "--threads", "1"
    )
    assert code == 0
    assert "statistically equivalent (batch_size 2 -> 1, grad_accum 1 -> 2)" in err
    assert "bit by bit" not in err


def test_a_best_model_that_was_deleted_is_not_said_to_be_written(folder, capsys):
    pico_edge(capsys, "train", "data.txt", *FLAGS)
    (folder / "ckpt.pt").unlink()
    code, out, err = pico_edge(capsys, "train", "data.txt", "--resume", "--json")
    assert (code, json.loads(out)["file"]) == (0, None)
    assert "wrote" not in err and "the best model is not where it was saved" in err


def test_a_model_alone_is_not_said_to_be_resumable(folder, capsys):
    pico_edge(capsys, "train", "data.txt", *FLAGS)
    shutil.rmtree(folder / "ckpt.run")
    said = refused(capsys, 2, "data.txt", *FLAGS)
    assert said == "error: ckpt.pt exists: add --force to start over, or choose another --out"


def test_a_held_out_share_that_leaves_nothing_to_train_on_is_named(folder, capsys):
    said = refused(capsys, 3, "data.txt", *FLAGS, "--val-fraction", "0.999")
    assert "val_fraction 0.999 leaves" in said and "lower --val-fraction" in said


@pytest.mark.parametrize(
    "flags",
    [
        ["--threads", "99999999999"],
        ["--target-bytes", "9" * 400],
        ["--sample-prompt", "\udcff"],
        ["--val-data", "data.txt", "--val-fraction", "0.2"],
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_work(flags, folder, capsys):
    given = FLAGS[:-2] if flags[0] == "--threads" else FLAGS
    given = given[8:] if flags[0] == "--target-bytes" else given
    refused(capsys, 2, "data.txt", *given, *flags)
    assert [path.name for path in folder.iterdir()] == ["data.txt"]


def test_a_name_like_a_flag_is_resumed_by_the_printed_command():
    command = resume_command(["-a.txt", "-", "b.txt"], TrainSettings())
    assert command == "pico-edge train ./-a.txt - b.txt --resume"


@pytest.mark.parametrize(
    "data",
    [["texts"], ["texts/*"], ["data.txt", "--val-data", "texts"], ["data.txt", "--val-data=t*/b*"]],
)
def test_text_found_in_a_folder_is_never_the_output(data, folder, capsys):
    (folder / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / "texts" / name).write_text("over the lazy dog " * 40)
    said = refused(capsys, 2, *data, *FLAGS, "--out", "texts/b.txt", "--force")
    assert "texts/b.txt is read, so it cannot be --out too" in said
    assert refused(capsys, 2, *data, *FLAGS, "--out", "texts/b.txt") == said
    assert (folder / "texts" / "b.txt").read_text() == "over the lazy dog " * 40
    assert not (folder / "texts" / "b.run").exists()


def test_a_model_by_any_name_among_the_data_is_replaced(folder, capsys):
    for flags in ((), ("--resume",), ("--force",)):
        assert pico_edge(capsys, "train", ".", *FLAGS, "--out", "model", *flags)[0] == 0


def test_an_output_that_is_a_pipe_is_refused_without_waiting(folder, capsys):
    os.mkfifo(folder / "pipe")
    said = refused(capsys, 2, "data.txt", *FLAGS, "--out", "pipe", "--force")
    assert "pipe is a device or a pipe" in said
