"""A flag value that cannot work is refused with the name of its field, without torch."""

import dataclasses
import math
import subprocess
import sys

import pytest

from pico_edge.errors import ArtefactError, UsageError
from pico_edge.train.settings import (
    PRESETS,
    Recipe,
    TrainSettings,
    choose_preset,
    eval_interval,
    nearest_preset,
)

RECIPE = TrainSettings(max_iters=100).recipe(
    "nano", gpu=False, max_iters=100, tokens_per_epoch=1000, block_size=64
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", -1.0),
        ("learning_rate", math.inf),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", math.nan),
        ("block_size", 0),
        ("batch_size", 0),
        ("batch_size", 1.5),
        ("grad_accum", 0),
        ("max_iters", 0),
        ("minutes", 0.0),
        ("minutes", math.nan),
        ("n_layer", 0),
        ("n_head", -1),
        ("warmup_iters", -1),
        ("min_lr", -1e-9),
        ("weight_decay", math.inf),
        ("beta1", 1.0),
        ("beta2", -0.5),
        ("grad_clip", math.nan),
        ("val_fraction", 0.0),
        ("val_fraction", 1.0),
        ("eval_interval", 0),
        ("eval_iters", 0),
        ("threads", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("vocab_size", 256),
        ("tokenizer", "words"),
        ("preset", "huge"),
        ("optimizer", "sgd"),
        ("device", "tpu"),
        ("dtype", "int8"),
        ("gelu", "relu"),
    ],
)
def test_a_bad_value_is_refused_and_its_field_named(field, value):
    with pytest.raises(UsageError, match=rf"^{field} is .*: expected ") as error:
        TrainSettings(**{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"preset": "nano", "n_embd": 100}, r"n_embd 100 .* n_head 4"),
        ({"preset": "nano", "n_head": 3}, "n_embd 128 .* n_head 3"),
        ({"minutes": 1.0, "max_iters": 5}, "minutes and max_iters"),
        ({"resume": True, "force": True}, "resume and force"),
        ({"resume": True, "init_from": "a.pt"}, "resume and init_from"),
        ({"init_from": "a.pt", "preset": "nano"}, "preset is given with init_from"),
        ({"ranks": "gpt2.tiktoken"}, "ranks .* tokenizer gpt2"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, named):
    with pytest.raises(UsageError, match=named):
        TrainSettings(**flags)


def test_min_lr_above_the_learning_rate_is_refused():
    settings = TrainSettings(learning_rate=1e-3, min_lr=1e-2)
    with pytest.raises(UsageError, match=r"min_lr is 0\.01"):
        settings.recipe("nano", gpu=False, max_iters=9, tokens_per_epoch=9, block_size=9)


def test_presets_have_the_shapes_of_the_contract():
    shapes = {n: (p.n_layer, p.n_embd, p.n_head, p.block_size) for n, p in PRESETS.items()}
    assert shapes == {
        "nano": (4, 128, 4, 64),
        "micro": (4, 256, 4, 128),
        "mini": (6, 384, 6, 256),
        "small": (8, 512, 8, 512),
        "gpt2": (12, 768, 12, 1024),
    }


@pytest.mark.parametrize(
    ("n_bytes", "preset"),
    [
        (0, "nano"),
        (99_999, "nano"),
        (100_000, "micro"),
        (1_999_999, "micro"),
        (2_000_000, "mini"),
        (49_999_999, "mini"),
        (50_000_000, "small"),
        (10**12, "small"),
    ],
)
def test_the_size_follows_the_data(n_bytes, preset):
    assert choose_preset(n_bytes) == preset


def test_every_flag_of_the_shape_overrides_the_preset():
    flags = dict(n_layer=3, n_head=2, n_embd=32, block_size=8, dropout=0.5, bias=False, gelu="erf")
    config = TrainSettings(preset="gpt2", **flags).model_config("gpt2", vocab_size=272)
    assert config.to_dict() == flags | {"vocab_size": 272}


def test_the_nearest_preset_of_a_presets_shape_is_itself():
    for name in PRESETS:
        assert nearest_preset(TrainSettings().model_config(name, vocab_size=272)) == name


def test_a_recipe_survives_the_checkpoint_and_a_damaged_one_does_not():
    assert Recipe.from_dict(RECIPE.to_dict()) == RECIPE
    for change in ({"seed": "1"}, {"max_iters": 1.0}, {"extra": 1}):
        with pytest.raises(ArtefactError, match="training recipe"):
            Recipe.from_dict(RECIPE.to_dict() | change)


def test_flags_reach_the_recipe():
    flags = dict(
        batch_size=3,
        grad_accum=2,
        learning_rate=0.5,
        min_lr=0.25,
        warmup_iters=7,
        weight_decay=0.0,
        beta1=0.0,
        beta2=0.5,
        grad_clip=0.0,
        optimizer="muon",
        eval_interval=11,
        eval_iters=13,
        seed=17,
    )
    recipe = TrainSettings(**flags).recipe(
        "nano", gpu=True, max_iters=19, tokens_per_epoch=1000, block_size=64
    )
    assert flags.items() <= dataclasses.asdict(recipe).items()
    assert recipe.max_iters == 19


def test_only_a_time_is_cut_short_by_patience():
    def patience(**flags):
        settings = TrainSettings(**flags)
        return settings.recipe(
            "nano", gpu=False, max_iters=50, tokens_per_epoch=1000, block_size=64
        ).patience

    assert patience(max_iters=50) == 0
    assert patience() == patience(minutes=3.0) > 0


def test_a_fine_tune_starts_with_smaller_steps():
    fresh = TrainSettings().recipe("nano", gpu=False, max_iters=9, tokens_per_epoch=9, block_size=9)
    tuned = TrainSettings(init_from="a.pt").recipe(
        "nano", gpu=False, max_iters=9, tokens_per_epoch=9, block_size=9
    )
    assert tuned.learning_rate < fresh.learning_rate


@pytest.mark.parametrize("max_iters", [1, 5, 10, 100, 10_000])
@pytest.mark.parametrize("tokens_per_epoch", [100, 10**5, 10**9])
def test_a_run_is_evaluated_at_least_once_and_at_most_every_tenth_step(max_iters, tokens_per_epoch):
    interval = eval_interval(max_iters, tokens_per_epoch, 1024)
    assert min(10, max_iters) <= interval <= max_iters


def test_the_settings_load_no_torch():
    code = "import sys, pico_edge.train.settings; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
