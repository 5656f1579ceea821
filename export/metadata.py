"""What `model.onnx` says of itself, written into its metadata_props as JSON under the keys of
`artefact`.

Knows nothing of how it is read (`pico_edge.runtime.preflight`). No clock, no path and no fact of
the build machine goes in: exporting a checkpoint twice gives the same bytes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pico_edge import __version__, artefact
from pico_edge.export.quantize import Plan
from pico_edge.export.targets import Target, precision_of, rows_are_independent
from pico_edge.train.checkpoint import Checkpoint

if TYPE_CHECKING:
    import onnx_ir as ir

# Of the int8 cache in GroupQueryAttention: 1.24.4 refuses the graph, 1.26.0 fails to run it.
MIN_ONNXRUNTIME_INT8_CACHE = "1.28"
# Targets whose files can check several drafted tokens in one call: only these get the table.
SPECULATE = ("cpu", "cuda")


def write_metadata(
    model: ir.Model,
    checkpoint: Checkpoint,
    *,
    target: Target,
    bits: int | None,
    plan: Plan | None,
    kernels: dict[str, Any],
) -> None:
    """Everything but the parity record, which is measured on the file that holds this.

    bits: of quantized weights, or None. plan: what `quantize_graph` did, or None. kernels: of
    `pico_edge.export.targets.kernel_report`.
    """
    values: dict[str, Any] = {
        artefact.FORMAT_VERSION_KEY: artefact.FORMAT_VERSION,
        artefact.CONFIG_KEY: checkpoint.config.to_dict(),
        artefact.TOKENIZER_KEY: checkpoint.tokenizer.to_dict(),
        artefact.SAMPLING_KEY: artefact.SAMPLING_DEFAULTS,
        artefact.EXPORT_KEY: {
            "target": target.name,
            "precision": precision_of(target, bits),
            "opset": model.opset_imports[""],
            "kernels": kernels,
            **_forms(model, target, bits, plan),
        },
        artefact.PROVENANCE_KEY: {
            "iter": checkpoint.iter,
            "tokens": checkpoint.tokens,
            "train_loss": checkpoint.train_loss,
            "val_loss": checkpoint.val_loss,
            "val_bits_per_byte": checkpoint.val_bits_per_byte,
            "data": checkpoint.data,
            "trained_with": checkpoint.versions,
            "exported_with": {"pico-edge": __version__},
        },
        artefact.PARITY_KEY: {},
    }
    model.metadata_props.pop(artefact.NGRAMS_KEY, None)  # of the fp32 file of the same graph
    drafts = target.name in SPECULATE and artefact.worth_drafting(checkpoint.config)
    if checkpoint.ngrams is not None and drafts:
        values[artefact.NGRAMS_KEY] = checkpoint.ngrams.to_dict()
    for key, value in values.items():
        model.metadata_props[key] = dumps(value)


def _forms(model: ir.Model, target: Target, bits: int | None, plan: Plan | None) -> dict[str, Any]:
    """How weights, activations and cache are stored, and what follows from it for the user."""
    layers: dict[str, list[str]] = {}
    for name, form in ({} if plan is None else plan.forms).items():
        layers.setdefault(form, []).append(name)
    weights = {form: _summary(names, plan) for form, names in layers.items() if plan is not None}
    if plan is None:
        floats = "float16" if target.half else "float32"
        weights = {floats if bits is None else target.weights: "all"}
    past = artefact.past_names(1)[0]
    (cache,) = (
        str(value.dtype.numpy())
        for value in model.graph.inputs
        if value.name == past and value.dtype is not None
    )
    releases = [target.min_onnxruntime]
    if cache == "int8":
        releases.append(MIN_ONNXRUNTIME_INT8_CACHE)
    return {
        "weights": weights,
        "cache": cache,
        # Where True, every activation has a scale of its own row, so a text does not depend on the
        # rows beside it; nor on the calls it came in, but that float rounding in another kernel may
        # move an activation by one of its steps.
        "rows_are_independent": rows_are_independent(target, bits is not None),
        # Measured, AVX2 against VNNI: 0.07 of logits of 10 with int8, one of three greedy texts of
        # 150 tokens parted.
        "across_cpus": (
            "equal up to float rounding"
            if bits is None
            else "equal up to a step of an activation: greedy text may part at near ties"
        ),
        # Calls of more take the other branch, whose products saturate at 16 bits on x86 without
        # VNNI: there other runtimes should make calls of at most so many, as ours does.
        "few_tokens": artefact.FEW_TOKENS if plan is not None and plan.branches else None,
        "min_onnxruntime": max(releases, key=_release),
    }


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _summary(names: list[str], plan: Plan) -> str:
    """Example: ["transformer.h.0.mlp.c_fc", "lm_head"] -> "h.0.mlp.c_fc, table"."""
    table = ["table"] if "lm_head" in names else []
    layers = [name.removeprefix("transformer.") for name in names if name != "lm_head"]
    if len(layers) == len(plan.forms) - 1:
        return ", ".join(["layers", *table])
    if len(layers) > len(plan.forms) // 2:
        return ", ".join(["other layers", *table])
    return ", ".join([*layers, *table])


def write_parity(model: ir.Model, record: dict[str, Any]) -> None:
    """Add the parity record of `pico_edge.export.verify`."""
    model.metadata_props[artefact.PARITY_KEY] = dumps(record)


def dumps(value: object) -> str:
    """Compact JSON with sorted keys; raises ValueError for NaN, which JSON does not have."""
    return json.dumps(
        value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
