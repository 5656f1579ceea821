"""A gigabyte of text becomes tokens in bounded memory; minutes, so slow ones all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

GIGABYTE = 10**9
MAX_RSS_BYTES = 600_000_000  # above the imports

# In a process of its own: the peak is of all that a process ever did.
CODE = """
import json, resource, sys
from pathlib import Path
import tiktoken, tokenizers
from pico_edge.train.bpe import choose_tokenizer
from pico_edge.train.ngrams import count_ngrams
from pico_edge.train.tokens import prepare_tokens

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

before = peak()
path, kind = Path(sys.argv[1]), sys.argv[2]
vocab_size = None if kind == "simple" else 4096
tokenizer = choose_tokenizer(kind, [path], vocab_size=vocab_size, folder=path.parent / "run")
data = prepare_tokens([path], tokenizer, path.parent / "run", block_size=64)
ngrams = count_ngrams(data.train, tokenizer.n_vocab)
ends = [tokenizer.decode_bytes(ids.tolist()) for ids in (data.train[:200], data.val[-200:])]
print(json.dumps({
    "rss": peak() - before,
    "n_val_bytes": data.n_val_bytes,
    "n_tokens": len(data.train) + len(data.val),
    "n_vocab": tokenizer.n_vocab,
    "ends": [end.decode("utf-8", "ignore") for end in ends],
}))
"""


def words(path: Path) -> None:
    """Words of 60,000, frequent and rare."""
    rng = np.random.default_rng(0)
    known = np.array([f"{i:x} ".translate(str.maketrans("0123", "ghij")) for i in range(60_000)])
    known = known.astype(object)
    n_bytes = GIGABYTE
    with open(path, "wb") as file:
        while n_bytes:
            text = "".join(known[(60_000 * rng.random(500_000) ** 3).astype(int)].tolist())
            n_bytes -= file.write(text.encode()[:n_bytes])


def different(path: Path) -> None:
    """Chinese characters at random, without spaces: no word is there twice."""
    rng = np.random.default_rng(0)
    n_bytes = GIGABYTE
    with open(path, "wb") as file:
        while n_bytes:
            characters = rng.integers(0x4E00, 0x9FA5, 300_000).tolist()
            text = "".join(map(chr, characters)).encode()
            n_bytes -= file.write(text if n_bytes > len(text) else b"x" * n_bytes)


def one_line(path: Path) -> None:
    with open(path, "wb") as file:
        for _ in range(1000):
            file.write(b"a" * (GIGABYTE // 1000))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("simple", words),
        ("simple", one_line),
        ("bpe", words),
        ("bpe", different),
        ("bpe", one_line),
    ],
)
def test_a_gigabyte_is_tokenized_in_bounded_memory(kind: str, text, tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    text(path)
    assert path.stat().st_size == GIGABYTE
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(path), kind], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (tmp_path / "run" / "tokens.bin").unlink()
    assert found["rss"] <= MAX_RSS_BYTES
    with open(path, "rb") as file:
        start = file.read(200).decode("utf-8", "ignore")
        file.seek(-200, 2)
        end = file.read().decode("utf-8", "ignore")
    path.unlink()
    assert found["ends"][0].startswith(start) and found["ends"][1].endswith(end)
    if kind == "simple":
        assert (found["n_tokens"], found["n_val_bytes"]) == (GIGABYTE, GIGABYTE // 10)
    else:
        assert found["n_tokens"] < GIGABYTE // 1.5 and found["n_vocab"] <= 4096
