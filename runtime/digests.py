"""Digests of what a model file holds: one for each weight, for the rest of the graph, for metadata.

A changed low bit of one weight moves no logit past a tolerance; its digest differs. They tell
damage and editing, not a forger, who can write them anew. Knows nothing of running a model.

Try: `digests(read_model_file("model.onnx"))["weights"]`.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from typing import Any

from pico_edge import artefact
from pico_edge.runtime.preflight import ModelFile, check_unchanged

SHORT_HEX = 8  # digits of a digest that only says which part has changed, or of a short text


def digests(model_file: ModelFile) -> dict[str, Any]:
    """SHA-256 in hexadecimal of the parts of a file that was checked.

    "nodes": the graph but for its initializers, with the IR version and the opsets. "weights": all
    initializers, in graph order, names, types and shapes included. "each": SHORT_HEX digits of
    each of them, joined. "metadata": SHORT_HEX digits of the value of each key, as canonical JSON,
    but of the parity record.
    Raises ArtefactError if the file has changed since it was checked.
    """
    versions = {"ir_version": model_file.ir_version, "opsets": model_file.opsets}
    nodes, weights = hashlib.sha256(canonical(versions)), hashlib.sha256()
    each = []
    with (
        open(model_file.path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        at, end = model_file.graph_span
        for tensor in model_file.initializers:
            start, stop = tensor.span
            nodes.update(view[at:start])
            digest = hashlib.sha256(view[start:stop])
            weights.update(digest.digest())
            each.append(digest.hexdigest()[:SHORT_HEX])
            at = stop
        nodes.update(view[at:end])
    check_unchanged(model_file)
    return {
        "nodes": nodes.hexdigest(),
        "weights": weights.hexdigest(),
        "each": "".join(each),
        "metadata": {
            key.removeprefix(artefact.KEY_PREFIX): _short(canonical(value))
            for key, value in model_file.metadata.items()
            if key != artefact.PARITY_KEY
        },
    }


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:SHORT_HEX]


def canonical(value: object) -> bytes:
    """JSON with sorted keys and no spaces, in UTF-8."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")
