"""`ckpt.pt` -> `model.onnx`: trace, quantize, check against torch, measure, and only then publish.

The order of the steps and their limits; each step is a module of its own.
Try: `export(Path("ckpt.pt"), Path("model.onnx"), quantize=True)`.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.export.metadata import write_metadata, write_parity
from pico_edge.export.targets import (
    Target,
    adapt,
    couples_rows,
    kernel_report,
    precision_of,
    quantize_for,
    target_of,
    trace_for,
)
from pico_edge.export.verify import (
    FP16_TOLERANCE,
    check_parity,
    measure_parity,
    parity_record,
)
from pico_edge.publish import check_output, publish
from pico_edge.runtime.evaluate import Comparison, compare, evaluate
from pico_edge.runtime.session import Session
from pico_edge.train.checkpoint import Checkpoint, build_model, load_checkpoint
from pico_edge.train.data import read_documents

# A protobuf message, and so a model in one file, is at most this long; 16 MiB are left for the
# metadata.
MAX_FILE_BYTES = (2 << 30) - (16 << 20)
# Decode steps timed for the table that export prints: about a second at the largest shapes.
SPEED_STEPS = 48

Progress = Callable[[str], None]


def export(
    checkpoint_path: Path,
    out: Path,
    *,
    quantize: bool = False,
    target: str = "cpu",
    eval_data: Path | None = None,
    max_loss_increase: float = 1.0,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write one self-contained model file and return the report of `cli.md`.

    target: a name of `targets.TARGETS`. max_loss_increase: percent of held-out loss above fp32 at
    which no file is written. progress: is given a line as each step begins.
    Raises UsageError for arguments, ArtefactError for a refused checkpoint, PicoEdgeError when a
    parity or quality limit is missed. Nothing is written under `out` before all checks have passed.
    """
    if not max_loss_increase >= 0:  # also refuses nan
        raise UsageError(
            f"max_loss_increase is {max_loss_increase}: expected a percentage, 0 or more"
        )
    made_for = target_of(target)
    check_output(out, force=force)
    checkpoint = load_checkpoint(checkpoint_path)
    n_bytes = sum(
        tensor.nbytes for name, tensor in checkpoint.model.items() if name != "lm_head.weight"
    )
    if n_bytes > MAX_FILE_BYTES:
        raise PicoEdgeError(
            f"{checkpoint_path}: {n_bytes / 1e9:.1f} GB of weights: one ONNX file holds at most "
            f"{MAX_FILE_BYTES / 1e9:.1f} GB: train a smaller model"
        )
    text = checkpoint.held_out if eval_data is None else _read_text(eval_data)
    ids = checkpoint.tokenizer.encode(text)
    if len(ids) < 2:
        raise ArtefactError(
            f"{eval_data or checkpoint_path}: {len(ids)} tokens of held-out text: expected 2 or "
            "more: give a longer text with --eval-data"
        )
    with tempfile.TemporaryDirectory(prefix="pico-edge-") as folder:
        graph, report = _checked_graph(
            checkpoint,
            ids,
            Path(folder),
            made_for,
            quantize,
            max_loss_increase,
            progress or _silent,
        )
        proto = ir.to_proto(graph)
        onnx.checker.check_model(proto, full_check=True)
        data = proto.SerializeToString()
    publish(out, lambda file: file.write(data))
    return {"file": str(out), "bytes": len(data), **report}


def _checked_graph(
    checkpoint: Checkpoint,
    ids: list[int],
    folder: Path,
    target: Target,
    quantize: bool,
    max_loss_increase: float,
    say: Progress,
) -> tuple[ir.Model, dict[str, Any]]:
    """The graph that is worth publishing, with its metadata, and the figures of the report."""
    model = build_model(checkpoint)
    parity_ids = list(itertools.islice(itertools.cycle(ids), model.config.block_size))
    say(f"tracing {model.num_parameters() / 1e6:.1f} M parameters")
    graph = trace_for(model, target)
    fp32 = target_of(target.name if target.portable else "cpu")
    reference = _session(graph, checkpoint, folder, fp32, "fp32")
    say("checking the graph against PyTorch")
    parity = measure_parity(model, reference, parity_ids)
    check_parity(parity)
    precision = precision_of(target, quantize)
    if quantize:
        say("quantizing to int8")
        quantize_for(graph, target)
    adapt(graph, target)
    kernels = kernel_report(graph, target)
    coupled = couples_rows(target, quantize)
    session = _session(graph, checkpoint, folder, target, precision, kernels, coupled)
    if precision != "fp32":
        parity = measure_parity(model, session, parity_ids)
    if precision == "fp16":
        check_parity(parity, relative=FP16_TOLERANCE)
    say(f"measuring the loss on {len(ids)} tokens of held-out text")
    if precision == "fp32":
        same = evaluate(reference, ids)
        quality = Comparison(same, same, top1_agreement=1.0, kl_divergence=0.0)
    else:
        quality = compare(session, reference, ids)
    _check_quality(quality, max_loss_increase)
    record = parity_record(session, parity_ids, parity)
    record["bits_per_byte"] = quality.evaluation.bits_per_byte
    write_parity(graph, record)
    say("measuring the speed")
    speed = _decode_speed(session, parity_ids)
    return graph, {
        "target": session.export["target"],
        "precision": session.export["precision"],
        "parity": {
            "max_abs_error": parity.max_abs_error,
            "max_rel_error": parity.max_rel_error,
            "greedy_match_tokens": parity.greedy_match_tokens,
        },
        "quality": {
            "fp32_bits_per_byte": quality.reference.bits_per_byte,
            "bits_per_byte": quality.evaluation.bits_per_byte,
            "loss_increase_percent": quality.loss_increase_percent,
            "top1_agreement": quality.top1_agreement,
            "kl_divergence": quality.kl_divergence,
        },
        "speed": {
            "fp32_decode_tokens_per_second": _decode_speed(reference, parity_ids)
            if precision != "fp32"
            else speed,
            "decode_tokens_per_second": speed,
        },
    }


def _silent(line: str) -> None:
    pass


def _session(
    graph: ir.Model,
    checkpoint: Checkpoint,
    folder: Path,
    target: Target,
    precision: str,
    kernels: dict[str, Any] | None = None,
    coupled: bool = False,
) -> Session:
    """A session on the graph as it stands, through a file, as every user will load it."""
    write_metadata(
        graph,
        checkpoint,
        target=target.name,
        precision=precision,
        min_onnxruntime=target.min_onnxruntime,
        kernels=kernels or {},
        couples_rows=coupled,
    )
    path = folder / f"{target.name}-{precision}.onnx"
    ir.save(graph, path)
    return Session(path, provider="cpu")


def _check_quality(quality: Comparison, max_loss_increase: float) -> None:
    increase = quality.loss_increase_percent
    if not increase <= max_loss_increase:  # also refuses nan
        raise PicoEdgeError(
            f"the held-out loss rises by {increase:.2f} % "
            f"({quality.reference.bits_per_byte:.4f} -> {quality.evaluation.bits_per_byte:.4f} "
            f"bits per byte): expected at most {max_loss_increase:g} %; no file was written: "
            "export without --quantize, or accept it with --max-loss-increase"
        )


def _decode_speed(session: Session, ids: list[int]) -> float:
    """Tokens per second of single steps after a short prompt, here and now: the median."""
    cache, times = session.new_cache(), []
    cache.prefill([ids[: max(1, min(16, cache.capacity // 2))]])
    for token in itertools.islice(itertools.cycle(ids), SPEED_STEPS):
        if cache.lengths[0] == cache.capacity:
            cache.reset()
        start = time.perf_counter()
        cache.decode([token])
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times)


def _read_text(path: Path) -> str:
    text = "".join(piece for piece, _ in read_documents([path]))
    return text
