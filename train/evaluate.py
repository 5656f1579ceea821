"""How good the model is now: the loss of the held-out part, and a sample of its text.

Nothing here draws from the global random state, so that evaluating more or less often never changes
what is trained. Knows nothing of files or schedules.

Try: `evaluate(trainer, data)` -> 1.89 nats per token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pico_edge.artefact import SAMPLING_DEFAULTS, tokens_kept
from pico_edge.tokenizer import TextStream, Tokenizer
from pico_edge.train.batches import val_batches
from pico_edge.train.model import GPT, KV
from pico_edge.train.step import Trainer, check_ids
from pico_edge.train.tokens import TokenData, Tokens

SAMPLE_TOKENS = 64


@torch.no_grad()
def evaluate(trainer: Trainer, data: TokenData) -> float:
    """Mean held-out loss, nats per token: of all tokens, or of eval_iters batches of many.

    The ranks share the batches; all get the same number.
    """
    model = trainer.model
    total = torch.zeros((), dtype=torch.float64)
    count = 0.0
    was_training = model.training
    model.eval()
    batches = held_out_batches(
        data.val,
        block_size=model.config.block_size,
        batch_size=trainer.recipe.batch_size,
        eval_iters=trainer.recipe.eval_iters,
    )
    for x, y in itertools.islice(batches, trainer.rank, None, trainer.world_size):
        check_ids(x, y, model.config.vocab_size)
        with trainer.autocast():
            _, loss = model(x.to(trainer.device), y.to(trainer.device))
        total += loss.double().cpu() * y.numel()
        count += y.numel()
    model.train(was_training)
    loss_sum, count = trainer.workers.sum([total.item(), count])
    return loss_sum / count


def held_out_batches(
    tokens: Tokens, *, block_size: int, batch_size: int, eval_iters: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every held-out token once, or where these are too many, the same windows spread over them.

    Yields x, y: (B, T) int64 as `val_batches` does.
    """
    if count_eval_batches(len(tokens), block_size, batch_size) <= eval_iters:
        yield from val_batches(tokens, block_size, batch_size)
        return
    starts = np.linspace(0, len(tokens) - block_size - 1, eval_iters * batch_size).astype(np.int64)
    for row in range(0, len(starts), batch_size):
        windows = [
            np.asarray(tokens[start : start + block_size + 1]).astype(np.int64)
            for start in starts[row : row + batch_size].tolist()
        ]
        both = torch.from_numpy(np.stack(windows))  # (B, T + 1)
        yield both[:, :-1], both[:, 1:]


def count_eval_batches(n_tokens: int, block_size: int, batch_size: int) -> int:
    """Batches that cover n_tokens held-out tokens once."""
    return math.ceil((n_tokens - 1) / (block_size * batch_size))


def bits_per_byte(loss: float, data: TokenData) -> float:
    """A loss in nats per held-out token as bits per UTF-8 byte, comparable across tokenizers.

    Of an evaluation over a part of the held-out text too: bytes per token are those of the whole.
    """
    return loss * len(data.val) / (math.log(2) * max(1, data.n_val_bytes))


@torch.no_grad()
def sample_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    seed: int,
    max_new_tokens: int = SAMPLE_TOKENS,
) -> str:
    """The prompt and its continuation by the model, drawn with a generator of its own.

    Past block_size it goes on from the newest part of the window, as the runtime does.
    """
    device = next(model.parameters()).device
    block_size = model.config.block_size
    kept = tokens_kept(block_size)
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    n_prompt = len(ids)
    new, past, cached = ids[-kept:], None, 0
    was_training = model.training
    model.eval()
    for _ in range(max_new_tokens):
        if cached + len(new) > block_size:
            new, past, cached = ids[-kept:], None, 0
        logits, past = _next_logits(model, new, past, device)
        cached += len(new)
        new = [_draw(logits[: tokenizer.n_vocab], generator)]
        ids += new
    model.train(was_training)
    stream = TextStream(tokenizer)
    return prompt + stream.feed(ids[n_prompt:]) + stream.flush()


def _next_logits(
    model: GPT, new: list[int], past: list[KV] | None, device: torch.device
) -> tuple[Tensor, list[KV]]:
    idx = torch.tensor([new], dtype=torch.int64, device=device)
    logits, present = model.forward_cached(idx, past)
    return logits[0, -1].float().cpu(), present


def _draw(logits: Tensor, generator: torch.Generator) -> int:
    top_k = min(int(SAMPLING_DEFAULTS["top_k"]), logits.numel())
    values, tokens = (logits / SAMPLING_DEFAULTS["temperature"]).topk(top_k)
    chosen = torch.multinomial(values.softmax(dim=-1), 1, generator=generator)
    return int(tokens[chosen])
