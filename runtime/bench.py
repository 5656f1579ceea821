"""Speed and memory of a model file here: prefill, decode, end to end, in llama-bench's terms.

Tokenizing and sampling are not in prefill and decode; end to end has both. Knows nothing of
terminals. Try: `measure("model.onnx", repeats=3)["decode_tokens_per_second"]`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pico_edge import __version__
from pico_edge.errors import UsageError
from pico_edge.runtime.cache import Cache
from pico_edge.runtime.generate import Model
from pico_edge.runtime.portable import PortableCache
from pico_edge.runtime.session import Session

PROMPT_TOKENS = 128
NEW_TOKENS = 128
REPEATS = 5
# Far more than a last-level cache holds, so that what is timed is memory.
BANDWIDTH_BYTES = 256 << 20
BANDWIDTH_ROUNDS = 5


def measure(
    path: str | os.PathLike[str],
    *,
    prompt_tokens: int | None = None,
    new_tokens: int = NEW_TOKENS,
    depth: int = 0,
    repeats: int = REPEATS,
    provider: str = "auto",
    threads: str | int = "auto",
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """What `pico-edge bench --json` prints; speeds in tokens per second, sizes in bytes.

    prompt_tokens: PROMPT_TOKENS, or block_size where that is less. depth: tokens in the cache
    before the first of new_tokens; where these do not fit behind it, they start from it again.
    Before each test it runs once unmeasured. load_s: of a file that may be in the page cache.
    time_to_first_token_s: from a tokenized prompt to its first token, sampling included, model
    loaded. peak_rss_bytes: of this process up to now, interpreter included, before the bandwidth is
    measured. progress: told tests done and tests in all. Raises UsageError for an argument, and
    what Session raises.
    """
    for name, value, least in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 1),
        ("depth", depth, 0),
        ("repeats", repeats, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}: expected {least} or more")
    start = time.perf_counter()
    model = Model(path, provider=provider, threads=threads)
    load_s = time.perf_counter() - start
    session, block_size = model.session, model.config.block_size
    if prompt_tokens is None:
        prompt_tokens = min(PROMPT_TOKENS, block_size)
    if prompt_tokens > block_size:
        raise UsageError(
            f"prompt_tokens is {prompt_tokens}: the context of the file is {block_size}"
        )
    if depth >= block_size:
        raise UsageError(f"depth is {depth}: expected less than the context, {block_size}")
    n_tests, done = 3 * (repeats + 1) + 1, 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, n_tests)

    cache = session.new_cache()
    ids = some_ids(model.tokenizer.n_vocab, max(prompt_tokens, depth, 1))
    prefill, decode, end_to_end, first = [], [], [], []
    for repeat in range(repeats + 1):
        seconds = time_prefill(cache, ids[:prompt_tokens])
        prefill += [prompt_tokens / seconds] if repeat else []
        step()
        seconds = time_decode(cache, ids[:depth], new_tokens)
        decode += [new_tokens / seconds] if repeat else []
        step()
        made, total, first_s = _time_generate(model, prompt_tokens, new_tokens)
        end_to_end += [made / total] if repeat else []
        first += [first_s] if repeat else []
        step()
    peak = peak_rss_bytes()
    bandwidth = read_bandwidth(session.threads)
    step()
    read = bytes_per_token(session, depth + min(new_tokens, block_size - depth) // 2)
    achieved = read * statistics.median(decode)
    return {
        "model": str(path),
        "bytes": Path(path).stat().st_size,
        "precision": session.export.get("precision"),
        "target": session.export.get("target"),
        "provider": session.provider,
        "threads": session.threads,
        "parameters": model.config.n_parameters,
        "block_size": block_size,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "depth": depth,
        "repeats": repeats,
        "load_s": load_s,
        "time_to_first_token_s": statistics.median(first),
        "peak_rss_bytes": peak,
        "prefill_tokens_per_second": spread(prefill),
        "decode_tokens_per_second": spread(decode),
        "end_to_end_tokens_per_second": statistics.median(end_to_end),
        "bytes_per_token": read,
        "achieved_bytes_per_second": achieved,
        "read_bandwidth_bytes_per_second": bandwidth,
        "bandwidth_share": achieved / bandwidth,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions(),
        "notices": session.notices,
    }


def some_ids(n_vocab: int, n: int) -> list[int]:
    """n ids, seeded: their values change no speed."""
    return [int(i) for i in np.random.default_rng(0).integers(0, n_vocab, n)]


def time_prefill(cache: Cache | PortableCache, ids: list[int]) -> float:
    """Seconds that a prompt takes in one call, its last logits included."""
    cache.reset()
    start = time.perf_counter()
    cache.prefill([ids])
    return time.perf_counter() - start


def time_decode(cache: Cache | PortableCache, ids: list[int], new_tokens: int) -> float:
    """Seconds that new_tokens single steps take behind ids; from there again where it is full."""
    cache.reset()
    depth = len(ids)
    if depth:
        cache.prefill([ids])
    tokens = some_ids(2, new_tokens)  # 0 and 1 are in every vocabulary
    start = time.perf_counter()
    for token in tokens:
        if cache.lengths[0] == cache.capacity:
            cache.truncate(0, depth)
        cache.decode([token])
    return time.perf_counter() - start


def _time_generate(model: Model, prompt_tokens: int, new_tokens: int) -> tuple[int, float, float]:
    """Tokens made, seconds from the text of a prompt to the end of its answer, and to its first.

    With the file's own sampling; of the first seed that does not end its text early, if one of
    twenty does not.
    """
    prompt = "a" * prompt_tokens
    ids = model.tokenizer.encode(prompt)
    if len(ids) < prompt_tokens:  # letters that merge: as many tokens as were asked for
        prompt *= -(-prompt_tokens // len(ids))
    for seed in range(20):
        start = time.perf_counter()
        made = model.generate(prompt, max_new_tokens=new_tokens, seed=seed)
        total = time.perf_counter() - start
        if made.new_tokens == new_tokens:
            break
    return made.new_tokens, total, made.time_to_first_token_s


def bytes_per_token(session: Session, length: int) -> int:
    """Bytes that a decode step reads at `length` cached tokens: weights, the cache.

    Weights are all tensors but the table of positions, of which a step reads one row; the table of
    tokens counts, since the head reads it.
    """
    config = session.config
    cached = 2 * config.n_layer * length * config.n_embd * session.cache_dtype.itemsize
    return session.weight_bytes + cached


def read_bandwidth(threads: int) -> float:
    """Bytes per second at which this machine reads memory, with so many threads: the best of few.

    An OR over 64-bit words: the fastest reduction of numpy, and one that lets other threads run.
    """
    words = np.ones(BANDWIDTH_BYTES // 8, np.uint64)
    parts = np.array_split(words, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(BANDWIDTH_ROUNDS):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, time.perf_counter() - start)
    return words.nbytes / best


def spread(values: list[float]) -> dict[str, float]:
    """{"mean", "stdev", "median"}; the deviation of one value is 0."""
    return {
        "mean": statistics.fmean(values),
        "stdev": statistics.stdev(values) if len(values) > 1 else 0.0,
        "median": statistics.median(values),
    }


def peak_rss_bytes() -> int:
    """Most memory this process has had so far, in bytes."""
    if sys.platform == "linux":
        # Not getrusage: a process starts with its parent's maximum there.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return _peak_working_set()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_working_set() -> int:
    """PeakWorkingSetSize of PROCESS_MEMORY_COUNTERS, psapi.h."""
    import ctypes

    class Counters(ctypes.Structure):
        _fields_ = (
            ("cb", ctypes.c_uint32),
            ("PageFaultCount", ctypes.c_uint32),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            ("others", ctypes.c_size_t * 7),
        )

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    kernel32 = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]
    kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel32.GetCurrentProcess())
    kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
    return int(counters.PeakWorkingSetSize)


def cpu_name() -> str:
    """What the processor calls itself, as far as the system tells."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of what the speed depends on."""
    found = {"pico_edge": __version__, "python": platform.python_version()}
    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
