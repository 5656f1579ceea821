"""The number of threads: what was asked for; else what a machine, here a simulated one, rewards."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pico_edge.errors import UsageError
from pico_edge.runtime import threads as threads_module
from pico_edge.runtime.session import Session
from pico_edge.runtime.threads import LONGEST_WAIT_S, Pace, fixed_threads, physical_cores

DATA = Path(__file__).parents[1] / "data"


def test_threads_come_from_the_argument_then_the_variable(monkeypatch):
    monkeypatch.delenv("PICO_EDGE_THREADS", raising=False)
    assert fixed_threads("auto") is None
    monkeypatch.setenv("PICO_EDGE_THREADS", "3")
    assert fixed_threads("auto") == 3
    assert fixed_threads(2) == 2
    assert fixed_threads("4") == 4
    monkeypatch.setenv("PICO_EDGE_THREADS", "many")
    with pytest.raises(UsageError, match="PICO_EDGE_THREADS is 'many': expected auto or 1 to"):
        fixed_threads("auto")


@pytest.mark.parametrize("threads", [0, -1, 10**6, 1.5, True, "", "two", None])
def test_a_number_of_threads_out_of_range_is_refused(threads):
    with pytest.raises(UsageError, match=r"threads is .*expected auto or 1 to"):
        fixed_threads(threads)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_cores_are_those_of_the_affinity():
    allowed = os.sched_getaffinity(0)
    assert 1 <= physical_cores() <= len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


class Machine:
    """Clocks and steps of a machine with two cores, as measured; `neighbour`: one core is taken."""

    def __init__(self, monkeypatch, quiet_s, *, crowded_s, load_s=0.04):
        self.wall_s = self.cpu_s = 0.0
        self.neighbour = False
        self.quiet_s, self.crowded_s = quiet_s, crowded_s
        self.steps = []  # threads of each
        self.loads = 0
        monkeypatch.setattr(threads_module, "perf_counter", lambda: self.wall_s)
        monkeypatch.setattr(threads_module, "process_time", lambda: self.cpu_s)
        self.load_s = load_s
        self.loaded = {2}

    def run(self, pace, seconds):
        """Steps for so long; how many were made, and the number of changes."""
        end, made, changes = self.wall_s + seconds, 0, 0
        while self.wall_s < end:
            threads = pace.threads
            if threads not in self.loaded:
                self.loaded.add(threads)
                self.wall_s += self.load_s
            step_s = (self.crowded_s if self.neighbour else self.quiet_s)[threads]
            self.wall_s += step_s
            self.cpu_s += step_s * (1.0 if self.neighbour else threads)
            pace.record(step_s, threads)
            self.steps.append(threads)
            changes += pace.threads != threads
            made += 1
        return made, changes


@pytest.mark.parametrize("scale", [0.1, 1, 30])  # a step from 20 us to 6 ms
def test_a_neighbour_costs_no_more_than_the_thread_he_takes(monkeypatch, scale):
    quiet, crowded = {2: 200e-6 * scale, 1: 270e-6 * scale}, {2: 1e-3 * scale, 1: 280e-6 * scale}
    machine = Machine(monkeypatch, quiet, crowded_s=crowded)
    pace = Pace(2, cost_s=machine.load_s)
    machine.run(pace, 5)
    assert machine.loaded == {2}  # nothing is loaded that nobody needs
    machine.neighbour = True
    machine.run(pace, 0.5)
    made, _ = machine.run(pace, 20)
    assert made > 0.95 * 20 / crowded[1]  # trials cost a few percent
    machine.neighbour = False
    machine.run(pace, LONGEST_WAIT_S + 1)
    made, changes = machine.run(pace, 5)
    assert (pace.threads, changes) == (2, 0)
    assert made > 0.99 * 5 / quiet[2]


def test_two_threads_stay_where_they_are_faster_even_beside_a_neighbour(monkeypatch):
    machine = Machine(
        monkeypatch, {2: 200e-6, 1: 400e-6}, crowded_s={2: 300e-6, 1: 400e-6}, load_s=0.1
    )
    machine.neighbour = True
    pace = Pace(2, cost_s=machine.load_s)
    machine.run(pace, 2)
    made, _ = machine.run(pace, 20)
    assert made > 0.97 * 20 / 300e-6


def test_what_was_timed_at_load_is_where_it_begins(monkeypatch):
    machine = Machine(monkeypatch, {2: 93e-6, 1: 83e-6}, crowded_s={2: 400e-6, 1: 85e-6})
    machine.loaded = {1, 2}
    pace = Pace(2, cost_s=0.01, means_s=machine.quiet_s)
    assert pace.threads == 1
    made, _ = machine.run(pace, 20)
    assert made > 0.99 * 20 / 83e-6
    machine.neighbour = True
    made, _ = machine.run(pace, 20)
    assert made > 0.95 * 20 / 85e-6


def test_a_slow_reader_of_the_text_is_no_neighbour(monkeypatch):
    """Between steps the threads spin or sleep: only the time inside of steps counts."""
    machine = Machine(monkeypatch, {2: 200e-6, 1: 270e-6}, crowded_s={})
    pace = Pace(2, cost_s=0.04)
    for _ in range(2000):
        machine.run(pace, 1e-6)  # one step
        machine.wall_s += 0.05
    assert machine.loaded == {2}


class Restless(Pace):
    """Changes at every step."""

    def record(self, seconds, threads):
        self.threads = 3 - threads


@pytest.mark.parametrize("name", ["tiny_fp32.onnx", "tiny.onnx", "tiny_int4.onnx"])
def test_a_change_of_threads_changes_no_bit_of_any_logit(name):
    plain, restless = Session(DATA / name, threads=1), Session(DATA / name, threads=2)
    restless.pace = Restless(2, cost_s=0.0)
    ids = np.random.default_rng(2).integers(0, plain.tokenizer.n_vocab, 24).tolist()
    logits = []
    for session in (plain, restless):
        cache = session.new_cache(batch=2)
        found = [cache.prefill([ids[:5], ids[5:7]]).copy()]
        found += [cache.decode([token, token]).copy() for token in ids[7:20]]
        found.append(cache.append(1, ids[20:], all_logits=True).copy())
        found.append(cache.decode(ids[:2]).copy())
        logits.append(np.concatenate(found))
    np.testing.assert_array_equal(*logits)
    assert set(restless._loaded) == {1, 2}


def test_a_file_replaced_while_it_runs_is_not_mixed_with_the_new_one(tmp_path):
    path = shutil.copy(DATA / "tiny.onnx", tmp_path / "model.onnx")
    session = Session(path, threads=2)
    session.pace = Restless(2, cost_s=0.0)
    cache = session.new_cache()
    cache.prefill([[1, 2, 3]])
    os.replace(shutil.copy(DATA / "tiny_int4.onnx", tmp_path / "new.onnx"), path)
    logits = [cache.decode([token]).copy() for token in (4, 5)]
    assert session.pace is None  # it goes on as it was
    plain = Session(DATA / "tiny.onnx", threads=1).new_cache()
    plain.prefill([[1, 2, 3]])
    for token, found in zip((4, 5), logits, strict=True):
        np.testing.assert_array_equal(found, plain.decode([token]))
