"""What is timed is what is said to be timed; no test looks at a speed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pico_edge.errors import UsageError
from pico_edge.runtime import bench
from pico_edge.runtime.session import Session

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(DATA / "tiny.onnx", provider="cpu", threads=1)


def test_decode_starts_again_at_its_depth_where_the_context_is_full(session: Session) -> None:
    cache = session.new_cache()
    bench.time_decode(cache, bench.some_ids(256, 60), new_tokens=10)
    assert cache.lengths == [60 + 10 - 2 * 4]
    bench.time_decode(cache, [], new_tokens=3)
    assert cache.lengths == [3]


def test_a_step_reads_the_weights_and_the_cache(session: Session) -> None:
    empty = bench.bytes_per_token(session, 0)
    config = session.config
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    assert weights < empty < session.path.stat().st_size  # int8: a byte a weight, and scales
    assert bench.bytes_per_token(session, 10) - empty == 2 * config.n_layer * 10 * config.n_embd


def test_every_test_runs_once_unmeasured_and_then_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BANDWIDTH_BYTES", 1 << 20)
    seen: list[tuple[int, int]] = []
    result = bench.measure(
        DATA / "tiny.onnx",
        new_tokens=2,
        repeats=2,
        threads=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i, 10) for i in range(1, 11)]
    assert result["repeats"] == 2


def test_the_deviation_of_one_value_is_zero() -> None:
    assert bench.spread([3.0]) == {"mean": 3.0, "stdev": 0.0, "median": 3.0}
    assert bench.spread([1.0, 3.0, 8.0])["median"] == 3.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_this_process_own() -> None:
    """A child does not start with the peak of its parent, as ru_maxrss does."""
    code = (
        "import sys, subprocess; big = bytearray(300_000_000); "
        "subprocess.run([sys.executable, '-c', "
        "'from pico_edge.runtime.bench import peak_rss_bytes; print(peak_rss_bytes())'], "
        "check=True)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert 10e6 < int(output) < 250e6
    before = bench.peak_rss_bytes()
    ballast = os.urandom(1 << 16) * (1 << 10)  # 64 MiB
    assert bench.peak_rss_bytes() >= before
    assert len(ballast) == 1 << 26


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "repeats"])
def test_nothing_to_measure_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is 0: expected 1 or more"):
        bench.measure(DATA / "tiny.onnx", **{name: 0})
