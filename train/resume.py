"""Going on with a run as if it had never stopped: the state in `last.pt`, and back.

On the machine, torch build, device, thread count and world size of the first run the weights become
bitwise those of an uninterrupted one; otherwise they are statistically equivalent, and
`differences` says why. Knows nothing of steps or evaluation.

Try: `load_resumable(run_paths("ckpt.pt"), Reporter())`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError, UsageError
from pico_edge.tokenizer import Tokenizer
from pico_edge.train.checkpoint import Checkpoint, load_checkpoint
from pico_edge.train.folder import RunPaths
from pico_edge.train.optim import load_optimizer_states, optimizer_states
from pico_edge.train.report import Reporter, duration
from pico_edge.train.settings import ARCHITECTURE, Recipe, TrainSettings
from pico_edge.train.step import Trainer


@dataclasses.dataclass
class Progress:
    """How far a run is; plain values, stored in `last.pt`. iter: updates made.

    train_loss_sum and train_loss_count: over the steps since the last evaluation. samples_bytes:
    size of `samples.txt`. finished: why nothing is left to do, "max_iters" or "patience".
    """

    iter: int = 0
    elapsed_s: float = 0.0
    best_iter: int | None = None
    best_val_loss: float | None = None
    best_val_bits_per_byte: float | None = None
    evaluations_since_best: int = 0
    train_loss_sum: float = 0.0
    train_loss_count: int = 0
    samples_bytes: int = 0
    finished: str | None = None


def environment(trainer: Trainer, *, compiled: bool) -> dict[str, str | int | bool]:
    """What decides, beside data and recipe, which bits the weights get."""
    device = trainer.device
    return {
        "machine": platform.machine(),
        "processor": _processor(device),
        "torch": str(torch.__version__),  # a class of its own, which no checkpoint takes
        "device": device.type,
        "dtype": str(trainer.dtype),
        "compile": compiled,
        "threads": torch.get_num_threads(),
        "world_size": trainer.world_size,
    }


def stored_dtype(checkpoint: Checkpoint, device: torch.device) -> str | None:
    """The type a run worked in on such a processor; timed again, a busy one may choose another."""
    before = (checkpoint.resume or {}).get("environment", {})
    if before.get("device") != device.type or before.get("processor") != _processor(device):
        return None
    return str(before["dtype"]).removeprefix("torch.") if "dtype" in before else None


def _processor(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_capability()


def resume_values(trainer: Trainer, progress: Progress, *, compiled: bool) -> dict[str, Any]:
    """The part of `last.pt` that only a resume needs: tensors and plain values."""
    return {
        "recipe": trainer.recipe.to_dict(),
        "progress": dataclasses.asdict(progress),
        "optimizers": optimizer_states(trainer.optimizers),
        "scaler": trainer.scaler.state_dict(),
        "random": _random_states(trainer.device),
        "environment": environment(trainer, compiled=compiled),
        "world_size": trainer.world_size,
        "tokens_per_iter": trainer.tokens_per_iter,
    }


def load_resumable(paths: RunPaths, reporter: Reporter) -> Checkpoint:
    """`last.pt`, or, where it is missing or damaged, `last.prev.pt`, said loudly; hold the lock.

    Raises ArtefactError when neither can be read.
    """
    try:
        return _load(paths.last)
    except ArtefactError as error:
        if not paths.previous.exists():
            if paths.out.exists() and not paths.last.exists():  # killed between its first two saves
                raise ArtefactError(
                    f"{paths.last} does not exist: nothing to resume; train with --force in place "
                    f"of --resume to start over, which replaces {paths.out}"
                ) from error
            raise
        reporter.say(f"WARNING: {error}")
    checkpoint = _load(paths.previous)
    if paths.last.exists():
        # Or the next save would keep the damaged file as the one before, in place of the whole one.
        os.replace(paths.last, paths.damaged)
        reporter.say(f"WARNING: the damaged file is now {paths.damaged}")
    reporter.say(
        f"WARNING: continuing from {paths.previous}, iteration {checkpoint.iter}, the state before"
    )
    return checkpoint


def _load(path: Path) -> Checkpoint:
    if not path.exists():
        raise ArtefactError(f"{path} does not exist: nothing to resume; train without --resume")
    checkpoint = load_checkpoint(path)
    if checkpoint.resume is None:
        raise ArtefactError(f"{path} has no optimizer state: --init-from can train on from it")
    return checkpoint


def stored_recipe(checkpoint: Checkpoint) -> Recipe:
    """The recipe in force. Raises ArtefactError."""
    return Recipe.from_dict((checkpoint.resume or {}).get("recipe"))


def check_flags(
    checkpoint: Checkpoint, settings: TrainSettings, reporter: Reporter, *, world_size: int
) -> Recipe:
    """The recipe of a resumed run; flags repeat it or are refused, by UsageError.

    Another split of the same number of windows into batch_size, grad_accum and processes is
    accepted, and said. Where it is not given, grad_accum follows the other two.
    """
    recipe = stored_recipe(checkpoint)
    check_shape_flags(checkpoint.config, checkpoint.tokenizer, settings)
    if settings.has_target:
        raise UsageError("a target for the device is given, the run to resume has its size")
    config = checkpoint.config
    for name, has in (("dropout", config.dropout), ("vocab_size", checkpoint.tokenizer.n_vocab)):
        asked = getattr(settings, name)
        if asked is not None and asked not in (has, getattr(config, name)):
            raise UsageError(f"{name} is {asked}, the run to resume has {has}: leave the flag out")
    changed = _split_windows(checkpoint, recipe, settings, reporter, world_size)
    for field in dataclasses.fields(Recipe):
        asked = getattr(settings, field.name, None)
        if field.name == "seed" and asked == TrainSettings.seed:
            continue  # not told from the default
        if asked is not None and asked != getattr(changed, field.name):
            raise UsageError(
                f"{field.name} is {asked}, the run to resume has {getattr(changed, field.name)}: "
                "leave the flag out, or start anew with --init-from"
            )
    if settings.minutes is not None:
        planned = duration(recipe.budget_s) if recipe.budget_s else f"{recipe.max_iters} iterations"
        reporter.say(f"minutes: the {planned} of the start stay in force")
    return changed


def _split_windows(
    checkpoint: Checkpoint,
    recipe: Recipe,
    settings: TrainSettings,
    reporter: Reporter,
    world_size: int,
) -> Recipe:
    """The recipe with the windows of a step split as asked; there must be as many as before."""
    before = {
        "batch_size": recipe.batch_size,
        "grad_accum": recipe.grad_accum,
        "processes": (checkpoint.resume or {}).get("world_size", 1),
    }
    windows = math.prod(before.values())
    batch_size = settings.batch_size or recipe.batch_size
    grad_accum = settings.grad_accum
    if grad_accum is None:
        whole, rest = divmod(windows, batch_size * world_size)
        grad_accum = recipe.grad_accum if rest else whole
    now = {"batch_size": batch_size, "grad_accum": grad_accum, "processes": world_size}
    if math.prod(now.values()) != windows:
        raise UsageError(
            f"{_product(now)} are not the {_product(before)} windows per step of the run: keep "
            "the product, or start anew with --init-from"
        )
    if now != before:
        reporter.say(
            ", ".join(f"{k} {before[k]} -> {now[k]}" for k in now if now[k] != before[k])
            + ": the same number of windows per step, statistically equivalent to an "
            "uninterrupted run"
        )
    return dataclasses.replace(recipe, batch_size=batch_size, grad_accum=grad_accum)


def _product(split: dict[str, int]) -> str:
    return " x ".join(f"{name} {value}" for name, value in split.items())


def check_shape_flags(config: GPTConfig, tokenizer: Tokenizer, settings: TrainSettings) -> None:
    """Refuse flags that ask for another model than the one loaded, by UsageError."""
    wanted = {name: getattr(settings, name) for name in ARCHITECTURE}
    if settings.preset is not None:
        shape = settings.model_config(settings.preset, vocab_size=config.vocab_size)
        wanted = {name: getattr(shape, name) for name in ARCHITECTURE}
    for name, value in wanted.items():
        if value is not None and value != getattr(config, name):
            raise UsageError(
                f"{name} is {value}, the checkpoint has {getattr(config, name)}: leave the flag out"
            )
    if settings.tokenizer is not None:
        kind = "simple" if settings.tokenizer == "simple" else "bpe"
        if kind != tokenizer.kind:
            raise UsageError(
                f"tokenizer is {settings.tokenizer!r}, the checkpoint has {tokenizer.kind!r}: "
                "leave the flag out"
            )


def restore(checkpoint: Checkpoint, trainer: Trainer) -> Progress:
    """Put optimizers, loss scale and, last, random states back; returns the progress.

    Raises ArtefactError when the stored state does not fit this model.
    """
    values = checkpoint.resume or {}
    try:
        load_optimizer_states(trainer.optimizers, values["optimizers"])
        trainer.scaler.load_state_dict(values["scaler"])
        progress = Progress(**values["progress"])
        _restore_random_states(values["random"], trainer.device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtefactError(f"the resumable state does not fit its model: {error}") from error
    if progress.iter != checkpoint.iter:
        raise ArtefactError(
            f"the resumable state is of iteration {progress.iter}, the weights of {checkpoint.iter}"
        )
    return progress


def differences(checkpoint: Checkpoint, trainer: Trainer, *, compiled: bool) -> Sequence[str]:
    """What is not as it was, such as "threads 2 -> 1"; empty where the resume is bitwise exact."""
    before = dict((checkpoint.resume or {}).get("environment", {}))
    now = environment(trainer, compiled=compiled)
    split = ("batch_size", "grad_accum")
    recipe = stored_recipe(checkpoint)
    before |= {name: getattr(recipe, name) for name in split}
    now |= {name: getattr(trainer.recipe, name) for name in split}
    changed = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]
    if trainer.device.type != "cpu":
        changed.append(f"{trainer.device.type} kernels that add up in varying order")
    return changed


def _cpu_capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def _restore_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    # A run that changed its device starts the generator of the new one afresh, from the seed.
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
    torch.set_rng_state(states["cpu"])
