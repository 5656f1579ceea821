"""The end of a run is told as it is: every case on curves made for it."""

import dataclasses
import math

import numpy as np
import pytest

from pico_edge.train.report import TrainResult
from pico_edge.train.verdict import WORDS, Facts, Verdict, baseline, closing_lines, judge

FACTS = Facts(
    stopped="max_iters",
    preset="micro",
    sized_by="preset",
    dropout=0.0,
    minutes=2.0,
    max_iters=1000,
    tokens_per_epoch=100_000,
    train_bytes=100_000,
    baseline_bits_per_byte=4.8,
    learning_rate=4e-3,
    resume_command="pico-edge train data.txt --resume",
)


def rows(train, val):
    """Evaluations every 50 iterations with these losses, of a byte tokenizer."""
    return [
        {
            "iter": 50 * (i + 1),
            "tokens": 50_000 * (i + 1),
            "train_loss": t,
            "val_loss": v,
            "val_bits_per_byte": v / math.log(2),
        }
        for i, (t, v) in enumerate(zip(train, val, strict=True))
    ]


def facts(**changes):
    return dataclasses.replace(FACTS, **changes)


FALLS = [2.5, 2.2, 2.0, 1.9, 1.82, 1.76, 1.71, 1.67, 1.64, 1.61, 1.585, 1.56]
FLAT = [2.5, 2.2, 2.0, 1.9, 1.85, 1.83, 1.82, 1.815, 1.812, 1.811, 1.813, 1.81]
MEMORY = [2.5, 2.0, 1.6, 1.2, 0.9, 0.6, 0.4, 0.3, 0.2, 0.15, 0.1, 0.08]
RISES = [2.6, 2.3, 2.2, 2.25, 2.3, 2.4, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0]


def shifted(losses, by):
    return [loss + by for loss in losses]


def test_a_loss_that_still_falls_asks_for_more_time():
    verdict = judge(rows(shifted(FALLS, -0.02), FALLS), FACTS)
    assert verdict.word == "improving"
    assert "fell by 3." in verdict.finding and "over the last 100 iterations" in verdict.finding
    assert verdict.advice == "more time: --minutes 4 --force"
    verdict = judge(rows(FALLS, FALLS), facts(minutes=None))
    assert verdict.advice == "more time: --max-iters 2000 --force"


def test_a_loss_that_falls_steeply_to_the_end_also_suggests_a_smaller_model():
    steep = [5.0, 4.0, 3.4, 3.0, 2.6, 2.3]
    verdict = judge(rows(steep, steep), FACTS)
    assert verdict.word == "improving"
    assert "--minutes 8 --force" in verdict.advice and "--preset nano" in verdict.advice
    assert "--preset" not in judge(rows(steep, steep), facts(preset="nano")).advice


def test_a_flat_loss_without_a_gap_asks_for_a_larger_model_and_with_one_for_more_text():
    verdict = judge(rows(shifted(FLAT, -0.02), FLAT), FACTS)
    assert verdict.word == "converged"
    assert verdict.advice == "a larger model: --preset mini --minutes 4 --force"
    assert "--n-embd" in judge(rows(FLAT, FLAT), facts(preset="gpt2")).advice
    verdict = judge(rows(shifted(FLAT, -0.3), FLAT), FACTS)
    assert (verdict.word, verdict.advice) == ("converged", "more text of this kind")


def test_held_out_rising_while_training_falls_is_overfitting():
    verdict = judge(rows(MEMORY, RISES), FACTS)
    assert verdict.word == "overfit"
    assert "since iteration 150" in verdict.finding and "100 kB" in verdict.finding
    assert verdict.advice == "more text of this kind; else --dropout 0.2 --force"
    assert "--preset nano" in judge(rows(MEMORY, RISES), facts(dropout=0.2)).advice
    smallest = judge(rows(MEMORY, RISES), facts(dropout=0.2, preset="nano"))
    assert smallest.advice == "more text of this kind"


def test_held_out_flat_far_above_training_is_overfitting_too():
    assert judge(rows(MEMORY, FLAT), FACTS).word == "overfit"


def test_a_poem_learnt_by_heart_is_told_as_such():
    verdict = judge(rows(MEMORY, RISES), facts(train_bytes=2_700, tokens_per_epoch=2_700))
    assert verdict.word == "tiny"
    assert verdict.finding == (
        "this text is too small to learn a language from: 2.7 kB, read 222 times; after iteration "
        "150 it was only learnt by heart"
    )
    assert "--init-from" in verdict.advice


def test_a_small_text_that_is_learnt_well_is_not_called_too_small():
    verdict = judge(rows(FALLS, FALLS), facts(train_bytes=2_700, tokens_per_epoch=2_700))
    assert verdict.word == "improving"


def test_a_training_loss_that_rises_is_diverging():
    up = [2.5, 2.0, 1.8, 1.9, 2.4, 2.9, 3.1, 3.2]
    verdict = judge(rows(up, shifted(up, 0.1)), FACTS)
    assert verdict.word == "diverging"
    assert verdict.advice == "smaller steps: --learning-rate 0.001 --force"


def test_a_model_no_better_than_the_frequencies_has_learnt_nothing():
    flat = [4.0, 3.34, 3.33, 3.33, 3.33, 3.33]  # 4.8 bits
    verdict = judge(rows(flat, flat), FACTS)
    assert verdict.word == "learnt_nothing"
    assert "4.80 bits/byte" in verdict.finding and "4.80" in verdict.finding
    assert "compressed, encrypted or random" in verdict.advice
    falls = [5.5, 5.0, 4.6, 4.2, 3.8, 3.5]
    verdict = judge(rows(falls, falls), FACTS)
    assert verdict.word == "learnt_nothing"
    assert verdict.advice.startswith("more time: --minutes 8 --force; or a model that learns")


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_evaluations_are_not_judged(n):
    verdict = judge(rows(FALLS[:n], FALLS[:n]), FACTS)
    assert verdict.word == "short" and "--minutes 8" in verdict.advice


def test_a_run_stopped_by_a_signal_is_to_be_continued():
    verdict = judge(rows(FALLS, FALLS), facts(stopped="signal"))
    assert (verdict.word, verdict.advice) == ("unfinished", FACTS.resume_command)


@pytest.mark.parametrize(
    ("train", "val"), [(FALLS, FALLS), (FLAT, FLAT), (MEMORY, RISES), (RISES, RISES), (RISES, FLAT)]
)
@pytest.mark.parametrize("preset", ["nano", "gpt2"])
def test_every_verdict_is_a_known_word_with_a_line_of_advice(train, val, preset):
    for n in range(len(val) + 1):
        verdict = judge(rows(train[:n], val[:n]), facts(preset=preset))
        assert verdict.word in WORDS
        assert verdict.finding and verdict.advice and "\n" not in verdict.finding + verdict.advice


def test_the_baseline_is_the_entropy_of_the_frequencies():
    train = np.array([0, 1] * 50_000, dtype=np.uint16)
    assert baseline(train, train, n_vocab=2, n_val_bytes=len(train)) == pytest.approx(1.0)
    # Two bytes to a token: half as many bits per byte.
    assert baseline(train, train, n_vocab=2, n_val_bytes=2 * len(train)) == pytest.approx(0.5)
    unseen = np.array([2], dtype=np.uint16)
    assert baseline(train, unseen, n_vocab=3, n_val_bytes=1) == pytest.approx(math.log2(100_003))


RESULT = TrainResult(
    file="my model.pt",
    run_folder="my model.run",
    stopped="patience",
    signal=None,
    iter=400,
    max_iters=1000,
    tokens=400_000,
    parameters=836_000,
    elapsed_s=65.0,
    best_iter=200,
    val_loss=1.5,
    val_bits_per_byte=2.164,
    resume_command="pico-edge train data.txt --resume",
    verdict="overfit",
    advice="more text",
)


def test_the_last_lines_tell_all_there_is_to_know():
    verdict = Verdict("overfit", "overfits: a lot", "more text")
    sample = "To be\n\n\tor \x1b[31mnot\n" + "line\n" * 20
    lines = closing_lines(RESULT, verdict, patience=8, sample=sample)
    assert lines[:7] == [
        "trained 836k parameters on 400k tokens in 1:05, 400 of 1000 iterations",
        "stopped early: the held-out loss has not improved for 8 evaluations; the best model, of "
        "iteration 200, is kept",
        "best held-out loss 1.5000 nats/token, 2.164 bits/byte, at iteration 200",
        "verdict: overfits: a lot",
        "advice: more text",
        "the best model writes:",
        "  To be",
    ]
    assert lines[7] == "      or \N{MIDDLE DOT}[31mnot"
    assert len([line for line in lines if line == "  line"]) == 4
    assert lines[-2:] == [
        "wrote my model.pt",
        "next: pico-edge export 'my model.pt' --quantize",
    ]


def test_after_a_signal_the_last_line_is_the_command_that_continues():
    result = dataclasses.replace(RESULT, stopped="signal", signal=15, file=None, val_loss=None)
    lines = closing_lines(result, Verdict("unfinished", "", ""), patience=8, sample=None)
    assert lines[-1] == "  pico-edge train data.txt --resume"
    assert not any("verdict" in line for line in lines)


@pytest.mark.parametrize(
    ("sized_by", "larger", "faster"),
    [
        ("preset", "--preset mini --minutes 4 --force", "--preset nano --force"),
        ("flags", "a higher --n-layer or --n-embd, --minutes 4", "a lower --n-layer or --n-embd,"),
        ("target", "a higher --target-bytes or a lower", "a lower --target-bytes or a higher"),
        ("checkpoint", "more text, and a larger model, trained anew", "more time"),
    ],
)
def test_advice_on_the_size_contradicts_no_flag_of_the_run(sized_by, larger, faster):
    assert larger in judge(rows(FLAT, FLAT), facts(sized_by=sized_by)).advice
    advice = judge(rows(FALLS[:2], FALLS[:2]), facts(sized_by=sized_by)).advice
    assert faster in advice
    assert ("--preset" in advice) == (sized_by == "preset")


def test_a_run_that_has_not_read_its_text_once_says_nothing_of_the_text():
    nothing = rows([4.8] * 4, [4.8] * 4)
    judged = facts(baseline_bits_per_byte=4.8)
    assert "compressed, encrypted or random" in judge(nothing, judged).advice
    early = dataclasses.replace(judged, tokens_per_epoch=10**6)
    assert judge(nothing, early).advice.startswith("more time")
