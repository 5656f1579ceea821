"""What each `--target` asks of the graph: topology, element type, form of the weights.

Passes over the traced graph, in place; one topology but for `portable`. Knows nothing of files,
text or sessions. Try: `adapt(trace(model), target_of("cuda"))`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pico_edge import artefact
from pico_edge.config import GPTConfig
from pico_edge.errors import PicoEdgeError, UsageError
from pico_edge.export import kernels
from pico_edge.export.calibrate import Statistics
from pico_edge.export.columns import quantize_columns
from pico_edge.export.graph import array, drop_unused, initializer, replace
from pico_edge.export.portable import trace_portable
from pico_edge.export.prompts import branch_calls
from pico_edge.export.quantize import Plan, choose_plan, quantize_graph
from pico_edge.export.trace import trace
from pico_edge.train.model import GPT

PACKED_BELOW = 512  # channels: see _pack_queries
FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Target:
    """One value of `--target`.

    provider: the table of `kernels` in which every node must be found. half: float16 activations,
    cache and weights. weights: the form of int8 ones, "plan" (what `quantize.choose_plan` says),
    "blocks" (MatMulNBits) or "columns" (dynamic quantization). min_onnxruntime: the oldest release
    that runs the file; an int8 cache needs a later one.
    """

    name: str
    provider: str
    half: bool
    weights: str
    min_onnxruntime: str

    @property
    def portable(self) -> bool:
        """Standard operators and a cache that grows."""
        return self.name == artefact.PORTABLE


# cuda: its GroupQueryAttention knows no float32. directml: float32, since float16 could not be
# tried there. web: MatMulNBits is ten times slower than float32 in WASM, dynamic quantization as
# fast. 1.24 brought GatherBlockQuantized at 8 bits, and is DirectML's last; opset 18 came with
# 1.14.
TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "cpu", half=False, weights="plan", min_onnxruntime="1.24"),
        Target("cuda", "cuda", half=True, weights="blocks", min_onnxruntime="1.24"),
        Target("directml", "directml", half=False, weights="blocks", min_onnxruntime="1.24"),
        Target("web", "wasm", half=False, weights="columns", min_onnxruntime="1.24"),
        Target(artefact.PORTABLE, "cpu", half=False, weights="columns", min_onnxruntime="1.14"),
    )
}


def target_of(name: str) -> Target:
    """Raises UsageError for an unknown name."""
    if name not in TARGETS:
        raise UsageError(f"target is {name!r}: expected {', '.join(TARGETS)}")
    return TARGETS[name]


def trace_for(model: GPT, target: Target) -> ir.Model:
    """The fp32 graph that a target's file is made from, and held to."""
    return trace_portable(model) if target.portable else trace(model)


def check_bits(target: Target, bits: int | None) -> None:
    """Raises UsageError for weights of a width that the target has no form of."""
    if bits not in (None, 8, 4):
        raise UsageError(f"bits is {bits}: expected 8 or 4")
    if bits == 4 and target.weights != "plan":
        raise UsageError(
            f"bits is 4 and target is {target.name}: 4 bits are made for target cpu only: "
            "expected 8"
        )


def precision_of(target: Target, bits: int | None) -> str:
    """The `precision` of the report: that of the weights. bits: of quantized ones, or None."""
    if bits is not None:
        return f"int{bits}"
    return "fp16" if target.half else "fp32"


def rows_are_independent(target: Target, quantize: bool) -> bool:
    """Whether a row's result depends, beyond rounding, on none of the rows beside it."""
    return not (quantize and target.weights == "columns")


def plan_for(config: GPTConfig, target: Target, bits: int | None) -> Plan | None:
    """What `quantize_for` makes of each matrix; None for floats and for columns."""
    if bits is None or target.weights == "columns":
        return None
    plan = choose_plan(config, bits)
    if target.weights == "plan":
        return plan
    return Plan(plan.precision, dict.fromkeys(plan.forms, "int8"), "float32")


def quantize_for(
    model: ir.Model, target: Target, plan: Plan | None, statistics: Statistics | None = None
) -> None:
    """Weights of 8 bits, or as planned, in the target's form, in place.

    plan: of `plan_for`. statistics: as `quantize_graph` wants them.
    """
    if plan is not None:
        quantize_graph(model, plan, statistics)
    else:
        quantize_columns(model, standard=target.portable)


def adapt(model: ir.Model, target: Target, plan: Plan | None = None) -> None:
    """The last pass, after any quantization: what the target's kernels ask for.

    plan: of the quantization. Raises PicoEdgeError for weights that float16 cannot hold.
    """
    if target.half:
        to_half(model)
        _give_gather_zero_points(model)
    if target.name == "cpu":
        _split_norms(model)
        if plan is not None and plan.branches:  # whose attention in floats scales them apart
            branch_calls(model.graph)
        else:
            _pack_queries(model)
    if target.name == "directml":
        _give_matmul_zero_points(model)
        _spell_out_gather(model)
        drop_unused(model.graph)


def _split_norms(model: ir.Model) -> None:
    """Sums and norms apart: onnxruntime's LayerNormalization is vectorized, its
    SkipLayerNormalization is not.

    That takes 2.4 us for one row of 384 channels and 250 us for 128 rows; the nodes in its place 1
    and 40. The last norm comes after the wanted rows are taken: onnxruntime would fuse it again.
    """
    graph = model.graph
    for node in [node for node in graph if node.op_type == "SkipLayerNormalization"]:
        x, delta, *affine = node.inputs[:4]
        y, _, _, total = node.outputs
        sums = []
        if len(node.inputs) == 5:
            sums.append(ir.node("Add", [delta, node.inputs[4]]))
            delta = sums[-1].outputs[0]
        sums.append(ir.node("Add", [x, delta]))
        new_total = sums[-1].outputs[0]
        new_total.type, new_total.shape = y.type, y.shape
        attributes = {"axis": -1, "epsilon": node.attributes["epsilon"].as_float()}
        if total.uses():
            norm = ir.node("LayerNormalization", [new_total, *affine], attributes)
            ir.convenience.replace_nodes_and_values(
                graph, node, [node], [*sums, norm], [y, total], [norm.outputs[0], new_total]
            )
            continue
        ir.convenience.replace_nodes_and_values(graph, node, [node], sums, [y], [new_total])
        ((reshape, _),) = new_total.uses()
        ((gather, _),) = reshape.outputs[0].uses()
        assert (reshape.op_type, gather.op_type) == ("Reshape", "Gather"), "rows, then the head"
        take = ir.node("Gather", gather.inputs, gather.attributes)
        norm = ir.node("LayerNormalization", [take.outputs[0], *affine], attributes)
        replace(graph, gather, [take, norm])


def _pack_queries(model: ir.Model) -> None:
    """Queries, keys and values of narrow models go into GroupQueryAttention as one: no Split.

    Steps of 4 x 128 take 11 % less time, of 4 x 256 5 %, of 6 x 384 4 %; of 12 x 768 0 to 3 % more.
    """
    graph = model.graph
    width = array(graph.initializers["transformer.h.0.ln_1.weight"]).size
    if width >= PACKED_BELOW:
        return
    for node in [node for node in graph if node.op_type == "GroupQueryAttention"]:
        query = node.inputs[0]
        assert query is not None
        split = query.producer()
        assert split is not None and split.op_type == "Split"
        for i, value in enumerate((split.inputs[0], None, None)):
            node.replace_input_with(i, value)
        graph.remove(split, safe=True)


def kernel_report(model: ir.Model, target: Target) -> dict[str, dict[str, object]]:
    """Nodes without a kernel on the target's provider and on the CPU, for the metadata.

    Raises PicoEdgeError if the target's provider lacks one: the file would not run as promised.
    """
    report: dict[str, dict[str, object]] = {}
    for provider in dict.fromkeys((target.provider, "cpu")):
        missing = kernels.missing_kernels(model, provider)
        report[provider] = {"missing": missing, "source": kernels.SOURCES[provider]}
        if missing and provider == target.provider:
            raise PicoEdgeError(
                f"{len(missing)} kinds of nodes have no kernel on {provider}, the first is "
                f"{missing[0]}: no file was written: please report this"
            )
    return report


def to_half(model: ir.Model) -> None:
    """float32 -> float16 throughout; logits leave the graph as float32.

    Norms and softmax still sum in float32 inside their kernels.
    """
    graph = model.graph
    half = ir.DataType.FLOAT16
    for value in list(graph.initializers.values()):
        if value.dtype != ir.DataType.FLOAT:
            continue
        contents = array(value)
        largest = float(np.abs(contents).max(initial=0.0))
        if not largest <= FLOAT16_MAX:
            raise PicoEdgeError(
                f"{value.name} holds {largest:.3g}: float16 ends at {FLOAT16_MAX:.0f}: "
                "export for another target"
            )
        value.const_value = ir.tensor(contents.astype(np.float16), name=value.name)
        value.dtype = half
    values = [*graph.inputs]
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", half)
        # The mean and deviation of a norm stay float32.
        statistics = (1, 2) if node.op_type.endswith("LayerNormalization") else ()
        values += [value for i, value in enumerate(node.outputs) if i not in statistics]
    for value in values:
        if value.dtype == ir.DataType.FLOAT:
            value.dtype = half
    (logits,) = (value for value in graph.outputs if value.name == artefact.LOGITS)
    logits.name = f"{artefact.LOGITS}.half"
    cast = ir.node("Cast", [logits], {"to": ir.DataType.FLOAT})
    result = cast.outputs[0]
    result.name, result.dtype, result.shape = artefact.LOGITS, ir.DataType.FLOAT, logits.shape
    graph.append(cast)
    graph.outputs[graph.outputs.index(logits)] = result


def _give_gather_zero_points(model: ir.Model) -> None:
    """CUDA's GatherBlockQuantized took absent zero points for 0 before it took them for 128."""
    graph = model.graph
    for node in graph:
        if node.op_type == "GatherBlockQuantized" and len(node.inputs) == 3:
            blocks = node.inputs[0]
            assert blocks is not None
            shape = (*array(blocks).shape[:-1], 1)
            name = f"{blocks.name}.zero_points"
            node.resize_inputs(4)
            node.replace_input_with(3, initializer(graph, name, _zero_points(shape, 8)))


def _give_matmul_zero_points(model: ir.Model) -> None:
    """DirectML's MatMulNBits wants them as its fourth input, all of them half the range."""
    graph = model.graph
    for node in graph:
        if node.op_type == "MatMulNBits" and len(node.inputs) == 3:
            n, k, size, bits = (
                node.attributes[name].as_int() for name in ("N", "K", "block_size", "bits")
            )
            row = -(-(k // size) * bits // 8)  # bytes
            points = initializer(
                graph, f"zero_points.{bits}.{n}.{row}", _zero_points((n, row), bits)
            )
            node.resize_inputs(4)
            node.replace_input_with(3, points)


def _zero_points(shape: tuple[int, ...], bits: int) -> np.typing.NDArray[np.uint8]:
    return np.full(shape, 0x88 if bits == 4 else 0x80, np.uint8)


def _spell_out_gather(model: ir.Model) -> None:
    """GatherBlockQuantized, which DirectML lacks, in standard operators on the same table."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "GatherBlockQuantized":
            continue
        if node.attributes["bits"].as_int() != 8:
            raise ValueError("a table of 4 bits: expected 8")
        blocks, ids, scales = node.inputs[:3]
        half_range = initializer(graph, "half_range", np.array(128.0, np.float32))
        codes = ir.node("Gather", [blocks, ids])  # (B, S, C / block_size, block_size)
        cast = ir.node("Cast", [codes.outputs[0]], {"to": ir.DataType.FLOAT})
        centred = ir.node("Sub", [cast.outputs[0], half_range])
        factor = ir.node("Gather", [scales, ids])  # (B, S, C / block_size, 1)
        result = ir.node("Mul", [centred.outputs[0], factor.outputs[0]])
        replace(graph, node, [codes, cast, centred, factor, result])
