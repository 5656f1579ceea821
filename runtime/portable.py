"""The cache of a file for the target `portable`: keys and values that grow by Concat.

Same methods as `pico_edge.runtime.cache.Cache`, made by `Session.new_cache`. Every row runs by
itself, so that rows of different lengths need no padding; each call copies what the row holds, as
the graph demands. Knows ids and logits, not text. Try: `session.new_cache().prefill([[72, 105]])`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pico_edge import artefact
from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError, UsageError

FloatArray = npt.NDArray[np.floating[Any]]
Ids = Sequence[int] | npt.NDArray[np.integer[Any]]
# The inputs of a call by name -> logits (1, S, V), then the present keys and values.
Run = Callable[[Mapping[str, npt.NDArray[Any]]], Sequence[npt.NDArray[Any]]]

# Tokens per call: the graph returns the logits of all of them, 26 MB at 50,304 words.
CHUNK_TOKENS = 128


class PortableCache:
    """Keys and values of one generation, B rows of up to `capacity` tokens. `lengths`: valid
    tokens of each row. Not thread-safe; several caches of one Session are independent.
    """

    def __init__(
        self, run: Run, config: GPTConfig, batch: int, capacity: int, dtype: np.dtype[Any]
    ) -> None:
        if batch < 1:
            raise UsageError(f"batch is {batch}: expected 1 or more")
        if not 1 <= capacity <= config.block_size:
            raise UsageError(
                f"capacity is {capacity}: expected 1 to block_size, {config.block_size} tokens"
            )
        self.batch = batch
        self.capacity = capacity
        self.lengths = [0] * batch
        self._run = run
        self._vocab_size = config.vocab_size
        self._names = artefact.past_names(config.n_layer)
        self._empty = np.zeros((1, config.n_head, 0, config.head_dim), dtype)
        self._rows = [[self._empty] * len(self._names) for _ in range(batch)]

    def prefill(self, rows: Sequence[Ids]) -> FloatArray:
        """Put one prompt into each row of an empty cache; logits (B, V) of each row's last token.

        Raises ValueError if the cache is not empty or the rows do not fit.
        """
        if len(rows) != self.batch:
            raise ValueError(f"{len(rows)} rows: the cache has {self.batch}")
        if any(self.lengths):
            raise ValueError("prefill needs an empty cache: call reset first")
        for ids in rows:
            self._check(0, ids)
        return np.concatenate([self.append(row, ids) for row, ids in enumerate(rows)])

    def append(self, row: int, ids: Ids, *, all_logits: bool = False) -> FloatArray:
        """Add ids to one row, at any length of it; logits (1, V) of the last id, or (S, V) of all.

        Raises ValueError if the row cannot take them.
        """
        if not 0 <= row < self.batch:
            raise ValueError(f"row {row}: the cache has {self.batch}")
        self._check(self.lengths[row], ids)
        parts = []
        for at in range(0, len(ids), CHUNK_TOKENS):
            chunk = np.asarray(ids[at : at + CHUNK_TOKENS], np.int64)
            past = self.lengths[row]
            logits, *present = self._run(
                {
                    artefact.INPUT_IDS: chunk[None],
                    artefact.ATTENTION_MASK: np.ones((1, past + len(chunk)), np.int64),
                    artefact.POSITION_IDS: np.arange(past, past + len(chunk), dtype=np.int64)[None],
                    **dict(zip(self._names, self._rows[row], strict=True)),
                }
            )
            self._check_shapes(past + len(chunk), len(chunk), logits, present)
            self._rows[row] = present
            self.lengths[row] += len(chunk)
            parts.append(logits[0] if all_logits else logits[0, -1:])
        return np.concatenate(parts) if all_logits else parts[-1]

    def _check_shapes(
        self, total: int, new: int, logits: FloatArray, present: Sequence[FloatArray]
    ) -> None:
        """onnxruntime only warns of an output that has not the shape that the file says."""
        _, heads, _, channels = self._empty.shape
        for found, expected in (
            (logits.shape, (1, new, self._vocab_size)),
            *((part.shape, (1, heads, total, channels)) for part in present),
        ):
            if found != expected:
                raise ArtefactError(
                    f"the model answered with shape {found} where {expected} was promised: "
                    "copy the file or export it again"
                )

    def decode(self, token_ids: Ids) -> FloatArray:
        """Add one token to each row; logits (B, V). Raises ValueError when a row is full."""
        longest = max(self.lengths)
        if longest >= self.capacity:
            raise ValueError(f"{longest} + 1 tokens: the cache holds {self.capacity}")
        rows = [self.append(row, [int(token_ids[row])]) for row in range(self.batch)]
        return rows[0] if self.batch == 1 else np.concatenate(rows)

    def truncate(self, row: int, length: int) -> None:
        """Forget all but the first `length` tokens of a row."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"length {length}: row {row} holds {self.lengths[row]} tokens")
        self.lengths[row] = length
        self._rows[row] = [np.ascontiguousarray(part[:, :, :length]) for part in self._rows[row]]

    def keep_rows(self, rows: Sequence[int]) -> list[int]:
        """Drop all rows but these, given in ascending order; where each of them is now."""
        rows = list(rows)
        if not rows or rows != sorted(set(rows)) or rows[0] < 0 or rows[-1] >= self.batch:
            raise ValueError(f"rows {rows}: expected some of 0 to {self.batch - 1}, ascending")
        self.batch = len(rows)
        self.lengths = [self.lengths[row] for row in rows]
        self._rows = [self._rows[row] for row in rows]
        return list(range(self.batch))

    def reset(self) -> None:
        """Forget everything."""
        for row in range(self.batch):
            self.truncate(row, 0)

    def _check(self, past: int, ids: Ids) -> None:
        if not 1 <= len(ids) <= self.capacity - past:
            raise ValueError(f"{past} + {len(ids)} tokens: the cache holds {self.capacity}")
        low, high = int(min(ids)), int(max(ids))
        if low < 0 or high >= self._vocab_size:
            raise ValueError(f"token ids {low} to {high}: expected 0 to {self._vocab_size - 1}")
