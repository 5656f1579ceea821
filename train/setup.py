"""From flags and files to something that can be trained: tokens, model, device, schedule.

All refusals come from here, before the first step.

Try: `set_up(["data.txt"], TrainSettings(), run_paths("ckpt.pt"), Reporter())`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.ngrams import NGrams
from pico_edge.tokenizer import Tokenizer, padded_vocab_size
from pico_edge.train.bpe import choose_tokenizer, default_tokenizer
from pico_edge.train.budget import lay_schedule
from pico_edge.train.checkpoint import (
    Checkpoint,
    build_model,
    load_checkpoint,
)
from pico_edge.train.evaluate import sample_text
from pico_edge.train.folder import RunPaths, check_space
from pico_edge.train.model import GPT
from pico_edge.train.ngrams import count_ngrams
from pico_edge.train.optim import make_optimizers
from pico_edge.train.report import Reporter, count, duration
from pico_edge.train.resume import (
    Progress,
    check_flags,
    check_shape_flags,
    differences,
    load_resumable,
    restore,
)
from pico_edge.train.settings import (
    DEFAULT_MINUTES,
    PRESET_BELOW_BYTES,
    Recipe,
    TrainSettings,
    choose_preset,
    nearest_preset,
)
from pico_edge.train.step import Forward, Trainer
from pico_edge.train.text import find_files, fingerprint, text_bytes
from pico_edge.train.tokens import TokenData, prepare_tokens

StrPath = str | os.PathLike[str]

# torch.compile takes most of a minute: not worth it in a run of fewer minutes than this.
COMPILE_FROM_MINUTES = 5.0


@dataclass
class Run:
    """One run, ready to go on at `progress.iter`. source: how its data is read, to be stored."""

    trainer: Trainer
    progress: Progress
    data: TokenData
    tokenizer: Tokenizer
    paths: RunPaths
    sample_prompt: str
    compiled: bool
    source: dict[str, Any]
    ngrams: NGrams


def set_up(
    data: Sequence[StrPath],
    settings: TrainSettings,
    paths: RunPaths,
    reporter: Reporter,
    *,
    started: float,
) -> Run:
    """Read the data, build or load the model, lay the schedule. started: as `train` has it.

    Raises UsageError, ArtefactError (data or checkpoint refused) or PicoEdgeError (device missing).
    """
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    files = find_files(data)
    val_files = None if settings.val_data is None else find_files([settings.val_data])

    checkpoint = _loaded(settings, paths, reporter)
    if settings.resume and checkpoint is not None:
        _check_same_data(checkpoint, files, val_files)
        settings = _with_stored_reading(settings, checkpoint)
    config, preset, tokenizer = _shape(files, settings, checkpoint, paths.folder, reporter)
    tokens = prepare_tokens(
        files,
        tokenizer,
        paths.folder,
        block_size=config.block_size,
        val_fraction=settings.val_fraction,
        val_files=val_files,
        encoding=settings.encoding,
        text_field=settings.text_field,
        threads=settings.threads,
        reporter=reporter,
    )
    reporter.say(
        f"data: {count(len(tokens.train))} tokens to train on, {count(len(tokens.val))} held out; "
        f"{_tokenizer_name(tokenizer)}"
    )

    torch.manual_seed(settings.seed)
    model = (GPT(config) if checkpoint is None else _model(checkpoint, config)).to(device).train()
    reporter.say(
        f"model: {config.n_layer} layers x {config.n_embd} ({config.n_head} heads), block "
        f"{config.block_size}, {count(model.num_parameters())} parameters, {preset[1]}"
    )
    check_space(paths, model.num_parameters())
    trainer = Trainer(
        model=model,
        forward=model,
        optimizers=[],
        scaler=_scaler(device, dtype),
        recipe=_recipes(settings, preset[0], config, tokens, device)(settings.max_iters or 1000),
        tokens=tokens.train,
        device=device,
        dtype=dtype,
    )
    compiled = choose_compile(settings, device) and _compile(
        trainer, reporter, asked=settings.compile is True
    )
    run = Run(
        trainer=trainer,
        progress=Progress(),
        data=tokens,
        tokenizer=tokenizer,
        paths=paths,
        sample_prompt=_sample_prompt(settings, tokens),
        compiled=compiled,
        source={
            "val_fraction": settings.val_fraction,
            "encoding": settings.encoding,
            "text_field": settings.text_field,
        },
        ngrams=_ngrams(settings, checkpoint, tokens, tokenizer),
    )
    if settings.resume and checkpoint is not None:
        trainer.recipe = check_flags(checkpoint, settings, reporter)
        trainer.optimizers = make_optimizers(model, trainer.recipe)
        run.progress = restore(checkpoint, trainer)
        changed = differences(checkpoint, trainer, compiled=compiled)
        exact = "the same weights as an uninterrupted run, bit by bit"
        reporter.say(
            f"resuming at iteration {checkpoint.iter} of {trainer.recipe.max_iters}: "
            + (exact if not changed else f"statistically equivalent ({', '.join(changed)})")
        )
        return run
    if settings.max_iters is None:
        budget_s = _budget_s(settings)
        trainer.recipe = lay_schedule(
            trainer,
            tokens,
            _recipes(settings, preset[0], config, tokens, device),
            sample=lambda: sample_text(model, tokenizer, run.sample_prompt, seed=0),
            left_s=lambda: budget_s - (time.perf_counter() - started),
        )
    trainer.optimizers = make_optimizers(model, trainer.recipe)
    trainer.scaler = _scaler(device, dtype)
    # The steps that measured drew from it; a run of as many iterations without them must be the
    # same.
    torch.manual_seed(settings.seed)
    recipe = trainer.recipe
    reporter.say(
        f"schedule: {recipe.max_iters} iterations of {trainer.tokens_per_iter} tokens, "
        f"{recipe.optimizer} at {recipe.learning_rate:g}, on {device.type} in "
        f"{str(dtype).removeprefix('torch.')}"
        + ("" if settings.max_iters else f": {duration(_budget_s(settings))} in all, as measured")
    )
    return run


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto": CUDA, MPS or CPU. Raises PicoEdgeError if not usable."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, there in usable.items() if there), "cpu")
    elif not usable.get(name, True):
        raise PicoEdgeError(f"device {name} is not usable here: choose --device cpu or auto")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products; "auto" is 16 bits on CUDA, float32 elsewhere."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def choose_compile(settings: TrainSettings, device: torch.device) -> bool:
    """Whether to run torch.compile: as asked, else on CUDA with Triton in runs long enough."""
    if settings.compile is not None:
        return settings.compile
    long_enough = settings.max_iters is not None or _budget_s(settings) >= COMPILE_FROM_MINUTES * 60
    possible = importlib.util.find_spec("triton") is not None and shutil.which("cc") is not None
    return device.type == "cuda" and long_enough and possible


def _compile(trainer: Trainer, reporter: Reporter, *, asked: bool) -> bool:
    """Compile the model by running it once, forward and back; False where that cannot be done.

    Raises PicoEdgeError instead where compiling was asked for.
    """
    from torch._dynamo.exc import TorchDynamoException

    shape = (trainer.recipe.batch_size, trainer.model.config.block_size)
    idx = torch.zeros(shape, dtype=torch.int64, device=trainer.device)  # (B, T)
    forward = cast(Forward, torch.compile(trainer.model))
    reporter.say("compiling the model, about a minute")
    try:
        with trainer.autocast():
            _, loss = forward(idx, idx)
        torch.autograd.backward(cast(torch.Tensor, loss))
    except TorchDynamoException as error:
        why = f"torch.compile does not work here ({str(error).splitlines()[0]})"
        if asked:
            raise PicoEdgeError(f"{why}: train with --no-compile") from error
        reporter.say(f"{why}: training without it")
        return False
    finally:
        trainer.model.zero_grad(set_to_none=True)
    trainer.forward = forward
    return True


def _loaded(settings: TrainSettings, paths: RunPaths, reporter: Reporter) -> Checkpoint | None:
    if settings.resume:
        return load_resumable(paths, reporter)
    if settings.init_from is not None:
        checkpoint = load_checkpoint(settings.init_from)
        check_shape_flags(checkpoint.config, checkpoint.tokenizer, settings)
        return checkpoint
    return None


def _check_same_data(
    checkpoint: Checkpoint, files: Sequence[Path], val_files: Sequence[Path] | None
) -> None:
    found = fingerprint(files)
    if val_files is not None:
        found["val"] = fingerprint(val_files)
    if found != checkpoint.data:
        raise ArtefactError(
            f"the data has changed since the run began ({found.get('bytes')} bytes, then "
            f"{checkpoint.data.get('bytes')}): a resume needs the same files; train on with "
            "others by --init-from CKPT and a new --out"
        )


def _with_stored_reading(settings: TrainSettings, checkpoint: Checkpoint) -> TrainSettings:
    """The settings with what decides how the data is read and split, from the run itself."""
    names = ("val_fraction", "encoding", "text_field")
    stored = {name: checkpoint.settings[name] for name in names if name in checkpoint.settings}
    return dataclasses.replace(settings, **stored)


def _shape(
    files: Sequence[Path],
    settings: TrainSettings,
    checkpoint: Checkpoint | None,
    folder: Path,
    reporter: Reporter,
) -> tuple[GPTConfig, tuple[str, str], Tokenizer]:
    """Shape of the model, preset of its training values (name, reason), tokenizer."""
    if checkpoint is not None:
        config = checkpoint.config
        if settings.dropout is not None:
            config = dataclasses.replace(config, dropout=settings.dropout)
        return config, (nearest_preset(config), "from the checkpoint"), checkpoint.tokenizer
    n_bytes = text_bytes(files)
    if settings.preset is not None:
        name, reason = settings.preset, f"preset {settings.preset} as asked"
    else:
        name = choose_preset(n_bytes)
        limit = PRESET_BELOW_BYTES.get(name)
        size = f"under {count(limit)}B" if limit is not None else "large"
        reason = f"preset {name} because the text is {size}"
    settings.model_config(name, vocab_size=272)  # refuses a shape before the text is read
    kind, vocab_size = default_tokenizer(n_bytes)
    if settings.tokenizer is not None:
        kind, vocab_size = settings.tokenizer, settings.vocab_size or vocab_size
    elif settings.vocab_size is not None:
        kind, vocab_size = "bpe", settings.vocab_size  # nothing else has a size to choose
    tokenizer = choose_tokenizer(
        kind,
        files,
        vocab_size=vocab_size if kind == "bpe" else None,
        ranks=settings.ranks,
        encoding=settings.encoding,
        text_field=settings.text_field,
        val_fraction=0.0 if settings.val_data is not None else settings.val_fraction,
        folder=folder,
        reporter=reporter,
    )
    rows = padded_vocab_size(tokenizer.n_vocab)
    if kind != "bpe" and settings.vocab_size is not None:
        if settings.vocab_size < tokenizer.n_vocab:
            raise UsageError(
                f"vocab_size is {settings.vocab_size}, the {kind} tokenizer has "
                f"{tokenizer.n_vocab}: expected at least that"
            )
        rows = settings.vocab_size
    return settings.model_config(name, vocab_size=rows), (name, reason), tokenizer


def _model(checkpoint: Checkpoint, config: GPTConfig) -> GPT:
    return build_model(dataclasses.replace(checkpoint, config=config))


def _ngrams(
    settings: TrainSettings,
    checkpoint: Checkpoint | None,
    tokens: TokenData,
    tokenizer: Tokenizer,
) -> NGrams:
    if settings.resume and checkpoint is not None and checkpoint.ngrams is not None:
        return checkpoint.ngrams
    return count_ngrams(tokens.train, tokenizer.n_vocab)


def _sample_prompt(settings: TrainSettings, tokens: TokenData) -> str:
    if settings.sample_prompt is not None:
        return settings.sample_prompt
    return tokens.held_out.lstrip()[:16] or "\n"


def _tokenizer_name(tokenizer: Tokenizer) -> str:
    kind = {"simple": "bytes as tokens", "bpe": "byte-pair encoding"}[tokenizer.kind]
    return f"{kind}, {tokenizer.n_vocab} of them"


def _budget_s(settings: TrainSettings) -> float:
    return 60 * (DEFAULT_MINUTES if settings.minutes is None else settings.minutes)


def _scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def _recipes(
    settings: TrainSettings, preset: str, config: GPTConfig, tokens: TokenData, device: torch.device
) -> Callable[[int], Recipe]:
    """The recipe of this run for every number of iterations."""

    def recipe(max_iters: int) -> Recipe:
        return settings.recipe(
            preset,
            gpu=device.type != "cpu",
            max_iters=max_iters,
            tokens_per_epoch=len(tokens.train),
            block_size=config.block_size,
        )

    return recipe
