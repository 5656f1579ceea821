"""GPT -> ONNX with an in-place key-value cache: `torch.onnx.export` (dynamo) over an export module.

The module runs the weights of `pico_edge.train.model.GPT` through onnxruntime's fused operators,
which torch traces as symbolic ops. In eager torch those return zeros without a word: never compare
against this module, compare the *model* with onnxruntime (`pico_edge.export.verify`).

Knows nothing of quantization, tokenizers or files. Try: `trace(model).graph.num_nodes()`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pico_edge import __version__, artefact
from pico_edge.train.model import GPT, Block

if TYPE_CHECKING:
    import onnx_ir as ir

# 18 is the lowest that torch writes; DirectML stops at 20. At 18 the erf form of GELU is five
# nodes, which onnxruntime fuses again.
OPSET_VERSION = 18
# 8 is what opset 18 needs at least; older runtimes refuse a newer one ("Unsupported model IR
# version").
IR_VERSION = 8
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # of a layer, in graph order


def _group_query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    seqlens_k: Tensor,
    total_seq_len: Tensor,
    n_head: int,
) -> list[Tensor]:
    """(B, S, C) attended values, and the present key and value (B, H, K, D). Causal by itself.

    Source: onnxruntime ContribOperators.md, com.microsoft.GroupQueryAttention.
    """
    return list(
        torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (q, k, v, past_key, past_value, seqlens_k, total_seq_len),
            {"num_heads": n_head, "kv_num_heads": n_head},
            dtypes=(q.dtype, past_key.dtype, past_value.dtype),
            shapes=(q.shape, past_key.shape, past_value.shape),
            version=1,
        )
    )


def _add_and_norm(
    x: Tensor, delta: Tensor, norm: nn.LayerNorm, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """norm(x + delta + bias) and that sum, both (B, S, C): not fused by onnxruntime for pre-norm.

    bias: of the linear layer that delta comes from; here it costs no node of its own.
    """
    b, s, _ = x.shape
    inputs = (x, delta, norm.weight, _bias(norm))
    y, _, _, total = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::SkipLayerNormalization",
        inputs if bias is None else (*inputs, bias),
        {"epsilon": norm.eps},
        dtypes=(x.dtype, torch.float32, torch.float32, x.dtype),
        shapes=(x.shape, (b, s, 1), (b, s, 1), x.shape),
        version=1,
    )
    return y, total


def _without_bias(linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The layer's product, and its bias."""
    return nn.functional.linear(x, linear.weight), linear.bias


def _bias(norm: nn.LayerNorm) -> Tensor:
    # A model trained with bias=False: a bias of zeros is the same function.
    return norm.bias if norm.bias is not None else torch.zeros_like(norm.weight)


def _gelu(x: Tensor, form: str) -> Tensor:
    if form == "erf":
        return nn.functional.gelu(x)
    return torch.onnx.ops.symbolic(
        "com.microsoft::FastGelu", (x,), {}, dtype=x.dtype, shape=x.shape, version=1
    )


class _TracedGPT(nn.Module):
    """The forward pass of one call on the cache, in the inputs and outputs of `artefact`."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        seqlens_k: Tensor,
        total_seq_len: Tensor,
        out_index: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        config, parts = self.model.config, self.model.transformer
        blocks = cast("list[Block]", list(parts.h))
        norms = [*(block.ln_1 for block in blocks[1:]), parts.ln_f]
        y, x = _add_and_norm(parts.wte(input_ids), parts.wpe(position_ids), blocks[0].ln_1)
        present = []
        for i, block in enumerate(blocks):
            q, k, v = block.attn.c_attn(y).split(config.n_embd, dim=-1)
            a, key, value = _group_query_attention(
                q, k, v, *past[i], seqlens_k, total_seq_len, config.n_head
            )
            present.append((key, value))
            delta, bias = _without_bias(block.attn.c_proj, a)
            y, x = _add_and_norm(x, delta, block.ln_2, bias)
            delta, bias = _without_bias(block.mlp.c_proj, _gelu(block.mlp.c_fc(y), config.gelu))
            y, x = _add_and_norm(x, delta, norms[i], bias)
        rows = y.reshape(-1, config.n_embd).index_select(0, out_index)  # (N, C)
        return self.model.lm_head(rows), present


def trace(model: GPT) -> ir.Model:
    """The traced fp32 graph of a model: inputs and outputs as in `artefact`, no metadata.

    Source paths and stack traces that the exporter leaves in it are removed. Tracing the same
    weights twice gives the same bytes.
    """
    config = model.config
    # Example sizes of 0 or 1 would be taken for constants (pytorch#148886).
    B, S, K, N = 2, 3, 8, 2
    past = [
        tuple(torch.zeros(B, config.n_head, K, config.head_dim) for _ in range(2))
        for _ in range(config.n_layer)
    ]
    example = (
        torch.zeros(B, S, dtype=torch.int64),
        torch.zeros(B, S, dtype=torch.int64),
        torch.full((B,), S - 1, dtype=torch.int32),
        torch.tensor(S, dtype=torch.int32),
        torch.arange(N),
        past,
    )
    batch, seq, capacity, n_out = (
        torch.export.Dim(name) for name in ("batch", "seq", "kv_capacity", "n_out")
    )
    cache_axes = {0: batch, 2: capacity}
    dynamic_shapes: tuple[Any, ...] = (
        {0: batch, 1: seq},
        {0: batch, 1: seq},
        {0: batch},
        {},
        {0: n_out},
        [(cache_axes, cache_axes)] * config.n_layer,
    )
    names = artefact.input_names(config.n_layer)
    return run_exporter(_TracedGPT(model), example, dynamic_shapes, names, config.n_layer)


def run_exporter(
    module: nn.Module,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    input_names: list[str],
    n_layer: int,
) -> ir.Model:
    """What torch traces of a module, in the form that is published: see `trace`."""
    with warnings.catch_warnings(), _quiet_exporter():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            example,
            dynamo=True,
            opset_version=OPSET_VERSION,
            optimize=True,  # without it the splits stay SplitToSequence / SequenceAt
            external_data=False,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=artefact.output_names(n_layer),
            verbose=False,
        )
    if program is None:
        raise AssertionError("torch.onnx.export(dynamo=True) returns a program")
    traced = program.model
    traced.ir_version = IR_VERSION
    _strip(traced)
    _name_weights(traced, n_layer)
    return traced


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch.onnx logs and prints its steps; a user of export has no use for them."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _strip(traced: ir.Model) -> None:
    """Remove what the exporter notes of the build machine: source lines, paths, modules."""
    traced.producer_name, traced.producer_version = "pico-edge", __version__
    traced.metadata_props.clear()
    traced.graph.metadata_props.clear()
    traced.doc_string = None
    traced.graph.doc_string = None
    values = [*traced.graph.inputs, *traced.graph.initializers.values()]
    for node in traced.graph:
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None


def _name_weights(traced: ir.Model, n_layer: int) -> None:
    """Give initializers the names of the checkpoint: transposed matrices come as val_N."""
    graph = traced.graph
    matrices = [node for node in graph if node.op_type == "MatMul" and _has_weight(node)]
    assert len(matrices) == n_layer * len(MATRICES), "one MatMul per linear layer"
    for i, node in enumerate(matrices):
        weight = node.inputs[1]
        assert weight is not None
        if weight.name is not None and weight.name.startswith("val_"):
            layer, part = divmod(i, len(MATRICES))
            weight.name = f"transformer.h.{layer}.{MATRICES[part]}.weight"
    for value in list(graph.initializers.values()):
        if value.name is not None and value.name.startswith("model."):
            value.name = value.name.removeprefix("model.")
    graph.initializers["lm_head.weight"].name = "transformer.wte.weight"  # tied: one table


def _has_weight(node: ir.Node) -> bool:
    weight = node.inputs[1]
    return weight is not None and weight.is_initializer()
