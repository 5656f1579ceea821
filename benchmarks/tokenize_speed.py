"""Speed and memory from text to tokens: MB/s, peak memory, and what a second start takes.

Makes a synthetic text (words as frequent as Zipf says, without end), then in a process of its own
for each tokenizer: training it, tokenizing, counting n-grams, and all of that again from the cache.
Fails where the memory above the imports or the second start is over its limit.

Try: `python benchmarks/tokenize_speed.py --megabytes 1000`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

MAX_RSS_MB = 600
MAX_SECOND_START_S = 3.0
N_WORDS = 60_000
WORDS_AT_ONCE = 400_000


def write_text(path: Path, n_bytes: int) -> None:
    """Text of n_bytes, the same every time."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjxqz"))
    frequency = 1 / np.arange(3, 29)
    lengths = np.clip(rng.poisson(4.5 + np.log10(np.arange(1, N_WORDS + 1))), 1, 16)
    spelled = rng.choice(letters, lengths.sum(), p=frequency / frequency.sum())
    parts = np.split(spelled, np.cumsum(lengths)[:-1])
    words = np.array(["".join(part) for part in parts], dtype=object)
    ends = np.array([" ", " ", " ", " ", " ", " ", " ", ", ", ". ", ".\n"], dtype=object)
    zipf = np.cumsum(1 / (np.arange(1, N_WORDS + 1) + 2.7))
    with open(path, "wb") as file:
        while n_bytes:
            chosen = np.searchsorted(zipf, rng.random(WORDS_AT_ONCE) * zipf[-1])
            text = words[chosen] + ends[rng.integers(0, len(ends), WORDS_AT_ONCE)]
            n_bytes -= file.write("".join(text.tolist()).encode()[:n_bytes])


def peak_rss_mb() -> float:
    """Of this process, ever."""
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(path: Path, kind: str, vocab_size: int | None) -> dict[str, float]:
    """Figures of one tokenizer, in a process that has done nothing else."""
    import tiktoken  # noqa: F401
    import tokenizers  # noqa: F401

    from pico_edge.train.bpe import choose_tokenizer
    from pico_edge.train.ngrams import count_ngrams
    from pico_edge.train.tokens import prepare_tokens

    run, before = path.parent / f"{kind}.run", peak_rss_mb()
    times = [time.perf_counter()]

    def start() -> None:
        tokenizer = choose_tokenizer(kind, [path], vocab_size=vocab_size, folder=run)
        times.append(time.perf_counter())
        data = prepare_tokens([path], tokenizer, run, block_size=64)
        times.append(time.perf_counter())
        count_ngrams(data.train, tokenizer.n_vocab)
        times.append(time.perf_counter())

    start()
    start()
    took = np.diff(times)
    return {
        "tokenizer_s": took[0],
        "tokenize_mb_per_s": path.stat().st_size / 1e6 / took[1],
        "ngrams_s": took[2],
        "second_start_s": took[3:].sum(),
        "peak_rss_above_imports_mb": peak_rss_mb() - before,
    }


def main() -> int:
    """Print a table; 1 where a limit was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        path, kind, vocab_size = arguments.measure
        print(json.dumps(measure(Path(path), kind, int(vocab_size) or None)))
        return 0
    missed = False
    with tempfile.TemporaryDirectory(prefix="pico-edge-") as folder:
        path = Path(folder) / "text.txt"
        write_text(path, arguments.megabytes * 10**6)
        print(f"{arguments.megabytes} MB of synthetic text; {sys.platform}, {time.strftime('%F')}")
        for kind, vocab_size in (("simple", 0), ("bpe", 4096)):
            command = [sys.executable, __file__, "--measure", str(path), kind, str(vocab_size)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout)
            print(f"{kind:7}" + "  ".join(f"{name} {value:.3g}" for name, value in found.items()))
            missed |= found["peak_rss_above_imports_mb"] > MAX_RSS_MB
            missed |= found["second_start_s"] > MAX_SECOND_START_S
    if missed:
        print(f"missed: at most {MAX_RSS_MB} MB, {MAX_SECOND_START_S} s", file=sys.stderr)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
