"""A run by time ends in time on a machine that gets slower or faster. Its clock is a fake one."""

import dataclasses
import hashlib
import inspect
import io
import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pico_edge.train import budget, loop, setup
from pico_edge.train.budget import LAST_STRETCH, MIN_ITERS, OFF_BY, fit_schedule
from pico_edge.train.checkpoint import load_checkpoint, save_checkpoint
from pico_edge.train.evaluate import evaluate
from pico_edge.train.optim import rate_at
from pico_edge.train.report import Reporter
from pico_edge.train.settings import Recipe, TrainSettings
from pico_edge.train.step import train_step

TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer. " for i in range(200))
# Five minutes, and a second a step at the start: 294 iterations, after 5 s of measuring.
TINY = TrainSettings(
    preset="nano",
    n_layer=1,
    n_head=1,
    n_embd=16,
    block_size=8,
    batch_size=2,
    minutes=5.0,
    eval_interval=20,
    eval_iters=2,
    threads=1,
    dtype="float32",  # timed anew, a busy machine may choose another
)
BUDGET_S = 300.0


class Machine:
    """A clock in the place of the module `time`, which only steps and evaluations move on.

    changes_at: the step from which each takes later_s instead of 1 s. evaluation_s: of each
    evaluation, the one that measures too. ends_at: the step before which the signal comes.
    """

    def __init__(
        self, changes_at=10**9, later_s=1.0, evaluation_s=0.0, ends_at=None, signum=signal.SIGKILL
    ):
        self.now, self.rates = 0.0, {}
        self.changes_at, self.later_s, self.evaluation_s = changes_at, later_s, evaluation_s
        self.ends_at, self.signum = ends_at, signum

    def perf_counter(self):
        return self.now

    monotonic = perf_counter

    def step(self, trainer, step, rate):
        if step == self.ends_at:
            os.kill(os.getpid(), self.signum)
        self.rates[step] = rate
        self.now += self.later_s if step >= self.changes_at else 1.0
        return train_step(trainer, step, rate)

    def measuring_step(self, trainer, step, rate):
        self.now += 1.0
        return train_step(trainer, step, rate)

    def evaluate(self, trainer, data):
        self.now += self.evaluation_s
        return evaluate(trainer, data)

    def install(self, put):
        """put: setattr, or a fixture's, for the modules that read the clock."""
        for module in (budget, loop, setup):
            put(module, "time", self)
        put(loop, "train_step", self.step)
        put(budget, "train_step", self.measuring_step)
        for module in (budget, loop):
            put(module, "evaluate", self.evaluate)


class Lines(Reporter):
    def __init__(self):
        super().__init__(io.StringIO())
        self.lines, self.left = [], []

    def say(self, text):
        self.lines.append(text)

    def progress(self, line):
        if callable(line):  # tokenizing says text
            self.left.append(line(None).split(" | ")[-1])


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Trains on a machine, in this process: result, and what was said."""
    data = tmp_path / "data.txt"
    data.write_text(TEXT)

    def run(machine, name="ckpt", **changes):
        machine.install(monkeypatch.setattr)
        lines = Lines()
        settings = dataclasses.replace(TINY, out=str(tmp_path / f"{name}.pt"), **changes)
        return loop.train([data], settings, reporter=lines, started=machine.now), lines

    return run


def schedule_lines(lines):
    return [line for line in lines.lines if line.startswith("schedule: ")]


def end_of(folder, name="ckpt"):
    """What must not differ: weights and schedule at the end, and every evaluation."""
    last = load_checkpoint(folder / f"{name}.run" / "last.pt")
    digest = hashlib.sha256()
    for key, tensor in sorted(last.model.items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    rows = (folder / f"{name}.run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(row) | {"tokens_per_second": None} for row in rows]
    return digest.hexdigest(), last.resume["recipe"], metrics


def assert_the_rate_only_falls_and_in_small_steps(machine, result):
    steps = range(result.max_iters // 10, result.max_iters)  # beyond the warm-up
    rates = [machine.rates[step] for step in steps]
    falls = [before - after for before, after in itertools.pairwise(rates)]
    assert min(falls) > 0.0 and rates[-1] == 0.0
    # Of 280 even falls: at a third of the speed they are three times as steep, and more so since
    # the time until that is seen is lost too.
    assert max(falls) < 6 * max(rates) / 280


def test_a_steady_machine_keeps_its_schedule(train):
    result, lines = train(Machine())
    assert (result.iter, result.max_iters, result.stopped) == (294, 294, "max_iters")
    assert len(schedule_lines(lines)) == 1
    assert lines.left[0] == "4:53 left" and lines.left[-1] == "0:00 left"


@pytest.mark.parametrize("later_s", [1.5, 2.0, 3.0])
def test_on_a_slower_machine_fewer_iterations_end_in_time(later_s, train):
    machine = Machine(changes_at=100, later_s=later_s)
    result, lines = train(machine)
    said = schedule_lines(lines)[1:]
    assert said[0].startswith("schedule: 294 -> ") and said[0].endswith("slower than planned")
    assert result.iter == result.max_iters < 294
    assert abs(result.elapsed_s - BUDGET_S) <= OFF_BY * BUDGET_S
    assert_the_rate_only_falls_and_in_small_steps(machine, result)
    # Four seconds before the end, by the pace of then.
    minutes, seconds = lines.left[result.iter - 1 - round(4 / later_s)].split()[0].split(":")
    assert minutes == "0" and 2 <= int(seconds) <= 6


def test_on_a_faster_machine_more_iterations_use_the_time(train):
    machine = Machine(changes_at=100, later_s=0.5)
    result, lines = train(machine)
    assert schedule_lines(lines)[1].endswith("faster than planned")
    assert result.iter == result.max_iters > 440
    assert abs(result.elapsed_s - BUDGET_S) <= OFF_BY * BUDGET_S
    assert_the_rate_only_falls_and_in_small_steps(machine, result)


def test_a_run_whose_evaluations_are_too_far_apart_still_ends(train, tmp_path):
    machine = Machine(changes_at=50, later_s=10.0)
    result, _ = train(machine, eval_interval=1000)
    assert result.iter == result.max_iters < 80
    assert result.elapsed_s < 1.1 * BUDGET_S
    assert machine.rates[result.max_iters - 1] == 0.0
    # Saved when it was decided: before the step that followed it.
    recipe = load_checkpoint(tmp_path / "ckpt.run" / "last.prev.pt").resume["recipe"]
    assert recipe["max_iters"] == result.max_iters


# A process of its own that kills itself: python -c DRIVER out data changes_at later_s 0 ends_at.
DRIVER = """
import dataclasses, io, os, signal, sys
from pico_edge.train import budget, loop, setup
from pico_edge.train.evaluate import evaluate
from pico_edge.train.report import Reporter
from pico_edge.train.settings import TrainSettings
from pico_edge.train.step import train_step

{machine}

machine = Machine(*map(float, sys.argv[3:]))
machine.install(setattr)
settings = TrainSettings(**dict({settings}, out=sys.argv[1]))
loop.train([sys.argv[2]], settings, reporter=Reporter(io.StringIO()), started=0.0)
"""


@pytest.mark.parametrize(("ends_at", "changes"), [(130, 1), (150, 0)])
def test_a_run_laid_anew_and_killed_ends_in_the_bits_of_the_one_that_was_not(
    ends_at, changes, train, tmp_path
):
    """SIGKILL between the two changes of the schedule, which a resume finds too, and after them."""
    later = {"changes_at": 100, "later_s": 2.0}
    _, lines = train(Machine(**later), "whole")
    whole = schedule_lines(lines)[1:]
    assert len(whole) == 2

    code = DRIVER.format(machine=inspect.getsource(Machine), settings=dataclasses.asdict(TINY))
    arguments = [tmp_path / "cut.pt", tmp_path / "data.txt", *later.values(), 0, ends_at]
    process = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], timeout=120)
    assert process.returncode == -signal.SIGKILL
    last = load_checkpoint(tmp_path / "cut.run" / "last.pt")
    assert last.iter == ends_at // 20 * 20

    _, lines = train(Machine(**later), "cut", resume=True)
    assert schedule_lines(lines) == whole[2 - changes :]
    assert end_of(tmp_path, "cut") == end_of(tmp_path, "whole")


def test_a_resume_just_before_an_evaluation_does_not_take_it_for_the_pace(train):
    result, _ = train(Machine(evaluation_s=5.0, ends_at=38, signum=signal.SIGTERM))
    assert result.signal == signal.SIGTERM and result.iter == 39
    again, more = train(Machine(evaluation_s=5.0), resume=True)
    assert again.iter == again.max_iters == result.max_iters
    assert schedule_lines(more) == []


def test_a_number_of_iterations_is_kept_however_slow_the_machine(train, tmp_path):
    slow = Machine(changes_at=10, later_s=1000.0)
    for name, machine in (("slow", slow), ("steady", Machine())):
        result, lines = train(machine, name, minutes=None, max_iters=60)
        assert result.iter == result.max_iters == 60
        assert len(schedule_lines(lines)) == 1
    (slow_weights, slow_recipe, _), (weights, recipe, _) = map(
        lambda name: end_of(tmp_path, name), ("slow", "steady")
    )
    assert (slow_weights, slow_recipe) == (weights, recipe)
    assert recipe["budget_s"] == 0.0


def test_a_run_from_before_schedules_were_laid_anew_goes_on_as_it_was(train, tmp_path):
    train(Machine(), "whole", minutes=None, max_iters=60)
    path = tmp_path / "whole.run" / "last.prev.pt"
    old = load_checkpoint(path)
    assert old.iter == 40
    for name in ("budget_s", "decay_iter", "decay_rate"):
        del old.resume["recipe"][name]
    end = end_of(tmp_path, "whole")
    save_checkpoint(tmp_path / "whole.run" / "last.pt", old)
    train(Machine(changes_at=0, later_s=1000.0), "whole", resume=True, minutes=5.0)
    weights, recipe, metrics = end_of(tmp_path, "whole")
    assert (weights, recipe) == end[:2] and len(metrics) == 3


RECIPE = TINY.recipe("nano", gpu=False, max_iters=294, tokens_per_epoch=9999, block_size=8)


@given(
    step=st.integers(1, 293),
    elapsed_s=st.floats(1.0, 2 * BUDGET_S),
    per_iter_s=st.floats(0.05, 100.0),
    warmup_iters=st.integers(0, 300),
    min_lr=st.sampled_from([0.0, 1e-4]),
)
# A warm-up longer than the run was.
@example(step=248, elapsed_s=141.0, per_iter_s=0.05, warmup_iters=300, min_lr=1e-4)
def test_whatever_the_pace_the_rate_goes_on_from_where_it_is_and_the_end_is_near_the_time(
    step, elapsed_s, per_iter_s, warmup_iters, min_lr
):
    before = dataclasses.replace(RECIPE, min_lr=min_lr, decay_iter=warmup_iters)
    now = fit_schedule(before, step=step, elapsed_s=elapsed_s, per_iter_s=per_iter_s)
    ends_s = elapsed_s + per_iter_s * (now.max_iters - step)
    if now is before:
        in_time = abs(ends_s - BUDGET_S) <= 15.0 + per_iter_s  # or an iteration off
        last_steps = now.max_iters <= max(MIN_ITERS, step + 1)
        no_use = ends_s < BUDGET_S and elapsed_s > 0.9 * BUDGET_S
        at_once = ends_s - elapsed_s <= LAST_STRETCH * BUDGET_S + per_iter_s
        assert in_time or last_steps or no_use or at_once
        return
    assert now.max_iters > step
    assert fit_schedule(now, step=step, elapsed_s=elapsed_s, per_iter_s=per_iter_s) is now
    rates = [rate_at(now, i) for i in range(step, now.max_iters)]
    assert rates[-1] == min_lr
    if len(rates) > 1:
        assert rates[0] == pytest.approx(rate_at(before, step), rel=1e-12)
        peak = max(rates)
        assert rates[rates.index(peak) :] == sorted(rates[rates.index(peak) :], reverse=True)
        assert peak <= RECIPE.learning_rate
    # Of a run by iterations nothing changes.
    by_iters = dataclasses.replace(before, budget_s=0.0)
    assert fit_schedule(by_iters, step=step, elapsed_s=elapsed_s, per_iter_s=9.0) is by_iters


def test_a_recipe_of_before_is_one_that_falls_from_its_peak():
    old = RECIPE.to_dict()
    for name in ("budget_s", "decay_iter", "decay_rate"):
        del old[name]
    assert Recipe.from_dict(old) == dataclasses.replace(RECIPE, budget_s=0.0)
