"""`pico-edge eval`: loss and bits per byte of a model.onnx, or a ckpt.pt, on a text."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pico_edge.artefact import CHECKPOINT_MAGIC
from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.terminal import (
    Debug,
    Encoding,
    Json,
    Quiet,
    Signals,
    TextField,
    Threads,
    print_json,
    progress_bar,
    say,
    spin_briefly,
    write,
)

if TYPE_CHECKING:
    from pico_edge.runtime.evaluate import Scored
    from pico_edge.tokenizer import Tokenizer
    from pico_edge.train.text import Piece


def evaluate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model.onnx, or a ckpt.pt: needs PyTorch.")
    ],
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="A text that was not trained on; as train reads it."),
    ],
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="OTHER", help="A model to be compared with, such as the float32 file."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens between two windows. Default: the context, so that none overlap.",
            show_default=False,
        ),
    ] = None,
    encoding: Encoding = None,
    text_field: TextField = "text",
    threads: Threads = "auto",
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a model on a text: bits per byte, which compares across tokenizers."""
    with Signals() as signals:
        from pico_edge.runtime import evaluate as engine
        from pico_edge.runtime.threads import choose_threads
        from pico_edge.train.report import Reporter
        from pico_edge.train.text import find_files, read_documents

        signals.raise_at_once()
        reporter = Reporter(quiet=quiet)
        n_threads = choose_threads(threads)
        scored = _load(model, n_threads, quiet)
        other = None if compare is None else _load(compare, n_threads, quiet)
        if other is not None and other.tokenizer.to_dict() != scored.tokenizer.to_dict():
            raise UsageError(
                f"{model} and {compare} have different tokenizers: expected one; compare their "
                "bits per byte of two calls"
            )
        block_size = min(m.block_size for m in (scored, other) if m is not None)
        stride = block_size if stride is None else stride
        pieces = read_documents(find_files([data]), encoding=encoding, text_field=text_field)
        ids, digest = _encode(pieces, scored.tokenizer)
        if len(ids) < 2:
            raise ArtefactError(f"{data}: {len(ids)} tokens: expected 2 or more, of a longer text")
        start = time.perf_counter()

        def progress(done: int) -> None:
            elapsed_s = time.perf_counter() - start
            reporter.progress(lambda _: progress_bar(done, len(ids) - 1, elapsed_s, "tokens"))

        if other is None:
            evaluation = engine.evaluate(scored, ids, stride=stride, progress=progress)
            comparison = None
        else:
            comparison = engine.compare(scored, other, ids, stride=stride, progress=progress)
            evaluation = comparison.evaluation
        reporter.end_progress()
        seconds = time.perf_counter() - start
    if not math.isfinite(evaluation.loss):
        raise PicoEdgeError(f"{model}: its loss is {evaluation.loss}: expected a finite number")
    result: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "sha256": digest,
        "loss": evaluation.loss,
        "perplexity": math.exp(min(evaluation.loss, 700.0)),
        "bits_per_byte": evaluation.bits_per_byte,
        "tokens": evaluation.tokens,
        "bytes": evaluation.bytes,
        "block_size": block_size,
        "stride": stride,
        "seconds": seconds,
    }
    if comparison is not None:
        result |= {
            "other": str(compare),
            "other_bits_per_byte": comparison.reference.bits_per_byte,
            "loss_increase_percent": comparison.loss_increase_percent,
            "top1_agreement": comparison.top1_agreement,
            "kl_divergence": comparison.kl_divergence,
        }
    if json_:
        print_json(result)
    else:
        write(_report(result))


def _load(path: Path, threads: int, quiet: bool) -> Scored:
    """A model.onnx by onnxruntime, a checkpoint by torch: told apart by how the file begins."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would wait for its writer
        raise ArtefactError(f"{path} is a device or a pipe: expected a model.onnx or a checkpoint")
    with path.open("rb") as file:
        is_checkpoint = file.read(len(CHECKPOINT_MAGIC)) == CHECKPOINT_MAGIC
    if is_checkpoint:
        if importlib.util.find_spec("torch") is None:
            raise UsageError(
                f"{path} is a checkpoint, which needs PyTorch: pip install 'pico-edge[train]', "
                "or evaluate the model.onnx that export makes of it"
            )
        spin_briefly()
        from pico_edge.export.reference import scored_checkpoint

        return scored_checkpoint(path, threads=threads)
    from pico_edge.runtime.evaluate import scored
    from pico_edge.runtime.session import Session

    session = Session(path, threads=threads)
    if not quiet:
        for notice in session.notices:
            say(f"note: {notice}")
    return scored(session)


def _encode(pieces: Iterable[Piece], tokenizer: Tokenizer) -> tuple[list[int], str]:
    """Ids of all documents, end-of-text between two of them, and the SHA-256 of their text."""
    ids: list[int] = []
    digest = hashlib.sha256()
    between = False
    for text, end in pieces:
        if between:
            ids.append(tokenizer.eot_id)
        ids += tokenizer.encode(text)
        digest.update(text.encode())
        between = end
    return ids, digest.hexdigest()


def _report(result: dict[str, Any]) -> str:
    lines = [
        f"{result['bits_per_byte']:.4f} bits per byte: {result['model']} on {result['data']}",
        f"loss {result['loss']:.4f} nats per token, perplexity {result['perplexity']:.2f}",
        f"tokens {result['tokens']}, bytes {result['bytes']}, block_size {result['block_size']}, "
        f"stride {result['stride']}",
        f"sha256 {result['sha256']}",
    ]
    if "other" in result:
        lines += [
            f"against {result['other']}, {result['other_bits_per_byte']:.4f} bits per byte: loss "
            f"{result['loss_increase_percent']:+.3f} %",
            f"top-1 agreement {100 * result['top1_agreement']:.2f} %, KL divergence "
            f"{result['kl_divergence']:.2e} nats",
        ]
    return "\n".join(lines) + "\n"
