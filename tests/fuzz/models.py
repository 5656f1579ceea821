"""Mutate model files, and hold preflight and onnxruntime to: refuse or run, never crash or hang.

    python tests/fuzz/models.py --count 10000 --seed 1 --keep crashes/ a.onnx b.onnx

Half of the mutants are of bytes (flips, cuts, splices), half of fields (names, attributes, shapes,
types, edges, small constants). Each goes through `Session`, and what loads runs a prompt and a
step. A mutant that ends its process by a signal or takes longer than LIMIT_S is kept; one that
gets past preflight and crashes onnxruntime asks for a rule of preflight. No test runs this: ten
thousand take minutes. POSIX only.
"""

from __future__ import annotations

import argparse
import collections
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from pico_edge.errors import ArtefactError, PicoEdgeError
from pico_edge.runtime.cache import ORT_ERRORS
from pico_edge.runtime.session import Session

LIMIT_S = 20  # of one mutant
MEMORY_BYTES = 6 << 30
MANY_TOKENS = 40  # that take the other branch, in files with branches
SMALL_BYTES = 200  # of a tensor whose contents are worth changing
# Answers that are as they should be; anything else is a bug of ours.
REFUSED, FAILED, RAN, ODD, CRASHED = "refused", "failed in onnxruntime", "ran", "odd", "crashed"
OUTCOMES = (REFUSED, FAILED, RAN, ODD, CRASHED)
NUMBERS = (0, 1, 2, -1, 3, 7, 8, 16, 255, 1 << 15, (1 << 31) - 1, -(1 << 31), 1 << 40, -(1 << 63))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=1000, help="mutants of all files together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("crashes"), help="folder for crashes")
    arguments = parser.parse_args()
    originals = [path.read_bytes() for path in arguments.models]
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mutant.onnx")
        state = mmap.mmap(-1, 8 * (1 + len(OUTCOMES)))  # the next mutant, and counts: shared

        def mutant(i: int) -> bytes:
            which = i % len(originals)
            return mutate(originals[which], random.Random(f"{arguments.seed}/{i}"))

        while (at := _get(state, 0)) < arguments.count:
            child = os.fork()
            if child == 0:
                work(mutant, path, state, arguments.count)
            _, status = os.waitpid(child, 0)
            if status == 0:
                continue
            at = _get(state, 0)
            _add(state, CRASHED)
            _put(state, 0, at + 1)
            name = arguments.models[at % len(originals)].stem
            arguments.keep.mkdir(parents=True, exist_ok=True)
            kept = arguments.keep / f"{name}-{arguments.seed}-{at}-{status}.onnx"
            kept.write_bytes(mutant(at))
            print(f"{kept}: wait status {status}", flush=True)
        counts.update({name: _get(state, 1 + i) for i, name in enumerate(OUTCOMES)})
    print(", ".join(f"{counts[name]} {name}" for name in OUTCOMES))
    return 1 if counts[CRASHED] or counts[ODD] else 0


def work(mutant: Callable[[int], bytes], path: Path, state: mmap.mmap, count: int) -> None:
    """In a child: mutants from the shared number on; ends the process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    while (i := _get(state, 0)) < count:
        path.write_bytes(mutant(i))
        signal.alarm(LIMIT_S)
        outcome = attempt(path)
        signal.alarm(0)
        if outcome not in OUTCOMES:
            print(f"mutant {i}: {outcome}", flush=True)
            outcome = ODD
        _add(state, outcome)
        _put(state, 0, i + 1)
    os._exit(0)


def attempt(path: Path) -> str:
    """Preflight, load, and run if it gets there."""
    try:
        session = Session(path, provider="cpu", threads=1)
    except ArtefactError as error:
        return FAILED if "cannot load it" in str(error) else REFUSED
    except (PicoEdgeError, MemoryError):
        return FAILED
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    try:
        cache = session.new_cache(capacity=min(MANY_TOKENS + 1, session.config.block_size))
        for tokens in (3, MANY_TOKENS):
            cache.reset()
            cache.prefill([[1] * min(tokens, cache.capacity - 1)])
            cache.decode([4])
    except (*ORT_ERRORS, RuntimeError, PicoEdgeError, MemoryError, ValueError):
        return FAILED  # RuntimeError is what a run with bound memory raises
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return RAN


def mutate(data: bytes, numbers: random.Random) -> bytes:
    return mutate_bytes(data, numbers) if numbers.random() < 0.5 else mutate_fields(data, numbers)


def mutate_bytes(data: bytes, numbers: random.Random) -> bytes:
    changed = bytearray(data)
    draw = numbers.randrange
    for _ in range(1 + draw(3)):
        # Most bytes are contents of weights, which teach nothing: look for one that is not.
        for _ in range(20):
            place = draw(len(changed))
            if changed[max(0, place - 6) : place + 6].isascii():
                break
        kind = draw(12)
        if kind < 6:
            changed[place] ^= 1 << draw(8)
        elif kind < 8:
            changed[place] = draw(256)
        elif kind < 9:
            del changed[place : place + 1 + draw(20)]
        elif kind < 11:
            source = draw(len(data))
            size = 1 + draw(60)
            changed[place : place + draw(2) * size] = data[source : source + size]
        else:
            del changed[place:]
        if not changed:
            break
    return bytes(changed)


def mutate_fields(data: bytes, numbers: random.Random) -> bytes:
    """One or two edits of a parsed model, which stays a well-formed message."""
    model = onnx.load_model_from_string(data)
    for _ in range(1 + numbers.randrange(2)):
        numbers.choice(EDITS)(model, numbers)
    return model.SerializeToString()


def all_graphs(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    """The graph, and the branches of its nodes."""
    branches = [a.g for node in model.graph.node for a in node.attribute if a.HasField("g")]
    return [model.graph, *branches]


def edit_attribute(model: onnx.ModelProto, numbers: random.Random) -> None:
    nodes = [node for graph in all_graphs(model) for node in graph.node if node.attribute]
    attribute = numbers.choice(numbers.choice(nodes).attribute)
    value = numbers.choice(NUMBERS)
    if attribute.type == onnx.AttributeProto.INT:
        attribute.i = value
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = numbers.choice((0.0, -1.0, 1e38, float("nan"), float("inf")))
    elif attribute.ints:
        attribute.ints[numbers.randrange(len(attribute.ints))] = value
    else:
        attribute.name = numbers.choice(("axis", "bits", "K", "N", "x"))


def edit_edges(model: onnx.ModelProto, numbers: random.Random) -> None:
    """Another input, an absent one, one more or one fewer, another output or operator."""
    graphs = all_graphs(model)
    graph = numbers.choice(graphs) if numbers.random() < 0.5 else model.graph
    node = numbers.choice(graph.node)
    nodes = [other for found in graphs for other in found.node]
    names = [name for other in nodes for name in (*other.input, *other.output)]
    names += [tensor.name for tensor in model.graph.initializer]
    kind = numbers.randrange(6)
    if kind == 0 and node.input:
        node.input[numbers.randrange(len(node.input))] = numbers.choice([*names, ""])
    elif kind == 1 and node.input:
        del node.input[numbers.randrange(len(node.input))]
    elif kind == 2:
        node.input.append(numbers.choice([*names, ""]))
    elif kind == 3:
        node.output[numbers.randrange(len(node.output))] = numbers.choice([*names, ""])
    elif kind == 4:
        other = numbers.choice(nodes)
        node.op_type, node.domain = other.op_type, other.domain
    else:
        graph.node.remove(node)


def edit_tensor(model: onnx.ModelProto, numbers: random.Random) -> None:
    """Shape, contents or type of a weight; contents follow the shape, so that preflight agrees."""
    tensor = numbers.choice(model.graph.initializer)
    kind = numbers.randrange(4)
    size = len(tensor.raw_data)
    if kind == 0 and size <= SMALL_BYTES and size % 8 == 0 and size:  # a shape, an axis, an index
        at = 8 * numbers.randrange(size // 8)
        value = struct.pack("<q", numbers.choice(NUMBERS))
        tensor.raw_data = tensor.raw_data[:at] + value + tensor.raw_data[at + 8 :]
    elif kind == 1 and tensor.dims:
        item = size // max(1, int(np.prod(tensor.dims)))
        tensor.dims[numbers.randrange(len(tensor.dims))] = numbers.choice((0, 1, 2, 3, 16, 64))
        wanted = item * int(np.prod(tensor.dims))
        tensor.raw_data = (tensor.raw_data * (wanted // max(1, size) + 1))[:wanted]
    elif kind == 2:
        tensor.dims[:] = (
            list(reversed(tensor.dims)) if numbers.random() < 0.5 else [*tensor.dims, 1]
        )
    else:
        alike = {1: (6, 12), 2: (3,), 3: (2,), 7: (11, 13), 10: (4, 16)}
        tensor.data_type = numbers.choice(alike.get(tensor.data_type, (1,)))


def edit_value(model: onnx.ModelProto, numbers: random.Random) -> None:
    """An axis or the type of an input or output; a name of a free axis."""
    value = numbers.choice([*model.graph.input, *model.graph.output])
    tensor = value.type.tensor_type
    if tensor.shape.dim and numbers.random() < 0.7:
        axis = numbers.choice(tensor.shape.dim)
        if axis.HasField("dim_param"):
            axis.dim_param = numbers.choice(("batch", "seq", "n_out", "kv_capacity", "y"))
        else:
            axis.dim_value = numbers.choice((1, 2, 16, 1 << 20))
    else:
        tensor.elem_type = numbers.choice((1, 3, 6, 7, 10))


def edit_versions(model: onnx.ModelProto, numbers: random.Random) -> None:
    if numbers.random() < 0.5:
        numbers.choice(model.opset_import).version = numbers.randrange(1, 29)
    else:
        model.ir_version = numbers.randrange(1, 15)


def edit_order(model: onnx.ModelProto, numbers: random.Random) -> None:
    """A node twice, or at another place."""
    node = onnx.NodeProto()
    node.CopyFrom(numbers.choice(model.graph.node))
    if numbers.random() < 0.5:
        model.graph.node.remove(node)
    model.graph.node.insert(numbers.randrange(len(model.graph.node) + 1), node)


def edit_metadata(model: onnx.ModelProto, numbers: random.Random) -> None:
    entry = numbers.choice(model.metadata_props)
    text = entry.value
    digits = [i for i, character in enumerate(text) if character.isdigit()]
    if digits:
        at = numbers.choice(digits)
        new = numbers.choice(("0", "1", "9", "99", "-1", "1e99", '"x"', "null", "[]"))
        entry.value = text[:at] + new + text[at + 1 :]


EDITS = (
    *(edit_attribute, edit_attribute, edit_edges, edit_edges, edit_tensor, edit_tensor),
    *(edit_value, edit_versions, edit_order, edit_metadata),
)


def _get(state: mmap.mmap, i: int) -> int:
    return int(struct.unpack_from("<q", state, 8 * i)[0])


def _put(state: mmap.mmap, i: int, value: int) -> None:
    struct.pack_into("<q", state, 8 * i, value)


def _add(state: mmap.mmap, outcome: str) -> None:
    i = 1 + OUTCOMES.index(outcome)
    _put(state, i, _get(state, i) + 1)


if __name__ == "__main__":
    sys.exit(main())
