"""What the tests of texts share: when two texts of one file count as the same."""

import importlib.util

import pytest

# A plugin of onnxruntime that few have: without it there is nothing to test, and nothing to skip.
collect_ignore = [] if importlib.util.find_spec("onnxruntime_ep_webgpu") else ["test_webgpu.py"]

# The gap between the log-probabilities of the two likeliest tokens below which the same sums in
# another order may choose the other one. Logits are about 10 here. int8 and int4 round activations
# to codes, and where rounding moves one, logits move by up to 0.07.
NEAR_TIE = {"fp32": 1e-3, "int8": 0.2, "int4": 0.2}


def _same_but_for_near_ties(model, made, **options):
    alone = model.generate(made.prompt, **options, logprobs=2)
    for at, (a, b) in enumerate(zip(made.token_ids, alone.token_ids, strict=False)):
        if a == b:
            continue
        (_, first), (_, second) = alone.logprobs[at].top
        if options.get("temperature") == 0:
            assert first - second < NEAR_TIE[model.session.export["precision"]], (at, a, b)
        else:  # a draw near the border of two tokens; too rare for float32 in a short text
            assert model.session.export["precision"] != "fp32", (at, a, b)
        return
    assert made.token_ids == alone.token_ids
    assert (made.text, made.finish_reason) == (alone.text, alone.finish_reason)


@pytest.fixture(scope="session")
def same_but_for_near_ties():
    """Asserts that a Generation is what a model says by itself, up to a near tie."""
    return _same_but_for_near_ties
