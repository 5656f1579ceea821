"""Digests of what a model file holds: one for each weight, for the rest of the graph, for metadata.

A changed low bit of one weight moves no logit past a tolerance; its digest differs. They tell
damage and editing, not a forger, who can write them anew. Knows nothing of running a model.

Try: `digests(read_model_file("model.onnx"))["nodes"]`.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from typing import Any

from pico_edge import artefact
from pico_edge.runtime.preflight import ModelFile, check_unchanged

SHORT_HEX = 16  # of a digest that there are many of: 64 bits


def digests(model_file: ModelFile) -> dict[str, Any]:
    """SHA-256 in hexadecimal of the parts of a file that was checked.

    "nodes": the graph but for its initializers, with the IR version and the opsets. "tensors": of
    each initializer, in graph order, name, type and shape included; SHORT_HEX digits. "metadata":
    of the value of each key but the parity record's, as canonical JSON; SHORT_HEX digits.
    Raises ArtefactError if the file has changed since it was checked.
    """
    versions = {"ir_version": model_file.ir_version, "opsets": model_file.opsets}
    nodes = hashlib.sha256(canonical(versions))
    tensors = []
    with (
        open(model_file.path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        at, end = model_file.graph_span
        for tensor in model_file.initializers:
            start, stop = tensor.span
            nodes.update(view[at:start])
            tensors.append(hashlib.sha256(view[start:stop]).hexdigest()[:SHORT_HEX])
            at = stop
        nodes.update(view[at:end])
    check_unchanged(model_file)
    return {
        "nodes": nodes.hexdigest(),
        "tensors": tensors,
        "metadata": {
            key: hashlib.sha256(canonical(value)).hexdigest()[:SHORT_HEX]
            for key, value in model_file.metadata.items()
            if key != artefact.PARITY_KEY
        },
    }


def canonical(value: object) -> bytes:
    """JSON with sorted keys and no spaces, in UTF-8."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")
