"""Replay the parity record that a model file carries, on this device: no torch, no reference file.

Export wrote into the file what this very file answered there (`pico_edge.export.verify`). Each
check here says what was expected, what was found, and how far the two may be apart. Knows nothing
of how the record was made. Try: `verify("model.onnx")["ok"]`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pico_edge import artefact
from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError, PicoEdgeError
from pico_edge.runtime.digests import SHORT_HEX, digests
from pico_edge.runtime.evaluate import evaluate
from pico_edge.runtime.preflight import ModelFile, read_model_file
from pico_edge.runtime.session import Session

EXPORT_AGAIN = "make it again with pico-edge export"
MAX_SAMPLE_TOKENS = 1 << 16  # of a record that is not ours: bounds the time of a replay
NAMED_TENSORS = 3  # changed weights that are named; the rest are counted

Check = dict[str, Any]


class Record(NamedTuple):
    """The parity record of a file, every field checked. tolerance: of a logit."""

    prompt_ids: list[int]
    greedy_ids: list[int]
    logit_ids: list[int]
    logits: list[float]
    tolerance: float
    sample_ids: list[int]
    bits_per_byte: float
    tolerance_percent: float
    digests: dict[str, Any]


def verify(
    path: str | os.PathLike[str], *, provider: str = "auto", threads: str | int = "auto"
) -> dict[str, Any]:
    """{"file", "ok", "checks", ...}: each check {"name", "expected", "found", "tolerance", "ok",
    "detail"}, detail for people.

    structure: `preflight` took the file. metadata, graph, weights: digests, so that one changed bit
    is found. logits: the largest after a prompt, each within tolerance. greedy ids: along the
    recorded ids, the likeliest token is the recorded one, or above it by less than the tolerance of
    a logit: there a step of rounding decides. bits per byte: of a sample, tolerance as a share.
    A check that the file cannot even run becomes "run".

    Raises ArtefactError for a file that is refused, that has no record or an older one, or that
    does not run though it is what export wrote; PicoEdgeError if the provider cannot run it.
    """
    model_file = read_model_file(path)
    assert model_file.config is not None
    record = read_record(model_file)
    sound = f"{model_file.node_count} nodes, {len(model_file.initializers)} tensors"
    checks = [_check("structure", "sound", "sound", None, True, sound)]
    checks += _digest_checks(model_file, record)
    unchanged = all(check["ok"] for check in checks)
    report: dict[str, Any] = {"file": os.fspath(path)}
    session = None
    try:
        session = Session(path, provider=provider, threads=threads)
        report |= {
            "provider": session.provider,
            "threads": session.threads,
            "notices": session.notices,
        }
        checks += _replay(session, record)
    except PicoEdgeError as error:
        # Of a file as exported, or of the provider, it is the caller's to hear.
        if unchanged or not (session or isinstance(error, ArtefactError)):
            raise
        reason = " ".join(str(error).split())
        checks.append(_check("run", "runs", reason, None, False, reason))
    return {**report, "ok": all(check["ok"] for check in checks), "checks": checks}


def read_record(model_file: ModelFile) -> Record:
    """The record of a file. Raises ArtefactError if it has none, an older or a damaged one."""
    config = model_file.config
    assert config is not None
    values = model_file.metadata[artefact.PARITY_KEY]
    if not values:
        raise ArtefactError(f"{model_file.path}: has no parity record: {EXPORT_AGAIN}")
    if "digests" not in values:
        raise ArtefactError(
            f"{model_file.path}: its parity record is of an older pico-edge and has no digests: "
            f"{EXPORT_AGAIN}"
        )
    try:
        logits, sample, found = values["logits"], values["sample"], values["digests"]
        record = Record(
            prompt_ids=_ids(values["prompt_ids"], config, 1, config.block_size),
            greedy_ids=_ids(values["greedy_ids"], config, 1, config.block_size),
            logit_ids=_ids(logits["ids"], config, 1, config.vocab_size),
            logits=[_number(value) for value in logits["values"]],
            tolerance=_number(logits["tolerance"]),
            sample_ids=_ids(sample["ids"], config, 2, MAX_SAMPLE_TOKENS),
            bits_per_byte=_number(sample["bits_per_byte"]),
            tolerance_percent=_number(sample["tolerance_percent"]),
            digests={
                "nodes": str(found["nodes"]),
                "weights": str(found["weights"]),
                "each": str(found["each"]),
                "metadata": {str(key): str(one) for key, one in found["metadata"].items()},
            },
        )
        if len(record.logits) != len(record.logit_ids):
            raise ValueError("logits and their ids differ in number")
        if len(record.prompt_ids) + len(record.greedy_ids) - 1 > config.block_size:
            raise ValueError("more tokens than the context holds")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ArtefactError(
            f"{model_file.path}: its parity record is damaged ({error}): {EXPORT_AGAIN}"
        ) from error
    return record


def _ids(values: Any, config: GPTConfig, least: int, most: int) -> list[int]:
    if not isinstance(values, list) or not least <= len(values) <= most:
        raise ValueError(f"expected a list of {least} to {most} ids")
    for value in values:
        if type(value) is not int or not 0 <= value < config.vocab_size:
            raise ValueError(f"expected ids of 0 to {config.vocab_size - 1}")
    return values


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("expected a number")
    return float(value)


def _check(
    name: str, expected: object, found: object, tolerance: float | None, ok: bool, detail: str
) -> Check:
    return {
        "name": name,
        "expected": expected,
        "found": found,
        "tolerance": tolerance,
        "ok": ok,
        "detail": detail,
    }


def _digest_checks(model_file: ModelFile, record: Record) -> list[Check]:
    expected, found = record.digests, digests(model_file)
    was, now = expected["metadata"], found["metadata"]
    changed = [key for key in was if now.get(key) != was[key]]
    now = {key: now.get(key) for key in was}
    metadata = f"changed: {_some(changed)}" if changed else f"{len(was)} entries as exported"
    nodes = found["nodes"] == expected["nodes"]
    graph = "every node as exported" if nodes else "nodes, names or versions are not as exported"
    same = found["weights"] == expected["weights"]
    n = len(model_file.initializers)
    weights = f"{n} tensors, every bit as exported" if same else _changed(model_file, record, found)
    return [
        _check("metadata", was, now, None, not changed, metadata),
        _check("graph", expected["nodes"], found["nodes"], None, nodes, graph),
        _check("weights", expected["weights"], found["weights"], None, same, weights),
    ]


def _changed(model_file: ModelFile, record: Record, found: dict[str, Any]) -> str:
    """Which weights are not as exported, as far as the short digests tell."""
    was, now = record.digests["each"], found["each"]
    if len(was) != len(now):
        return f"{len(now) // SHORT_HEX} tensors: expected {len(was) // SHORT_HEX}"
    names = [
        tensor.name or "one without a name"
        for tensor, at in zip(model_file.initializers, range(0, len(now), SHORT_HEX), strict=True)
        if now[at : at + SHORT_HEX] != was[at : at + SHORT_HEX]
    ]
    return f"changed: {_some(names)}" if names else "changed, one cannot tell which"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_TENSORS} more" if len(names) > NAMED_TENSORS else ""
    return ", ".join(names[:NAMED_TENSORS]) + more


def _replay(session: Session, record: Record) -> list[Check]:
    return [
        *_logit_checks(session, record),
        _loss_check(session, record),
    ]


def _logit_checks(session: Session, record: Record) -> list[Check]:
    """Of the prompt's last position, and of the greedy ids that follow it."""
    n_vocab, tolerance = session.tokenizer.n_vocab, record.tolerance
    cache = session.new_cache()
    logits = cache.prefill([record.prompt_ids])[0]
    found = [float(logits[i]) for i in record.logit_ids]
    error = _largest_difference(found, record.logits)
    greedy, widest = [], 0.0
    for i, token_id in enumerate(record.greedy_ids):
        if i:
            logits = cache.decode(record.greedy_ids[i - 1 : i])[0]
        best = int(logits[:n_vocab].argmax())
        greedy.append(best)
        # A NaN is never within a tolerance, and argmax takes the first of them.
        widest = _worse(widest, float(logits[best]) - float(logits[token_id]))
    pairs = zip(greedy, record.greedy_ids, strict=True)
    equal = sum(is_ == was for is_, was in pairs)
    count = f"{equal} of {len(greedy)} equal"
    if equal == len(greedy):
        near = ""
    elif widest < tolerance:
        near = f", the others within {widest:.2g} of the likeliest, below {tolerance:.2g}"
    else:
        near = f", one is {widest:.2g} below the likeliest, expected below {tolerance:.2g}"
    return [
        _check(
            "logits",
            record.logits,
            [_json_number(value) for value in found],
            tolerance,
            error <= tolerance,
            f"largest difference {error:.2g}, expected at most {tolerance:.2g}",
        ),
        _check(
            "greedy ids",
            record.greedy_ids,
            greedy,
            tolerance,
            widest < tolerance or (widest == 0 and equal == len(greedy)),
            count + near,
        ),
    ]


def _largest_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    difference: npt.NDArray[np.float64] = np.abs(np.subtract(found, expected))
    return float(difference.max())


def _worse(a: float, b: float) -> float:
    return b if b > a or math.isnan(b) else a


def _loss_check(session: Session, record: Record) -> Check:
    found = evaluate(session, record.sample_ids).bits_per_byte
    tolerance = abs(record.bits_per_byte) * record.tolerance_percent / 100
    return _check(
        "bits per byte",
        record.bits_per_byte,
        _json_number(found),
        tolerance,
        abs(found - record.bits_per_byte) <= tolerance,
        f"{found:.4f}, expected {record.bits_per_byte:.4f} within {record.tolerance_percent:g} %",
    )


def _json_number(value: float) -> float | None:
    """JSON has no NaN and no infinity: None."""
    return value if math.isfinite(value) else None
