"""fp32 graph -> int8 or int4: a pass over the traced graph that changes the forms of its matrices.

Three forms of a matrix, all of which treat each row of activations by itself, so that a text does
not depend on its batch or on how it was cut into calls:

- blocks: `MatMulNBits`, 8 or 4 bits with a scale per block; activations become int8 per row and
  block inside the kernel;
- rows: the same at 8 bits with one scale for all of a row of weights, so that
  `pico_edge.export.prompts` can also multiply them as integers;
- the tables: one 8-bit initializer for the embedding of tokens (`GatherBlockQuantized`) and the
  head, one for positions.

`DynamicQuantizeMatMul` would save the nodes that find a row's scale, but takes one scale for all
rows of a call, and so couples them. Norms and biases stay float32. Knows nothing of models, text or
files. Try, with `statistics` of `pico_edge.export.calibrate`:
`quantize_graph(trace(model), choose_plan(config, 8), statistics)`.

Why this and not onnxruntime's quantizers: they leave `accuracy_level` unset (at 8 bits a 40 times
slower kernel), skip `Gemm`, and store the tied table twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from pico_edge.artefact import NARROW_BELOW, POSITION_BLOCK, SCALE_BLOCK, fine_blocks
from pico_edge.config import GPTConfig
from pico_edge.export.blocks import quantize_matrix
from pico_edge.export.calibrate import Statistics
from pico_edge.export.graph import add, array, drop_unused, initializer, replace
from pico_edge.export.trace import MATRICES

FloatArray = npt.NDArray[np.floating[Any]]

# Largest first: a scale per 128 weights is the fastest kernel and costs 3 % of size at 8 bits. The
# block must divide the rows' length: DirectML requires it, and a partial block would waste the
# kernel's time elsewhere.
BLOCK_SIZES = (SCALE_BLOCK, 64, 32, 16)
# 4 = the kernel also quantizes activations, per row and block, to int8: the only fast path at 8
# bits.
ACCURACY_LEVEL = 4
# From this width on files have branches, and 8-bit matrices the rows form: 128 tokens of a prompt
# at 12 x 768 take 0.65 of the time. Narrower, a scale per row would cost quality.
ROWS_MIN_WIDTH = NARROW_BELOW
# Of matrices with one scale for a row: the longest that a kernel has, the fewest scales of
# activations.
ROW_BLOCK = 256
DEEP = 8  # layers
# A narrow model with at most this many positions keeps its cache in float32: steps at 4 x 256 and
# 6 x 384 are within 5 % up to depth 256 (and 17 % slower at 480), prompts of 128 tokens take 0.64
# to 0.76 of the time, and texts are closer to fp32's.
SHORT_CONTEXT = 256
# The held-out text may hold larger keys and values than the part that was looked at.
CACHE_MARGIN = 1.1


@dataclass(frozen=True)
class Plan:
    """What becomes of each matrix. forms: "rows", "int8" or "int4" by module name, head included.

    cache: element type of keys and values, "int8" or "float32". int4_block: at most this many
    4-bit weights share a scale. fine: the same of 8-bit ones, by module name, where not 128.
    branches: whether a call of many tokens has a form of its own. int8_positions: whether the
    position table has 8 bits, or is float32.
    """

    precision: str
    forms: dict[str, str]
    cache: str
    int4_block: int = 128
    fine: dict[str, int] = field(default_factory=dict)
    branches: bool = False
    int8_positions: bool = False

    def largest_block(self, name: str) -> int:
        """At most this many weights of a matrix share a scale."""
        if self.forms[name] == "int4":
            return self.int4_block
        return self.fine.get(name, SCALE_BLOCK)


def choose_plan(config: GPTConfig, bits: int) -> Plan:
    """The forms for a model of this shape: never of what was measured on this machine."""
    if bits not in (8, 4):
        raise ValueError(f"bits is {bits}: expected 8 or 4")
    narrow = config.n_embd < ROWS_MIN_WIDTH
    eight_bits = "int8" if narrow else "rows"
    forms = {
        f"transformer.h.{i}.{part}": eight_bits if bits == 8 else _int4_form(config, i, part)
        for i in range(config.n_layer)
        for part in MATRICES
    }
    forms["lm_head"] = "int8"
    # A quarter of the block: a sixth less divergence than half of it, for 6 % of a file that is
    # small anyway and 5 % of a step; half of it is as much better than the whole.
    cache = "float32" if narrow and config.block_size <= SHORT_CONTEXT else "int8"
    return Plan(
        f"int{bits}",
        forms,
        cache,
        int4_block=64 if narrow else 128,
        fine=fine_blocks(config) if bits == 8 else {},
        branches=not narrow,
        int8_positions=True,
    )


def _int4_form(config: GPTConfig, layer: int, part: str) -> str:
    """8 bits in the first of several layers, whose errors all others see: 4 x 256 then diverges 3
    times less.

    In a deep model its widest matrix, which gains least, stays at 4 bits: 0.182 of the fp32 size at
    12 x 768 instead of 0.185.
    """
    first_of_several = layer == 0 and config.n_layer > 1
    spared = first_of_several and (config.n_layer <= DEEP or part != "mlp.c_proj")
    return "int8" if spared else "int4"


def quantize_graph(model: ir.Model, plan: Plan, statistics: Statistics | None = None) -> None:
    """Replace every matrix of a traced graph as planned, in place.

    statistics: of the weights as they are in the graph; needed for an int8 cache, and for error
    feedback if it has moments. Raises ValueError for a graph that `trace` did not make.
    """
    graph = model.graph
    table = _head(graph).inputs[1]
    assert table is not None
    matrices = [node for node in graph if node.op_type == "MatMul"]
    embedding = next(n for n in graph if n.op_type == "Gather" and n.inputs[0] is table)
    for i, node in enumerate(matrices):
        name = f"transformer.h.{i // len(MATRICES)}.{MATRICES[i % len(MATRICES)]}"
        moments = None if statistics is None else statistics.inputs[name].moments
        weight = torch.from_numpy(np.require(array(node.inputs[1]).T, requirements="W"))
        if plan.forms[name] == "rows":
            _replace_by_rows(graph, node, weight, moments)
        else:
            bits = 8 if plan.forms[name] == "int8" else 4
            _replace_by_blocks(graph, node, weight, bits, moments, plan.largest_block(name))
    # No feedback into the table: what helps the head would hurt the embedding.
    head = torch.from_numpy(np.require(array(table), requirements="W"))
    blocks, scales = _replace_by_blocks(
        graph, _head(graph), head, 8, None, plan.largest_block("lm_head")
    )
    _replace_gather(graph, embedding, blocks, scales)
    if plan.cache == "int8":
        if statistics is None:
            raise ValueError("an int8 cache needs statistics of keys and values")
        _quantize_cache(graph, statistics)
    if plan.int8_positions:
        _quantize_positions(graph)
    drop_unused(graph)


def block_size_for(k: int) -> int:
    """Weights that share a scale in rows of k. Raises ValueError if no kernel has such a block."""
    for block_size in BLOCK_SIZES:
        if k % block_size == 0:
            return block_size
    raise ValueError(f"rows of {k} weights: expected a multiple of {BLOCK_SIZES[-1]}")


def _replace_by_blocks(
    graph: ir.Graph,
    node: ir.Node,
    weight: Tensor,
    bits: int,
    moments: Tensor | None,
    limit: int,
) -> tuple[ir.Value, ir.Value]:
    """Put a MatMulNBits in the place of a node that multiplies by weight (N, K) transposed.

    Returns its blocks, uint8 (N, K / block_size, block_size * bits / 8), low half first, code 0 at
    -2^(bits-1); and scales (N, K / block_size). Source: onnxruntime ContribOperators.md.
    """
    block_size = min(block_size_for(weight.shape[1]), limit)
    name = node.inputs[1].name if node.inputs[1] is not None else None
    codes, scales = quantize_matrix(weight, bits, block_size, moments)
    blocks = _blocks(graph, f"{name}.blocks", codes, bits, block_size)
    factors = initializer(graph, f"{name}.scales", scales.numpy())
    replace(graph, node, [_product(node.inputs[0], blocks, factors, bits)])
    return blocks, factors


def _blocks(graph: ir.Graph, name: str, codes: Tensor, bits: int, block_size: int) -> ir.Value:
    """Codes (N, K) as MatMulNBits takes them; see `_replace_by_blocks`."""
    packed = _unsigned(codes, bits).reshape(len(codes), -1, block_size)
    if bits == 4:
        packed = packed[..., 0::2] | packed[..., 1::2] << 4
    return initializer(graph, name, packed.numpy())


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    """uint8, with the code of 0 at half of the range."""
    return (codes.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)


def _product(x: ir.Value | None, blocks: ir.Value, scales: ir.Value, bits: int) -> ir.Node:
    n, groups, block_bytes = array(blocks).shape
    block_size = block_bytes * 8 // bits
    attributes = {
        "K": groups * block_size,
        "N": n,
        "bits": bits,
        "block_size": block_size,
        "accuracy_level": ACCURACY_LEVEL,
    }
    return ir.node("MatMulNBits", [x, blocks, scales], attributes, domain="com.microsoft")


def _replace_by_rows(
    graph: ir.Graph, node: ir.Node, weight: Tensor, moments: Tensor | None
) -> None:
    """Blocks with one scale for all of a row: `prompts.branch_calls` multiplies them as integers.

    The kernel wants a scale per block; onnxruntime makes them of the row's, once, when it loads.
    """
    k = weight.shape[1]
    name = node.inputs[1].name if node.inputs[1] is not None else None
    block_size = next(size for size in (ROW_BLOCK, *BLOCK_SIZES) if k % size == 0)
    codes, scales = quantize_matrix(weight, 8, None, moments)
    blocks = _blocks(graph, f"{name}.blocks", codes, 8, block_size)
    rows = initializer(graph, f"{name}.scales", scales[:, 0].numpy())
    last_axis = initializer(graph, "last_axis", np.array([-1], np.int64))
    shape = initializer(graph, f"scales.{k}", np.array([1, k // block_size], np.int64))
    nodes: list[ir.Node] = []
    factors = add(nodes, "Expand", add(nodes, "Unsqueeze", rows, last_axis), shape)
    nodes.append(_product(node.inputs[0], blocks, factors, 8))
    replace(graph, node, nodes)


def _replace_gather(graph: ir.Graph, node: ir.Node, blocks: ir.Value, scales: ir.Value) -> None:
    """Read embeddings from the head's table.

    The table keeps its 3-D form: onnxruntime would fold a Reshape of it into a second copy. The
    scales, thirty times smaller, are the ones that are reshaped.
    """
    v, groups, block_size = array(blocks).shape
    three_d = initializer(graph, f"{scales.name}.shape", np.array([v, groups, 1], dtype=np.int64))
    flat = initializer(
        graph, f"{blocks.name}.row", np.array([0, 0, groups * block_size], dtype=np.int64)
    )
    scales_3d = ir.node("Reshape", [scales, three_d])  # (V, C / block_size, 1)
    gather = ir.node(
        "GatherBlockQuantized",
        [blocks, node.inputs[1], scales_3d.outputs[0]],
        {"bits": 8, "block_size": block_size, "gather_axis": 0, "quantize_axis": 2},
        domain="com.microsoft",
    )
    rows = ir.node("Reshape", [gather.outputs[0], flat])  # (B, S, C)
    replace(graph, node, [scales_3d, gather, rows])


def _quantize_positions(graph: ir.Graph) -> None:
    """The position table in 8 bits: one node in the place of one."""
    table = graph.initializers["transformer.wpe.weight"]
    weight = torch.from_numpy(np.require(array(table), requirements="W"))
    block_size = min(block_size_for(weight.shape[1]), POSITION_BLOCK)
    codes, scales = quantize_matrix(weight, 8, block_size)
    ((gather, _),) = table.uses()
    inputs = [
        initializer(graph, f"{table.name}.blocks", _unsigned(codes, 8).numpy()),
        gather.inputs[1],
        initializer(graph, f"{table.name}.scales", scales.numpy()),
    ]
    attributes = {"bits": 8, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1}
    rows = ir.node("GatherBlockQuantized", inputs, attributes, domain="com.microsoft")
    replace(graph, gather, [rows])


def _quantize_cache(graph: ir.Graph, statistics: Statistics) -> None:
    """Keys and values as int8, a scale per channel: inputs 12, 13 of GroupQueryAttention."""
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    for i, node in enumerate(nodes):
        node.resize_inputs(14)
        largest = (statistics.keys[i], statistics.values[i])  # (C) each
        for at, part, reach in zip((12, 13), ("key", "value"), largest, strict=True):
            scales = (reach * CACHE_MARGIN / 127).clamp_min(1e-12).to(torch.float32)
            name = f"cache.{i}.{part}.scales"
            node.replace_input_with(at, initializer(graph, name, scales.numpy()))
        node.attributes["k_quant_type"] = ir.AttrString("k_quant_type", "PER_CHANNEL")
        node.attributes["v_quant_type"] = ir.AttrString("v_quant_type", "PER_CHANNEL")
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
        for value in (node.inputs[3], node.inputs[4], node.outputs[1], node.outputs[2]):
            assert value is not None
            value.type = ir.TensorType(ir.DataType.INT8)


def _head(graph: ir.Graph) -> ir.Node:
    heads = [node for node in graph if node.op_type in ("Gemm", "MatMulNBits")]
    if not heads or heads[-1].op_type != "Gemm":
        raise ValueError("the graph has no Gemm head: expected a graph made by trace()")
    return heads[-1]
