"""Which nodes of a graph have a kernel on an execution provider: facts copied from releases.

For providers without a device at hand this is the proof that a file runs there: op by op and type
by type. The tables hold the operators that pico-edge emits, at opset 18 to 20, and of their types
those it uses. Knows nothing of models or targets. Try: `missing_kernels(trace(model), "cuda")`.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

# Where each table was read. cpu and cuda: the kernels that the released build registers, as its own
# `onnxruntime.capi.onnxruntime_pybind11_state.get_all_opkernel_def()` lists them. wasm: the CPU
# kernels, built for browsers. directml: docs/OperatorKernels.md of microsoft/onnxruntime at commit
# 001d12d2 (2026); the limits from DmlOperatorMatMulNBits.cpp and DmlOperatorGroupQueryAttention.cpp
# at 171d6160 and 076c3788. DirectML's last release is onnxruntime-directml 1.24.4.
SOURCES = {
    "cpu": "onnxruntime 1.32.0",
    "cuda": "onnxruntime-gpu 1.31.1",
    "directml": "onnxruntime docs 001d12d2",
    "wasm": "onnxruntime 1.32.0",
}

# operator, first opset, then type variable=types
_CPU = """
Abs 13 T=f32,i8,u8,i32,i64
Add 14 T=f32,i8,u8,i32,i64
And 7 T=bool T1=bool
BitwiseXor 18 T=i8,u8,i32,i64
Cast 13 T1=f32,f16,i8,u8,i32,i64,bool T2=f32,f16,i8,u8,i32,i64,bool
Concat 13 T=f32,f16,i8,u8,i32,i64,bool
Div 14 T=f32,i8,u8,i32,i64
DynamicQuantizeLinear 11 T2=u8
Erf 13 T=f32
Expand 13 T=f32,f16,i8,u8,i32,i64,bool
Gather 13 T=f32,f16,i8,u8,i32,i64,bool Tind=i32,i64
Gemm 13 T=f32
Greater 13 T=f32,i8,u8,i32,i64 T1=bool
If 16 B=bool V=f32,f16,i8,u8,i32,i64,bool
LayerNormalization 17 T=f32,f16 U=f32
LessOrEqual 16 T=f32,i8,u8,i32,i64 T1=bool
MatMul 13 T=f32,i32,i64
MatMulInteger 10 T1=i8,u8 T2=i8,u8 T3=i32
Mul 14 T=f32,i8,u8,i32,i64
Pow 15 T=f32,i32,i64 T1=f32,i32,i64
QuantizeLinear 13 T1=f32 T2=i8,u8
Range 11 T=f32,i32,i64
ReduceMax 18 T=f32,i8,u8,i32,i64
Reshape 14 T=f32,f16,i8,u8,i32,i64,bool
ScatterND 18 T=f32,f16,i8,u8,i32,i64,bool
Shape 15 T=f32,f16,i8,u8,i32,i64,bool
Slice 13 T=f32,f16,i8,u8,i32,i64,bool Tind=i32,i64
Softmax 13 T=f32
Split 18 T=f32,f16,i8,u8,i32,i64,bool
Squeeze 13 T=f32,f16,i8,u8,i32,i64,bool
Sub 14 T=f32,i8,u8,i32,i64
Tanh 13 T=f32
Transpose 13 T=f32,f16,i8,u8,i32,i64,bool
Unsqueeze 13 T=f32,f16,i8,u8,i32,i64,bool
Where 16 T=f32,i8,u8,i32,i64
com.microsoft.DynamicQuantizeMatMul 1 T1=f32 T2=i8,u8
com.microsoft.FastGelu 1 T=f32
com.microsoft.GatherBlockQuantized 1 T1=u8 T2=f32,f16 Tind=i32,i64
com.microsoft.GroupQueryAttention 1 T=f32 T_CACHE=f32,i8,u8 T_KV_SCALE=f32 M=i32
com.microsoft.GroupQueryAttention 1 T=f16 T_CACHE=f16,i8,u8 T_KV_SCALE=f32 M=i32
com.microsoft.MatMulNBits 1 T1=f32 T2=u8 T3=f32,u8 T4=i32
com.microsoft.MatMulNBits 1 T1=f16 T2=u8 T3=f16,u8 T4=i32
com.microsoft.QGemm 1 T=f32 TA=u8 TB=i8,u8 TC=i32 TYZ=u8
com.microsoft.QGemm 1 T=f32 TA=i8 TB=i8 TC=i32 TYZ=i8
com.microsoft.SkipLayerNormalization 1 T=f32,f16
"""
_CUDA = """
Add 14 T=f32,f16,i8,u8,i32,i64
And 7 T=bool T1=bool
Cast 13 T1=f32,f16,i8,u8,i32,i64,bool T2=f32,f16,i8,u8,i32,i64,bool
Concat 13 T=f32,f16,i8,u8,i32,i64,bool
Div 14 T=f32,f16,i8,u8,i32,i64
Erf 13 T=f32,f16
Gather 13 T=f32,f16,i8,u8,i32,i64,bool Tind=i32,i64
Gemm 13 T=f32,f16
Greater 13 T=f32,f16,i32,i64 T1=bool
LayerNormalization 17 T=f32,f16 U=f32
LessOrEqual 16 T=f32,f16,i32,i64 T1=bool
MatMul 13 T=f32,f16
MatMulInteger 10 T1=i8 T2=i8 T3=i32
Mul 14 T=f32,f16,i8,u8,i32,i64
Pow 15 T=f32,f16,i32,i64 T1=f32,f16,i32,i64
Range 11 T=f32,i32,i64
Reshape 14 T=f32,f16,i8,u8,i32,i64,bool
Shape 15 T=f32,f16,i8,u8,i32,i64,bool
Slice 13 T=f32,f16,i8,u8,i32,i64,bool Tind=i32,i64
Softmax 13 T=f32,f16
Split 18 T=f32,f16,i8,u8,i32,i64,bool
Squeeze 13 T=f32,f16,i8,u8,i32,i64,bool
Sub 14 T=f32,f16,i8,u8,i32,i64
Tanh 13 T=f32,f16
Transpose 13 T=f32,f16,i8,u8,i32,i64,bool
Unsqueeze 13 T=f32,f16,i8,u8,i32,i64,bool
Where 16 T=f32,f16,u8,i32,i64
com.microsoft.FastGelu 1 T=f32,f16
com.microsoft.GatherBlockQuantized 1 T1=u8 T2=f32,f16 Tind=i32,i64
com.microsoft.GroupQueryAttention 1 T=f16 T_CACHE=f16,i8,u8 T_KV_SCALE=f32 M=i32
com.microsoft.MatMulNBits 1 T1=f16 T2=u8 T3=f16,u8
com.microsoft.MatMulNBits 1 T1=f32 T2=u8 T3=f32,u8
com.microsoft.SkipLayerNormalization 1 T=f32,f16
"""
_DIRECTML = """
Add 14 T=f32,f16,i8,u8,i32,i64
And 7 T=bool
Cast 13 T1=f32,f16,i8,u8,i32,i64,bool T2=f32,f16,i8,u8,i32,i64,bool
Concat 13 T=f32,f16,i8,u8,i32,i64,bool
Div 14 T=f32,f16,i8,u8,i32,i64
DynamicQuantizeLinear 11 T1=f32 T2=i8,u8
Erf 13 T=f32,f16
Gather 13 T=f32,f16,i8,u8,i32,i64,bool Tind=i32,i64
Gemm 13 T=f32,f16
Greater 13 T=f32,f16,i8,u8,i32,i64
LayerNormalization 17 T=f32,f16 U=f32
LessOrEqual 16 T=f32,f16,i8,u8,i32,i64
MatMul 13 T=f32,f16
MatMulInteger 10 T1=i8,u8 T2=i8,u8 T3=i32
Mul 14 T=f32,f16,i8,u8,i32,i64
Reshape 14 T=f32,f16,i8,u8,i32,i64,bool
Shape 15 T=f32,f16,i8,u8,i32,i64,bool
Slice 13 T=f32,f16,i8,u8,i32,i64,bool Tind=i32,i64
Softmax 13 T=f32,f16
Split 18 T=f32,f16,i8,u8,i32,i64,bool
Squeeze 13 T=f32,f16,i8,u8,i32,i64,bool
Sub 14 T=f32,f16,i8,u8,i32,i64
Tanh 13 T=f32,f16
Transpose 13 T=f32,f16,i8,u8,i32,i64,bool
Unsqueeze 13 T=f32,f16,i8,u8,i32,i64,bool
Where 16 T=f32,f16,i8,u8,i32,i64,bool
com.microsoft.DynamicQuantizeMatMul 1 T1=f32 T2=i8,u8
com.microsoft.FastGelu 1 T=f32,f16
com.microsoft.GroupQueryAttention 1 T=f32 T_CACHE=f32 M=i32
com.microsoft.GroupQueryAttention 1 T=f16 T_CACHE=f16 M=i32
com.microsoft.MatMulNBits 1 T1=f32,f16 T2=u8 T3=u8
com.microsoft.SkipLayerNormalization 1 T=f32,f16
"""

# operator -> type variables of the inputs / of the outputs. "*" stands for all that follow; "-" has
# one type only. Source: onnx's schemas and onnxruntime's docs/ContribOperators.md.
_SIGNATURES = {
    **dict.fromkeys(("Add", "Div", "MatMul", "Mul", "Sub", "Gemm"), "T T T / T"),
    **dict.fromkeys(
        ("Abs", "Erf", "Softmax", "Tanh", "Transpose", "com.microsoft.FastGelu"), "T / T"
    ),
    **dict.fromkeys(("Greater", "LessOrEqual"), "T T / -bool"),
    **dict.fromkeys(("Expand", "ReduceMax", "Reshape", "Squeeze", "Unsqueeze"), "T - / T"),
    "And": "T T / -bool",
    "BitwiseXor": "T T / T",
    "Cast": "T1 / T2",
    "Concat": "* T / T",
    "DynamicQuantizeLinear": "T1 / T2 -f32 T2",
    "Gather": "T Tind / T",
    "If": "B / * V",  # which differ: they are those of the branches
    "LayerNormalization": "T T T / T U U",
    "MatMulInteger": "T1 T2 T1 T2 / T3",
    "Pow": "T T1 / T",
    "QuantizeLinear": "T1 T1 T2 / T2",
    "Range": "T T T / T",
    "ScatterND": "T - T / T",
    "Shape": "T / -i64",
    "Slice": "T Tind Tind Tind Tind / T",
    "Split": "T - / * T",
    "Where": "- T T / T",
    "com.microsoft.DynamicQuantizeMatMul": "T1 T2 T1 T2 T1 / T1",
    "com.microsoft.GatherBlockQuantized": "T1 Tind T2 T1 / T2",
    "com.microsoft.GroupQueryAttention": (
        "T T T T_CACHE T_CACHE M M T T - T T T_KV_SCALE T_KV_SCALE / T T_CACHE T_CACHE"
    ),
    "com.microsoft.MatMulNBits": "T1 T2 T1 T3 T4 T1 / T1",
    "com.microsoft.QGemm": "TA T TA TB T TB TC T TYZ / -f32",
    "com.microsoft.SkipLayerNormalization": "T T T T T / T - - T",
}
# Outputs whose type no input gives.
_DEFAULTS = {"DynamicQuantizeLinear": "u8", "MatMulInteger": "i32"}

_SHORT = {
    ir.DataType.FLOAT: "f32",
    ir.DataType.FLOAT16: "f16",
    ir.DataType.INT8: "i8",
    ir.DataType.UINT8: "u8",
    ir.DataType.INT32: "i32",
    ir.DataType.INT64: "i64",
    ir.DataType.BOOL: "bool",
}


class Kernel(NamedTuple):
    """One registered kernel: the opset it begins with, and the types of each type variable."""

    since: int
    types: dict[str, frozenset[str]]


def _table(text: str) -> dict[str, list[Kernel]]:
    table: dict[str, list[Kernel]] = {}
    for line in text.strip().splitlines():
        op, since, *types = line.split()
        pairs = (pair.split("=") for pair in types)
        kernel = Kernel(int(since), {name: frozenset(names.split(",")) for name, names in pairs})
        table.setdefault(op, []).append(kernel)
    return table


KERNELS = {
    "cpu": _table(_CPU),
    "cuda": _table(_CUDA),
    "directml": _table(_DIRECTML),
    "wasm": _table(_CPU),
}


def missing_kernels(model: ir.Model, provider: str) -> list[str]:
    """Nodes without a kernel there, one line for each kind of node, sorted; empty if all have one.

    provider: one of KERNELS. An operator that is not in the table counts as missing. Example:
    ["GroupQueryAttention(f32 f32 f32 f32 f32 i32 i32): no kernel for T=f32"].
    """
    types = value_types(model)
    opset = model.opset_imports[""]
    missing = set()
    for node in model.graph.all_nodes():
        op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        reason = _missing(node, op, KERNELS[provider].get(op, []), opset, types)
        if reason is None and provider == "directml":
            reason = _directml_limit(node)
        if reason is not None:
            found = " ".join(types.get(value, "-") if value else "-" for value in node.inputs)
            missing.add(f"{node.op_type}({found}): {reason}")
    return sorted(missing)


def value_types(model: ir.Model) -> dict[ir.Value, str]:
    """The short element type of every value of a graph, found from its inputs and weights on."""
    types: dict[ir.Value, str] = {}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype is None:
            raise ValueError(f"{value.name} has no type")
        types[value] = _SHORT[value.dtype]
    _add_types(model.graph, types)
    return types


def _add_types(graph: ir.Graph, types: dict[ir.Value, str]) -> None:
    """types: of all values that the nodes read and that are not theirs; gets those of the nodes."""
    for node in graph:
        op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        if op == "If":
            for name in ("then_branch", "else_branch"):
                branch = node.attributes[name].as_graph()
                _add_types(branch, types)
                types |= {v: types[r] for v, r in zip(node.outputs, branch.outputs, strict=True)}
            continue
        if op not in _SIGNATURES:
            raise ValueError(f"{op}: not an operator that pico-edge emits")
        bound, outputs = _bind(node, op, types)
        for value, variable in zip(node.outputs, outputs, strict=False):
            if variable.startswith("-"):
                types[value] = variable[1:] or "f32"
            else:
                types[value] = bound.get(variable) or _DEFAULTS.get(op) or "f32"


def _bind(node: ir.Node, op: str, types: dict[ir.Value, str]) -> tuple[dict[str, str], list[str]]:
    """The type of each type variable of a node, and the variables of its outputs."""
    inputs, outputs = (side.split() for side in _SIGNATURES[op].split("/"))
    bound: dict[str, str] = {}
    for value, variable in zip(node.inputs, _spread(inputs, len(node.inputs)), strict=True):
        if value is not None and not variable.startswith("-"):
            found = types[value]
            if bound.setdefault(variable, found) != found:
                raise ValueError(f"{op} {node.name}: {variable} is {bound[variable]} and {found}")
    if op == "Cast":
        bound["T2"] = _SHORT[ir.DataType(node.attributes["to"].as_int())]
    return bound, _spread(outputs, len(node.outputs))


def _spread(variables: list[str], count: int) -> list[str]:
    if variables[0] == "*":
        return variables[1:2] * count
    return variables[:count]


def _missing(
    node: ir.Node, op: str, kernels: list[Kernel], opset: int, types: dict[ir.Value, str]
) -> str | None:
    """Why no kernel takes the node; None if one does."""
    if not kernels:
        return "no kernel"
    bound, _ = _bind(node, op, types)
    reasons = []
    for kernel in kernels:
        if not node.domain and kernel.since > opset:
            reasons.append(f"no kernel at opset {opset}")
            continue
        wrong = [
            f"{variable}={found}"
            for variable, found in bound.items()
            if variable in kernel.types and found not in kernel.types[variable]
        ]
        if not wrong:
            return None
        reasons.append(f"no kernel for {', '.join(wrong)}")
    return min(reasons, key=len)


def _directml_limit(node: ir.Node) -> str | None:
    """What the kernels refuse or misread though they take the types."""
    if node.op_type == "MatMulNBits":
        # The kernel checks for exactly four inputs, and takes absent zero points for 0, not 128.
        if len(node.inputs) != 4 or node.inputs[3] is None:
            return "needs zero points, and no bias"
        k, size, bits = (node.attributes[name].as_int() for name in ("K", "block_size", "bits"))
        if k % size or bits not in (4, 8):
            return f"needs blocks that divide K, of 4 or 8 bits: found {k}, {size}, {bits}"
    if node.op_type == "GroupQueryAttention" and (len(node.inputs) != 7 or None in node.inputs):
        return "needs separate q, k, v and a shared cache, and nothing else"
    return None
