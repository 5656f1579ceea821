"""The `pico-edge` command: parse, call one function, print.

The product goes to stdout, all else to stderr. Engines are imported inside the commands: `generate`
works without torch, and `--help` without anything. Exit codes: `main`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from pico_edge import __version__
from pico_edge.artefact import SAMPLING_DEFAULTS
from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
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

if TYPE_CHECKING:
    from pico_edge.runtime.generate import Options

DEBUG_ENV = "PICO_EDGE_DEBUG"
SEPARATOR = "---\n"  # between the texts of --num-samples
SIGPIPE = 13  # which Windows does not name

# Typer carries its own copy of click and shows only the leaf: BadParameter < click's UsageError.
ClickUsageError: Any = typer.BadParameter.__mro__[1]

# What fingers know from other tools; not shown in --help.
ALIASES = {
    "max-tokens": "max-new-tokens",
    "temp": "temperature",
    "lr": "learning-rate",
    "steps": "max-iters",
}


def _normalize(token: str) -> str:
    """--top_k is --top-k, --temp is --temperature."""
    token = token.replace("_", "-")
    return ALIASES.get(token, token)


app = typer.Typer(
    name="pico-edge",
    help="Train a small GPT on your own text, export it to one ONNX file, run it fast.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": _normalize,
    },
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Nothing on stderr but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what exists.")]


class _StoppedError(Exception):
    """A signal asked the command to end."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        self.exit_code = 128 + signum


def _print_versions(wanted: bool) -> None:
    if not wanted:
        return
    from importlib import metadata

    print(f"pico-edge {__version__}")
    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            print(f"{name} {metadata.version(name)}")
    raise typer.Exit


@app.callback()
def _pico_edge(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print versions.", is_eager=True, callback=_print_versions),
    ] = False,
) -> None:
    pass


def _chosen(text: str, metavar: str | None = "N", *flags: str) -> Any:
    """An option of train whose default is chosen from the data, the device and the time."""
    return typer.Option(*flags, help=text, metavar=metavar, show_default=False)


@app.command()
def train(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA",
            help="Files, folders, globs: text, .jsonl, also as .gz; - is standard input.",
        ),
    ],
    out: Annotated[
        str, typer.Option("-o", "--out", help="The model; its run folder comes beside it.")
    ] = TrainSettings.out,
    preset: Annotated[str | None, _chosen("Size of the model.", "|".join(PRESETS))] = None,
    tokenizer: Annotated[str | None, _chosen("Text as tokens.", "|".join(TOKENIZERS))] = None,
    vocab_size: Annotated[int | None, _chosen("Tokens of bpe; rows for the others.")] = None,
    ranks: Annotated[
        str | None, _chosen("GPT-2 ranks in tiktoken format, not downloaded.", "FILE")
    ] = None,
    target_bytes: Annotated[
        str | None, _chosen("Largest int8 file, as 800kB or 8MB: chooses the size.", "BYTES")
    ] = None,
    target_tokens_per_second: Annotated[
        float | None, _chosen("Least speed of generation, on a device like this one.", "X")
    ] = None,
    minutes: Annotated[
        float | None,
        _chosen(f"Time for all of it. Default: {DEFAULT_MINUTES:g}.", "M"),
    ] = None,
    max_iters: Annotated[int | None, _chosen("Iterations, instead of a time.")] = None,
    n_layer: Annotated[int | None, _chosen("Layers.")] = None,
    n_head: Annotated[int | None, _chosen("Attention heads; they divide n_embd.")] = None,
    n_embd: Annotated[int | None, _chosen("Width.")] = None,
    block_size: Annotated[int | None, _chosen("Context, in tokens.")] = None,
    dropout: Annotated[float | None, _chosen("From 0 to below 1.", "P")] = None,
    bias: Annotated[bool | None, _chosen("Biases, as in GPT-2.", None, "--bias/--no-bias")] = None,
    gelu: Annotated[str | None, _chosen("As in GPT-2, or exact.", "tanh|erf")] = None,
    batch_size: Annotated[int | None, _chosen("Windows of block_size tokens at once.")] = None,
    grad_accum: Annotated[int | None, _chosen("Batches to one update.")] = None,
    optimizer: Annotated[str | None, _chosen("Optimizer.", "|".join(OPTIMIZERS))] = None,
    learning_rate: Annotated[float | None, _chosen("Its peak.", "X")] = None,
    min_lr: Annotated[float | None, _chosen("Its end. Default: 0.", "X")] = None,
    warmup_iters: Annotated[int | None, _chosen("Iterations that rise to the peak.")] = None,
    weight_decay: Annotated[float | None, _chosen("Of matrices.", "X")] = None,
    beta1: Annotated[float | None, _chosen("Memory of the gradient.", "X")] = None,
    beta2: Annotated[float | None, _chosen("Memory of its square.", "X")] = None,
    grad_clip: Annotated[float | None, _chosen("Largest gradient norm, 0 = any.", "X")] = None,
    val_data: Annotated[str | None, _chosen("Text to hold out.", "FILE")] = None,
    val_fraction: Annotated[
        float, typer.Option(metavar="F", help="Or this part of the text, its tail.")
    ] = TrainSettings.val_fraction,
    eval_interval: Annotated[int | None, _chosen("Iterations between evaluations.")] = None,
    eval_iters: Annotated[int | None, _chosen("Batches of one evaluation, at most.")] = None,
    sample_prompt: Annotated[
        str | None, _chosen("Start of the samples. Default: of the held-out text.", "TEXT")
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="|".join(DEVICES), help="Where to train.")
    ] = TrainSettings.device,
    dtype: Annotated[
        str, typer.Option(metavar="|".join(DTYPES), help="Of the matrix products.")
    ] = TrainSettings.dtype,
    compile_: Annotated[
        bool | None, _chosen("Run torch.compile.", None, "--compile/--no-compile")
    ] = None,
    threads: Annotated[str, typer.Option(metavar="N|auto", help="CPU threads.")] = "auto",
    seed: Annotated[
        int, typer.Option(metavar="N", help="Of weights, batches, dropout.")
    ] = TrainSettings.seed,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run of --out, exactly.")
    ] = False,
    init_from: Annotated[str | None, _chosen("Start from this model: fine-tune.", "CKPT")] = None,
    reinit_embeddings: Annotated[
        bool,
        typer.Option(
            "--reinit-embeddings", help="With --init-from: another tokenizer, a fresh token table."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Start over what exists.")] = False,
    encoding: Annotated[
        str | None, _chosen("Of the text. Default: UTF-8, or UTF-16 by its mark.", "NAME")
    ] = None,
    text_field: Annotated[
        str, typer.Option(metavar="NAME", help="Of the objects in .jsonl.")
    ] = TrainSettings.text_field,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write event files too; needs the extra log.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a small GPT on your own text. No flag is needed; each is there to overrule a choice."""
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
        threads=_thread_count(threads),
        seed=seed,
        resume=resume,
        init_from=init_from,
        reinit_embeddings=reinit_embeddings,
        force=force,
        encoding=encoding,
        text_field=text_field,
        tensorboard=tensorboard,
    )
    _require_extra("train", "torch")
    with _Signals() as signals:
        from pico_edge.train.loop import train as run
        from pico_edge.train.report import Reporter

        signals.raise_at_once()  # until training takes over the signals, to save first
        result = run(data, settings, reporter=Reporter(quiet=quiet), started=started)
    if json_ and place().rank == 0:
        _print_json(dataclasses.asdict(result))
    if result.signal is not None:
        raise _StoppedError(result.signal)


def _byte_count(text: str) -> int:
    """A size such as 5000, 800kB or 8MB in bytes. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    if found is None:
        raise UsageError(f"target_bytes is {text!r}: expected a size such as 5000, 800kB or 8MB")
    return int(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2].lower()])


def _thread_count(text: str) -> int | None:
    """None for "auto". Raises UsageError."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"threads is {text!r}: expected a whole number of at least 1, or auto")
    return int(text)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A ckpt.pt made by train.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("model.onnx"),
    quantize: Annotated[
        bool, typer.Option("--quantize", help="int8 weights, activations and cache.")
    ] = False,
    bits: Annotated[
        int | None,
        typer.Option(metavar="8|4", help="Of the weights; implies --quantize.", show_default="8"),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="cpu|cuda|directml|web|portable",
            help="What the file is made for; portable: standard ONNX operators only.",
        ),
    ] = "cpu",
    eval_data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text for the quality table. Default: held-out text in the checkpoint.",
        ),
    ] = None,
    max_loss_increase: Annotated[
        float,
        typer.Option(
            metavar="PERCENT", help="Write no file if the held-out loss is this far above fp32's."
        ),
    ] = 1.0,
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn a checkpoint into one self-contained ONNX file, checked against PyTorch."""
    _require_extra("export", "torch", "onnx", "onnxscript", "onnx_ir")

    with _Signals() as signals:
        from pico_edge.export.pipeline import export as run
        from pico_edge.export.report import table

        def progress(line: str) -> None:
            signals.check()
            if not quiet:
                _say(line)

        report = run(
            checkpoint,
            out,
            quantize=quantize,
            bits=bits,
            target=target,
            eval_data=eval_data,
            max_loss_increase=max_loss_increase,
            force=force,
            progress=progress,
        )
    if not quiet:
        _say(table(report))
        _say(f'next: pico-edge generate {shlex.quote(str(out))} "Hello"')
    if json_:
        _print_json(report)


def _sampling(name: str, text: str, *flags: str, metavar: str | None = None) -> Any:
    """An option whose default is the model file's, which export takes from SAMPLING_DEFAULTS."""
    return typer.Option(
        *flags,
        "--" + name.replace("_", "-"),
        help=f"{text} Default: the file's, at export {SAMPLING_DEFAULTS[name]}.",
        show_default=False,
        metavar=metavar,
    )


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model.onnx made by export.")],
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="Text to continue; - or a pipe: standard input; none: start a text.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, _sampling("max_new_tokens", "Tokens to make.", "-n", metavar="N")
    ] = None,
    temperature: Annotated[
        float | None,
        _sampling("temperature", "Below 1 safer, above 1 wilder, 0 greedy.", metavar="T"),
    ] = None,
    top_k: Annotated[
        int | None, _sampling("top_k", "Draw from the K likeliest tokens, 0 = all.", metavar="K")
    ] = None,
    top_p: Annotated[
        float | None,
        _sampling("top_p", "Draw from the likeliest tokens that hold P together.", metavar="P"),
    ] = None,
    min_p: Annotated[
        float | None,
        _sampling("min_p", "Drop tokens less likely than P times the likeliest.", metavar="P"),
    ] = None,
    repetition_penalty: Annotated[
        float | None, _sampling("repetition_penalty", "Above 1: repeat less.", metavar="R")
    ] = None,
    presence_penalty: Annotated[
        float | None,
        _sampling("presence_penalty", "Off the logit of every token drawn before.", metavar="X"),
    ] = None,
    frequency_penalty: Annotated[
        float | None,
        _sampling("frequency_penalty", "The same for each time it was drawn.", metavar="X"),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text. Repeatable.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Same seed, same file: same text. Default: drawn, and reported.",
            show_default=False,
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(metavar="N", help="Texts to make, as a batch.")] = 1,
    provider: Annotated[
        Literal["auto", "cpu", "cuda", "directml"], typer.Option(help="Where to run.")
    ] = "auto",
    threads: Annotated[str, typer.Option(metavar="N|auto", help="CPU threads.")] = "auto",
    context_overflow: Annotated[
        Literal["slide", "stop"] | None,
        _sampling(
            "context_overflow", "When the context is full: go on with its newest half, or end."
        ),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print text as it is made.")
    ] = True,
    allow_special: Annotated[
        bool,
        typer.Option("--allow-special", help="<|endoftext|> in the prompt is the special token."),
    ] = False,
    allow_foreign: Annotated[
        bool, typer.Option("--allow-foreign", help="Accept a model without our metadata.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt with a model.onnx: numpy and onnxruntime, no PyTorch."""
    if num_samples < 1:
        raise UsageError(f"--num-samples is {num_samples}: expected 1 or more")
    text = _read_prompt(prompt)
    with _Signals() as signals:
        from pico_edge.runtime import Model

        loaded = Model(model, provider=provider, threads=threads, allow_foreign=allow_foreign)
        if not quiet:
            for notice in loaded.session.notices:
                _say(f"note: {notice}")
        signals.raise_at_once()
        options: Options = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "stop": stop or (),
            "seed": seed,
            "context_overflow": context_overflow,
            "allow_special": allow_special,
        }
        if num_samples > 1:
            samples = loaded.generate([text] * num_samples, **options)
            result = samples[0]
            if json_:
                _print_json({"samples": [dataclasses.asdict(sample) for sample in samples]})
            else:
                _write(SEPARATOR.join(f"{text}{sample.text}\n" for sample in samples))
        else:
            pieces = loaded.stream(text, **options)
            live = stream and not json_
            if live:
                _write(text)
            for piece in pieces:
                if live:
                    _write(piece)
            result = pieces.result
            if json_:
                _print_json(dataclasses.asdict(result))
            else:
                _write("\n" if live else f"{text}{result.text}\n")
    if not quiet:
        _say(
            f"prefill {result.prompt_tokens} tokens {1000 * result.time_to_first_token_s:.1f} ms"
            f" | decode {result.decode_tokens_per_second:.0f} tokens/s"
            f" | {result.provider}, threads {result.threads} | seed {result.seed}"
        )


def _read_prompt(prompt: str | None) -> str:
    """The argument; standard input for "-" and for a pipe; else "", the start of a text."""
    if prompt is not None and prompt != "-":
        return prompt
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        return ""
    return sys.stdin.buffer.read().decode("utf-8", "replace")


def _require_extra(extra: str, *packages: str) -> None:
    """Raise UsageError naming the extra unless its packages are installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            name = "PyTorch" if package == "torch" else package
            raise UsageError(f"{extra} needs {name}: pip install 'pico-edge[{extra}]'")


def _write(text: str) -> None:
    """The product, at once: a reader of the pipe sees each token as it is made."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError as error:  # not left to Typer, which makes it exit 1
        _forget_stdout()
        raise _StoppedError(SIGPIPE) from error


def _print_json(value: object) -> None:
    _write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Signals:
    """SIGINT and SIGTERM as an exception at a place where one does no harm.

    An exception out of a handler breaks the import of an extension module, so at first they are
    only noted, and `check` raises; once `raise_at_once` was called, they raise wherever Python is.
    A second one raises in any case. Training has handlers of its own, which save first.
    """

    def __init__(self) -> None:
        self._noted: int | None = None
        self._at_once = False

    def __enter__(self) -> _Signals:
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._at_once or self._noted is not None:
            raise _StoppedError(number)
        self._noted = number

    def check(self) -> None:
        if self._noted is not None:
            raise _StoppedError(self._noted)

    def raise_at_once(self) -> None:
        self._at_once = True
        self.check()


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    0 done; 1 failed while running; 2 wrong usage; 3 an input file refused; 4 training diverged;
    128+n stopped by signal n; 141, silently, when the reader of stdout has gone. An error is one
    line on stderr, with its traceback under --debug; what is not ours is a bug and always shows it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Text of any language goes to any pipe, also under LANG=C and on Windows.
            stream.reconfigure(encoding="utf-8", errors="replace")
    code = _run(list(sys.argv[1:] if argv is None else argv))
    if place().world_size > 1:
        # One of several processes: the usual end of an interpreter may wait for those that failed.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    arguments = arguments or ["--help"]
    debug = "--debug" in arguments or os.environ.get(DEBUG_ENV, "") not in ("", "0")
    try:
        code = app(arguments, prog_name="pico-edge", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except _StoppedError as stopped:
        return _stopped(stopped.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _stopped(128 + signal.SIGINT)
    except typer.Exit as done:
        return done.exit_code
    except ClickUsageError as error:
        command = error.ctx.command_path if error.ctx else "pico-edge"
        return _fail(f"{error.format_message()} (see {command} --help)", 2, debug)
    except PicoEdgeError as error:
        return _fail(str(error), error.exit_code, debug)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        return _fail(_os_error(error), ArtefactError.exit_code, debug)
    except OSError as error:
        _forget_stdout()
        return _fail(_os_error(error), PicoEdgeError.exit_code, debug)
    except MemoryError:
        return _fail("out of memory: use a smaller model or batch", PicoEdgeError.exit_code, debug)
    except Exception:
        if place().world_size == 1:
            raise
        traceback.print_exc()
        return 1


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    rank = place().rank
    if not message:  # another process of the run says it
        return code
    with contextlib.suppress(OSError):  # stderr may be closed too; the exit code still tells
        _say(f"error: {f'rank {rank}: ' if rank else ''}{' '.join(message.split())}")
    return code


def _stopped(code: int) -> int:
    with contextlib.suppress(OSError):
        if sys.stdout.isatty():
            sys.stdout.write("\n")
        sys.stdout.flush()
    return code


def _os_error(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename is not None else ""
    return f"{name}{error.strerror or error}"


def _forget_stdout() -> None:
    """Leave Python nothing to flush, and so nothing to complain of, at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
