"""What `model.onnx` says of itself, written into its metadata_props as JSON under the keys of
`artefact`.

Knows nothing of how it is read (`pico_edge.runtime.preflight`). No clock, no path and no fact of
the build machine goes in: exporting a checkpoint twice gives the same bytes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pico_edge import __version__, artefact
from pico_edge.train.checkpoint import Checkpoint

if TYPE_CHECKING:
    import onnx_ir as ir


def write_metadata(
    model: ir.Model,
    checkpoint: Checkpoint,
    *,
    target: str,
    precision: str,
    min_onnxruntime: str,
    kernels: dict[str, Any],
    couples_rows: bool,
) -> None:
    """Everything but the parity record, which is measured on the file that holds this.

    kernels, couples_rows: of `pico_edge.export.targets`.
    """
    values: dict[str, Any] = {
        artefact.FORMAT_VERSION_KEY: artefact.FORMAT_VERSION,
        artefact.CONFIG_KEY: checkpoint.config.to_dict(),
        artefact.TOKENIZER_KEY: checkpoint.tokenizer.to_dict(),
        artefact.SAMPLING_KEY: artefact.SAMPLING_DEFAULTS,
        artefact.EXPORT_KEY: {
            "target": target,
            "precision": precision,
            "opset": model.opset_imports[""],
            "min_onnxruntime": min_onnxruntime,
            "kernels": kernels,
            "couples_rows": couples_rows,
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
    for key, value in values.items():
        model.metadata_props[key] = dumps(value)


def write_parity(model: ir.Model, record: dict[str, Any]) -> None:
    """Add the parity record of `pico_edge.export.verify`."""
    model.metadata_props[artefact.PARITY_KEY] = dumps(record)


def dumps(value: object) -> str:
    """Compact JSON with sorted keys; raises ValueError for NaN, which JSON does not have."""
    return json.dumps(
        value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
