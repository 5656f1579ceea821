"""Several processes under a real torchrun: the curve of one, one writer, nobody left behind."""

import dataclasses
import gc
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed

from pico_edge.config import GPTConfig
from pico_edge.errors import UsageError
from pico_edge.train.checkpoint import load_checkpoint
from pico_edge.train.distributed import Place, Workers, place
from pico_edge.train.loop import resume_command, train
from pico_edge.train.model import GPT
from pico_edge.train.optim import make_optimizers
from pico_edge.train.report import Reporter
from pico_edge.train.resume import check_flags
from pico_edge.train.settings import TrainSettings
from pico_edge.train.step import Trainer, train_step

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or os.name != "posix",
    reason="needs torch.distributed and signals",
)

TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer. " for i in range(200))
# As flags and as settings: the same run.
TINY = {
    "preset": "nano",
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 16,
    "block_size": 8,
    "dropout": 0.0,
    "batch_size": 2,
    "eval_interval": 4,
    "eval_iters": 5,
    "threads": 1,
}
LIMIT_S = 120  # a generous timeout, not a measure
# Runs on each rank in the place of `-m pico_edge`; what stands in {} happens to one rank alone.
DRIVER = """
import os, sys, time
from pico_edge.cli import main

if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    if rank == 1:
        {}
    main()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "data.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags(**changes):
    values = TINY | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def start(*arguments, program=("-m", "pico_edge"), timeout_s=60, n=2):
    """torchrun with n processes on this machine, on a port of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PICO_EDGE_TIMEOUT_S": str(timeout_s),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
    }
    return subprocess.Popen(
        [*launcher, "--nproc-per-node", str(n), *program, "train", "data.txt", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def driver(folder, happens):
    path = folder / "driver.py"
    path.write_text(DRIVER.format(happens))
    return (str(path),)


def end(process):
    """Exit code, stdout and stderr; whoever does not leave in time is killed and a failure."""
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.kill()
        raise
    return process.returncode, out, err


def errors(err):
    return [line for line in err.splitlines() if line.startswith("error: ")]


def rank_codes(err):
    """The exit codes of ranks that torchrun lists at the end."""
    return {int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", err)}


def ranks_of(process):
    """The process ids of the ranks, by rank."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found.update({int(v[5:]): int(child) for v in environment if v.startswith(b"RANK=")})
    return found


def wait_for(path, process):
    deadline = time.monotonic() + LIMIT_S
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists(), process.communicate()


def gone(pids):
    deadline = time.monotonic() + LIMIT_S
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def rows(name):
    return [json.loads(line) for line in Path(f"{name}.run/metrics.jsonl").read_text().splitlines()]


def assert_same_curve(a, b):
    assert [row["iter"] for row in a] == [row["iter"] for row in b]
    for one, two in zip(a, b, strict=True):
        assert one["tokens"] == two["tokens"]
        for name in ("train_loss", "val_loss", "val_bits_per_byte", "learning_rate", "grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-5), (one["iter"], name)


def weights_hash(path):
    digest = hashlib.sha256()
    for name, tensor in sorted(load_checkpoint(path).model.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def train_alone(name, *, stop_at="never", **changes):
    class StopAt(Reporter):
        def say(self, text):
            if text.startswith(stop_at):
                os.kill(os.getpid(), signal.SIGTERM)

    settings = TrainSettings(out=f"{name}.pt", **TINY | changes)
    return train(["data.txt"], settings, reporter=StopAt(io.StringIO()))


# What several processes compute


def test_two_processes_give_the_curve_of_one_at_the_same_global_batch(folder):
    train_alone("one", max_iters=16, grad_accum=4)
    two = start("--out=two.pt", "--json", *flags(max_iters=16, grad_accum=2))
    # Begun by one process and continued by two: grad_accum 4 becomes 2 by itself.
    train_alone("more", max_iters=16, grad_accum=4, stop_at="iter 8/")
    code, out, err = end(two)
    assert code == 0, err
    assert json.loads(out)["iter"] == 16
    assert err.count("iter 16/16") == 1 and "Warning" not in err
    assert_same_curve(rows("one"), rows("two"))
    assert load_checkpoint("two.run/last.pt").resume["world_size"] == 2
    assert not [path for path in folder.rglob(".*")]

    code, out, err = end(start("--out=more.pt", "--resume", "--threads=1"))
    assert code == 0, err
    assert "grad_accum 4 -> 2, processes 1 -> 2" in err
    assert "statistically equivalent (world_size 1 -> 2, grad_accum 4 -> 2)" in err
    assert_same_curve(rows("one"), rows("more"))


@pytest.mark.parametrize(
    ("world_size", "changes", "split"),
    [
        (2, {}, (2, 2)),
        (4, {}, (2, 1)),
        (1, {"batch_size": 8}, (8, 1)),
        (2, {"batch_size": 1, "grad_accum": 4}, (1, 4)),
        (1, {}, (2, 4)),
        (2, {"batch_size": 4}, (4, 1)),
        (3, {}, None),
        (2, {"grad_accum": 4}, None),
        (8, {}, None),
        (2, {"batch_size": 3}, None),
    ],
)
def test_other_processes_and_batches_go_on_where_tokens_per_step_are_the_same(
    world_size, changes, split, folder
):
    """Row 21."""
    if not Path("one.run").exists():
        train_alone("one", max_iters=2, grad_accum=4)
    checkpoint = load_checkpoint("one.run/last.pt")
    said = []
    reporter = Reporter(io.StringIO())
    reporter.say = said.append
    settings = TrainSettings(resume=True, **changes)
    if split is None:
        with pytest.raises(UsageError, match=rf"processes {world_size} are not the batch_size 2 x"):
            check_flags(checkpoint, settings, reporter, world_size=world_size)
        return
    recipe = check_flags(checkpoint, settings, reporter, world_size=world_size)
    assert (recipe.batch_size, recipe.grad_accum) == split
    assert len(said) == (split != (2, 4))


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_and_resumed_two_processes_end_in_the_bits_of_an_uninterrupted_run(killed, folder):
    """Row 20: SIGKILL of one rank; dropout and accumulation on."""
    run = flags(max_iters=100, grad_accum=2, dropout=0.2, eval_interval=10)
    assert end(start("--out=whole.pt", "--quiet", *run))[0] == 0
    process = start("--out=cut.pt", *run)
    last = folder / "cut.run" / "last.pt"
    wait_for(last, process)
    pids = ranks_of(process)
    os.kill(pids[killed], signal.SIGKILL)
    code, _, err = end(process)
    assert code == 1
    assert gone(pids.values())
    assert len(errors(err)) <= 1  # torchrun may be faster than the broken connection
    assert all("lost contact" in line for line in errors(err)), err
    assert -signal.SIGKILL in rank_codes(err)
    assert "train/loop.py" not in err  # a traceback of ours; torchrun prints its own
    assert 0 < load_checkpoint(last).iter < 100
    code, _, err = end(start("--out=cut.pt", "--resume", *run))
    assert code == 0 and "bit by bit" in err, err
    for name in ("pt", "run/last.pt"):
        assert weights_hash(f"cut.{name}") == weights_hash(f"whole.{name}")
    assert [r["val_loss"] for r in rows("cut")] == [r["val_loss"] for r in rows("whole")]


# Ranks that leave the others


def test_a_signal_to_torchrun_ends_all_ranks_at_the_same_step(folder):
    process = start("--out=ckpt.pt", *flags(max_iters=1_000_000))
    wait_for(folder / "ckpt.run" / "last.pt", process)
    pids = ranks_of(process)
    process.send_signal(signal.SIGTERM)
    _, out, err = end(process)
    assert gone(pids.values())
    command = "torchrun --nproc-per-node 2 -m pico_edge train data.txt --threads 1 --resume"
    assert f"\n  {command}\n" in err
    assert out == "" and not errors(err)
    assert load_checkpoint(folder / "ckpt.run" / "last.pt").iter > 0
    assert not [path for path in folder.rglob(".*")]


def test_a_signal_to_one_rank_stops_all_with_its_exit_code(folder):
    process = start("--out=ckpt.pt", *flags(max_iters=1_000_000))
    wait_for(folder / "ckpt.run" / "last.pt", process)
    os.kill(ranks_of(process)[1], signal.SIGUSR1)
    code, _, err = end(process)
    assert code == 1
    # The first to leave may make torchrun send SIGTERM to one that is about to.
    usual, late = 128 + signal.SIGUSR1, {128 + signal.SIGTERM, -signal.SIGTERM}
    assert usual in rank_codes(err) and rank_codes(err) <= {usual, *late}, err
    assert "stopped by signal" in err and not errors(err)


LEAVE = {
    # Row 20: one raises, before the first step and within one.
    "raises at the start": (
        "import pico_edge.train.setup as s; from pico_edge.errors import ArtefactError\n"
        "        def fail(*a, **k): raise ArtefactError('what rank 1 found')\n"
        "        s.prepare_tokens = fail",
        3,
        "error: rank 1: what rank 1 found",
    ),
    "raises in a step": (
        "import pico_edge.train.step as s; real = s.batch\n"
        "        def fail(*a, **k):\n"
        "            if k['step'] == 9: raise MemoryError\n"
        "            return real(*a, **k)\n"
        "        s.batch = fail",
        1,
        "error: rank 1: out of memory with batch_size 2",
    ),
    # Row 13: not finite on one rank alone.
    "is not finite": (
        "import pico_edge.train.model as m; real = m.GPT.forward; calls = []\n"
        "        def fail(self, *a):\n"
        "            calls.append(self.training)\n"
        "            logits, loss = real(self, *a)\n"
        "            return logits, loss * float('nan') if sum(calls) == 10 else loss\n"
        "        m.GPT.forward = fail",
        4,
        "error: diverged at iteration 10: loss nan",
    ),
    # Flags that differ between the ranks.
    "has other flags": (
        "sys.argv += ['--seed=5', '--beta1=0.5']",
        2,
        "error: beta1 is 0.5 on rank 1 and None on rank 0",
    ),
}


@pytest.mark.parametrize("what", LEAVE)
def test_when_one_rank_fails_all_leave_and_the_reason_is_said_once(what, folder):
    happens, rank_code, line = LEAVE[what]
    process = start("--out=ckpt.pt", *flags(max_iters=100), program=driver(folder, happens))
    code, out, err = end(process)
    assert code == 1 and out == ""
    assert rank_code in rank_codes(err), err
    assert len(errors(err)) == 1 and line.removeprefix("error: ") in errors(err)[0], err
    if what in ("raises in a step", "is not finite"):
        last = load_checkpoint("ckpt.run/last.pt")
        assert last.iter == 8
        assert all(tensor.isfinite().all() for tensor in last.model.values())
    assert not [path for path in folder.rglob(".*")]


def test_a_rank_that_never_comes_is_left_behind(folder):
    """Row 20: one that does not reach the barrier, and one that stands still in the middle."""
    happens = (
        "import pico_edge.train.setup as s\n"
        "        s.prepare_tokens = lambda *a, **k: time.sleep(600)"
    )
    absent = start(*flags(max_iters=9), program=driver(folder, happens), timeout_s=3)
    halted = start("--out=halt.pt", *flags(max_iters=1_000_000), timeout_s=3)
    wait_for(folder / "halt.run" / "last.pt", halted)
    pids = ranks_of(halted)
    os.kill(pids[1], signal.SIGSTOP)
    assert gone([pids[0]])
    os.kill(pids[1], signal.SIGCONT)  # torchrun would kill it, after 30 s
    for process in (absent, halted):
        code, _, err = end(process)
        assert code == 1
        assert len(errors(err)) == 1 and "error: lost contact with another rank" in err, err
    assert load_checkpoint(folder / "halt.run" / "last.pt").iter > 0


def test_the_time_is_measured_by_all_and_decided_by_the_first(folder):
    code, _, err = end(start("--minutes=0.02", "--tokenizer=bpe", "--vocab-size=300", *flags()))
    assert code == 0, err
    assert load_checkpoint("ckpt.pt").tokenizer.kind == "bpe"
    assert err.count("schedule: ") == 1


# Each rank writes its rates down; a clock in the place of rank 0's says that a step takes a second,
# then 1.5, in the end 100.
SLOWER = """
import os, time
from pico_edge.cli import main
from pico_edge.train import budget, loop, setup
from pico_edge.train.step import train_step

RANK = os.environ["RANK"]

class Clock:
    now = time.perf_counter()
    def perf_counter(self):
        return self.now
    monotonic = perf_counter

clock = Clock()

def step(trainer, step, rate):
    with open("rates." + RANK, "a") as file:
        file.write(f"{step} {rate}\\n")
    clock.now += 1.0 if step < 20 else 1.5 if step < 100 else 100.0
    return train_step(trainer, step, rate)

if __name__ == "__main__":
    if RANK == "0":
        budget.time = loop.time = setup.time = clock
    loop.train_step = budget.train_step = step
    main()
"""


def test_all_follow_the_first_where_the_schedule_changes(folder):
    """At an evaluation, and between two when the time is over."""
    (folder / "slower.py").write_text(SLOWER)
    run = flags(eval_interval=40)
    code, out, err = end(start("--minutes=5", "--json", *run, program=("slower.py",)))
    assert code == 0, err
    said = re.findall(r"schedule: (\d+) -> (\d+) iterations, slower than planned", err)
    assert len(said) >= 2, err
    result = json.loads(out)
    assert result["iter"] == result["max_iters"] == int(said[-1][1]) < 110
    rates = [(folder / f"rates.{rank}").read_text() for rank in range(2)]
    assert rates[0] == rates[1]


# One process


def test_without_torchrun_a_process_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert place() == Place(0, 1, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some clusters set for their own purposes
    assert place() == Place(0, 1, 0, 1)
    assert resume_command(["data.txt"], TrainSettings()) == "pico-edge train data.txt --resume"


def test_alone_every_agreement_is_on_the_spot():
    workers = Workers()
    state = torch.get_rng_state()
    workers.seed_step(1, 2)
    workers.meet()
    assert torch.equal(torch.get_rng_state(), state)
    assert workers.is_first
    assert workers.mean(0.1) == 0.1 and workers.sum([1.5]) == [1.5]
    assert workers.agreed(None) is None and workers.agreed(2) == 2
    assert workers.share(lambda: workers) is workers
    assert workers.in_turn(lambda: 3, seen=lambda: pytest.fail("not needed")) == 3
    with workers.gradients(print, last=False):
        pass
    assert workers.data_parallel(print, torch.device("cpu")) is print


def test_dropout_of_each_rank_and_step_is_its_own_and_repeats():
    draws = []
    for rank, seed, step in [(0, 5, 7), (1, 5, 7), (0, 5, 8), (0, 6, 7), (0, 5, 7)]:
        Workers(Place(rank, 2, rank, 2)).seed_step(seed, step)
        draws.append(tuple(torch.rand(4).tolist()))
    assert draws[0] == draws[-1] and len(set(draws)) == 4


def test_more_processes_than_can_share_a_device_are_refused():
    two = Workers(Place(1, 2, 1, 2))
    assert two.device(torch.device("cpu")) == torch.device("cpu")
    assert two.device(torch.device("cuda")) == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="device mps with 2 processes"):
        two.device(torch.device("mps"))


def test_the_resume_command_names_machines_and_processes(monkeypatch):
    values = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    command = resume_command(["data.txt"], dataclasses.replace(TrainSettings(), out="a b.pt"))
    assert command == (
        "torchrun --nnodes 2 --nproc-per-node 4 -m pico_edge train data.txt --out 'a b.pt' --resume"
    )


def test_accumulated_gradients_are_averaged_once_per_step(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        workers = Workers(Place(0, 2, 0, 2), store)
        model = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=1, n_head=1, n_embd=16))
        recipe = TrainSettings(grad_accum=4, batch_size=2).recipe(
            "nano", gpu=False, max_iters=9, tokens_per_epoch=99, block_size=8
        )
        trainer = Trainer(
            model=model,
            forward=workers.data_parallel(model, torch.device("cpu")),
            optimizers=make_optimizers(model, recipe),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            recipe=recipe,
            tokens=np.arange(99, dtype=np.uint16) % 31,
            device=torch.device("cpu"),
            dtype=torch.float32,
            workers=workers,
        )
        calls = []

        def count(state, bucket):
            calls.append(len(bucket.parameters()))
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        trainer.forward.register_comm_hook(None, count)
        for step in range(3):
            train_step(trainer, step, 1e-3)
        assert sum(calls) == 3 * len(list(model.parameters()))
        del trainer
    finally:
        gc.collect()
        torch.distributed.destroy_process_group()
