"""`pico-edge generate`: model.onnx and a prompt -> text."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pico_edge.artefact import SAMPLING_DEFAULTS
from pico_edge.errors import UsageError
from pico_edge.terminal import (
    Debug,
    Json,
    Provider,
    Quiet,
    Signals,
    Threads,
    print_json,
    say,
    write,
)

if TYPE_CHECKING:
    from pico_edge.runtime.generate import Options

SEPARATOR = "---\n"  # between the texts of --num-samples
MAX_ID_DIGITS = 18  # Python refuses to read thousands of them


def _sampling(name: str, text: str, *flags: str, metavar: str | None = None) -> Any:
    """An option whose default is the model file's, which export takes from SAMPLING_DEFAULTS."""
    return typer.Option(
        *flags,
        "--" + name.replace("_", "-"),
        help=f"{text} Default: the file's, at export {SAMPLING_DEFAULTS[name]}.",
        show_default=False,
        metavar=metavar,
    )


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
    typical_p: Annotated[
        float | None,
        _sampling("typical_p", "Draw from the least surprising tokens that hold P.", metavar="P"),
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
    no_repeat_ngram_size: Annotated[
        int | None,
        _sampling("no_repeat_ngram_size", "No N tokens in a row twice, 0 = off.", metavar="N"),
    ] = None,
    min_new_tokens: Annotated[
        int | None,
        _sampling("min_new_tokens", "Neither end-of-text nor a stop before so many.", metavar="N"),
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN=X",
            help="Add X to the logit of a token, by id or text. Repeatable.",
            show_default=False,
        ),
    ] = None,
    banned_tokens: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN",
            help="Never draw this token, by id or text. Repeatable.",
            show_default=False,
        ),
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
    provider: Provider = "auto",
    threads: Threads = "auto",
    context_overflow: Annotated[
        Literal["slide", "stop"] | None,
        _sampling(
            "context_overflow", "When the context is full: go on with its newest third, or end."
        ),
    ] = None,
    speculate: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(help="Check several guessed tokens in one step: auto where it pays."),
    ] = "auto",
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print text as it is made.")
    ] = True,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="In --json: log-probability of each token, and of the N likeliest.",
            show_default=False,
        ),
    ] = None,
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
    with Signals() as signals:
        from pico_edge.runtime import Model

        loaded = Model(
            model, provider=provider, threads=threads, allow_foreign=allow_foreign, lean=True
        )
        if not quiet:
            for notice in loaded.session.notices:
                say(f"note: {notice}")
        signals.raise_at_once()
        options: Options = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "typical_p": typical_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "no_repeat_ngram_size": no_repeat_ngram_size,
            "min_new_tokens": min_new_tokens,
            "logit_bias": dict(map(_bias, logit_bias or ())),
            "banned_tokens": [_token(token) for token in banned_tokens or ()],
            "stop": stop or (),
            "seed": seed,
            "logprobs": logprobs,
            "context_overflow": context_overflow,
            "allow_special": allow_special,
            "speculate": speculate,
        }
        if num_samples > 1:
            samples = loaded.generate([text] * num_samples, **options)
            result = samples[0]
            if json_:
                print_json({"samples": [sample.to_dict() for sample in samples]})
            else:
                write(SEPARATOR.join(f"{text}{sample.text}\n" for sample in samples))
        else:
            pieces = loaded.stream(text, **options)
            live = stream and not json_
            if live:
                write(text)
            for piece in pieces:
                if live:
                    write(piece)
            result = pieces.result
            if json_:
                print_json(result.to_dict())
            else:
                write("\n" if live else f"{text}{result.text}\n")
    if not quiet:
        say(
            f"prefill {result.prompt_tokens} tokens {1000 * result.time_to_first_token_s:.1f} ms"
            f" | decode {result.decode_tokens_per_second:.0f} tokens/s"
            f" | {result.provider}, threads {result.threads} | seed {result.seed}"
        )


def _token(token: str) -> int | str:
    """An id where it is a number, else the text of a token: the digit 7 itself goes by its id."""
    is_id = token.isascii() and token.isdigit() and len(token) <= MAX_ID_DIGITS
    return int(token) if is_id else token


def _bias(text: str) -> tuple[int | str, float]:
    """A token and a number. Example: "a=-1.5" -> "a", -1.5."""
    token, sign, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        sign = ""
    if not sign:
        raise UsageError(f"--logit-bias is {text!r}: expected TOKEN=NUMBER, as 10=-5 or a=2.5")
    return _token(token), value


def _read_prompt(prompt: str | None) -> str:
    """The argument; standard input for "-" and for a pipe; else "", the start of a text."""
    if prompt is not None and prompt != "-":
        try:
            prompt.encode()
        except UnicodeEncodeError:  # bytes that the locale could not read: as those of a pipe
            return os.fsencode(prompt).decode("utf-8", "replace")
        return prompt
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        return ""
    return sys.stdin.buffer.read().decode("utf-8", "replace")
