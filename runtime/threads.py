"""How many threads a model runs on: chosen at load, changed when a neighbour takes a core.

The threads of onnxruntime spin and wait for each other at every node. Quiet, that is the fastest;
but when another process takes one of their cores, all wait for the one that has none: on two cores
two threads then fall to less than half, while one alone keeps its speed. The number of threads
changes no bit of a logit (tested), so a clock may decide it. Knows nothing of onnxruntime.

Try: `physical_cores()`, what "auto" begins with.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path
from time import perf_counter, process_time

from pico_edge.errors import UsageError

THREADS_ENV = "PICO_EDGE_THREADS"
MAX_THREADS = 1024

# Steps are judged by the stretch: long against the slices of a scheduler, 4 to 8 ms.
STRETCH_S, STRETCH_STEPS = 0.025, 4
# Of the time of all cores that spinning threads had one: above 0.98 quiet, 0.5 beside one neighbour
# on two cores, 0.94 beside one on eight.
QUIET_SHARE = 0.95
BETTER = 0.95  # of the time of a step: less is not worth a change
# Until another number is tried again: doubled each time, so that trials cost a tenth of the time
# at first and a hundredth in the end.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 4.0


class Pace:
    """Chooses between `most` threads and half as many, from how long the steps take.

    `threads`: the number that the next step should run on. `record` is called after every step.
    A number that was not tried yet is, once the steps beside a neighbour have taken as long as that
    costs: so it costs at most as much again as knowing from the first step how long he stays.
    """

    def __init__(
        self, most: int, *, cost_s: float, means_s: dict[int, float] | None = None
    ) -> None:
        """cost_s: seconds that the first change takes. means_s: seconds of a step by threads, where
        they were measured."""
        self.cost_s = cost_s
        self.most, self.fewer = most, max(1, most // 2)
        self.means_s = dict(means_s or {})
        self.threads = min(self.means_s, key=lambda n: self.means_s[n], default=most)
        self._crowded_s = 0.0  # since a stretch was quiet
        self._wait_s = FIRST_WAIT_S
        self._try_at = 0.0
        self._begin(self.threads)

    def _begin(self, threads: int) -> None:
        self._stretch_threads, self._steps, self._wall_s = threads, 0, 0.0
        self._cpu_s = process_time()

    def record(self, seconds: float, threads: int) -> None:
        """A step took `seconds` of wall clock on `threads` threads."""
        if threads != self._stretch_threads:
            self._begin(threads)  # without this step, the first after a change
            return
        self._steps += 1
        self._wall_s += seconds
        if self._wall_s >= STRETCH_S and self._steps >= STRETCH_STEPS:
            share = (process_time() - self._cpu_s) / (self._wall_s * threads)
            self._crowded_s = self._crowded_s + self._wall_s if share < QUIET_SHARE else 0.0
            self._judge(self._wall_s / self._steps, threads)
            self._begin(threads)

    def _judge(self, mean_s: float, threads: int) -> None:
        """A stretch of steps of so many seconds each has ended: sets `threads`."""
        now, other = perf_counter(), self.most + self.fewer - threads
        self.means_s[threads] = mean_s
        known = self.means_s.get(other)
        # On fewer threads nothing tells whether the neighbour has gone, but a trial.
        curious = threads == self.fewer or self._crowded_s > 0
        if known is None:
            change = self._crowded_s >= self.cost_s and curious
        elif known < BETTER * mean_s:
            change = True
        else:
            change = curious and now >= self._try_at
            if change:
                self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        if change:
            self.threads, self._try_at = other, now + self._wait_s
        elif threads == self.most and self._crowded_s == 0:
            self._wait_s = FIRST_WAIT_S


def fixed_threads(threads: str | int) -> int | None:
    """The number that the argument or, for "auto", PICO_EDGE_THREADS asks for; None for neither.

    Raises UsageError for what is not "auto" or 1 to MAX_THREADS.
    """
    source = "threads"
    if threads == "auto":
        threads = os.environ.get(THREADS_ENV) or "auto"
        source = THREADS_ENV
    if threads == "auto":
        return None
    if isinstance(threads, str) and threads.isascii() and threads.isdigit():
        threads = int(threads)
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"{source} is {threads!r}: expected auto or 1 to {MAX_THREADS}")
    return threads


def choose_threads(threads: str | int) -> int:
    """`fixed_threads`, or the physical cores: where the number must stay the same."""
    return fixed_threads(threads) or physical_cores()


def physical_cores() -> int:
    """Physical cores that this process may use, at least 1: its affinity and cgroup are respected.

    Two threads on one core get in each other's way, and one too many, spinning, stalls them all.
    """
    if sys.platform == "linux":
        cpus = os.sched_getaffinity(0)
        cores = {
            _read(f"/sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list") for i in cpus
        }
        count = len(cpus) if "" in cores else len(cores)
        # "200000 100000" us per period, or "max ..."
        quota = _read("/sys/fs/cgroup/cpu.max").split()
        if len(quota) == 2 and quota[0] != "max":
            count = min(count, int(quota[0]) // int(quota[1]))
        return max(1, count)
    if sys.platform == "darwin":
        value, size = ctypes.c_int(0), ctypes.c_size_t(4)
        libc = ctypes.CDLL(None)
        for name in (b"hw.perflevel0.physicalcpu", b"hw.physicalcpu"):  # performance cores first
            if not libc.sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, 0):
                return max(1, value.value)
    logical = os.cpu_count() or 1
    # Most x86 cores hold two threads, and one thread too few costs less than one too many.
    return max(1, logical // 2) if platform.machine().lower() in ("amd64", "x86_64") else logical


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
