"""From flags and files to something that can be trained: tokens, model, device, schedule.

All refusals come from here, before the first step.

Try: `set_up(["data.txt"], TrainSettings(), run_paths("ckpt.pt"), Reporter())`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.ngrams import NGrams
from pico_edge.tokenizer import Tokenizer, padded_vocab_size, tokenizer_from_dict
from pico_edge.train.bpe import choose_tokenizer, default_tokenizer
from pico_edge.train.budget import lay_schedule
from pico_edge.train.checkpoint import (
    Checkpoint,
    build_model,
    load_checkpoint,
)
from pico_edge.train.choose import (
    choose_size,
    dropout_for,
    measure_bytes_per_second,
    measure_tokens_per_second,
    shape_for_target,
)
from pico_edge.train.distributed import Workers
from pico_edge.train.evaluate import sample_text
from pico_edge.train.folder import RunPaths, check_space, written_paths
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
    stored_dtype,
)
from pico_edge.train.settings import (
    PRESET_BELOW_BYTES,
    PRESETS,
    Recipe,
    TrainSettings,
    choose_preset,
    nearest_preset,
)
from pico_edge.train.step import Forward, Trainer, is_out_of_memory
from pico_edge.train.text import find_files, fingerprint, text_bytes
from pico_edge.train.tokens import TokenData, prepare_tokens

StrPath = str | os.PathLike[str]

# torch.compile takes most of a minute: not worth it in a run of fewer minutes than this.
COMPILE_FROM_MINUTES = 5.0
# Of English, with some thousand tokens: for a first guess, before the text is tokenized.
BPE_BYTES_PER_TOKEN = 3.5
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt, malloc.h of glibc


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
    workers: Workers | None = None,
) -> Run:
    """Read the data, build or load the model, lay the schedule. started: as `train` has it.

    Raises UsageError, ArtefactError (data or checkpoint refused) or PicoEdgeError (device missing).
    """
    keep_freed_memory()
    workers = workers or Workers()
    device = workers.device(choose_device(settings.device))
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    written = written_paths(paths)
    files = find_files(data, exclude=written)
    val_files = None
    if settings.val_data is not None:
        val_files = find_files([settings.val_data], exclude=written)

    checkpoint = workers.in_turn(
        lambda: _loaded(settings, paths, reporter),
        seen=lambda: [fingerprint(files), _listing(paths)],
    )
    if settings.resume and checkpoint is not None:
        _check_same_data(checkpoint, files, val_files)
        settings = _with_stored_reading(settings, checkpoint)
    dtype = _run_dtype(settings, checkpoint, device, workers)
    config, preset, tokenizer = workers.share(
        lambda: _shape(
            files, settings, checkpoint, paths.folder, reporter, device=device, dtype=dtype
        ),
        to_plain=lambda shape: [shape[0].to_dict(), shape[1], shape[2].to_dict()],
        from_plain=lambda v: (GPTConfig.from_dict(v[0]), tuple(v[1]), tokenizer_from_dict(v[2])),
    )
    tokens = workers.in_turn(
        lambda: prepare_tokens(
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
        ),
        seen=lambda: _listing(paths),
    )
    reporter.say(
        f"data: {count(len(tokens.train))} tokens to train on, {count(len(tokens.val))} held out; "
        f"{_tokenizer_name(tokenizer)}"
    )

    torch.manual_seed(settings.seed)
    with _model_memory(config):
        model = _model(checkpoint, config, settings, reporter).to(device).train()
    reporter.say(
        f"model: {config.n_layer} layers x {config.n_embd} ({config.n_head} heads), block "
        f"{config.block_size}, {count(model.num_parameters())} parameters, dropout "
        f"{config.dropout:g}, {preset[1]}"
    )
    workers.share(lambda: check_space(paths, model.num_parameters()))
    recipe_for = _recipes(settings, preset[0], config, tokens, device, workers)
    trainer = Trainer(
        model=model,
        forward=model,
        optimizers=[],
        scaler=_scaler(device, dtype),
        recipe=recipe_for(settings.max_iters or 1000),
        tokens=tokens.train,
        device=device,
        dtype=dtype,
        world_size=workers.world_size,
        rank=workers.rank,
        workers=workers,
    )
    compiled = choose_compile(settings, device) and _compile(
        trainer, reporter, asked=settings.compile is True
    )
    trainer.forward = workers.data_parallel(trainer.forward, device)
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
        _resume(run, checkpoint, settings, reporter)
    else:
        _begin(run, settings, recipe_for, reporter, started)
    return run


def _resume(run: Run, checkpoint: Checkpoint, settings: TrainSettings, reporter: Reporter) -> None:
    """Put a run where its checkpoint was, and say whether it ends in the same bits."""
    trainer = run.trainer
    trainer.recipe = check_flags(checkpoint, settings, reporter, world_size=trainer.world_size)
    trainer.optimizers = make_optimizers(trainer.model, trainer.recipe, trainer.dtype)
    run.progress = restore(checkpoint, trainer)
    changed = differences(checkpoint, trainer, compiled=run.compiled)
    exact = "the same weights as an uninterrupted run, bit by bit"
    reporter.say(
        f"resuming at iteration {checkpoint.iter} of {trainer.recipe.max_iters}: "
        + (exact if not changed else f"statistically equivalent ({', '.join(changed)})")
    )


def _begin(
    run: Run,
    settings: TrainSettings,
    recipe_for: Callable[[int], Recipe],
    reporter: Reporter,
    started: float,
) -> None:
    """Lay the schedule of a new run: over the iterations asked for, or over what time is left."""
    trainer, workers = run.trainer, run.trainer.workers
    if settings.max_iters is None:
        trainer.recipe = lay_schedule(
            trainer,
            run.data,
            recipe_for,
            sample=lambda: sample_text(trainer.model, run.tokenizer, run.sample_prompt, seed=0),
            left_s=lambda: settings.time_s - (time.perf_counter() - started),
        )
        # By the clock of rank 0.
        trainer.recipe = recipe_for(workers.share(lambda: trainer.recipe.max_iters))
    trainer.optimizers = make_optimizers(trainer.model, trainer.recipe, trainer.dtype)
    trainer.scaler = _scaler(trainer.device, trainer.dtype)
    # The steps that measured drew from it; a run of as many iterations without them must be the
    # same.
    torch.manual_seed(settings.seed)
    recipe = trainer.recipe
    reporter.say(
        f"schedule: {recipe.max_iters} iterations of {trainer.tokens_per_iter} tokens, "
        f"{recipe.optimizer} at {recipe.learning_rate:g}, on {trainer.device.type} in "
        f"{str(trainer.dtype).removeprefix('torch.')}"
        + ("" if settings.max_iters else f": {duration(settings.time_s)} in all, as measured")
    )


def _run_dtype(
    settings: TrainSettings, checkpoint: Checkpoint | None, device: torch.device, workers: Workers
) -> torch.dtype:
    """The number type of a run: as asked, else that of the run resumed, else by rank 0's timing."""
    if settings.dtype != "auto":
        return choose_dtype(settings.dtype, device)
    stored = stored_dtype(checkpoint, device) if settings.resume and checkpoint else None
    name = workers.share(lambda: stored or str(choose_dtype("auto", device)).removeprefix("torch."))
    return choose_dtype(name, device)


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto": CUDA, MPS or CPU. Raises PicoEdgeError if not usable."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, there in usable.items() if there), "cpu")
    elif not usable.get(name, True):
        raise PicoEdgeError(f"device {name} is not usable here: choose --device cpu or auto")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products; "auto" is 16 bits where these are native, else float32."""
    if name == "auto" and device.type == "cpu":
        return torch.bfloat16 if has_fast_bfloat16() else torch.float32
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


@functools.cache
def has_fast_bfloat16() -> bool:
    """Whether products of bfloat16 are native on this CPU: they then take a quarter of the time.

    Timed, since torch has no name for it on every kind of CPU. Where they are emulated they take
    several times as long as float32's, so the answer is the same each time.
    """
    a, b = torch.ones(512, 512), torch.ones(512, 512)

    def fastest_s(dtype: torch.dtype) -> float:
        x, y = a.to(dtype), b.to(dtype)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            x @ y
            times.append(time.perf_counter() - begin)
        return min(times)

    return fastest_s(torch.bfloat16) < 0.7 * fastest_s(torch.float32)


def keep_freed_memory() -> None:
    """Ask the C library to keep the blocks a step frees for the next one: 5 % of a step on glibc.

    By default it gives large ones back to the system, which hands out pages of zeros anew.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def choose_compile(settings: TrainSettings, device: torch.device) -> bool:
    """Whether to run torch.compile: as asked, else on CUDA with Triton in runs long enough."""
    if settings.compile is not None:
        return settings.compile
    long_enough = settings.max_iters is not None or settings.time_s >= COMPILE_FROM_MINUTES * 60
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
        new_tokenizer = settings.reinit_embeddings
        asked = dataclasses.replace(settings, tokenizer=None) if new_tokenizer else settings
        check_shape_flags(checkpoint.config, checkpoint.tokenizer, asked)
        return checkpoint
    return None


def _check_same_data(
    checkpoint: Checkpoint, files: Sequence[Path], val_files: Sequence[Path] | None
) -> None:
    found = fingerprint(files)
    if val_files is not None:
        found["val"] = fingerprint(val_files)
    if ("val" in found) != ("val" in checkpoint.data):
        began = "with" if "val" in checkpoint.data else "without"
        raise UsageError(f"the run began {began} --val-data: a resume needs the same")
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
    for name, value in stored.items():
        asked = getattr(settings, name)
        if asked not in (value, getattr(TrainSettings, name)):
            raise UsageError(
                f"{name} is {asked}, the run to resume has {value}: leave the flag out"
            )
    return dataclasses.replace(settings, **stored)


def _shape(
    files: Sequence[Path],
    settings: TrainSettings,
    checkpoint: Checkpoint | None,
    folder: Path,
    reporter: Reporter,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[GPTConfig, tuple[str, str], Tokenizer]:
    """Shape of the model, preset of its training values (name, reason), tokenizer."""
    if checkpoint is not None:
        config = checkpoint.config
        tokenizer = checkpoint.tokenizer
        if settings.dropout is not None:
            config = dataclasses.replace(config, dropout=settings.dropout)
        if settings.reinit_embeddings:
            tokenizer, rows = _tokenizer(files, settings, folder, reporter)
            config = dataclasses.replace(config, vocab_size=rows)
        return config, (nearest_preset(config), "from the checkpoint"), tokenizer
    most = choose_preset(text_bytes(files))
    settings.model_config(settings.preset or most, vocab_size=272)  # refuses before text is read
    tokenizer, rows = _tokenizer(files, settings, folder, reporter)

    def config_of(preset: str) -> GPTConfig:
        return settings.model_config(preset, vocab_size=rows)

    if settings.has_target:
        config, said = shape_for_target(
            lambda n_layer, n_head, n_embd: dataclasses.replace(
                config_of(most), n_layer=n_layer, n_head=n_head, n_embd=n_embd
            ),
            target_bytes=settings.target_bytes,
            target_tokens_per_second=settings.target_tokens_per_second,
            n_vocab=tokenizer.n_vocab,
            bytes_per_second=measure_bytes_per_second,
        )
        return config, (nearest_preset(config), said), tokenizer
    if settings.preset is not None:
        reason = f"preset {settings.preset} as asked"
        return config_of(settings.preset), (settings.preset, reason), tokenizer
    limit = PRESET_BELOW_BYTES.get(most)
    size = choose_size(
        most,
        f"the text is {f'under {count(limit)}B' if limit is not None else 'large'}",
        seconds=settings.time_s if settings.max_iters is None else None,
        n_parameters=lambda name: config_of(name).n_parameters,
        tokens_per_second=lambda name: measure_tokens_per_second(
            config_of(name),
            settings.recipe(
                name,
                gpu=device.type != "cpu",
                max_iters=1000,
                tokens_per_epoch=1 << 30,
                block_size=config_of(name).block_size,
            ),
            device,
            dtype,
        ),
    )
    config = config_of(size.preset)
    if settings.dropout is None:
        dropout = PRESETS[most].dropout  # not that of a smaller model: the text is as long
        if size.tokens is not None:
            per_token = 1.0 if tokenizer.kind == "simple" else BPE_BYTES_PER_TOKEN
            dropout = dropout_for(size.tokens * per_token / text_bytes(files))
        config = dataclasses.replace(config, dropout=dropout)
    return config, (size.preset, f"preset {size.preset}: {size.reason}"), tokenizer


def _tokenizer(
    files: Sequence[Path], settings: TrainSettings, folder: Path, reporter: Reporter
) -> tuple[Tokenizer, int]:
    """The tokenizer for the text, and the rows of the token table."""
    kind = settings.tokenizer
    if kind is None and settings.vocab_size is not None:
        kind = "bpe"  # nothing else has a size to choose
    kind = kind or default_tokenizer(text_bytes(files))[0]
    tokenizer = choose_tokenizer(
        kind,
        files,
        vocab_size=settings.vocab_size if kind == "bpe" else None,
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
    return tokenizer, rows


def _model(
    checkpoint: Checkpoint | None, config: GPTConfig, settings: TrainSettings, reporter: Reporter
) -> GPT:
    if checkpoint is None:
        return GPT(config)
    if not settings.reinit_embeddings:
        return build_model(dataclasses.replace(checkpoint, config=config))
    model = GPT(config)
    fresh = ("transformer.wte.weight", "lm_head.weight")
    kept = {name: value for name, value in checkpoint.model.items() if name not in fresh}
    model.load_state_dict(kept, strict=False)
    reporter.say(
        f"embeddings: {config.vocab_size} fresh rows; the blocks and positions are those of "
        f"{settings.init_from}"
    )
    return model


def _listing(paths: RunPaths) -> list[list[str | int]]:
    """Names and sizes in the run folder: by them a rank knows that it sees the disk of rank 0."""
    files = sorted(path for path in paths.folder.iterdir() if path.is_file())
    return [[path.name, path.stat().st_size] for path in files]


@contextlib.contextmanager
def _model_memory(config: GPTConfig) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise PicoEdgeError(
            f"out of memory for a model of {config.n_layer} layers x {config.n_embd}, block_size "
            f"{config.block_size}, vocab_size {config.vocab_size}: choose a smaller --preset, or a "
            "smaller --n-embd or --n-layer"
        ) from error


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


def _scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def _recipes(
    settings: TrainSettings,
    preset: str,
    config: GPTConfig,
    tokens: TokenData,
    device: torch.device,
    workers: Workers,
) -> Callable[[int], Recipe]:
    """The recipe of this run for every number of iterations."""

    def recipe(max_iters: int) -> Recipe:
        return settings.recipe(
            preset,
            gpu=device.type != "cpu",
            max_iters=max_iters,
            tokens_per_epoch=len(tokens.train) // workers.world_size,  # read by one rank
            block_size=config.block_size,
        )

    return recipe
