"""fp32 graph -> int8 weights: a pass over the traced graph that changes forms, never the topology.

Every matrix becomes the weight of a `MatMulNBits`, and the token table becomes one 8-bit
initializer that serves both the embedding (`GatherBlockQuantized`) and the head. Activations,
norms, biases and the position table stay float32. Knows nothing of models, text or files. Try:
`quantize_int8(trace(model))`.

Why this and not onnxruntime's quantizers: they leave `accuracy_level` unset (at 8 bits a 40 times
slower kernel), skip `Gemm`, and store the tied table twice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

BITS = 8
ZERO_POINT = 1 << (BITS - 1)  # what MatMulNBits assumes when no zero points are given
# Largest first: a scale per 128 weights is the fastest kernel and costs 3 % of size. The block must
# divide the rows' length: DirectML requires it, and a partial block would waste the kernel's time
# elsewhere.
BLOCK_SIZES = (128, 64, 32, 16)
# 4 = the kernel also quantizes activations, per row and block, to int8: the only fast path at 8
# bits.
ACCURACY_LEVEL = 4


def quantize_int8(model: ir.Model) -> None:
    """Replace every matrix of a traced graph by 8-bit blocks with a scale each, in place.

    Raises ValueError for a graph that `pico_edge.export.trace` did not make.
    """
    graph = model.graph
    table = _head(graph).inputs[1]
    assert table is not None
    for node in list(graph):
        if node.op_type == "MatMul":
            _replace_matmul(graph, node, _matrix(node).T)
        elif node.op_type == "Gather" and node.inputs[0] is table:
            embedding = node
    blocks, scales = _replace_matmul(graph, _head(graph), _array(table))
    _replace_gather(graph, embedding, blocks, scales)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def block_size_for(k: int) -> int:
    """Weights that share a scale in rows of k. Raises ValueError if no kernel has such a block."""
    for block_size in BLOCK_SIZES:
        if k % block_size == 0:
            return block_size
    raise ValueError(f"rows of {k} weights: expected a multiple of {BLOCK_SIZES[-1]}")


def quantize_blocks(weight: FloatArray, block_size: int) -> tuple[ByteArray, FloatArray]:
    """Round a matrix to 8 bits in blocks along its rows, to nearest.

    weight: (N, K). Returns blocks (N, K / block_size, block_size) and scales (N, K / block_size)
    with weight ~ (blocks - 128) * scales. The scale has the sign that puts the block's largest
    weight at code 0, that is at -128 steps, so that all 256 codes are used. Source: onnxruntime
    ContribOperators.md, com.microsoft.MatMulNBits.
    """
    n, k = weight.shape
    grouped = weight.reshape(n, k // block_size, block_size)
    largest = np.take_along_axis(grouped, np.abs(grouped).argmax(-1)[..., None], axis=-1)
    scales = -largest / ZERO_POINT  # (N, K / block_size, 1)
    scales[scales == 0] = 1.0  # a block of zeros: any scale gives zeros back
    codes = np.rint(grouped / scales) + ZERO_POINT
    blocks = np.clip(codes, 0, 2 * ZERO_POINT - 1).astype(np.uint8)
    return blocks, scales[..., 0].astype(np.float32)


def _replace_matmul(
    graph: ir.Graph, node: ir.Node, weight: FloatArray
) -> tuple[ir.Value, ir.Value]:
    """Put a MatMulNBits in the place of a node that multiplies by weight (N, K) transposed."""
    n, k = weight.shape
    block_size = block_size_for(k)
    name = node.inputs[1].name if node.inputs[1] is not None else None
    codes, factors = quantize_blocks(np.ascontiguousarray(weight), block_size)
    blocks = _initializer(graph, f"{name}.blocks", codes)
    scales = _initializer(graph, f"{name}.scales", factors)
    attributes = {
        "K": k,
        "N": n,
        "bits": BITS,
        "block_size": block_size,
        "accuracy_level": ACCURACY_LEVEL,
    }
    quantized = ir.node(
        "MatMulNBits", [node.inputs[0], blocks, scales], attributes, domain="com.microsoft"
    )
    _replace(graph, node, [quantized])
    return blocks, scales


def _replace_gather(graph: ir.Graph, node: ir.Node, blocks: ir.Value, scales: ir.Value) -> None:
    """Read embeddings from the head's table.

    The table keeps its 3-D form: onnxruntime would fold a Reshape of it into a second copy. The
    scales, thirty times smaller, are the ones that are reshaped.
    """
    v, groups, block_size = _array(blocks).shape
    three_d = _initializer(graph, f"{scales.name}.shape", np.array([v, groups, 1], dtype=np.int64))
    flat = _initializer(
        graph, f"{blocks.name}.row", np.array([0, 0, groups * block_size], dtype=np.int64)
    )
    scales_3d = ir.node("Reshape", [scales, three_d])  # (V, C / block_size, 1)
    gather = ir.node(
        "GatherBlockQuantized",
        [blocks, node.inputs[1], scales_3d.outputs[0]],
        {"bits": BITS, "block_size": block_size, "gather_axis": 0, "quantize_axis": 2},
        domain="com.microsoft",
    )
    rows = ir.node("Reshape", [gather.outputs[0], flat])  # (B, S, C)
    _replace(graph, node, [scales_3d, gather, rows])


def _replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Swap nodes; the last new one takes over the old one's output: name, type and shape."""
    before, after = old.outputs[0], new[-1].outputs[0]
    name = before.name
    after.type, after.shape = before.type, before.shape
    ir.convenience.replace_nodes_and_values(graph, old, [old], new, [before], [after])
    after.name = name


def _head(graph: ir.Graph) -> ir.Node:
    heads = [node for node in graph if node.op_type in ("Gemm", "MatMulNBits")]
    if not heads or heads[-1].op_type != "Gemm":
        raise ValueError("the graph has no Gemm head: expected a graph made by trace()")
    return heads[-1]


def _matrix(node: ir.Node) -> FloatArray:
    weight = node.inputs[1]
    if weight is None or weight.const_value is None:
        raise ValueError(f"MatMul {node.name} has no constant weight: expected a graph of trace()")
    return _array(weight)


def _array(value: ir.Value) -> FloatArray:
    assert value.const_value is not None
    return value.const_value.numpy()


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value
