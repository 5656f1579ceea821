"""The `pico-edge` command: parse, call one function, print.

The product goes to stdout, all else to stderr. Engines are imported inside the commands: `generate`
works without torch, and `--help` without anything. Exit codes: `main`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from pico_edge import __version__
from pico_edge.commands import (
    bench,
    compare,
    doctor,
    eval,
    export,
    generate,
    info,
    train,
    verify,
)
from pico_edge.errors import ArtefactError, PicoEdgeError
from pico_edge.terminal import StoppedError, forget_stdout, say
from pico_edge.train.distributed import place

DEBUG_ENV = "PICO_EDGE_DEBUG"

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


for command in (
    train.train,
    export.export,
    generate.generate,
    bench.bench,
    compare.compare,
    verify.verify,
    info.info,
    doctor.doctor,
):
    app.command()(command)
app.command("eval")(eval.evaluate)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    0 done; 1 failed while running; 2 wrong usage; 3 an input file refused; 4 training diverged;
    128+n stopped by signal n; 141, silently, when the reader of stdout has gone. An error is one
    line on stderr, with its traceback under --debug; what is not ours is a bug and always shows it.
    """
    if sys.stderr is None:  # closed: what is said there must not go to stdout, as print would have
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
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
    except StoppedError as stopped:
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
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        return _fail(_os_error(error), ArtefactError.exit_code, debug)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return _fail(_os_error(error), ArtefactError.exit_code, debug)
        forget_stdout()
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
        say(f"error: {f'rank {rank}: ' if rank else ''}{' '.join(message.split())}")
    return code


def _stopped(code: int) -> int:
    if sys.stdout is not None:
        with contextlib.suppress(OSError):
            if sys.stdout.isatty():
                sys.stdout.write("\n")
            sys.stdout.flush()
    return code


def _os_error(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename is not None else ""
    return f"{name}{error.strerror or error}"
