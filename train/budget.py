"""How many iterations fit into the user's minutes, measured on this machine before the first one.

The machine may get slower or faster later: then the rest is laid anew. The schedule in force is
stored with the run, so that a resume follows the same one. Knows nothing of flags or files.

Try: `lay_schedule(trainer, data, recipe_for, sample=..., left_s=lambda: 60.0).max_iters`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

from pico_edge.train.evaluate import count_eval_batches, evaluate
from pico_edge.train.optim import make_optimizers, rate_at
from pico_edge.train.settings import Recipe
from pico_edge.train.step import Trainer, memory_errors, train_step
from pico_edge.train.tokens import TokenData

MEASURE_S = 1.5
MEASURE_STEPS = 100  # at most
WARM_UP_STEPS = 2  # these allocate, and compile
MIN_ITERS = 20  # laid over any time, however short
# An evaluation saves weights and two moments, and the weights once more for the best model.
SAVED_BYTES_PER_PARAMETER = 16
SAVED_BYTES_PER_S = 150e6  # written, hashed and flushed; a laptop's disk, not its best

# A schedule stays as it is while its end is off by less than the larger of these: a share of the
# time, which the speed of a busy desktop wanders by, and what nobody minds to wait.
OFF_BY, OFF_BY_S = 0.05, 15.0
NEAR_END = 0.1  # of the time: too little to win by more iterations at a rate so low
LAST_STRETCH = 0.02  # of the time, where it is over: in which the rate still falls to its end


class Speed(NamedTuple):
    """Seconds of one step, of one batch of an evaluation, and of the rest of it (sample, saves)."""

    step_s: float
    batch_s: float
    rest_s: float


def lay_schedule(
    trainer: Trainer,
    data: TokenData,
    recipe_for: Callable[[int], Recipe],
    *,
    sample: Callable[[], object],
    left_s: Callable[[], float],
) -> Recipe:
    """The recipe of as many iterations as fit into the time left, evaluations and saves included.

    recipe_for: the recipe for a number of iterations. sample: what an evaluation does to show a
    text. left_s: asked after measuring. Leaves the weights as they were and the optimizers to be
    made anew.
    """
    recipe = trainer.recipe
    with memory_errors(recipe, trainer.model.config):
        speed = measure(trainer, data, sample)
    left = left_s()
    batches = count_eval_batches(len(data.val), trainer.model.config.block_size, recipe.batch_size)
    max_iters = max(MIN_ITERS, int(left / speed.step_s))
    for _ in range(4):  # the interval of evaluations depends on the length, and the other way round
        recipe = recipe_for(max_iters)
        evaluation_s = speed.rest_s + speed.batch_s * min(recipe.eval_iters, batches)
        per_iter_s = speed.step_s + evaluation_s / recipe.eval_interval
        max_iters = max(MIN_ITERS, int(left / per_iter_s))
    return recipe_for(max_iters)


def fit_schedule(recipe: Recipe, *, step: int, elapsed_s: float, per_iter_s: float) -> Recipe:
    """The recipe with what is left of it laid over the time left, or itself where it ends in time.

    step: updates made. per_iter_s: of late, evaluations included. The rate falls on from where it
    is. eval_interval stays: an evaluation gets slower and faster as the steps do, so its share is
    the same, and `patience` goes on counting equal stretches.
    """
    left_s = recipe.budget_s - elapsed_s
    late_s = per_iter_s * (recipe.max_iters - step) - left_s
    if recipe.budget_s == 0.0 or abs(late_s) <= max(OFF_BY * recipe.budget_s, OFF_BY_S):
        return recipe
    if late_s < 0.0 and left_s < NEAR_END * recipe.budget_s:
        return recipe
    n = max(1, int(max(left_s, LAST_STRETCH * recipe.budget_s) / per_iter_s))
    max_iters = max(MIN_ITERS, step + n)
    if (max_iters - recipe.max_iters) * late_s >= 0.0:
        return recipe
    rate = rate_at(recipe, step)
    recipe = dataclasses.replace(recipe, max_iters=max_iters)
    if step < recipe.decay_iter <= step + n // 2:
        return recipe  # still warming up, with time left to fall
    return dataclasses.replace(recipe, decay_iter=step, decay_rate=rate)


def measure(trainer: Trainer, data: TokenData, sample: Callable[[], object]) -> Speed:
    """Time steps at learning rate 0, which change no weight, two evaluation batches, a sample."""
    recipe = trainer.recipe
    trainer.optimizers = make_optimizers(trainer.model, recipe, trainer.dtype)
    for step in range(WARM_UP_STEPS):
        train_step(trainer, step, 0.0)
    begin = time.perf_counter()
    steps = 0
    while trainer.workers.first_says(
        steps < 3 or (steps < MEASURE_STEPS and time.perf_counter() - begin < MEASURE_S)
    ):
        train_step(trainer, steps, 0.0)
        steps += 1
    step_s = (time.perf_counter() - begin) / steps

    trainer.recipe = dataclasses.replace(recipe, eval_iters=2)
    begin = time.perf_counter()
    evaluate(trainer, data)
    block_size = trainer.model.config.block_size
    batches = min(2, count_eval_batches(len(data.val), block_size, recipe.batch_size))
    batch_s = (time.perf_counter() - begin) / batches
    trainer.recipe = recipe

    begin = time.perf_counter()
    sample()
    save_s = trainer.model.num_parameters() * SAVED_BYTES_PER_PARAMETER / SAVED_BYTES_PER_S
    return Speed(step_s, batch_s, time.perf_counter() - begin + save_s)
