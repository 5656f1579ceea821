"""A kept cache: it holds what it says, is never shared, and changes no text beyond rounding."""

import threading
from pathlib import Path

import numpy as np
import pytest

from pico_edge.errors import PicoEdgeError
from pico_edge.runtime import Model
from pico_edge.runtime.prefix import KeptCache

DATA = Path(__file__).parents[1] / "data"
FILES = {"tiny_fp32.onnx": 1e-5, "tiny.onnx": 1e-2, "tiny_int4.onnx": 1e-2}  # of the largest logit


@pytest.fixture(scope="module", params=sorted(FILES))
def models(request):
    """The same file with and without reuse."""
    path = DATA / request.param
    return [Model(path, "cpu", 1, reuse_prefix=reuse) for reuse in (True, False)]


def held(model):
    """What the kept cache holds, by its owner and by its length."""
    cache, ids = model._kept._kept
    assert cache.lengths == [len(ids)]
    return ids


def test_a_conversation_says_what_it_says_without_reuse(models, same_but_for_near_ties):
    reusing, plain = models
    text = "The "
    for turn in range(6):
        made = reusing.generate(text, max_new_tokens=9, seed=turn)
        ids = reusing.tokenizer.encode(text)
        ids += made.token_ids
        end = len(ids) if made.finish_reason == "eos" else len(ids) - 1
        assert held(reusing) == ids[end - len(held(reusing)) : end]
        same_but_for_near_ties(plain, made, max_new_tokens=9, seed=turn)
        text += made.text + " and "
    for prompt in ("Th", "The", "X", "", "The end", "The end"):  # shorter, equal, another, longer
        made = reusing.generate(prompt, max_new_tokens=5, temperature=0)
        same_but_for_near_ties(plain, made, max_new_tokens=5, temperature=0)


def test_the_kept_cache_holds_the_tokens_that_it_says(models, same_but_for_near_ties):
    """After a length, a stop, an end of text, a closed stream, and a slide of the window."""
    reusing, plain = models
    scale = FILES[reusing.session.path.name]

    def check():
        cache, ids = reusing._kept._kept
        expected = plain.session.new_cache().prefill([[*ids, 5]])
        found = cache.append(0, [5])
        cache.truncate(0, len(ids))
        atol = scale * max(1, np.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)

    reasons = set()
    window = reusing.config.block_size
    for seed in range(3):
        for options in ({}, {"stop": "e"}, {"logit_bias": {"<|endoftext|>": 40.0}}):
            made = reusing.generate("Hello", max_new_tokens=20, seed=seed, **options)
            reasons.add(made.finish_reason)
            check()
    assert {"length", "stop", "eos"} <= reasons
    stream = reusing.stream("Hello", max_new_tokens=20, seed=1, min_new_tokens=20)
    next(stream)
    stream.close()
    check()
    n = window + 7
    reusing.generate("Hello", max_new_tokens=n, min_new_tokens=n, seed=1)
    assert len(held(reusing)) < window
    check()
    reusing.generate("x" * (2 * window), max_new_tokens=1, seed=1)
    assert len(held(reusing)) == window
    prompt = "x" * (2 * window)
    made = reusing.generate(prompt, max_new_tokens=3, seed=1)
    same_but_for_near_ties(plain, made, max_new_tokens=3, seed=1)


def test_a_shared_start_is_not_computed_again(models):
    reusing, _ = models
    reusing.generate("Hello", max_new_tokens=4, seed=1)
    ids = [*reusing.tokenizer.encode("Hello"), 1, 2]
    cache = reusing._kept.take(ids)
    assert cache.lengths == [5]
    assert reusing._kept.take(ids) is None  # somebody has it
    reusing._kept.give(cache, ids[:5])
    assert reusing._kept.take(ids[:3]).lengths == [2]  # one is left to compute logits from


def test_an_error_gives_nothing_back(models):
    reusing, _ = models
    reusing.generate("Hello", max_new_tokens=4, seed=1)
    with pytest.raises(PicoEdgeError, match="every token is banned"):
        reusing.generate("Hello", banned_tokens=list(range(reusing.tokenizer.n_vocab)))
    assert reusing._kept._kept is None
    assert reusing.generate("Hello", max_new_tokens=4, seed=1).new_tokens == 4
    # In a stream, and after the window has slid: the cache then holds the last token already.
    options = {"no_repeat_ngram_size": 1, "min_new_tokens": 10**6, "max_new_tokens": 10**6}
    stream = reusing.stream("Hello", seed=1, temperature=2.0, top_k=0, **options)
    with pytest.raises(PicoEdgeError, match="every token is banned"):
        list(stream)
    assert list(stream) == []
    stream.close()
    assert stream.result.finish_reason == "cancelled"
    assert reusing._kept._kept is None


def test_several_threads_never_get_the_same_cache():
    kept, caches, taken = KeptCache(), [], []

    class Row:
        lengths = (0,)

        def truncate(self, row, length):
            pass

    def work():
        for _ in range(300):
            cache = kept.take([1]) or Row()
            assert cache not in taken
            taken.append(cache)
            caches.append(cache)
            taken.remove(cache)
            kept.give(cache, [1])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caches) == 1200


def test_a_kept_cache_holds_no_draft_that_did_not_come():
    """Drafts that were refused are still in the memory of the cache when the text ends."""
    reusing, plain = [
        Model(DATA / "tiny_fp32.onnx", "cpu", 1, reuse_prefix=r) for r in (True, False)
    ]
    prompt, refused = "to be or not to be or not to be", 0
    for new in range(7, 15):
        options = {"max_new_tokens": new, "temperature": 0.0, "speculate": "on"}
        made = reusing.generate(prompt, **options)
        assert made.text == plain.generate(prompt, **options).text
        ids = reusing.tokenizer.encode(prompt) + made.token_ids
        end = len(ids) if made.finish_reason == "eos" else len(ids) - 1
        assert held(reusing) == ids[end - len(held(reusing)) : end]
        refused += made.drafted_tokens - made.accepted_tokens
        prompt += made.text[:5] + " or"
    assert refused > 0
