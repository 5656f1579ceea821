"""Drafts change how many tokens a call brings, and never the text."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pico_edge.errors import UsageError
from pico_edge.runtime import Model
from pico_edge.runtime import speculate as module
from pico_edge.runtime.cache import Cache
from pico_edge.runtime.speculate import Drafter, Speculation

DATA = Path(__file__).parents[1] / "data"
PROMPT = "to be, or not to be, to be, or"
# Of logits: how far a step of an int8 file and a call of several tokens may be apart. See NOTES.md.
TOLERANCE = 0.2


@pytest.fixture(scope="module")
def model():
    return Model(DATA / "tiny_fp32.onnx", provider="cpu", threads=1)


@pytest.fixture
def drafts(monkeypatch):
    """Makes every draft that of a function of the text so far."""

    def use(draft):
        monkeypatch.setattr(
            Drafter, "draft", lambda self, limit, price: draft(list(self.ids))[:limit]
        )

    return use


def both(model, prompt=PROMPT, **options):
    """The same text with and without drafts."""
    return [model.generate(prompt, speculate=how, **options) for how in ("off", "on")]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.3},
        {"temperature": 0.8, "top_k": 0, "top_p": 0.6},
        {"temperature": 0.8, "top_k": 0, "typical_p": 0.6},
        {"temperature": 0.5, "repetition_penalty": 1.3},
        {"temperature": 0.5, "presence_penalty": 0.4, "frequency_penalty": 0.2},
        {"temperature": 0.4, "stop": ["e t", "ou"]},
        {"temperature": 0.4, "context_overflow": "stop"},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", ["", PROMPT, "ab" * 40])
def test_the_text_is_that_of_plain_decoding(model, prompt, options):
    for seed in range(3):
        plain, drafted = both(model, prompt, seed=seed, max_new_tokens=200, **options)
        for field in ("text", "token_ids", "finish_reason", "prompt_tokens", "new_tokens"):
            assert getattr(drafted, field) == getattr(plain, field)


def test_drafts_come_and_save_calls(model, monkeypatch):
    calls = []
    for name in ("decode", "verify"):
        real = getattr(Cache, name)

        def counted(self, ids, real=real):
            calls.append(len(ids))
            return real(self, ids)

        monkeypatch.setattr(Cache, name, counted)
    plain = model.generate(PROMPT, speculate="off", temperature=0, max_new_tokens=300)
    steps = len(calls)
    drafted = model.generate(PROMPT, speculate="on", temperature=0, max_new_tokens=300)
    assert plain.accepted_tokens == plain.drafted_tokens == 0
    assert 0 < drafted.accepted_tokens <= drafted.drafted_tokens
    assert drafted.text == plain.text
    assert steps == plain.new_tokens - 1
    assert len(calls) - steps < steps / 2


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("kind", ["wrong", "right", "half", "endless"])
def test_no_draft_changes_a_text(model, drafts, kind, temperature):
    options = {"temperature": temperature, "seed": 5, "max_new_tokens": 150}
    plain = model.generate(PROMPT, speculate="off", **options)
    told = model.tokenizer.encode(PROMPT) + plain.token_ids
    rng = np.random.default_rng(0)

    def draft(ids):
        n = len(ids)
        if kind == "wrong":
            return [(told[n % len(told)] + 1) % 256] * 3
        if kind == "right":
            return told[n : n + 4]
        if kind == "half":
            return [*told[n : n + int(rng.integers(0, 6))], 7]
        return (told[n:] + [0] * 99)[:99]

    drafts(draft)
    made = model.generate(PROMPT, speculate="on", **options)
    assert made.token_ids == plain.token_ids
    if kind == "right":
        assert made.accepted_tokens > 0.6 * made.new_tokens
    if kind == "wrong":
        # Drafts that never pay are given up, for longer each time.
        assert made.accepted_tokens == 0
        assert 0 < made.drafted_tokens < 3 * made.new_tokens * 0.75


@pytest.mark.parametrize("file", ["tiny.onnx", "tiny_int4.onnx"])
def test_greedy_text_of_a_file_in_blocks_parts_only_at_near_ties(file):
    model = Model(DATA / file, provider="cpu", threads=1)
    n_vocab = model.tokenizer.n_vocab
    for prompt in (PROMPT, "Hello", "a"):
        plain, drafted = both(model, prompt, temperature=0, max_new_tokens=60)
        pairs = zip(plain.token_ids, drafted.token_ids, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if at is None:
            assert drafted.text == plain.text
            continue
        ids = model.tokenizer.encode(prompt) + plain.token_ids[:at]
        ids = ids[-model.config.block_size :]
        logits = np.sort(model.session.new_cache().prefill([ids])[0, :n_vocab])
        assert logits[-1] - logits[-2] < TOLERANCE


def test_what_was_asked_for_later_does_not_change_the_beginning():
    """Also where a call of several tokens rounds differently from a step."""
    model = Model(DATA / "tiny.onnx", provider="cpu", threads=1)
    options = {"seed": 4, "temperature": 0.4, "speculate": "on"}
    long = model.generate(PROMPT, max_new_tokens=90, **options)
    for n in (1, 7, 40):
        assert model.generate(PROMPT, max_new_tokens=n, **options).token_ids == long.token_ids[:n]
    streamed = model.stream(PROMPT, max_new_tokens=90, **options)
    assert "".join(streamed) == long.text
    other = Model(DATA / "tiny.onnx", provider="cpu", threads=2)
    assert other.generate(PROMPT, max_new_tokens=90, **options).text == long.text


def test_sampled_tokens_have_the_distribution_of_the_model(model, drafts):
    """Pairs of tokens, drafted right at times: chi-square against the model's own probabilities."""
    k, temperature, n = 3, 0.9, 1500
    prompt = model.tokenizer.encode(PROMPT)

    def probabilities(ids):
        logits = model.session.new_cache().prefill([ids])[0, : model.tokenizer.n_vocab]
        likely = np.argsort(-logits, kind="stable")[:k]
        weights = np.exp((logits[likely] - logits[likely[0]]).astype(np.float64) / temperature)
        return dict(zip(likely.tolist(), weights / weights.sum(), strict=True))

    expected = {}
    first = probabilities(prompt)
    for a, p in first.items():
        for b, q in probabilities([*prompt, a]).items():
            for c, r in probabilities([*prompt, a, b]).items():
                expected[a, b, c] = p * q * r
    # The likeliest second and third token after each first one.
    guesses = {a: max((key for key in expected if key[0] == a), key=expected.get) for a in first}

    def draft(ids):
        told = ids[len(prompt) :]
        return list(guesses[told[0]][1:]) if len(told) == 1 else []

    drafts(draft)
    options = {"temperature": temperature, "top_k": k, "max_new_tokens": 3, "speculate": "on"}
    counts = dict.fromkeys(expected, 0)
    accepted = 0
    for seed in range(n):
        made = model.generate(PROMPT, seed=seed, **options)
        counts[tuple(made.token_ids)] += 1
        accepted += made.accepted_tokens
    assert accepted > n / 4
    often = [key for key in expected if n * expected[key] >= 5]
    rest = [key for key in expected if n * expected[key] < 5]
    observed = [*(counts[key] for key in often), sum(counts[key] for key in rest)]
    wanted = [*(n * expected[key] for key in often), n * sum(expected[key] for key in rest)]
    if wanted[-1] < 1:
        observed, wanted = observed[:-1], np.array(wanted[:-1]) * n / sum(wanted[:-1])
    assert stats.chisquare(observed, np.array(wanted) * sum(observed) / sum(wanted)).pvalue > 1e-3


def test_what_does_not_speculate(model):
    assert model.generate([PROMPT] * 2, max_new_tokens=50, speculate="on")[0].drafted_tokens == 0
    # Drafting costs a model this small more than it saves.
    assert model.generate(PROMPT, max_new_tokens=50, temperature=0).drafted_tokens == 0
    assert model.generate(PROMPT, max_new_tokens=50, speculate="off").drafted_tokens == 0
    with pytest.raises(UsageError, match="speculate is 'yes': expected auto, on, off"):
        model.generate(PROMPT, speculate="yes")


def test_a_text_can_be_left_and_cancelled_while_drafts_are_open(model, drafts):
    told = model.tokenizer.encode(PROMPT) + model.generate(PROMPT, temperature=0).token_ids
    drafts(lambda ids: told[len(ids) : len(ids) + 6])
    stream = model.stream(PROMPT, temperature=0, speculate="on")
    begun = list(itertools.islice(stream, 3))
    stream.close()
    assert (stream.result.finish_reason, stream.result.text) == ("cancelled", "".join(begun))
    asked = itertools.count()
    made = model.generate(PROMPT, temperature=0, speculate="on", cancel=lambda: next(asked) >= 4)
    assert (made.finish_reason, made.new_tokens) == ("cancelled", 5)


def test_drafts_are_measured_only_where_no_text_can_change():
    def measures(how, fixed, export):
        return module.measures(how, fixed, export, "cpu")

    floats, blocks = {"weights": {"float32": "all"}}, {"weights": {"int8": "layers, table"}}
    rows = {"weights": {"rows": "layers", "int8": "table"}}
    assert measures("auto", False, floats) and measures("auto", False, rows)
    assert not measures("auto", False, blocks)
    for how, fixed in (("auto", True), ("on", False), ("on", True)):
        assert not any(measures(how, fixed, export) for export in (floats, rows, blocks))


def test_verify_is_append_to_the_bit(model):
    ids = model.tokenizer.encode(PROMPT)
    one, other = model.session.new_cache(), model.session.new_cache()
    for cache in (one, other):
        cache.prefill([ids])
    for n in (2, 5, 2, 1, 16):
        chunk = [(7 * n + i) % 256 for i in range(n)]
        expected = one.append(0, chunk, all_logits=True)
        assert np.array_equal(other.verify(chunk), expected)
        assert one.lengths == other.lengths
        for cache in (one, other):
            cache.truncate(0, cache.lengths[0] - n // 2)
        assert np.array_equal(other.decode([3]), one.decode([3]))
    with pytest.raises(ValueError, match="the cache holds"):
        other.verify([1] * (model.config.block_size + 1))
    with pytest.raises(ValueError, match="batch 2"):
        model.session.new_cache(2).verify([1, 2])


def test_a_period_is_drafted_and_a_wrong_guess_is_learned():
    ids = [1, 2, 3, 4, 5] * 4
    drafter = Drafter(ids, None, 257)
    assert drafter.draft(15, 0.1)[:12] == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]
    assert drafter.draft(2, 0.1) == [1, 2]
    for _ in range(40):
        drafter.draft(4, 0.1)
        drafter.learn(9)
    assert drafter.draft(4, 0.5) == []
    assert Drafter([1, 2, 3], None, 257).draft(4, 0.1) == []
    assert Drafter([], None, 257).draft(4, 0.1) == []


def test_the_index_takes_what_was_added_and_stays_bounded(monkeypatch):
    monkeypatch.setattr(module, "MAX_INDEX", 64)
    ids = list(range(200))
    drafter = Drafter(ids, None, 257)
    for token_id in [*range(200, 256), *range(180)]:
        ids.append(token_id)
        drafter.draft(2, 0.1)
        assert len(drafter._places) <= 64 + 200
    ids += [*range(170, 175)]
    assert drafter.draft(2, 0.1) == [175, 176]


def test_a_table_is_asked_where_the_text_says_nothing():
    from pico_edge.train.ngrams import count_ngrams  # needs no torch

    text = b"the cat sat on the mat. " * 20
    table = count_ngrams(np.frombuffer(text, np.uint8).astype(np.uint16), 257)
    drafter = Drafter(list(b"a cat s"), table, 257)
    assert bytes(drafter.draft(4, 0.1)) == b"at o"


def test_a_full_window_slides_with_drafts_open(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "n_vocab", 256)  # no end of text
    n = 4 * model.config.block_size
    plain, drafted = both(model, temperature=0, max_new_tokens=n)
    assert drafted.token_ids == plain.token_ids and drafted.accepted_tokens > 0
    assert drafted.new_tokens == n


def test_the_loop_sees_only_lengths_of_what_was_drawn(model):
    cache = model.session.new_cache()
    ids = [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3]
    cache.prefill([ids])
    made = Speculation(cache, Drafter(ids, None, 257), 0.01, measures=False)
    ids.append(1)
    made.decode([1])
    assert made.lengths == [13] and cache.lengths[0] > 13
    ids.append(9)  # not what was drafted
    logits = made.decode([9]).copy()
    assert made.lengths == [14]
    expected = model.session.new_cache().prefill([ids])
    assert np.allclose(logits, expected, atol=1e-4)
