"""`ckpt.pt` -> `model.onnx`: trace, quantize, check against torch, measure, and only then publish.

The order of the steps and their limits; each step is a module of its own.
Try: `export(Path("ckpt.pt"), Path("model.onnx"), quantize=True)`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from pico_edge.errors import ArtefactError, PicoEdgeError, UsageError
from pico_edge.export.align import align
from pico_edge.export.calibrate import Statistics, calibrate, split_ids
from pico_edge.export.metadata import write_metadata, write_parity
from pico_edge.export.quantize import Plan
from pico_edge.export.smooth import smooth
from pico_edge.export.targets import (
    Target,
    adapt,
    check_bits,
    kernel_report,
    plan_for,
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
from pico_edge.train.model import GPT
from pico_edge.train.text import read_documents

# A protobuf message, and so a model in one file, is at most this long; 16 MiB are left for the
# metadata.
MAX_FILE_BYTES = (2 << 30) - (16 << 20)
# Decode steps and prompts timed for the table that export prints: a second at the largest shapes.
SPEED_STEPS = 48
SPEED_PROMPTS = 5
SPEED_PROMPT_TOKENS = 128
# Threads of another session spin for 0.1 s after its last call, on the cores that are measured.
SETTLE_S = 0.2
# Fewer tokens than this say too little of how channels go together for error feedback.
FEEDBACK_TOKENS = 1024

Progress = Callable[[str], None]


def export(
    checkpoint_path: Path,
    out: Path,
    *,
    quantize: bool = False,
    bits: int | None = None,
    target: str = "cpu",
    eval_data: Path | None = None,
    encoding: str | None = None,
    text_field: str = "text",
    max_loss_increase: float = 1.0,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write one self-contained model file and return the report of `export --json`.

    bits: of the weights, 8 or 4, which imply quantize; 8 where only quantize is given. target: a
    name of `targets.TARGETS`; 4 bits are for "cpu". eval_data: the text to measure on, by default
    the held-out sample of the checkpoint but for its first quarter. That quarter, or the whole
    sample where there is eval_data, is what quantization calibrates on, so that no text is both.
    max_loss_increase: percent of held-out loss above fp32 at which no file is written. encoding and
    text_field say how eval_data is read. progress: is given a line as each step begins.
    Raises UsageError for arguments, ArtefactError for a refused checkpoint, PicoEdgeError when a
    parity or quality limit is missed. Nothing is written under `out` before all checks have passed.
    """
    if not max_loss_increase >= 0:  # also refuses nan
        raise UsageError(
            f"max_loss_increase is {max_loss_increase}: expected a percentage, 0 or more"
        )
    if encoding is not None and eval_data is None:
        raise UsageError(f"encoding is {encoding}, of no text: name the text with --eval-data")
    if quantize and bits is None:
        bits = 8
    made_for = target_of(target)
    check_bits(made_for, bits)
    inputs = [checkpoint_path] if eval_data is None else [checkpoint_path, eval_data]
    check_output(out, force=force, inputs=inputs)
    checkpoint = load_checkpoint(checkpoint_path)
    for name, tensor in checkpoint.model.items():
        if not tensor.isfinite().all():
            raise ArtefactError(
                f"{checkpoint_path}: {name} holds numbers that are not finite: train again, or "
                "export an earlier checkpoint"
            )
    n_bytes = sum(
        tensor.nbytes for name, tensor in checkpoint.model.items() if name != "lm_head.weight"
    )
    if n_bytes > MAX_FILE_BYTES:
        raise PicoEdgeError(
            f"{checkpoint_path}: {n_bytes / 1e9:.1f} GB of weights: one ONNX file holds at most "
            f"{MAX_FILE_BYTES / 1e9:.1f} GB: train a smaller model"
        )
    text = None
    if eval_data is not None:
        text = _read_text(eval_data, encoding=encoding, text_field=text_field)
    calibration_ids, ids = _texts(checkpoint, text, source=eval_data or checkpoint_path)
    model = build_model(checkpoint)
    checkpoint = dataclasses.replace(checkpoint, model={})  # the model has its own
    with tempfile.TemporaryDirectory(prefix="pico-edge-") as folder:
        graph, report = _checked_graph(
            checkpoint,
            model,
            calibration_ids,
            ids,
            Path(folder),
            made_for,
            bits,
            max_loss_increase,
            progress or _silent,
        )
        proto = _proto(graph)
        onnx.checker.check_model(proto, full_check=True)
        data = proto.SerializeToString()
    publish(out, lambda file: file.write(data))
    return {"file": str(out), "bytes": len(data), **report}


def _checked_graph(
    checkpoint: Checkpoint,
    model: GPT,
    calibration_ids: Sequence[int],
    ids: Sequence[int],
    folder: Path,
    target: Target,
    bits: int | None,
    max_loss_increase: float,
    say: Progress,
) -> tuple[ir.Model, dict[str, Any]]:
    """The graph that is worth publishing, with its metadata, and the figures of the report."""
    parity_ids = list(itertools.islice(itertools.cycle(ids), model.config.block_size))
    plan = plan_for(model.config, target, bits)
    graph, seen = _traced(model, target, plan, calibration_ids, say)
    calibrated = 0 if seen is None else seen.tokens
    fp32 = target if target.portable else target_of("cpu")
    reference = _session(graph, checkpoint, folder, fp32)
    say("checking the graph against PyTorch")
    parity = measure_parity(model, reference, parity_ids)
    check_parity(parity)
    path = reference.path
    del reference  # what the kernels keep beside the weights: 1 GB at 12 x 768
    precision = precision_of(target, bits)
    if bits is not None:
        say(f"quantizing to {precision}")
        quantize_for(graph, target, plan, seen)
        seen = None
    adapt(graph, target, plan)
    session = _session(graph, checkpoint, folder, target, bits, plan)
    reference = session
    if precision != "fp32":
        parity = measure_parity(model, session, parity_ids)
        reference = Session(path, provider="cpu")
    if precision == "fp16":
        check_parity(parity, relative=FP16_TOLERANCE)
    say(f"measuring the loss on {len(ids)} tokens of held-out text")
    if precision == "fp32":
        same = evaluate(session, ids)
        quality = Comparison(same, same, top1_agreement=1.0, kl_divergence=0.0)
    else:
        quality = compare(session, reference, ids)
    _check_quality(quality, max_loss_increase)
    record = parity_record(session, parity_ids, ids, parity)
    measured = _measured(quality)
    record["quality"] = measured
    write_parity(graph, record)
    say("measuring the speed")
    speed = _speed(session, parity_ids)
    fp32_speed = speed if session is reference else _speed(reference, parity_ids)
    return graph, {
        "target": session.export["target"],
        "precision": session.export["precision"],
        "parity": {
            "max_abs_error": parity.max_abs_error,
            "max_rel_error": parity.max_rel_error,
            "greedy_match_tokens": parity.greedy_match_tokens,
        },
        "quality": {**measured, "calibration_tokens": calibrated},
        "speed": {**{f"fp32_{name}": value for name, value in fp32_speed.items()}, **speed},
    }


def _traced(
    model: GPT,
    target: Target,
    plan: Plan | None,
    calibration_ids: Sequence[int],
    say: Progress,
) -> tuple[ir.Model, Statistics | None]:
    """The float32 graph; where the plan needs it with smoothed weights, and what calibration saw.

    The model stays as it is, for all else is held to it.
    """
    seen: Statistics | None = None
    if plan is not None and target.weights == "plan":
        say(f"calibrating on {len(calibration_ids)} tokens of held-out text")
        model = copy.deepcopy(model)
        feedback = len(calibration_ids) >= FEEDBACK_TOKENS
        seen = smooth(model, calibrate(model, calibration_ids, moments=feedback))
    say(f"tracing {model.num_parameters() / 1e6:.1f} M parameters")
    return trace_for(model, target), seen


def _measured(quality: Comparison) -> dict[str, float]:
    """The part of the report that is no timing; the file carries it too."""
    return {
        "fp32_bits_per_byte": quality.reference.bits_per_byte,
        "bits_per_byte": quality.evaluation.bits_per_byte,
        "loss_increase_percent": quality.loss_increase_percent,
        "top1_agreement": quality.top1_agreement,
        "kl_divergence": quality.kl_divergence,
        "tokens": quality.evaluation.tokens,
    }


def _silent(line: str) -> None:
    pass


def _texts(
    checkpoint: Checkpoint, text: str | None, *, source: Path
) -> tuple[Sequence[int], Sequence[int]]:
    """Ids to calibrate on and ids to measure on, these of the text, by default of the checkpoint's.

    Raises ArtefactError, naming the source, if these are too few.
    """
    held_out = checkpoint.tokenizer.encode(checkpoint.held_out)
    if text is None:
        calibration_ids, ids = split_ids(held_out)
    else:
        ids = checkpoint.tokenizer.encode(text)
        calibration_ids = held_out
        if len(held_out) < 2:
            calibration_ids, ids = split_ids(ids)
    if len(ids) < 2:
        raise ArtefactError(
            f"{source}: {len(ids)} tokens of held-out text: expected 2 or "
            "more: give a longer text with --eval-data"
        )
    return calibration_ids, ids


def _session(
    graph: ir.Model,
    checkpoint: Checkpoint,
    folder: Path,
    target: Target,
    bits: int | None = None,
    plan: Plan | None = None,
) -> Session:
    """A session on the graph as it stands, through a file, as every user will load it."""
    kernels = kernel_report(graph, target)
    write_metadata(graph, checkpoint, target=target, bits=bits, plan=plan, kernels=kernels)
    path = folder / f"{target.name}-{precision_of(target, bits)}.onnx"
    path.write_bytes(_proto(graph).SerializeToString())
    return Session(path, provider="cpu")


def _proto(graph: ir.Model) -> onnx.ModelProto:
    proto = ir.to_proto(graph)
    align(proto)
    return proto


def _check_quality(quality: Comparison, max_loss_increase: float) -> None:
    increase = quality.loss_increase_percent
    if not increase <= max_loss_increase:  # also refuses nan
        raise PicoEdgeError(
            f"the held-out loss rises by {increase:.2f} % "
            f"({quality.reference.bits_per_byte:.4f} -> {quality.evaluation.bits_per_byte:.4f} "
            f"bits per byte): expected at most {max_loss_increase:g} %; no file was written: "
            "export without --quantize, or accept it with --max-loss-increase"
        )


def _speed(session: Session, ids: Sequence[int]) -> dict[str, float]:
    """Tokens per second of single steps after a short prompt, and of a prompt: medians, here."""
    time.sleep(SETTLE_S)
    cache, steps, prompts = session.new_cache(), [], []
    cache.prefill([ids[: max(1, min(16, cache.capacity // 2))]])
    for token in itertools.islice(itertools.cycle(ids), SPEED_STEPS):
        if cache.lengths[0] == cache.capacity:
            cache.reset()
        start = time.perf_counter()
        cache.decode([token])
        steps.append(time.perf_counter() - start)
    prompt = ids[:SPEED_PROMPT_TOKENS]
    for _ in range(SPEED_PROMPTS):
        cache.reset()
        start = time.perf_counter()
        cache.prefill([prompt])
        prompts.append(time.perf_counter() - start)
    return {
        "decode_tokens_per_second": 1 / statistics.median(steps),
        "prefill_tokens_per_second": len(prompt) / statistics.median(prompts),
    }


def _read_text(path: Path, *, encoding: str | None, text_field: str) -> str:
    documents = read_documents([path], encoding=encoding, text_field=text_field)
    return "".join(text for text, _ in documents)
