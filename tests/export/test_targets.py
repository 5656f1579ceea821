from __future__ import annotations

import collections
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto

from pico_edge import artefact
from pico_edge.errors import PicoEdgeError, UsageError
from pico_edge.export import kernels, targets
from pico_edge.export.calibrate import calibrate
from pico_edge.export.graph import array
from pico_edge.export.pipeline import export
from pico_edge.export.targets import TARGETS, target_of
from pico_edge.runtime import Model
from pico_edge.runtime.preflight import read_model_file
from pico_edge.runtime.session import Session
from pico_edge.train.model import GPT

NAMES = ["cuda", "directml", "web", "portable"]
FILES = [(name, quantize) for name in NAMES for quantize in (False, True)]
SECRETS = (str(Path(__file__).parents[2]), sys.prefix, ".py", "stack_trace", 'File "')


@pytest.fixture(scope="module")
def exported(
    checkpoint_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, bool], tuple[Path, dict[str, Any]]]]:
    """exported(target, quantize) -> the file and its report, each made once."""
    folder = tmp_path_factory.mktemp("targets")
    made: dict[tuple[str, bool], tuple[Path, dict[str, Any]]] = {}

    def get(name: str, quantize: bool) -> tuple[Path, dict[str, Any]]:
        if (name, quantize) not in made:
            path = folder / f"{name}-{quantize}.onnx"
            report = export(checkpoint_path, path, target=name, quantize=quantize)
            made[name, quantize] = path, report
        return made[name, quantize]

    yield get


Exported = Callable[[str, bool], tuple[Path, dict[str, Any]]]
_traced: dict[tuple[bool, str], onnx.ModelProto] = {}


def _graph(model: GPT, name: str, quantize: bool, gelu: str = "tanh") -> ir.Model:
    """The graph of a target as it would be published; each topology is traced once."""
    target = target_of(name)
    if (target.portable, gelu) not in _traced:
        config = dataclasses.replace(model.config, gelu=gelu)
        traced = targets.trace_for(GPT(config).eval(), target)
        _traced[target.portable, gelu] = ir.to_proto(traced)
    graph = ir.from_proto(_traced[target.portable, gelu])
    if quantize:
        plan = targets.plan_for(model.config, target, 8)
        seen = calibrate(model, list(range(200))) if name == "cpu" else None
        targets.quantize_for(graph, target, plan, seen)
    targets.adapt(graph, target)
    return graph


@pytest.mark.parametrize(("name", "quantize"), FILES)
def test_a_file_is_sound_and_says_what_it_is_for(
    name: str, quantize: bool, exported: Exported
) -> None:
    path, report = exported(name, quantize)
    precision = "int8" if quantize else "fp16" if name == "cuda" else "fp32"
    assert (report["target"], report["precision"]) == (name, precision)
    assert abs(report["quality"]["loss_increase_percent"]) < 0.5
    said = read_model_file(path).metadata[artefact.EXPORT_KEY]
    assert (said["target"], said["precision"], said["opset"]) == (name, precision, 18)
    assert said["rows_are_independent"] is not (quantize and name in ("web", "portable"))
    floats = "float16" if name == "cuda" else "float32"
    form = {"columns": "all"} if name in ("web", "portable") else {"int8": "layers, table"}
    assert (said["weights"], said["cache"]) == (form if quantize else {floats: "all"}, floats)
    assert said["min_onnxruntime"] == TARGETS[name].min_onnxruntime
    provider = TARGETS[name].provider
    assert said["kernels"][provider] == {"missing": [], "source": kernels.SOURCES[provider]}
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 8
    data = path.read_bytes()
    assert not [secret for secret in SECRETS if secret.encode() in data]


@pytest.mark.parametrize(("name", "quantize"), FILES)
def test_a_file_generates_the_text_of_the_model(
    name: str, quantize: bool, exported: Exported, model: GPT
) -> None:
    """By the command's own path: the loop, a batch of two prompts, on the CPU provider."""
    path, _ = exported(name, quantize)
    text = Model(path, provider="cpu")
    ids = text.tokenizer.encode("The value")
    expected = model.generate(
        torch.tensor([ids]), 24, temperature=0, n_vocab=text.tokenizer.n_vocab
    )[0, len(ids) :].tolist()
    found = text.generate("The value", max_new_tokens=24, temperature=0)
    same = [a == b for a, b in zip(found.token_ids, expected, strict=True)]
    assert all(same) if not quantize else sum(same) >= 12
    past_the_end = text.generate("The value", max_new_tokens=300, temperature=0)
    assert past_the_end.new_tokens == 300  # over block_size: the cache is made anew


@pytest.mark.parametrize(("name", "quantize"), [("cuda", False), ("cuda", True)])
def test_cuda_files_hold_half_precision_and_give_float32_logits(
    name: str, quantize: bool, exported: Exported
) -> None:
    model = onnx.load(exported(name, quantize)[0])
    types = {tensor.data_type for tensor in model.graph.initializer}
    assert TensorProto.FLOAT not in types
    assert TensorProto.FLOAT16 in types
    kinds = {
        v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)
    }
    assert kinds["logits"] == TensorProto.FLOAT
    assert kinds["past_key_values.0.key"] == kinds["present.1.value"] == TensorProto.FLOAT16


def test_half_precision_stays_within_its_tolerance(exported: Exported) -> None:
    _, report = exported("cuda", False)
    assert 0 < report["parity"]["max_rel_error"] < 2e-2
    assert report["quality"]["top1_agreement"] > 0.99


def test_weights_beyond_half_precision_are_refused(model: GPT) -> None:
    graph = targets.trace_for(model, target_of("cuda"))
    bias = graph.graph.initializers["transformer.ln_f.bias"]
    bias.const_value = ir.tensor(np.full_like(array(bias), 1e5), name=bias.name)
    with pytest.raises(PicoEdgeError, match=r"ln_f.bias holds 1e\+05: float16 ends at 65504"):
        targets.adapt(graph, target_of("cuda"))


def test_directml_files_keep_within_its_kernels(exported: Exported) -> None:
    model = onnx.load(exported("directml", True)[0])
    points = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    matmuls = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
    assert len(matmuls) == 4 * 2 + 1
    for node in matmuls:
        assert len(node.input) == 4
        assert (points[node.input[3]] == 128).all()
    assert "GatherBlockQuantized" not in {n.op_type for n in model.graph.node}
    # The table is in the file once, for the embedding and the head.
    tables = [t for t in model.graph.initializer if list(t.dims) == [272, 1, 32]]
    assert len(tables) == 1
    users = [n.op_type for n in model.graph.node if tables[0].name in n.input]
    assert sorted(users) == ["Gather", "MatMulNBits"]


def test_directml_and_cuda_files_of_int8_agree(exported: Exported, int8: Session) -> None:
    """The same codes and scales, in another spelling; the CPU's are calibrated."""
    ids = int8.tokenizer.encode("The value of a name")
    found = {"cpu": int8.new_cache().append(0, ids, all_logits=True)}
    for name in ("directml", "cuda"):
        session = Session(exported(name, True)[0], provider="cpu", threads=1)
        found[name] = session.new_cache().append(0, ids, all_logits=True)
    np.testing.assert_allclose(found["cuda"], found["directml"], atol=0.1)
    np.testing.assert_allclose(found["directml"], found["cpu"], atol=0.3)


@pytest.mark.parametrize("name", NAMES)
def test_int8_files_hold_one_table(name: str, exported: Exported) -> None:
    model = onnx.load(exported(name, True)[0])
    tables = [t for t in model.graph.initializer if np.prod(t.dims) == 272 * 32]
    assert len(tables) == 1
    largest = max(
        np.prod(t.dims)
        for t in model.graph.initializer
        if t.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
    )
    assert largest == 288 * 32  # the position table


def test_another_process_writes_the_same_bytes(
    checkpoint_path: Path, exported: Exported, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from pico_edge.export.pipeline import export\n"
        "for name in sys.argv[3:]:\n"
        "    export(Path(sys.argv[1]), Path(sys.argv[2], name), target=name, quantize=True)"
    )
    subprocess.run([sys.executable, "-c", code, checkpoint_path, tmp_path, *NAMES], check=True)
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == exported(name, True)[0].read_bytes(), name


def test_an_unknown_target_is_refused(checkpoint_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="target is 'npu': expected cpu, cuda, directml, web, por"):
        export(checkpoint_path, tmp_path / "m.onnx", target="npu")


@pytest.mark.parametrize("name", NAMES)
def test_4_bits_are_for_the_cpu_only(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"bits is 4 and target is {name}: .*expected 8"):
        export(tmp_path / "ckpt.pt", tmp_path / "m.onnx", target=name, bits=4)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_every_node_has_a_kernel(name: str, quantize: bool, gelu: str, model: GPT) -> None:
    graph = _graph(model, name, quantize, gelu)
    assert kernels.missing_kernels(graph, TARGETS[name].provider) == []


def test_the_tables_know_what_is_missing(model: GPT) -> None:
    fp32 = _graph(model, "cpu", False)
    assert kernels.missing_kernels(fp32, "cuda") == [
        "GroupQueryAttention(f32 - - f32 f32 i32 i32): no kernel for T=f32, T_CACHE=f32"
    ]
    assert kernels.missing_kernels(_graph(model, "cpu", True), "directml") == [
        "GatherBlockQuantized(u8 i64 f32): no kernel",
        "GroupQueryAttention(f32 - - i8 i8 i32 i32 - - - - - f32 f32): no kernel for T_CACHE=i8",
        "MatMulNBits(f32 u8 f32): needs zero points, and no bias",
    ]
    assert "DynamicQuantizeMatMul(f32 i8 f32): no kernel" in kernels.missing_kernels(
        _graph(model, "web", True), "cuda"
    )


def test_a_graph_without_a_kernel_is_not_exported(model: GPT) -> None:
    with pytest.raises(PicoEdgeError, match=r"no kernel on cuda.*GroupQueryAttention.*no file"):
        targets.kernel_report(_graph(model, "cpu", False), target_of("cuda"))


def test_the_cpu_table_is_that_of_the_runtime_installed_here() -> None:
    """Every row of the table is a kernel that this onnxruntime registers, and its types are so."""
    import onnxruntime

    long = {"f32": "float", "f16": "float16", "i8": "int8", "u8": "uint8", "bool": "bool"}
    long |= {"i32": "int32", "i64": "int64"}
    registered: dict[str, list[Any]] = {}
    for found in onnxruntime.capi.onnxruntime_pybind11_state.get_all_opkernel_def():
        if found.provider == "CPUExecutionProvider":
            op = f"{found.domain}.{found.op_name}" if found.domain else found.op_name
            registered.setdefault(op, []).append(found)
    for op, rows in kernels.KERNELS["cpu"].items():
        for row in rows:
            for variable, types in row.types.items():
                for short in types:
                    assert any(
                        f"tensor({long[short]})" in other.type_constraints.get(variable, [])
                        and other.version_range[0] <= row.since <= other.version_range[1]
                        for other in registered[op]
                    ), (op, variable, short)


def test_the_metadata_of_kernels_is_plain_json(exported: Exported) -> None:
    said = read_model_file(exported("cuda", False)[0]).metadata[artefact.EXPORT_KEY]
    assert "MatMul(f16 f16): no kernel for T=f16" in said["kernels"]["cpu"]["missing"]
    assert json.loads(json.dumps(said)) == said


@pytest.mark.parametrize("quantize", [False, True])
def test_a_cpu_file_runs_the_vectorized_norm_alone(
    model: GPT, quantize: bool, tmp_path: Path
) -> None:
    """Also after the fusions of onnxruntime, which knows a slower one."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    file = ir.to_proto(_graph(model, "cpu", quantize)).SerializeToString()
    ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(options.optimized_model_filepath)
    ops = collections.Counter(node.op_type for node in optimized.graph.node)
    assert ops["LayerNormalization"] == 2 * model.config.n_layer + 1
    assert ops["SkipLayerNormalization"] == 0
