"""Several processes that train one model together, as torchrun starts them.

Every process (rank) reads its own batches; DistributedDataParallel averages the gradients, so that
all make the same step. Rank 0 alone writes, prints and tokenizes; what it decides, the others are
told. A rank that fails says so, and the others leave. Without torchrun there is one process,
nothing of torch.distributed is touched, and every method here does its work on the spot.

Does not know what is trained. What travels between ranks outside of collectives is JSON: the store
of the rendezvous takes connections without a password.

Try: `torchrun --nproc-per-node 2 -m pico_edge train data.txt`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from pico_edge.errors import PicoEdgeError, UsageError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# A rank that the others have waited for so long is taken for dead. It must cover what the ranks
# differ by in one step, and a save by rank 0: seconds.
TIMEOUT_S = 300.0
TIMEOUT_ENV = "PICO_EDGE_TIMEOUT_S"
HEARTBEAT_S = 1.0
# A rank that loses contact looks so long for the one that failed first and told why.
LOOK_S = 2.0
# On one machine the ranks talk over this interface: no name is looked up, no port open to others.
LOOPBACK = {"linux": "lo", "darwin": "lo0"}


class Place(NamedTuple):
    """Which process this is, of how many; local: on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def place() -> Place:
    """What torchrun says in the environment, or the place of a process of its own."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = [os.environ.get(name, "") for name in names]
    if not all(value.isdecimal() for value in values):
        return Place()
    return Place(*map(int, values))


class ElsewhereError(PicoEdgeError):
    """Another rank has failed and said why; there is nothing to add."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


class Workers:
    """The processes of one run, seen from one of them. `Workers()` is one that is alone."""

    def __init__(
        self, where: Place | None = None, store: Any = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        self.place = where or Place()
        self.rank, self.world_size = self.place.rank, self.place.world_size
        self._store = store
        self._timeout_s = timeout_s
        self._n_shared = 0

    @property
    def is_first(self) -> bool:
        """True for the one process that writes and prints."""
        return self.rank == 0

    def device(self, kind: torch.device) -> torch.device:
        """The device of this rank. Raises UsageError for a kind that ranks cannot share."""
        import torch

        if self.world_size == 1 or kind.type == "cpu":
            return kind
        if kind.type != "cuda":
            raise UsageError(
                f"device {kind.type} with {self.world_size} processes: expected cpu or cuda"
            )
        return torch.device("cuda", self.place.local_rank)

    def data_parallel(self, forward: Callable[..., T], device: torch.device) -> Callable[..., T]:
        """A model (compiled or not) whose gradients are the mean over the ranks."""
        if self.world_size == 1:
            return forward
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(
            cast(Any, forward),
            device_ids=None if device.type == "cpu" else [device.index],
            gradient_as_bucket_view=True,
        )

    def gradients(
        self, forward: Callable[..., object], *, last: bool
    ) -> contextlib.AbstractContextManager[object]:
        """Around the forward pass of one micro-step: only the last one of a step averages."""
        if self.world_size == 1 or last:
            return contextlib.nullcontext()
        return cast("contextlib.AbstractContextManager[object]", cast(Any, forward).no_sync())

    def seed_step(self, seed: int, step: int) -> None:
        """Give every rank random numbers (dropout) of its own, a pure function of seed and step.

        So the state of rank 0 is enough to resume all. Alone, the generator runs on.
        """
        if self.world_size == 1:
            return
        import numpy as np
        import torch

        mixed = np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed[0]) >> 1)

    # Collectives: every rank calls them in the same order.

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over the ranks, in float64, the same on all."""
        if self.world_size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return cast("list[float]", total.tolist())

    def mean(self, value: float) -> float:
        """The mean over the ranks; not finite on any is not finite on all."""
        return value if self.world_size == 1 else self.sum([value])[0] / self.world_size

    def agreed(self, signum: int | None) -> int | None:
        """The signal that any rank was asked to stop by, or None: the same on all."""
        if self.world_size == 1:
            return signum
        import torch
        import torch.distributed as dist

        highest = torch.tensor(signum or 0)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return int(highest) or None

    def first_says(self, flag: bool) -> bool:
        """The flag of rank 0, on all: for what is decided by its clock."""
        return bool(self.sum([float(flag) if self.is_first else 0.0])[0])

    def meet(self) -> None:
        """Wait until all are here."""
        self.sum([0.0])

    # The word of rank 0, however long it works: the others look whether it is alive.

    def share(
        self,
        act: Callable[[], T],
        *,
        to_plain: Callable[[T], object] | None = None,
        from_plain: Callable[[Any], T] | None = None,
    ) -> T:
        """Rank 0 acts, all return its result; it travels as JSON, made and read by the other two.

        An error of rank 0 ends the others as ElsewhereError.
        """
        if self.world_size == 1:
            return act()
        self._n_shared += 1
        key = f"shared/{self._n_shared}"
        if not self.is_first:
            plain = json.loads(self._receive(key))
            return cast(T, plain) if from_plain is None else from_plain(plain)
        with self._heartbeat():
            result = act()
        self._store.set(key, json.dumps(result if to_plain is None else to_plain(result)))
        return result

    def in_turn(self, act: Callable[[], T], *, seen: Callable[[], object]) -> T:
        """Rank 0 acts, and may write; then the others, who read what it wrote.

        seen: a plain value of what is on the disk then. A rank that sees something else would read
        other files: PicoEdgeError.
        """
        if self.world_size == 1:
            return act()
        result: list[T] = []

        def act_first() -> object:
            result.append(act())
            return seen()

        theirs = self.share(act_first)
        if not self.is_first:
            mine = json.loads(json.dumps(seen()))
            if mine != theirs:
                raise PicoEdgeError(
                    f"rank {self.rank} does not see the files that rank 0 sees: data and run "
                    "folder must be on a disk that all machines share"
                )
            result.append(act())
        self.meet()
        return result[0]

    def _receive(self, key: str) -> bytes:
        beat, moved_at, pause = -1, time.monotonic(), 1e-4
        while not self._store.check([key]):
            self._leave_if_another_failed()
            found = self._store.add("heartbeat", 0)
            if found != beat:
                beat, moved_at = found, time.monotonic()
            elif time.monotonic() - moved_at > self._timeout_s:
                raise PicoEdgeError(
                    f"rank 0 has not been heard of for {self._timeout_s:g} s; what is saved is "
                    "whole: continue with --resume"
                )
            time.sleep(pause)  # in Python, where a signal can interrupt
            pause = min(2 * pause, 0.05)
        return cast(bytes, self._store.get(key))

    @contextlib.contextmanager
    def _heartbeat(self) -> Iterator[None]:
        done = threading.Event()

        def beat() -> None:
            with contextlib.suppress(RuntimeError):  # the store is gone, and with it the listeners
                while not done.wait(HEARTBEAT_S):
                    self._store.add("heartbeat", 1)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    # Failures

    def check_same(self, flags: Mapping[str, object]) -> None:
        """Refuse ranks that were started with different flags. Raises UsageError, on all."""
        if self.world_size == 1:
            return
        mine = json.dumps(flags)
        self._store.set(f"flags/{self.rank}", mine)
        keys = [f"flags/{rank}" for rank in range(self.world_size)]
        self._store.wait(keys, timedelta(seconds=self._timeout_s))
        first = json.loads(self._store.get(keys[0]))
        for rank, key in enumerate(keys[1:], start=1):
            other = json.loads(self._store.get(key))
            for name in sorted(first.keys() | other.keys()):
                if first.get(name) != other.get(name):
                    raise UsageError(
                        f"{name} is {other.get(name)!r} on rank {rank} and {first.get(name)!r} on "
                        "rank 0: start every rank with the same command"
                    )

    def told(self, error: Exception) -> Exception:
        """The error to end this rank with, after the others have been told of it.

        ElsewhereError where another rank says the same, or broke off the contact and says why.
        """
        if isinstance(error, ElsewhereError):
            return error
        try:
            if _is_lost_contact(error):
                deadline = time.monotonic() + LOOK_S
                while time.monotonic() < deadline:
                    self._leave_if_another_failed()
                    time.sleep(0.02)
                line = str(error).splitlines()[0] if str(error) else type(error).__name__
                error = PicoEdgeError(
                    f"lost contact with another rank ({line}); what is saved is whole: continue "
                    "with --resume"
                )
            mine = {
                "rank": self.rank,
                "text": f"{type(error).__name__}: {error}",
                "exit_code": getattr(error, "exit_code", 1),
            }
            # The first to fail is the one who says it.
            found = json.loads(self._store.compare_set("failure", "", json.dumps(mine)))
            if found["rank"] != self.rank and found["text"] == mine["text"]:
                return ElsewhereError(found["exit_code"])
        except ElsewhereError as elsewhere:
            return elsewhere
        except RuntimeError:  # the store is gone too
            return error
        return error

    def _leave_if_another_failed(self) -> None:
        if self._store.check(["failure"]):
            raise ElsewhereError(json.loads(self._store.get("failure"))["exit_code"])


@contextlib.contextmanager
def join(flags: Mapping[str, object], *, device: str) -> Iterator[Workers]:
    """The workers of this run for the time of the block; alone without torchrun.

    flags: plain values that must be equal on all ranks. device: as `TrainSettings` has it.
    Waits for the others at the end of a block that went well; one that raises leaves them at once.
    NOTE what is left of a process group may keep an interpreter from ending, or abort it: leave by
    os._exit, as `pico_edge.cli.main` does.
    """
    where = place()
    if where.world_size == 1:
        yield Workers()
        return
    import torch.distributed as dist

    workers = _connect(where, device)
    try:
        workers.check_same(flags)
        yield workers
        workers.meet()
    except Exception as error:
        told = workers.told(error)
        if told is error:
            raise
        raise told from error
    # DistributedDataParallel is part of a cycle. What it holds of the group must go before the
    # group does, or an interpreter that ends finds threads running: seen as SIGABRT in 4 of 7 runs.
    gc.collect()
    dist.destroy_process_group()


def _connect(where: Place, device: str) -> Workers:
    import torch
    from torch import distributed

    dist: Any = distributed  # two of its public names are not exported for type checkers
    if "MASTER_ADDR" not in os.environ:
        raise UsageError(
            f"WORLD_SIZE is {where.world_size} and MASTER_ADDR is not set: start with torchrun"
        )
    timeout_s = _timeout_s()
    backend = "gloo"
    if device in ("auto", "cuda") and torch.cuda.is_available():
        n_devices = torch.cuda.device_count()
        if where.local_world_size > n_devices:
            raise PicoEdgeError(
                f"{where.local_world_size} processes and {n_devices} CUDA devices on this machine: "
                f"start with --nproc-per-node {n_devices}, or train with --device cpu"
            )
        torch.cuda.set_device(where.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    if where.local_world_size == where.world_size and sys.platform in LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])
    timeout = timedelta(seconds=timeout_s)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("torch", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise PicoEdgeError(
            f"rank {where.rank} of {where.world_size} did not find the others within "
            f"{timeout_s:g} s: {line}"
        ) from error
    return Workers(where, dist.PrefixStore("pico_edge", store), timeout_s)


def _timeout_s() -> float:
    text = os.environ.get(TIMEOUT_ENV)
    if text is None:
        return TIMEOUT_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < 1e6:
        raise UsageError(f"{TIMEOUT_ENV} is {text!r}: expected seconds, such as {TIMEOUT_S:g}")
    return seconds


def _is_lost_contact(error: Exception) -> bool:
    """Whether a collective failed because of another rank; gloo has no class of its own for it."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)
