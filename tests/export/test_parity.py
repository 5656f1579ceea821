"""The parity ladder: torch full forward = torch cached = onnxruntime, position by position."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from pico_edge.artefact import tokens_kept
from pico_edge.runtime import Model
from pico_edge.runtime import cache as cache_module
from pico_edge.runtime.session import Session
from pico_edge.tokenizer import SimpleTokenizer
from pico_edge.train.model import GPT

FP32_LOGITS = 1e-4  # float32 sums in another order


class Tolerance(NamedTuple):
    """In logits, which are about 5 here. torch: distance from the model; itself: of one way to
    reach a position from another, in the same file."""

    torch: float
    itself: float


# Integer sums are exact: in the wide form only norms, attention and the head are left to float
# rounding. Where float sums in another order feed a rounding to codes, a code may move by one.
TOLERANCES = {
    "fp32": Tolerance(FP32_LOGITS, FP32_LOGITS),
    "int8": Tolerance(0.05, 0.03),
    "wide": Tolerance(0.05, 0.03),
    "int4": Tolerance(0.5, 0.03),
}
N_VOCAB = SimpleTokenizer.n_vocab

Array = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def rows(model: GPT) -> list[list[int]]:
    """Three texts as long as the context."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 257, (3, model.config.block_size)).tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def expected(model: GPT, rows: list[list[int]]) -> Array:
    """(3, T, V): logits of torch's full forward."""
    with torch.no_grad():
        return model(torch.tensor(rows))[0].numpy()  # type: ignore[no-any-return]


def test_torch_cached_equals_torch_full(model: GPT, rows: list[list[int]], expected: Array) -> None:
    past, parts = None, []
    with torch.no_grad():
        for chunk in torch.tensor(rows).split(37, dim=1):
            logits, past = model.forward_cached(chunk, past)
            parts.append(logits)
    np.testing.assert_allclose(torch.cat(parts, 1).numpy(), expected, rtol=0, atol=FP32_LOGITS)


@pytest.mark.parametrize("batch", [1, 3])
def test_steps_equal_torch_at_every_cache_length(
    fp32: Session, rows: list[list[int]], expected: Array, batch: int
) -> None:
    cache = fp32.new_cache(batch)
    logits = cache.prefill([row[:1] for row in rows[:batch]])
    np.testing.assert_allclose(logits, expected[:batch, 0], rtol=0, atol=FP32_LOGITS)
    for t in range(1, fp32.config.block_size):
        logits = cache.decode([row[t] for row in rows[:batch]])
        np.testing.assert_allclose(logits, expected[:batch, t], rtol=0, atol=FP32_LOGITS)


@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_equals_torch_at_every_length(
    fp32: Session, rows: list[list[int]], expected: Array, batch: int
) -> None:
    cache = fp32.new_cache(batch)
    for length in range(1, fp32.config.block_size + 1):
        cache.reset()
        logits = cache.prefill([row[:length] for row in rows[:batch]])
        np.testing.assert_allclose(logits, expected[:batch, length - 1], rtol=0, atol=FP32_LOGITS)


@pytest.mark.parametrize("chunk", [2, 17])
def test_a_chunk_equals_torch_at_every_cache_length(
    fp32: Session, rows: list[list[int]], expected: Array, chunk: int
) -> None:
    """Chunks go row by row, here onto the middle row of a batch of three."""
    cache = fp32.new_cache(3)
    for past in range(fp32.config.block_size - chunk + 1):
        cache.reset()
        if past:
            cache.prefill([row[:past] for row in rows])
        logits = cache.append(1, rows[1][past : past + chunk], all_logits=True)
        np.testing.assert_allclose(
            logits, expected[1, past : past + chunk], rtol=0, atol=FP32_LOGITS
        )


def test_a_ragged_batch_equals_torch(fp32: Session, rows: list[list[int]], expected: Array) -> None:
    lengths = [5, 100, 31]
    cache = fp32.new_cache(3)
    logits = cache.prefill([row[:n] for row, n in zip(rows, lengths, strict=True)])
    for step in range(20):
        for i, n in enumerate(lengths):
            np.testing.assert_allclose(
                logits[i], expected[i, n - 1 + step], rtol=0, atol=FP32_LOGITS
            )
        logits = cache.decode([row[n + step] for row, n in zip(rows, lengths, strict=True)])


def _every_way(session: Session, rows: list[list[int]]) -> dict[str, Array]:
    """Logits of the first row, (T, V), by each way the runtime reaches a position; NaN: not asked.

    Batches hold two more texts. Steps and chunks start on caches of 0, 1 and many tokens.
    """
    n = len(rows[0])
    whole = session.new_cache().append(0, rows[0], all_logits=True).copy()
    found = {"one call": whole}
    for batch in (1, 3):
        cache, logits = session.new_cache(batch), np.full_like(whole, np.nan)
        for past in (1, n // 2):
            cache.reset()
            logits[past - 1] = cache.prefill([row[:past] for row in rows[:batch]])[0]
            for t in range(past, past + 20):
                logits[t] = cache.decode([row[t] for row in rows[:batch]])[0]
        found[f"steps, batch {batch}"] = logits
        cache, logits = session.new_cache(batch), np.full_like(whole, np.nan)
        if batch > 1:
            cache.prefill([row[:5] for row in rows])
            cache.truncate(0, 0)
        at = 0
        for size in (1, 2, 7, 64, n):
            chunk = rows[0][at : at + size]
            logits[at : at + len(chunk)] = cache.append(0, chunk, all_logits=True)
            at += len(chunk)
        found[f"chunks, batch {batch}"] = logits
    ragged = [rows[0][: n // 2], rows[1][: n - 1], [255] * 3]  # a row unlike text
    logits = np.full_like(whole, np.nan)
    logits[n // 2 - 1] = session.new_cache(3).prefill(ragged)[0]
    found["a ragged batch"] = logits
    return found


@pytest.mark.parametrize("precision", TOLERANCES)
def test_every_precision_stays_near_torch_by_every_way(
    precision: str, rows: list[list[int]], expected: Array, request: pytest.FixtureRequest
) -> None:
    found = _every_way(request.getfixturevalue(precision), rows)
    for way, logits in found.items():
        error = np.nanmax(np.abs(logits - expected[0]))
        assert error < TOLERANCES[precision].torch, way
        assert error > 0, way


@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_row_depends_on_neither_its_batch_nor_its_calls(
    precision: str, rows: list[list[int]], request: pytest.FixtureRequest
) -> None:
    found = _every_way(request.getfixturevalue(precision), rows)
    for way, logits in found.items():
        error = np.nanmax(np.abs(logits - found["one call"]))
        assert error < TOLERANCES[precision].itself, way


@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_row_is_the_same_to_the_bit_beside_an_outlier(
    precision: str, rows: list[list[int]], request: pytest.FixtureRequest
) -> None:
    """The same prompt lengths, other company: nothing of it may be seen."""
    session, n = request.getfixturevalue(precision), 40
    company = ([rows[1][:n], rows[2][:n]], [[255] * n, [10] * n])
    found = [session.new_cache(3).prefill([rows[0][:n], *others])[0] for others in company]
    np.testing.assert_array_equal(found[0], found[1])


def test_greedy_text_equals_torch_for_256_tokens(model: GPT, fp32_path: Path) -> None:
    prompt = "The following"
    got = Model(fp32_path, threads=1).generate(prompt, max_new_tokens=256, temperature=0)
    idx = torch.tensor([SimpleTokenizer().encode(prompt)])
    want = model.generate(idx, 256, temperature=0, n_vocab=N_VOCAB)[0, idx.size(1) :]
    assert got.token_ids == want.tolist()


def test_sampled_frequencies_match_torch(model: GPT, fp32_path: Path) -> None:
    """Both samplers against the exact distribution, 20,000 draws of the next token each."""
    prompt, temperature, top_k, draws = "The ", 0.9, 20, 20_000
    idx = torch.tensor([SimpleTokenizer().encode(prompt)])
    with torch.no_grad():
        logits = model(idx)[0][0, -1, :N_VOCAB] / temperature
    kept = logits.topk(top_k)
    probabilities = kept.values.double().softmax(0).numpy()
    position = {int(token): i for i, token in enumerate(kept.indices)}

    generator = torch.Generator().manual_seed(3)
    reference = model.generate(
        idx.expand(draws, -1),
        1,
        temperature=temperature,
        top_k=top_k,
        n_vocab=N_VOCAB,
        generator=generator,
    )[:, -1].tolist()
    runtime = Model(fp32_path, threads=1)
    ours: list[int] = []
    for seed in range(20):
        samples = runtime.generate(
            [prompt] * (draws // 20),
            max_new_tokens=1,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )
        ours += [sample.token_ids[0] for sample in samples]
    for tokens in (reference, ours):
        counts = np.bincount([position[token] for token in tokens], minlength=top_k)
        assert stats.chisquare(counts, probabilities * draws).pvalue > 1e-3


def test_the_same_seed_gives_the_same_text(int8_path: Path) -> None:
    first = Model(int8_path, threads=1).generate("Hello", max_new_tokens=80, seed=7)
    second = Model(int8_path, threads=2).generate("Hello", max_new_tokens=80, seed=7)
    other = Model(int8_path, threads=1).generate("Hello", max_new_tokens=80, seed=8)
    assert first.text == second.text != other.text


def test_a_text_past_the_context_is_that_of_torch_on_the_same_windows(
    fp32_path: Path, model: GPT
) -> None:
    """Greedy, over three refills: each token the likeliest of a full forward of its window."""
    runtime = Model(fp32_path, threads=1)
    window = model.config.block_size
    keep = tokens_kept(window)
    n = window + 2 * (window - keep) + 20
    made = runtime.generate("The ", max_new_tokens=n, min_new_tokens=n, temperature=0)
    assert made.new_tokens == n
    ids = [*runtime.tokenizer.encode("The "), *made.token_ids]
    start = 0
    refills = 0
    for at in range(4, len(ids)):
        if at - start > window:
            start, refills = at - keep, refills + 1
        if at % 5 and at - start not in (1, keep, keep + 1, window):
            continue  # a forward of torch takes longer than all else here
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:at]]))[0][0, -1, :N_VOCAB].numpy()
        logits[runtime.tokenizer.eot_id] = -np.inf
        assert logits[ids[at]] >= logits.max() - FP32_LOGITS
    assert refills == 3


def test_a_piecewise_prompt_gives_the_logits_of_one_call(
    fp32: Session, int8: Session, wide: Session, int4: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of more than 32 tokens agree to the bit in all forms but the float32 of a batch."""
    ids = list(itertools.islice(itertools.cycle(range(40, 120)), 200))
    for session in (fp32, int8, wide, int4):
        for rows in ([ids], [ids, ids[:90], ids[:1]]):
            cache = session.new_cache(len(rows))
            whole = cache.prefill(rows).copy()
            step = cache.decode([65] * len(rows)).copy()
            cache.reset()
            with monkeypatch.context() as patch:
                patch.setattr(cache_module, "PROMPT_PIECE", 64)
                patch.setattr(cache_module, "BATCH_PIECE", 64)
                pieces = cache.prefill(rows).copy()
            assert cache.lengths == [len(row) for row in rows]
            np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-5)
            np.testing.assert_allclose(cache.decode([65] * len(rows)), step, rtol=0, atol=1e-5)


def test_a_long_prompt_that_does_not_fit_leaves_the_cache_empty(
    fp32: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "PROMPT_PIECE", 32)
    monkeypatch.setattr(cache_module, "BATCH_PIECE", 64)
    cache = fp32.new_cache(2, 100)
    for rows in ([[1] * 90, [1] * 101], [[1] * 90, [9999]], [[1] * 90, []]):
        with pytest.raises(ValueError):
            cache.prefill(rows)
        assert cache.lengths == [0, 0]
