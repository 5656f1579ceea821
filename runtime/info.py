"""What a model file says of itself, without loading it: onnxruntime is not even imported.

Everything is read by `preflight`; numbers measured at export are repeated, not measured again
(`verify` does that). Try: `info("model.onnx")["precision"]`.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from pico_edge import artefact
from pico_edge.config import GPTConfig
from pico_edge.errors import ArtefactError
from pico_edge.runtime.contract import ValueInfo
from pico_edge.runtime.digests import canonical
from pico_edge.runtime.preflight import ModelFile, Tensor, read_model_file
from pico_edge.tokenizer import BPETokenizer, SimpleTokenizer

# The part of the model that a weight belongs to, by what its name holds; the first that fits.
PARTS = (
    ("token table", (".wte.", "lm_head")),
    ("positions", (".wpe.",)),
    ("attention", (".attn.",)),
    ("mlp", (".mlp.",)),
    ("norms", (".ln_",)),
    ("cache scales", ("cache.",)),
)
OTHER = "other"
CACHE_ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1}


def info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """All that a file of `pico-edge export` says of itself; plain values, for JSON.

    sizes: bytes; weights by element type and by part of the model. cache: bytes per row of a full
    context. kernels: provider -> nodes without a kernel there, by the tables of `source`. parity
    and quality: as measured at export, None where the file does not say.
    Raises ArtefactError for a file that is refused.
    """
    model_file = read_model_file(path)
    config, metadata = model_file.config, model_file.metadata
    assert config is not None
    export, parity = metadata[artefact.EXPORT_KEY], metadata[artefact.PARITY_KEY]
    ngrams = metadata.get(artefact.NGRAMS_KEY)
    return {
        "file": os.fspath(path),
        "bytes": model_file.size,
        "target": export.get("target"),
        "provider": artefact.TARGET_PROVIDERS.get(str(export.get("target"))),
        "precision": export.get("precision"),
        "weights": export.get("weights"),
        "parameters": config.n_parameters,
        "config": config.to_dict(),
        "tokenizer": _tokenizer(metadata[artefact.TOKENIZER_KEY]),
        "inputs": [_value(value) for value in model_file.inputs],
        "outputs": [_value(value) for value in model_file.outputs],
        "sizes": _sizes(model_file),
        "cache": _cache(config, model_file),
        "requires": {
            "onnxruntime": export.get("min_onnxruntime"),
            "opset": model_file.opsets.get("", None),
            "opsets": model_file.opsets,
            "ir_version": model_file.ir_version,
        },
        "nodes": model_file.node_count,
        "op_types": model_file.op_types,
        "kernels": export.get("kernels"),
        "rows_are_independent": export.get("rows_are_independent"),
        "across_cpus": export.get("across_cpus"),
        "parity": {
            "max_abs_error": parity.get("max_abs_error"),
            "max_rel_error": parity.get("max_rel_error"),
            "greedy_match_tokens": parity.get("greedy_match_tokens"),
        },
        "quality": parity.get("quality"),
        "can_be_verified": "digests" in parity,
        "sampling": metadata[artefact.SAMPLING_KEY],
        "ngrams": None if ngrams is None else _ngrams(ngrams),
        "provenance": metadata[artefact.PROVENANCE_KEY],
        "format_version": metadata[artefact.FORMAT_VERSION_KEY],
        "producer": model_file.producer,
    }


def _tokenizer(values: dict[str, Any]) -> dict[str, Any]:
    """Kind and size; preflight has looked at both."""
    if values["kind"] == SimpleTokenizer.kind:
        return {"kind": SimpleTokenizer.kind, "n_vocab": SimpleTokenizer.n_vocab, "pattern": None}
    n_vocab = len(values["tokens"]) + 1  # and the end of text
    return {"kind": BPETokenizer.kind, "n_vocab": n_vocab, "pattern": values["pattern"]}


def _value(value: ValueInfo) -> dict[str, Any]:
    return {"name": value.name, "type": value.elem_type, "shape": list(value.shape)}


def _sizes(model_file: ModelFile) -> dict[str, Any]:
    by_type: Counter[str] = Counter()
    by_part: Counter[str] = Counter()
    for tensor in model_file.initializers:
        by_type[tensor.elem_type] += tensor.n_bytes
        by_part[part_of(tensor)] += tensor.n_bytes
    weights = sum(by_type.values())
    start, end = model_file.graph_span
    return {
        "file": model_file.size,
        "weights": weights,
        "nodes": end - start - weights,
        "metadata": model_file.size - (end - start),
        "weights_by_type": dict(by_type.most_common()),
        "weights_by_part": dict(by_part.most_common()),
    }


def part_of(tensor: Tensor) -> str:
    """The part of the model that an initializer belongs to: a name of PARTS, or OTHER.

    Example: "transformer.h.0.mlp.c_fc.weight.blocks" -> "mlp".
    """
    return next(
        (part for part, marks in PARTS if any(mark in tensor.name for mark in marks)), OTHER
    )


def _cache(config: GPTConfig, model_file: ModelFile) -> dict[str, Any]:
    past = artefact.past_names(1)[0]
    elem_type = next(value.elem_type for value in model_file.inputs if value.name == past)
    values = 2 * config.n_layer * config.block_size * config.n_embd
    return {"type": elem_type, "bytes_per_row": values * CACHE_ITEM_BYTES[elem_type]}


def _ngrams(values: object) -> dict[str, Any]:
    """The size only; whoever drafts from the table checks it."""
    if not isinstance(values, dict):
        raise ArtefactError("metadata ngrams is not an object: export the file again")
    orders = {name: values.get(name) for name in ("min_order", "max_order")}
    return {"bytes": len(canonical(values)), **orders}
