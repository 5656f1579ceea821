"""Every prediction of a text counts once, in the context that was promised."""

from pathlib import Path

import numpy as np
import pytest

from pico_edge.errors import UsageError
from pico_edge.runtime import evaluate as engine
from pico_edge.runtime.evaluate import compare, evaluate, log_softmax
from pico_edge.runtime.session import Session

DATA = Path(__file__).parents[1] / "data"
TEXT = "Boolean operations are described in the section about comparisons; they end. " * 3


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(DATA / "tiny_fp32.onnx", provider="cpu", threads=1)


def by_hand(session: Session, ids: list[int], stride: int) -> float:
    """Mean nats, prediction by prediction: which window it falls into, and a prefill of that."""
    block_size, total = session.config.block_size, 0.0
    for i in range(1, len(ids)):
        # The first window that reaches i, windows starting at multiples of stride.
        start = max(0, -(-(i - block_size) // stride)) * stride
        logits = session.new_cache().prefill([ids[start:i]])[:, : session.tokenizer.n_vocab]
        total -= float(log_softmax(logits)[0, ids[i]])
    return total / (len(ids) - 1)


@pytest.mark.parametrize("stride", [64, 48, 7, 1])
@pytest.mark.parametrize("n", [2, 64, 65, 66, 150])
def test_each_prediction_counts_once_in_the_first_window_that_reaches_it(
    session: Session, n: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHUNK_TOKENS", 24)  # windows of several chunks
    ids = session.tokenizer.encode(TEXT)[:n]
    found = evaluate(session, ids, stride=stride)
    assert found.tokens == found.bytes == n - 1
    assert found.loss == pytest.approx(by_hand(session, ids, stride), abs=1e-5)
    assert found.bits_per_byte == pytest.approx(found.loss / np.log(2))


def test_windows_do_not_overlap_unless_told(session: Session) -> None:
    ids = session.tokenizer.encode(TEXT)
    assert evaluate(session, ids) == evaluate(session, ids, stride=session.config.block_size)


def test_end_of_text_counts_as_a_token_without_bytes(session: Session) -> None:
    ids = session.tokenizer.encode("one")
    ids += [session.tokenizer.eot_id, *session.tokenizer.encode("two")]
    found = evaluate(session, ids)
    assert (found.tokens, found.bytes) == (6, 5)


def test_compare_agrees_with_two_evaluations(session: Session) -> None:
    int8 = Session(DATA / "tiny.onnx", provider="cpu", threads=1)
    ids = session.tokenizer.encode(TEXT)
    seen: list[int] = []
    both = compare(int8, session, ids, stride=40, progress=seen.append)
    assert both.evaluation == evaluate(int8, ids, stride=40)
    assert both.reference == evaluate(session, ids, stride=40)
    assert seen == sorted(seen)
    assert seen[-1] == len(ids) - 1


@pytest.mark.parametrize("stride", [0, -1, 65])
def test_a_stride_that_leaves_gaps_is_refused(session: Session, stride: int) -> None:
    with pytest.raises(UsageError, match=f"stride is {stride}: expected 1 to block_size, 64"):
        evaluate(session, [1, 2, 3], stride=stride)


def test_one_token_has_no_loss(session: Session) -> None:
    with pytest.raises(ValueError, match="1 tokens: a loss needs 2"):
        evaluate(session, [1])
