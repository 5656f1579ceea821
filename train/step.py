"""One training step: micro-batches, gradients, the check that all is finite, the update.

Knows nothing of evaluation, files or time. World size and rank enter only through the slot of a
batch.

Try: `train_step(trainer, 0, 1e-3)` -> StepResult(loss=5.6, grad_norm=2.1).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError, DivergedError, PicoEdgeError
from pico_edge.train.batches import batch
from pico_edge.train.distributed import Workers
from pico_edge.train.model import GPT
from pico_edge.train.optim import set_learning_rate
from pico_edge.train.settings import Recipe
from pico_edge.train.tokens import IdArray, Tokens

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass
class Trainer:
    """What a step works on. forward: the model, compiled or not, averaging over the ranks or not.

    dtype: of the matrix products. recipe: batch_size and grad_accum are those of one rank.
    """

    model: GPT
    forward: Forward
    optimizers: Sequence[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    recipe: Recipe
    tokens: Tokens | IdArray
    device: torch.device
    dtype: torch.dtype
    world_size: int = 1
    rank: int = 0
    workers: Workers = field(default_factory=Workers)

    @property
    def tokens_per_iter(self) -> int:
        """Tokens of one step, over all ranks."""
        windows = self.recipe.batch_size * self.recipe.grad_accum * self.world_size
        return windows * self.model.config.block_size

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context in which the model runs; nothing for float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


class StepResult(NamedTuple):
    """Mean loss in nats per token before the update, norm of the gradient before clipping."""

    loss: float
    grad_norm: float


def train_step(trainer: Trainer, step: int, rate: float) -> StepResult:
    """Update the weights once, at learning rate `rate`, from the batches of this step.

    Raises DivergedError, with the weights as they were, when loss or gradient norm is not finite.
    """
    recipe, scaler = trainer.recipe, trainer.scaler
    for optimizer in trainer.optimizers:
        optimizer.zero_grad(set_to_none=True)
    trainer.workers.seed_step(recipe.seed, step)
    total = torch.zeros((), device=trainer.device)
    for micro_step in range(recipe.grad_accum):
        x, y = batch(
            trainer.tokens,
            seed=recipe.seed,
            step=step,
            slot=micro_step * trainer.world_size + trainer.rank,
            batch_size=recipe.batch_size,
            block_size=trainer.model.config.block_size,
        )  # (B, T) each
        check_ids(x, y, trainer.model.config.vocab_size)
        x = x.to(trainer.device, non_blocking=True)
        y = y.to(trainer.device, non_blocking=True)
        last = micro_step == recipe.grad_accum - 1
        with trainer.autocast(), trainer.workers.gradients(trainer.forward, last=last):
            _, loss = trainer.forward(x, y)
        assert loss is not None
        loss = loss / recipe.grad_accum
        torch.autograd.backward(scaler.scale(loss))
        total += loss.detach()
    for optimizer in trainer.optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(
        trainer.model.parameters(), recipe.grad_clip or math.inf, foreach=True
    )
    # Of all ranks, whose gradients are the same by now: either all go on or none does.
    result = StepResult(trainer.workers.mean(total.item()), norm.item())
    # float16 finds its loss scale by overflowing now and then; its scaler skips that update by
    # itself.
    overflow = scaler.is_enabled() and scaler.get_scale() > 1.0
    if not math.isfinite(result.loss) or not (math.isfinite(result.grad_norm) or overflow):
        found = f"loss {result.loss}, gradient norm {result.grad_norm}"
        raise divergence(trainer, step, rate, found)
    set_learning_rate(trainer.optimizers, rate)
    for optimizer in trainer.optimizers:
        scaler.step(optimizer)
    scaler.update()
    return result


def check_ids(x: Tensor, y: Tensor, vocab_size: int) -> None:
    """Refuse token ids that the model has no row for. The cache on disk may change under a run.

    Raises ArtefactError; what a device would say ranges from IndexError to nothing.
    """
    highest = max(int(x.max()), int(y.max()))
    if highest >= vocab_size:
        raise ArtefactError(
            f"the token cache has changed while in use: token id {highest}, expected under "
            f"{vocab_size}: start again with --resume, it is made anew"
        )


def divergence(trainer: Trainer, step: int, rate: float, found: str) -> DivergedError:
    """The error for what was found in the step that makes `step` into `step` + 1."""
    slots = trainer.recipe.grad_accum * trainer.world_size
    return DivergedError(
        f"diverged at iteration {step + 1}: {found}, learning rate {rate:.3g}, batches of seed "
        f"{trainer.recipe.seed} step {step} slots 0-{slots - 1}; the checkpoints are as they were: "
        "use a smaller --learning-rate"
    )


@contextlib.contextmanager
def memory_errors(recipe: Recipe, config: GPTConfig) -> Iterator[None]:
    """Turn every form of "out of memory" into a PicoEdgeError that names what to make smaller."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise PicoEdgeError(_memory_message(recipe, config)) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says so in any of the forms of Python, CUDA and torch's CPU allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)  # which has no class of its own


def _memory_message(recipe: Recipe, config: GPTConfig) -> str:
    return (
        f"out of memory with batch_size {recipe.batch_size}, block_size {config.block_size}, "
        f"grad_accum {recipe.grad_accum}: halve --batch-size and double --grad-accum, or choose a "
        "smaller --block-size or --preset"
    )
