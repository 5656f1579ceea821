"""The size that is chosen follows from text, time and target, and its figures from the shape."""

import pytest
import torch

from pico_edge.config import GPTConfig
from pico_edge.errors import UsageError
from pico_edge.train.choose import (
    TARGET_SHAPES,
    choose_size,
    decode_tokens_per_second,
    dropout_for,
    int8_bytes,
    measure_bytes_per_second,
    measure_tokens_per_second,
    shape_for_target,
)
from pico_edge.train.model import GPT
from pico_edge.train.settings import TrainSettings

PARAMETERS = {"nano": 1_000_000, "micro": 3_000_000, "mini": 12_000_000}


def chosen(most, seconds, speeds):
    asked = []

    def speed(name):
        asked.append(name)
        return speeds[name]

    size = choose_size(
        most,
        "the text is so",
        seconds=seconds,
        n_parameters=PARAMETERS.__getitem__,
        tokens_per_second=speed,
    )
    return size, asked


def test_a_model_that_sees_enough_tokens_is_taken_without_measuring_smaller_ones():
    size, asked = chosen("mini", 1000.0, {"mini": 6000.0})
    assert size == ("mini", "the text is so", pytest.approx(5_400_000))
    assert asked == ["mini"]


def test_too_little_time_for_a_size_gives_the_next_and_says_why():
    size, asked = chosen("mini", 120.0, {"mini": 3000.0, "micro": 15_000.0})
    assert size.preset == "micro"
    assert size.reason == "mini (12M) would see only 324k tokens in 2:00 here"
    assert asked == ["mini", "micro"]


def test_the_smallest_needs_no_measurement():
    size, asked = chosen("micro", 6.0, {"micro": 100.0})
    assert size.preset == "nano"
    assert asked == ["micro"]
    assert chosen("nano", 6.0, {}) == (("nano", "the text is so", None), [])


def test_without_a_time_the_text_decides_alone():
    assert chosen("mini", None, {}) == (("mini", "the text is so", None), [])


def test_the_more_often_a_text_is_read_the_more_dropout():
    rates = [dropout_for(passes) for passes in (0.1, 1, 3.9, 4, 9, 12, 500)]
    assert rates == [0, 0, 0, 0.1, 0.1, 0.2, 0.2]


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_of_a_config_are_those_of_its_model(bias):
    config = GPTConfig(16, 272, 3, 2, 32, bias=bias)
    assert config.n_parameters == GPT(config).num_parameters()


def config_for(n_layer, n_head, n_embd):
    return GPTConfig(128, 272, n_layer, n_head, n_embd)


def target(n_bytes=None, rate=None, speed=20e9):
    return shape_for_target(
        config_for,
        target_bytes=n_bytes,
        target_tokens_per_second=rate,
        n_vocab=257,
        bytes_per_second=lambda: speed,
    )


@pytest.mark.parametrize("shape", TARGET_SHAPES)
def test_the_largest_shape_that_fits_its_own_size_is_itself(shape):
    size = int8_bytes(config_for(*shape), 257)
    config, said = target(n_bytes=size)
    assert (config.n_layer, config.n_head, config.n_embd) == shape
    assert "as int8" in said


def test_both_targets_hold():
    config, _ = target(n_bytes=20_000_000, rate=3000)
    size = int8_bytes(config, 257)
    assert size <= 20_000_000
    assert decode_tokens_per_second(config, size, 20e9) >= 3000
    assert target(rate=3000, speed=1e9)[0].n_parameters < config.n_parameters


def test_a_target_below_the_smallest_model_is_refused():
    with pytest.raises(UsageError, match=r"smallest model, 2 layers x 64, is about \d+kB"):
        target(n_bytes=10_000)


def test_a_target_and_a_shape_contradict_each_other():
    with pytest.raises(UsageError, match="n_embd is given with a target"):
        TrainSettings(target_bytes=1_000_000, n_embd=64)


def test_measurements_are_positive_and_leave_the_random_state():
    config = GPTConfig(16, 272, 1, 2, 32)
    recipe = TrainSettings(batch_size=2).recipe(
        "nano", gpu=False, max_iters=10, tokens_per_epoch=1 << 20, block_size=16
    )
    torch.manual_seed(5)
    before = torch.get_rng_state()
    cpu = torch.device("cpu")
    assert measure_tokens_per_second(config, recipe, cpu, torch.float32) > 0
    assert measure_bytes_per_second(1 << 20, rounds=1) > 0
    assert torch.equal(before, torch.get_rng_state())
