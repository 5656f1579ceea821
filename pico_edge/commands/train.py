"""`pico-edge train`: text -> ckpt.pt."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Annotated, Any

import typer

from pico_edge.errors import UsageError
from pico_edge.runtime.threads import fixed_threads
from pico_edge.terminal import (
    Debug,
    Json,
    Quiet,
    Signals,
    StoppedError,
    Threads,
    print_json,
    require_extra,
    spin_briefly,
)
from pico_edge.train.distributed import place
from pico_edge.train.settings import (
    DEFAULT_MINUTES,
    DEVICES,
    DTYPES,
    OPTIMIZERS,
    PRESETS,
    TOKENIZERS,
    TrainSettings,
)


def _chosen(text: str, metavar: str | None = "N", *flags: str) -> Any:
    """An option of train whose default is chosen from the data, the device and the time."""
    return typer.Option(*flags, help=text, metavar=metavar, show_default=False)


def train(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA",
            help="Files, folders, globs: text, .jsonl, also as .gz; - is standard input.",
        ),
    ],
    out: Annotated[
        str, typer.Option("-o", "--out", help="Where the model goes; its run folder is beside it.")
    ] = TrainSettings.out,
    preset: Annotated[str | None, _chosen("Size of the model.", "|".join(PRESETS))] = None,
    tokenizer: Annotated[
        str | None, _chosen("How text becomes tokens: bytes, or a BPE.", "|".join(TOKENIZERS))
    ] = None,
    vocab_size: Annotated[
        int | None, _chosen("Vocabulary of --tokenizer bpe; else rows of the token table.")
    ] = None,
    ranks: Annotated[
        str | None, _chosen("GPT-2 ranks in tiktoken format, instead of downloading them.", "FILE")
    ] = None,
    target_bytes: Annotated[
        str | None,
        _chosen("Choose the size so that the int8 file is at most this, as 8MB.", "BYTES"),
    ] = None,
    target_tokens_per_second: Annotated[
        float | None, _chosen("Choose the size so that generation is at least this fast here.", "X")
    ] = None,
    minutes: Annotated[
        float | None,
        _chosen(f"Time for the whole run. Default: {DEFAULT_MINUTES:g}.", "M"),
    ] = None,
    max_iters: Annotated[int | None, _chosen("Train for N iterations instead of a time.")] = None,
    n_layer: Annotated[int | None, _chosen("Number of layers.")] = None,
    n_head: Annotated[int | None, _chosen("Attention heads per layer; must divide n_embd.")] = None,
    n_embd: Annotated[int | None, _chosen("Width: channels of the residual stream.")] = None,
    block_size: Annotated[int | None, _chosen("Context length, in tokens.")] = None,
    dropout: Annotated[float | None, _chosen("Dropout probability.", "P")] = None,
    bias: Annotated[
        bool | None,
        _chosen("Biases in linear layers and norms, as in GPT-2.", None, "--bias/--no-bias"),
    ] = None,
    gelu: Annotated[
        str | None, _chosen("GELU form: tanh as in GPT-2, or the exact erf.", "tanh|erf")
    ] = None,
    batch_size: Annotated[
        int | None, _chosen("Sequences of block_size tokens per micro-batch.")
    ] = None,
    grad_accum: Annotated[int | None, _chosen("Micro-batches per update.")] = None,
    optimizer: Annotated[
        str | None,
        _chosen("Muon for matrices and AdamW for the rest, or AdamW.", "|".join(OPTIMIZERS)),
    ] = None,
    learning_rate: Annotated[float | None, _chosen("Peak learning rate.", "X")] = None,
    min_lr: Annotated[float | None, _chosen("Learning rate at the end. Default: 0.", "X")] = None,
    warmup_iters: Annotated[int | None, _chosen("Iterations of warm-up to the peak.")] = None,
    weight_decay: Annotated[float | None, _chosen("Weight decay of the matrices.", "X")] = None,
    beta1: Annotated[float | None, _chosen("AdamW beta1.", "X")] = None,
    beta2: Annotated[float | None, _chosen("AdamW beta2.", "X")] = None,
    grad_clip: Annotated[
        float | None, _chosen("Clip the gradient norm to this, 0 = off.", "X")
    ] = None,
    val_data: Annotated[str | None, _chosen("Validate on this text.", "FILE")] = None,
    val_fraction: Annotated[
        float, typer.Option(metavar="F", help="Else hold out this fraction, the end of the text.")
    ] = TrainSettings.val_fraction,
    eval_interval: Annotated[int | None, _chosen("Iterations between evaluations.")] = None,
    eval_iters: Annotated[int | None, _chosen("Batches per evaluation, at most.")] = None,
    sample_prompt: Annotated[
        str | None,
        _chosen("Prompt of the samples. Default: the start of the held-out text.", "TEXT"),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="|".join(DEVICES), help="Where to train.")
    ] = TrainSettings.device,
    dtype: Annotated[
        str, typer.Option(metavar="|".join(DTYPES), help="Number type of matrix products.")
    ] = TrainSettings.dtype,
    compile_: Annotated[
        bool | None, _chosen("Use torch.compile.", None, "--compile/--no-compile")
    ] = None,
    threads: Threads = "auto",
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of weights, batches and dropout.")
    ] = TrainSettings.seed,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the interrupted run of --out.")
    ] = False,
    init_from: Annotated[str | None, _chosen("Fine-tune this checkpoint.", "CKPT")] = None,
    reinit_embeddings: Annotated[
        bool,
        typer.Option(
            "--reinit-embeddings",
            help="With --init-from: take another tokenizer and a new token table.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start over, replacing --out and its run folder.")
    ] = False,
    encoding: Annotated[
        str | None, _chosen("Encoding of the text. Default: UTF-8, or UTF-16 by its BOM.", "NAME")
    ] = None,
    text_field: Annotated[
        str, typer.Option(metavar="NAME", help="Key of the text in .jsonl objects.")
    ] = TrainSettings.text_field,
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", help="Write TensorBoard event files; needs pico-edge[log]."),
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a small GPT on your own text. No flag is needed: each overrides an automatic choice."""
    started = time.perf_counter()
    settings = TrainSettings(
        out=out,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        ranks=ranks,
        preset=preset,
        target_bytes=None if target_bytes is None else _byte_count(target_bytes),
        target_tokens_per_second=target_tokens_per_second,
        minutes=minutes,
        max_iters=max_iters,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        block_size=block_size,
        dropout=dropout,
        bias=bias,
        gelu=gelu,
        batch_size=batch_size,
        grad_accum=grad_accum,
        optimizer=optimizer,
        learning_rate=learning_rate,
        min_lr=min_lr,
        warmup_iters=warmup_iters,
        weight_decay=weight_decay,
        beta1=beta1,
        beta2=beta2,
        grad_clip=grad_clip,
        val_data=val_data,
        val_fraction=val_fraction,
        eval_interval=eval_interval,
        eval_iters=eval_iters,
        sample_prompt=sample_prompt,
        device=device,
        dtype=dtype,
        compile=compile_,
        threads=fixed_threads(threads),
        seed=seed,
        resume=resume,
        init_from=init_from,
        reinit_embeddings=reinit_embeddings,
        force=force,
        encoding=encoding,
        text_field=text_field,
        tensorboard=tensorboard,
    )
    require_extra("train", "torch", "tokenizers")
    spin_briefly()
    with Signals() as signals:
        from pico_edge.train.loop import train as run
        from pico_edge.train.report import Reporter

        signals.raise_at_once()  # until training takes over the signals, to save first
        result = run(data, settings, reporter=Reporter(quiet=quiet), started=started)
    if json_ and place().rank == 0:
        print_json(dataclasses.asdict(result))
    if result.signal is not None:
        raise StoppedError(result.signal)


def _byte_count(text: str) -> int:
    """A size such as 5000, 800kB or 8MB in bytes. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    if found is None:
        raise UsageError(f"target_bytes is {text!r}: expected a size such as 5000, 800kB or 8MB")
    n_bytes = float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2].lower()]
    if not n_bytes < 1 << 63:
        raise UsageError(f"target_bytes is {text[:40]}...: expected a size such as 800kB or 8MB")
    return int(n_bytes)
