"""Log-probabilities against one call per token."""

import math
from pathlib import Path

import numpy as np
import pytest

from pico_edge.errors import UsageError
from pico_edge.runtime import Model, evaluate
from pico_edge.runtime.score import token_logprob

DATA = Path(__file__).parents[1] / "data"
HELLO = "Hello, world"


@pytest.fixture(scope="module")
def model():
    return Model(DATA / "tiny_fp32.onnx", provider="cpu", threads=1)


def slow_logprobs(model, ids):
    """(V,) after these ids, in a cache of its own."""
    logits = model.session.new_cache().prefill([ids])[0, : model.tokenizer.n_vocab]
    shifted = logits.astype(np.float64) - float(logits.max())
    return shifted - math.log(np.exp(shifted).sum())


def test_the_score_of_each_token_is_its_log_probability_in_the_context_it_says(model):
    window = model.config.block_size
    for n in (1, 2, window - 1, window, window + 1, 3 * window + 5):
        text = (HELLO * 30)[:n]
        scores = model.score(text)
        ids = [model.tokenizer.eot_id, *model.tokenizer.encode(text)]
        assert [score.token_id for score in scores] == ids[1:]
        for at, score in enumerate(scores, 1):
            least = min(at, window // 2)
            assert least <= score.context <= min(at, window)
            expected = slow_logprobs(model, ids[at - score.context : at])[score.token_id]
            assert score.logprob == pytest.approx(expected, abs=1e-4)
    assert model.score("") == []
    with pytest.raises(UsageError, match="text is a bytes"):
        model.score(b"x")


def test_scores_add_up_to_the_loss_of_evaluate(model):
    ids = [model.tokenizer.eot_id, *model.tokenizer.encode(HELLO)]
    loss = evaluate.evaluate(model.session, ids).loss
    assert -sum(score.logprob for score in model.score(HELLO)) == pytest.approx(
        loss * len(HELLO), abs=1e-4
    )


def test_logprobs_of_drawn_tokens_are_those_of_the_model_itself(model):
    """Whatever temperature, penalties and bans make of them."""
    options = {"max_new_tokens": 12, "seed": 3, "min_new_tokens": 12}
    changes = {"temperature": 3.0, "top_k": 0, "repetition_penalty": 1.5, "banned_tokens": ["e"]}
    made = model.generate(HELLO, logprobs=4, **options, **changes)
    ids = model.tokenizer.encode(HELLO)
    assert [entry.token_id for entry in made.logprobs] == made.token_ids
    for entry in made.logprobs:
        expected = slow_logprobs(model, ids)
        order = np.argsort(-expected, kind="stable")[:4]
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-4)
        assert [token_id for token_id, _ in entry.top] == order.tolist()
        assert [p for _, p in entry.top] == pytest.approx(expected[order].tolist(), abs=1e-4)
        ids.append(entry.token_id)
    scored = model.score(HELLO + made.text)[len(HELLO) :]
    assert len(scored) == len(made.token_ids)

    alone = model.generate(HELLO, logprobs=True, **options, **changes)
    assert [(e.logprob, e.top) for e in alone.logprobs] == [(e.logprob, []) for e in made.logprobs]
    plain = model.generate(HELLO, **options, **changes)
    assert plain.logprobs is None
    assert "logprobs" not in plain.to_dict()
    assert made.to_dict()["logprobs"][0].keys() == {"token_id", "logprob", "top"}
    assert plain.text == made.text


def test_the_likeliest_tokens_of_a_hand_computed_distribution():
    logits = np.log(np.array([0.2, 0.4, 0.2, 0.2], np.float32))
    entry = token_logprob(logits, 3, 3)
    assert entry.logprob == pytest.approx(math.log(0.2))
    assert [i for i, _ in entry.top] == [1, 0, 2]
    assert [p for _, p in entry.top] == pytest.approx([math.log(p) for p in (0.4, 0.2, 0.2)])
    assert len(token_logprob(logits, 0, 99).top) == 4


@pytest.mark.parametrize("bad", [-1, 1.5, "3"])
def test_a_number_of_logprobs_out_of_range_is_refused(model, bad):
    with pytest.raises(UsageError, match="logprobs is"):
        model.generate(HELLO, logprobs=bad)
