"""`pico-edge export`: ckpt.pt -> model.onnx."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from pico_edge.terminal import (
    Debug,
    Encoding,
    Force,
    Json,
    Quiet,
    Signals,
    TextField,
    print_json,
    require_extra,
    say,
    spin_briefly,
)


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A ckpt.pt made by train.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("model.onnx"),
    quantize: Annotated[
        bool, typer.Option("--quantize", help="int8 weights and activations, a long cache too.")
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
    encoding: Encoding = None,
    text_field: TextField = "text",
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
    require_extra("export", "torch", "onnx", "onnxscript", "onnx_ir")
    spin_briefly()

    with Signals() as signals:
        from pico_edge.export.pipeline import export as run
        from pico_edge.export.report import table

        def progress(line: str) -> None:
            signals.check()
            if not quiet:
                say(line)

        report = run(
            checkpoint,
            out,
            quantize=quantize,
            bits=bits,
            target=target,
            eval_data=eval_data,
            encoding=encoding,
            text_field=text_field,
            max_loss_increase=max_loss_increase,
            force=force,
            progress=progress,
        )
    if not quiet:
        say(table(report))
        say(f'next: pico-edge generate {shlex.quote(str(out))} "Hello"')
    if json_:
        print_json(report)
