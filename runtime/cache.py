"""Keys and values of one generation, and the calls that read and extend them in place.

Knows ids and logits, not text or sampling. Shapes: B batch, S new tokens of a call, H n_head,
K capacity, D head_dim, V vocab_size.

Try: `Session("model.onnx").new_cache().prefill([[72, 105]])` -> logits (1, V) of the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter as clock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pico_edge import artefact
from pico_edge.errors import PicoEdgeError, UsageError
from pico_edge.runtime.installed import import_onnxruntime
from pico_edge.runtime.weights import FEW, MANY

if TYPE_CHECKING:
    from pico_edge.runtime.session import Session

ort = import_onnxruntime()

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int32]
Ids = Sequence[int] | npt.NDArray[np.integer[Any]]

_Errors = ort.capi.onnxruntime_pybind11_state
# onnxruntime's exceptions have no base class of their own.
ORT_ERRORS = (
    _Errors.EPFail,
    _Errors.EngineError,
    _Errors.Fail,
    _Errors.InvalidArgument,
    _Errors.InvalidGraph,
    _Errors.InvalidProtobuf,
    _Errors.NoModel,
    _Errors.NoSuchFile,
    _Errors.NotImplemented,
    _Errors.RuntimeException,
)
# With bound memory it raises RuntimeError, whatever is wrong, or cannot decode its own message.
RUN_ERRORS = (*ORT_ERRORS, RuntimeError, UnicodeDecodeError)

# Tokens of a call on the CPU. 1000 at 12 x 768, Zen 4, 2 threads, in pieces of 250 and at once:
# int8 0.52 and 0.50 s, 20 and 81 MB; float32 1.02 of the time. The logits are the same to the bit.
PROMPT_PIECE = 256
# Longer ones of a batch go row by row: 4 x 300 tokens 1.2 of the time at int8, 4 x 800 0.89.
BATCH_PIECE = 512

NO_MEMORY = ("bad_alloc", "Failed to allocate memory")  # in its words


class Cache:
    """Keys and values of one generation, B rows of up to K tokens, updated in place by every call.

    `lengths`: valid tokens of each of the B rows. A row holds at most block_size tokens, since
    positions are learned; when it is full the caller truncates or prefills again. Not thread-safe;
    several caches of one Session are independent.
    """

    def __init__(
        self, session: Session, batch: int, capacity: int, ort_session: Any = None
    ) -> None:
        """ort_session: one of the session's, instead of the one its pace chooses."""
        config = session.config
        if batch < 1:
            raise UsageError(f"batch is {batch}: expected 1 or more")
        if not 1 <= capacity <= config.block_size:
            raise UsageError(
                f"capacity is {capacity}: expected 1 to block_size, {config.block_size} tokens"
            )
        self.session = session
        self._pace = session.pace if ort_session is None else None
        self._threads = session.threads
        self._ort = ort_session or session.with_threads(self._threads)
        self._few_tokens = capacity if session.few_tokens is None else session.few_tokens
        self.batch = batch
        self.capacity = capacity
        self.lengths = [0] * batch
        self._vocab_size = config.vocab_size
        self._history: list[list[int]] | None = None  # what append replays where it cannot append
        if not session.appends:
            self._history = [[] for _ in range(batch)]
        self._past_names = artefact.past_names(config.n_layer)
        self._present_names = artefact.present_names(config.n_layer)
        shape = (batch, config.n_head, capacity, config.head_dim)
        # Zeros, not garbage: a NaN in a place that is masked out would still poison the sum.
        self._arrays = [np.zeros(shape, session.cache_dtype) for _ in self._past_names]
        self._values = [
            ort.OrtValue.ortvalue_from_numpy(array, session.device) for array in self._arrays
        ]
        if session.device != "cpu":
            self._arrays = []  # the values are copies on the device
        self._row_bytes = int(np.prod(shape[1:])) * session.cache_dtype.itemsize
        self._row_shape = (1, *shape[1:])
        # By branch, and the row whose memory it has, or None for all rows.
        self._bindings: dict[tuple[str, int | None], Any] = {}
        self._verifications: dict[int, _Verification] = {}  # by number of tokens
        self._bind_decode()

    def _bind_decode(self) -> None:
        """Make the inputs of `decode`, one token per row, written in place at every step."""
        session, batch = self.session, self.batch
        # The binding of all rows while its small inputs and logits are those of decode.
        self._bound_to_decode: Any = None
        self._ids = np.zeros(batch, np.int64)
        self._positions = np.zeros(batch, np.int64)
        self._total = np.zeros((), np.int32)
        self._logits: FloatArray = np.zeros((batch, self._vocab_size), session.logits_dtype)
        self._seqlens = np.zeros(batch, np.int32)
        rows = np.arange(batch, dtype=np.int64)
        self._decode_inputs = _small_inputs(
            self._ids[:, None], self._positions[:, None], self._seqlens, self._total, rows
        )
        self._decode_output = ort.OrtValue.ortvalue_from_numpy(self._logits)

    def prefill(self, rows: Sequence[Ids]) -> FloatArray:
        """Put one prompt into each row of an empty cache; logits (B, V) of each row's last token.

        rows: B prompts of 1 to K ids, lengths may differ. Raises ValueError if the cache is not
        empty or the rows do not fit.
        """
        if len(rows) != self.batch:
            raise ValueError(f"{len(rows)} rows: the cache has {self.batch}")
        if any(self.lengths):
            raise ValueError("prefill needs an empty cache: call reset first")
        longest = max(len(row) for row in rows)
        most = PROMPT_PIECE if self.batch == 1 else BATCH_PIECE
        # Each row takes the form of the weights that it would take alone.
        mixed = min(len(row) for row in rows) <= self._few_tokens < longest
        if (longest > most or mixed) and self.session.device == "cpu":
            return self._prefill_by_row(rows)
        logits = self._run_prompts(rows, [[len(row) - 1] for row in rows])
        self.lengths[:] = [len(row) for row in rows]
        if self._history is not None:
            self._history = [[int(i) for i in row] for row in rows]
        return logits

    def _prefill_by_row(self, rows: Sequence[Ids]) -> FloatArray:
        """`prefill` one row after the other, long ones in pieces."""
        self._checked(rows)
        try:
            return np.concatenate([self.append(row, ids) for row, ids in enumerate(rows)])
        except BaseException:
            self.reset()
            raise

    def append(self, row: int, ids: Ids, *, all_logits: bool = False) -> FloatArray:
        """Add ids to one row, at any length of it; logits (1, V) of the last id, or (S, V) of all.

        Raises ValueError if the row cannot take them.
        """
        if not 0 <= row < self.batch:
            raise ValueError(f"row {row}: the cache has {self.batch}")
        past, n = self.lengths[row], len(ids)
        if past + n > self.capacity:
            raise ValueError(f"{past} + {n} tokens: the cache holds {self.capacity}")
        if self._history is not None and past and n > 1:
            return self._replay(row, ids, list(range(n)) if all_logits else [n - 1])
        chunk = self._checked([ids])
        logits: FloatArray = np.empty(
            (n if all_logits else 1, self._vocab_size), self.session.logits_dtype
        )
        pieces = 1 if all_logits or self.session.device != "cpu" else -(-n // PROMPT_PIECE)
        for piece in np.array_split(chunk, pieces, axis=1):
            end = past + piece.shape[1]
            self._run(
                row,
                _small_inputs(
                    np.ascontiguousarray(piece),
                    np.arange(past, end, dtype=np.int64)[None],  # (1, S)
                    np.array([end - 1], np.int32),
                    np.array(end, np.int32),
                    np.arange(piece.shape[1], dtype=np.int64)[-len(logits) :],
                ),
                logits,
            )
            past = end
        self.lengths[row] += n
        if self._history is not None:
            self._history[row] += [int(i) for i in ids]
        return logits

    def decode(self, token_ids: Ids) -> FloatArray:
        """Add one token to each row; logits (B, V).

        token_ids: (B,), below vocab_size, which is not checked; rows may have different lengths.
        Raises ValueError when a row is full.
        NOTE: the logits are the same array at every call, valid until the next.
        """
        lengths = self.lengths
        longest = max(lengths)
        if longest >= self.capacity:
            # onnxruntime would grow the output, or fail, by the kernel it chose.
            raise ValueError(f"{longest} + 1 tokens: the cache holds {self.capacity}")
        # The valid length after the step, minus one, is the length before it. Batch 1 is the usual
        # case: three stores into a place cost a fifth of three slices.
        if self.batch == 1:
            self._ids[0], self._positions[0], self._seqlens[0] = token_ids[0], longest, longest
        else:
            self._ids[:], self._positions[:], self._seqlens[:] = token_ids, lengths, lengths
        self._total[()] = longest + 1
        binding = self._bound_to_decode
        if binding is None:
            binding = self._bound_to_decode = self._binding(FEW, None)
            _bind_inputs(binding, self._decode_inputs)
            binding.bind_ortvalue_output(artefact.LOGITS, self._decode_output)
        elif self.session.device != "cpu":
            _bind_inputs(binding, self._decode_inputs)  # off the CPU, binding is what copies them
        self._run_paced(binding)
        if self.session.device != "cpu":
            binding.synchronize_outputs()
        for row in range(self.batch):
            lengths[row] += 1
        if self._history is not None:
            for history, token_id in zip(self._history, token_ids, strict=True):
                history.append(int(token_id))
        return self._logits

    def verify(self, ids: Ids) -> FloatArray:
        """`append` with all logits (S, V) to the one row of a cache of batch 1, bound once for each
        S: its cost is that of the kernels alone, 20 us less than `append` takes.

        ids must be below vocab_size. Raises ValueError if the row cannot take them.
        NOTE: the logits are valid until the next call of the same S.
        """
        n, past = len(ids), self.lengths[0]
        if self.batch != 1 or past + n > self.capacity:
            raise ValueError(
                f"{past} + {n} tokens, batch {self.batch}: the cache holds {self.capacity}, batch 1"
            )
        if self._history is not None or self.session.device != "cpu":  # binding is what copies
            return self.append(0, ids, all_logits=True)
        if n not in self._verifications:
            self._verifications[n] = _Verification(self, n)
        bound = self._verifications[n]
        bound.ids[0] = ids
        np.add(bound.steps, past, out=bound.positions)
        bound.seqlens[0] = past + n - 1
        bound.total[()] = past + n
        self._run_paced(bound.binding)
        self.lengths[0] += n
        return bound.logits

    def _run_paced(self, binding: Any) -> None:
        """Run, and where the number of threads may change, say how long it took."""
        pace = self._pace
        if pace is None:
            self._call(self._ort, binding)
            return
        started = clock()
        self._call(self._ort, binding)
        pace.record(clock() - started, self._threads)
        if pace.threads != self._threads:
            self._change_threads(pace.threads)

    def _call(self, ort_session: Any, binding: Any) -> None:
        """Raises MemoryError for want of memory, PicoEdgeError when onnxruntime fails otherwise."""
        lock = self.session.one_at_a_time
        try:
            if lock is None:
                ort_session.run_with_iobinding(binding)
            else:
                with lock:
                    ort_session.run_with_iobinding(binding)
        except RUN_ERRORS as error:
            reason = str(error).splitlines()[0]
            if any(words in reason for words in NO_MEMORY):
                raise MemoryError(f"{self.session.path}: {reason}") from error
            raise PicoEdgeError(
                f"{self.session.path}: onnxruntime {ort.__version__} failed on "
                f"{self.session.provider}: {reason}: check the file with pico-edge verify"
            ) from error

    def _change_threads(self, threads: int) -> None:
        """Go on with another session of the same weights: the logits stay the same, to the bit."""
        try:
            self._ort = self.session.with_threads(threads)
        except PicoEdgeError:
            self._pace = self.session.pace = None  # no memory for it, or a new file: as before
            return
        self._threads = threads
        self._bindings = {key: kept for key, kept in self._bindings.items() if key[0] == MANY}
        self._verifications, self._bound_to_decode = {}, None

    def truncate(self, row: int, length: int) -> None:
        """Forget all but the first `length` tokens of a row."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"length {length}: row {row} holds {self.lengths[row]} tokens")
        self.lengths[row] = length
        if self._history is not None:
            del self._history[row][length:]

    def keep_rows(self, rows: Sequence[int]) -> list[int]:
        """Drop all rows but these, given in ascending order; where each of them is now.

        On the CPU they move to the front and the batch shrinks. On a device the memory stays as it
        is: dropped rows are emptied, and `decode` still wants a token for each.
        Raises ValueError for rows that are not there, or out of order.
        """
        rows = list(rows)
        if not rows or rows != sorted(set(rows)) or rows[0] < 0 or rows[-1] >= self.batch:
            raise ValueError(f"rows {rows}: expected some of 0 to {self.batch - 1}, ascending")
        if self.session.device != "cpu":
            for row in set(range(self.batch)) - set(rows):
                self.truncate(row, 0)
            return rows
        for array in self._arrays:
            for to, row in enumerate(rows):
                if to != row:
                    n = self.lengths[row]
                    array[to, :, :n] = array[row, :, :n]
        self.batch = len(rows)
        self.lengths = [self.lengths[row] for row in rows]
        if self._history is not None:
            self._history = [self._history[row] for row in rows]
        self._arrays = [array[: self.batch] for array in self._arrays]
        self._values = [
            ort.OrtValue.ortvalue_from_numpy(array, self.session.device) for array in self._arrays
        ]
        self._bindings, self._verifications = {}, {}
        self._bind_decode()
        return list(range(self.batch))

    def reset(self) -> None:
        """Forget everything; the memory is used again."""
        for row in range(self.batch):
            self.truncate(row, 0)

    def _checked(self, rows: Sequence[Ids]) -> npt.NDArray[np.int64]:
        """Rows of ids, right-padded with 0 to the longest: (B, S)."""
        longest = max(len(row) for row in rows)
        ids = np.zeros((len(rows), longest), np.int64)
        for i, row in enumerate(rows):
            if not 1 <= len(row) <= self.capacity:
                raise ValueError(f"row {i} has {len(row)} tokens: expected 1 to {self.capacity}")
            ids[i, : len(row)] = row
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise ValueError(
                f"token ids {ids.min()} to {ids.max()}: expected 0 to {self._vocab_size - 1}"
            )
        return ids

    def _run_prompts(self, rows: Sequence[Ids], wanted: Sequence[Sequence[int]]) -> FloatArray:
        """All rows from position 0 in one call; logits of the wanted places, row after row."""
        ids = self._checked(rows)
        S = ids.shape[1]
        out_index = [b * S + s for b, places in enumerate(wanted) for s in places]
        logits: FloatArray = np.empty((len(out_index), self._vocab_size), self.session.logits_dtype)
        self._run(
            None,
            _small_inputs(
                ids,
                np.tile(np.arange(S, dtype=np.int64), (self.batch, 1)),  # (B, S)
                np.array([len(row) - 1 for row in rows], np.int32),
                np.array(S, np.int32),
                np.array(out_index, np.int64),
            ),
            logits,
        )
        return logits

    def _replay(self, row: int, ids: Ids, wanted: Sequence[int]) -> FloatArray:
        """`append` where a kernel cannot: the tokens of all rows again, from position 0."""
        assert self._history is not None
        past = len(self._history[row])
        rows = [list(history) for history in self._history]
        rows[row] += [int(i) for i in ids]
        places: list[list[int]] = [[] for _ in rows]
        places[row] = [past + i for i in wanted]
        # An empty row needs a token to be run; it stays empty, the token is overwritten later.
        logits = self._run_prompts([tokens or [0] for tokens in rows], places)
        self._history = rows
        self.lengths[row] += len(ids)
        return logits

    def _run(self, row: int | None, inputs: dict[str, Any], logits: FloatArray) -> None:
        """One call on the memory of a row, or of all: the form of the weights is that for its
        number of tokens."""
        n_tokens = inputs[artefact.INPUT_IDS].shape()[1]
        branch = FEW if n_tokens <= self._few_tokens else MANY
        binding = self._binding(branch, row)
        if binding is self._bound_to_decode:
            self._bound_to_decode = None
        _bind_inputs(binding, inputs)
        output = ort.OrtValue.ortvalue_from_numpy(logits)
        binding.bind_ortvalue_output(artefact.LOGITS, output)
        self._call(self._session_of(branch), binding)
        if self.session.device != "cpu":
            binding.synchronize_outputs()

    def _session_of(self, branch: str) -> Any:
        return self._ort if branch == FEW else self.session.for_prompts

    def _binding(self, branch: str, row: int | None) -> Any:
        """The binding with the memory of one row as a cache of batch 1, or of all rows; kept, since
        making one takes 50 us."""
        key = branch, None if self.batch == 1 else row
        if key not in self._bindings:
            self._bindings[key] = self._bind_caches(self._session_of(branch).io_binding(), key[1])
        return self._bindings[key]

    def _bind_caches(self, binding: Any, row: int | None) -> Any:
        """Bind the cache, whole or one row of it, as past and as present: the same memory."""
        session = self.session
        for i, (past, present) in enumerate(
            zip(self._past_names, self._present_names, strict=True)
        ):
            if row is None:
                binding.bind_ortvalue_input(past, self._values[i])
                binding.bind_ortvalue_output(present, self._values[i])
            elif session.device == "cpu":
                value = ort.OrtValue.ortvalue_from_numpy(self._arrays[i][row : row + 1])
                binding.bind_ortvalue_input(past, value)
                binding.bind_ortvalue_output(present, value)
            else:
                place = self._values[i].data_ptr() + row * self._row_bytes
                where = (session.device, 0, session.cache_dtype.type, self._row_shape, place)
                binding.bind_input(past, *where)
                binding.bind_output(present, *where)
        return binding


class _Verification:
    """The arrays of `Cache.verify` for n tokens, and the binding that shares their memory."""

    def __init__(self, cache: Cache, n: int) -> None:
        session = cache.session
        self.ids = np.zeros((1, n), np.int64)
        self.steps = np.arange(n, dtype=np.int64)[None]
        self.positions = np.zeros((1, n), np.int64)
        self.seqlens = np.zeros(1, np.int32)
        self.total = np.zeros((), np.int32)
        self.logits: FloatArray = np.zeros((n, session.config.vocab_size), session.logits_dtype)
        self._inputs = _small_inputs(
            self.ids, self.positions, self.seqlens, self.total, np.arange(n, dtype=np.int64)
        )
        self._output = ort.OrtValue.ortvalue_from_numpy(self.logits)
        self.binding = cache._bind_caches(cache._ort.io_binding(), None)
        _bind_inputs(self.binding, self._inputs)
        self.binding.bind_ortvalue_output(artefact.LOGITS, self._output)


def _small_inputs(
    ids: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    seqlens: IntArray,
    total: npt.NDArray[np.int32],
    out_index: npt.NDArray[np.int64],
) -> dict[str, Any]:
    """OrtValues that share the memory of the arrays, by input name."""
    arrays = {
        artefact.INPUT_IDS: ids,
        artefact.POSITION_IDS: positions,
        artefact.SEQLENS_K: seqlens,
        artefact.TOTAL_SEQ_LEN: total,
        artefact.OUT_INDEX: out_index,
    }
    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}


def _bind_inputs(binding: Any, inputs: dict[str, Any]) -> None:
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
