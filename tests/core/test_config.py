"""GPTConfig: every field is checked and named, and JSON gives back what it was given."""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pico_edge.config import MAX_DIMENSION, GPTConfig
from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError

TINY: dict[str, Any] = {
    "block_size": 32,
    "vocab_size": 65,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
}


@st.composite
def configs(draw: st.DrawFn) -> GPTConfig:
    n_head = 2 * draw(st.integers(1, 8))
    return GPTConfig(
        block_size=draw(st.integers(1, MAX_DIMENSION)),
        vocab_size=draw(st.integers(1, MAX_DIMENSION)),
        n_layer=draw(st.integers(1, 100)),
        n_head=n_head,
        n_embd=n_head * 8 * draw(st.integers(1, 16)),
        dropout=draw(st.floats(0, 1, exclude_max=True)),
        bias=draw(st.booleans()),
        gelu=draw(st.sampled_from(["tanh", "erf"])),
    )


def test_the_defaults_are_gpt2() -> None:
    assert GPTConfig().to_dict() == {
        "block_size": 1024,
        "vocab_size": 50304,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "dropout": 0.0,
        "bias": True,
        "gelu": "tanh",
    }
    assert GPTConfig().head_dim == 64


@given(configs())
def test_a_config_survives_json(config: GPTConfig) -> None:
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(configs())
def test_heads_share_the_width_evenly(config: GPTConfig) -> None:
    assert config.head_dim * config.n_head == config.n_embd


def test_a_config_cannot_change_after_its_check() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig(**TINY).n_layer = 0  # type: ignore[misc]


WHOLE_NUMBERS = ["block_size", "vocab_size", "n_layer", "n_head", "n_embd"]
BAD_FIELDS = [
    *[
        (name, value)
        for name in WHOLE_NUMBERS
        for value in (0, -1, MAX_DIMENSION + 1, 2**63, 32.0, True, "32", None, math.nan, [32])
    ],
    *[("dropout", value) for value in (1.0, 1.5, -0.1, math.nan, math.inf, True, "0.1", None, [])],
    *[("bias", value) for value in (1, 0, "true", None)],
    *[("gelu", value) for value in ("relu", "", None, True, ["tanh"])],
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_a_bad_field_is_named_in_one_line(name: str, value: object) -> None:
    bad = {**GPTConfig(**TINY).to_dict(), name: value}
    with pytest.raises(UsageError, match=rf"^{name} is ") as error:
        GPTConfig(**bad)
    assert isinstance(error.value, ValueError)
    assert "expected" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ArtefactError, match=rf"^model config: {name} is "):
        GPTConfig.from_dict(bad)


@pytest.mark.parametrize(
    ("n_head", "n_embd", "message"),
    [
        (3, 32, "n_embd 32 is not a multiple of n_head 3"),
        (8, 32, "n_embd 32 over n_head 8 gives heads of 4 channels: expected a multiple of 8"),
        (2, 24, "n_embd 24 over n_head 2 gives heads of 12 channels: expected a multiple of 8"),
        (64, 32, "n_embd 32 is not a multiple of n_head 64"),
        (1, 24, "n_embd is 24: expected a multiple of 16"),
    ],
)
def test_shapes_that_no_kernel_takes_are_refused(n_head: int, n_embd: int, message: str) -> None:
    with pytest.raises(UsageError) as error:
        GPTConfig(**{**TINY, "n_head": n_head, "n_embd": n_embd})
    assert str(error.value).startswith(message)


@given(n_head=st.integers(1, 200), n_embd=st.integers(1, 2000))
def test_a_width_is_accepted_exactly_when_its_heads_and_blocks_fit(
    n_head: int, n_embd: int
) -> None:
    fits = n_embd % 16 == 0 and n_embd % n_head == 0 and (n_embd // n_head) % 8 == 0
    try:
        GPTConfig(**{**TINY, "n_head": n_head, "n_embd": n_embd})
    except UsageError:
        assert not fits
    else:
        assert fits


def test_missing_and_unknown_fields_of_a_file_are_listed() -> None:
    values = GPTConfig(**TINY).to_dict()
    del values["n_layer"]
    values["n_kv_head"] = 2
    with pytest.raises(ArtefactError) as error:
        GPTConfig.from_dict(values)
    assert str(error.value) == (
        "model config: missing fields ['n_layer'], unknown fields ['n_kv_head']"
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(json_values)
def test_json_that_is_no_config_is_refused_as_a_bad_file(values: object) -> None:
    with pytest.raises(ArtefactError, match=r"^model config"):
        GPTConfig.from_dict(values)


@given(name=st.sampled_from(sorted(GPTConfig().to_dict())), value=json_values)
def test_one_strange_value_gives_a_config_or_a_refusal(name: str, value: object) -> None:
    values = {**GPTConfig(**TINY).to_dict(), name: value}
    try:
        assert GPTConfig.from_dict(values).to_dict() == values
    except PicoEdgeError as error:
        assert type(error) is ArtefactError
