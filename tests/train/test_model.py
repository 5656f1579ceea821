"""The torch reference: GPT-2's shape and start, one function cached or not, a plain sampler."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pico_edge.config import GPTConfig
from pico_edge.train.model import GPT

CONFIG = GPTConfig(block_size=24, vocab_size=65, n_layer=2, n_head=2, n_embd=32)
# Two orders of summation of float32 values of about 1.
ATOL = 1e-5


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    made = GPT(CONFIG).eval()
    with torch.no_grad():  # of a trained size: at the start attention hardly matters
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return made


def some_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=generator)


# Shape and start


def test_the_parts_have_the_names_and_shapes_of_gpt2() -> None:
    expected = {"transformer.wte.weight": (65, 32), "transformer.wpe.weight": (24, 32)}
    for i in range(2):
        layer = f"transformer.h.{i}"
        for name, shape in {
            "ln_1": (32,),
            "attn.c_attn": (96, 32),
            "attn.c_proj": (32, 32),
            "ln_2": (32,),
            "mlp.c_fc": (128, 32),
            "mlp.c_proj": (32, 128),
        }.items():
            expected |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    expected |= {"transformer.ln_f.weight": (32,), "transformer.ln_f.bias": (32,)}
    expected |= {"lm_head.weight": (65, 32)}
    state = GPT(CONFIG).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


def test_the_head_is_the_token_table() -> None:
    made = GPT(CONFIG)
    assert made.lm_head.weight is made.transformer.wte.weight
    unique = sum(value.numel() for value in made.state_dict().values()) - 65 * 32
    assert made.num_parameters() == unique


def test_gpt2_has_as_many_parameters_as_gpt2() -> None:
    with torch.device("meta"):
        made = GPT(GPTConfig(vocab_size=50257))
    assert made.num_parameters() == 124_439_808


def test_dropout_stands_where_gpt2_has_it() -> None:
    made = GPT(dataclasses.replace(CONFIG, dropout=0.25))
    places = [name for name, module in made.named_modules() if isinstance(module, nn.Dropout)]
    assert places == [
        "transformer.drop",
        "transformer.h.0.attn.resid_dropout",
        "transformer.h.0.mlp.dropout",
        "transformer.h.1.attn.resid_dropout",
        "transformer.h.1.mlp.dropout",
    ]
    assert all(module.p == 0.25 for module in made.modules() if isinstance(module, nn.Dropout))
    idx = some_ids(2, 8)
    torch.manual_seed(0)
    first, second = made(idx)[0], made(idx)[0]
    assert not torch.equal(first, second)
    made.eval()
    assert torch.equal(made(idx)[0], made(idx)[0])


def test_attention_weights_are_dropped_too_while_training() -> None:
    made = GPT(dataclasses.replace(CONFIG, dropout=0.5))
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    idx = some_ids(2, 8)
    torch.manual_seed(0)
    assert not torch.equal(made(idx)[0], made(idx)[0])


def test_weights_start_with_the_spread_of_gpt2() -> None:
    torch.manual_seed(0)
    made = GPT(GPTConfig(block_size=256, vocab_size=512, n_layer=8, n_head=4, n_embd=128))
    for name, value in made.named_parameters():
        if value.dim() == 1:
            expected = 1.0 if name.endswith("weight") else 0.0  # LayerNorm, biases
            assert torch.equal(value, torch.full_like(value, expected)), name
            continue
        std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
        assert value.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(value.mean().item()) < std / 20, name


def test_a_fresh_model_is_about_as_good_as_guessing() -> None:
    torch.manual_seed(0)
    idx = some_ids(4, 24)
    _, loss = GPT(CONFIG)(idx, some_ids(4, 24, seed=2))
    assert loss is not None and loss.item() == pytest.approx(math.log(65), abs=0.1)


# Forward


def by_hand(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """The logits, each head and position on its own."""
    config, state = model.config, model.state_dict()

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ state[f"{name}.weight"].T
        return y + state[f"{name}.bias"] if config.bias else y

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = x * state[f"{name}.weight"]
        return x + state[f"{name}.bias"] if config.bias else x

    def gelu(x: torch.Tensor) -> torch.Tensor:
        if config.gelu == "erf":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    rows = []
    D = config.head_dim
    for row in idx:
        x = state["transformer.wte.weight"][row] + state["transformer.wpe.weight"][: len(row)]
        for i in range(config.n_layer):
            layer = f"transformer.h.{i}"
            qkv = linear(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn")
            q, k, v = qkv.split(config.n_embd, dim=1)
            heads = []
            for h in range(config.n_head):
                part = slice(h * D, (h + 1) * D)
                out = []
                for t in range(len(row)):
                    weights = (k[: t + 1, part] @ q[t, part] / math.sqrt(D)).softmax(0)
                    out.append(weights @ v[: t + 1, part])
                heads.append(torch.stack(out))
            x = x + linear(torch.cat(heads, 1), f"{layer}.attn.c_proj")
            hidden = gelu(linear(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc"))
            x = x + linear(hidden, f"{layer}.mlp.c_proj")
        rows.append(norm(x, "transformer.ln_f") @ state["lm_head.weight"].T)
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@torch.no_grad()
def test_logits_are_those_computed_by_hand(bias: bool, gelu: str) -> None:
    torch.manual_seed(3)
    made = GPT(dataclasses.replace(CONFIG, bias=bias, gelu=gelu)).eval()
    for parameter in made.parameters():  # biases and norms too are given something to do
        parameter.add_(torch.randn_like(parameter) * 0.1)
    assert bias == any(name.endswith(".bias") for name in made.state_dict())
    idx = some_ids(2, 10)
    logits, loss = made(idx)
    assert loss is None and logits.shape == (2, 10, 65)
    torch.testing.assert_close(logits, by_hand(made, idx), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_two_forms_of_gelu_differ() -> None:
    torch.manual_seed(0)
    tanh = GPT(CONFIG).eval()
    erf = GPT(dataclasses.replace(CONFIG, gelu="erf")).eval()
    erf.load_state_dict(tanh.state_dict())
    assert not torch.equal(tanh(some_ids(1, 8))[0], erf(some_ids(1, 8))[0])


@torch.no_grad()
def test_the_loss_is_the_mean_of_what_each_target_costs(model: GPT) -> None:
    idx, targets = some_ids(3, 7), some_ids(3, 7, seed=2)
    targets[0, :5] = -1  # not counted
    logits, loss = model(idx, targets)
    costs = [
        -math.log(logits[b, t].double().softmax(0)[targets[b, t]].item())
        for b in range(3)
        for t in range(7)
        if targets[b, t] >= 0
    ]
    assert len(costs) == 16
    assert loss is not None and loss.item() == pytest.approx(sum(costs) / 16, abs=1e-5)


@torch.no_grad()
def test_no_position_sees_a_later_one(model: GPT) -> None:
    idx = some_ids(1, 12)
    logits, _ = model(idx)
    for t in range(1, 12):
        changed = idx.clone()
        changed[0, t:] = (changed[0, t:] + 1) % CONFIG.vocab_size
        torch.testing.assert_close(model(changed)[0][:, :t], logits[:, :t], atol=ATOL, rtol=0)
        assert not torch.allclose(model(changed)[0][:, t], logits[:, t], atol=ATOL)


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_cached_forward_matches_full_forward_at_every_split(model: GPT, batch: int) -> None:
    idx = some_ids(batch, CONFIG.block_size)
    full, _ = model(idx)
    for split in range(1, CONFIG.block_size):
        first, past = model.forward_cached(idx[:, :split])
        second, present = model.forward_cached(idx[:, split:], past)
        both = torch.cat((first, second), dim=1)
        torch.testing.assert_close(both, full, atol=ATOL, rtol=0)
        assert len(present) == CONFIG.n_layer
        for kv in present:
            assert kv.key.shape == kv.value.shape == (batch, 2, CONFIG.block_size, 16)
        assert past[0].key.size(2) == split  # what was given is left as it was


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 23, 24])
@torch.no_grad()
def test_cached_forward_matches_full_forward_in_chunks(model: GPT, chunk: int) -> None:
    idx = some_ids(2, CONFIG.block_size)
    full, _ = model(idx)
    past, parts = None, []
    for start in range(0, CONFIG.block_size, chunk):
        logits, past = model.forward_cached(idx[:, start : start + chunk], past)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=ATOL, rtol=0)
    assert torch.equal(torch.cat(parts, dim=1).argmax(-1), full.argmax(-1))


@torch.no_grad()
def test_more_positions_than_the_model_has_are_an_error(model: GPT) -> None:
    with pytest.raises(ValueError, match="25 positions: the model has 24"):
        model(some_ids(1, 25))
    _, past = model.forward_cached(some_ids(1, 24))
    with pytest.raises(ValueError, match="25 positions: the model has 24"):
        model.forward_cached(some_ids(1, 1), past)


def test_every_weight_gets_a_gradient() -> None:
    made = GPT(CONFIG)
    idx = torch.arange(24)[None]
    made(idx, idx)[1].backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_few_steps_learn_a_text_by_heart() -> None:
    torch.manual_seed(0)
    made = GPT(CONFIG)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    idx = some_ids(1, 25)
    for _ in range(60):
        optimizer.zero_grad()
        loss = made(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert torch.equal(made.generate(idx[:, :1], 24, temperature=0), idx)


# Sampling


@torch.no_grad()
def test_temperature_0_takes_the_most_likely_token_at_each_step(model: GPT) -> None:
    idx = some_ids(2, 3)
    out = model.generate(idx, 40, temperature=0)  # beyond the window of 24
    assert out.shape == (2, 43)
    expected = idx
    for _ in range(40):
        logits, _ = model(expected[:, -CONFIG.block_size :])
        expected = torch.cat((expected, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(out, expected)


def draws(model: GPT, prompt: torch.Tensor, n: int, **options: object) -> torch.Tensor:
    """n tokens drawn after one prompt."""
    generator = torch.Generator().manual_seed(5)
    return model.generate(prompt.expand(n, -1), 1, generator=generator, **options)[:, -1]


@torch.no_grad()
def test_top_k_draws_of_the_k_most_likely_alone(model: GPT) -> None:
    prompt = some_ids(1, 6)
    likely = model(prompt)[0][0, -1].topk(4).indices.tolist()
    assert set(draws(model, prompt, 4000, top_k=4, temperature=3.0).tolist()) == set(likely)
    assert set(draws(model, prompt, 50, top_k=1).tolist()) == {likely[0]}
    assert len(set(draws(model, prompt, 4000, top_k=1000, temperature=9.0).tolist())) > 50


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@torch.no_grad()
def test_tokens_are_drawn_as_often_as_they_are_likely(model: GPT, temperature: float) -> None:
    prompt, n = some_ids(1, 6), 20_000
    expected = n * (model(prompt)[0][0, -1] / temperature).softmax(0)
    found = draws(model, prompt, n, temperature=temperature).bincount(minlength=65)
    many = expected > 5
    chi_square = ((found - expected) ** 2 / expected)[many].sum().item()
    degrees = int(many.sum()) - 1
    # Five standard deviations above the mean of a chi-square of so many degrees of freedom.
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


@torch.no_grad()
def test_rows_of_padding_are_never_drawn(model: GPT) -> None:
    prompt = some_ids(1, 6)
    logits, _ = model(prompt)
    order = logits[0, -1].argsort(descending=True)
    n_vocab = int(order[0])  # the most likely token is the first that may not be drawn
    assert 0 < n_vocab < 65
    drawn = draws(model, prompt, 4000, n_vocab=n_vocab, temperature=5.0)
    assert int(drawn.max()) < n_vocab
    assert int(draws(model, prompt, 4000, temperature=5.0).max()) >= n_vocab
    best = model.generate(prompt, 1, temperature=0, n_vocab=n_vocab)[0, -1]
    assert best == logits[0, -1, :n_vocab].argmax()
    assert set(draws(model, prompt, 50, n_vocab=3, top_k=5).tolist()) <= {0, 1, 2}


def test_generating_repeats_with_its_generator_and_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    made = GPT(dataclasses.replace(CONFIG, dropout=0.5))
    prompt, state = some_ids(1, 4), torch.get_rng_state()
    one, two, other = (
        made.generate(prompt, 30, generator=torch.Generator().manual_seed(seed))
        for seed in (7, 7, 8)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert made.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(made.generate(prompt, 0), prompt)
    made.eval()
    made.generate(prompt, 1)
    assert not made.training


def test_the_loss_is_taken_in_float32_whatever_the_weights_are() -> None:
    made = GPT(CONFIG).bfloat16()
    logits, loss = made(some_ids(1, 4), some_ids(1, 4))
    assert logits.dtype == torch.bfloat16
    assert loss is not None and loss.dtype == torch.float32
    assert torch.equal(loss, F.cross_entropy(logits[0].float(), some_ids(1, 4)[0]))
