"""One engine, one file, one process: the half of peers.py that runs in a peer's own environment.

Converts a Hugging Face GPT-2 folder into what the engine runs, and measures it. Imports nothing but
numpy and the engine. Started by peers.py; by hand, with the Python of that environment:

    python benchmarks/engines.py measure llama.cpp int8 FOLDER task.json out.json --threads 2
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_TOKENS, PROMPTS = 128, 5
DEPTHS, STEPS = (16, 256, 1000), 24
# Short steps are repeated until so much time was measured.
DECODE_S, DECODE_RUNS = 0.4, 20
GREEDY_PROMPT, GREEDY_TOKENS = 16, 32


# Weights


def read_safetensors(path: Path) -> dict[str, Any]:
    """name -> float32 array."""
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    return {
        name: np.frombuffer(data, np.float32, math.prod(entry["shape"]), at)
        .reshape(entry["shape"])
        .copy()
        for name, entry in header.items()
        if name != "__metadata__"
        for at in [8 + n + entry["data_offsets"][0]]
    }


# Conversion. Each takes the Hugging Face folder, gives the files whose sizes count.


def convert_llama(hf: Path, out: Path, precision: str) -> list[Path]:
    """F32 by the gguf package, the rest from it by llama.cpp's own quantizer."""
    full = out / "F32.gguf"
    if not full.exists():
        _write_gguf(hf, full)
    if precision == "fp32":
        return [full]
    import llama_cpp

    name, ftype = {
        "int8": ("Q8_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0),
        "int4": ("Q4_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0),
    }[precision]
    path = out / f"{name}.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    if llama_cpp.llama_model_quantize(str(full).encode(), str(path).encode(), params):
        raise RuntimeError(f"llama_model_quantize to {name} failed")
    return [path]


def _write_gguf(hf: Path, path: Path) -> None:
    import gguf

    config = json.loads((hf / "config.json").read_text())
    weights = read_safetensors(hf / "model.safetensors")
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_name("pico-edge")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    names = {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }
    writer.add_tensor("token_embd.weight", weights["transformer.wte.weight"])
    writer.add_tensor("position_embd.weight", weights["transformer.wpe.weight"])
    for part in ("weight", "bias"):
        writer.add_tensor(f"output_norm.{part}", weights[f"transformer.ln_f.{part}"])
        for i in range(config["n_layer"]):
            for theirs, ours in names.items():
                value = weights[f"transformer.h.{i}.{theirs}.{part}"]
                if value.ndim == 2:
                    value = np.ascontiguousarray(value.T)
                writer.add_tensor(f"blk.{i}.{ours}.{part}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert_ctranslate2(hf: Path, out: Path, precision: str) -> list[Path]:
    """By CTranslate2's own specification; bfloat16 is made of float32 when it is loaded."""
    from ctranslate2.specs import common_spec, transformer_spec

    config = json.loads((hf / "config.json").read_text())
    weights = read_safetensors(hf / "model.safetensors")
    activation = {
        "gelu_new": common_spec.Activation.GELUTanh,
        "gelu": common_spec.Activation.GELU,
    }[config["activation_function"]]
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config["n_layer"], config["n_head"], pre_norm=True, activation=activation
    )

    def linear(place: Any, name: str) -> None:
        place.weight = np.ascontiguousarray(weights[f"{name}.weight"].T)
        place.bias = weights[f"{name}.bias"]

    def norm(place: Any, name: str) -> None:
        place.gamma, place.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights["transformer.wte.weight"]
    decoder.projection.weight = weights["transformer.wte.weight"]
    decoder.position_encodings.encodings = weights["transformer.wpe.weight"]
    norm(decoder.layer_norm, "transformer.ln_f")
    for i, layer in enumerate(decoder.layer):
        name = f"transformer.h.{i}"
        norm(layer.self_attention.layer_norm, f"{name}.ln_1")
        linear(layer.self_attention.linear[0], f"{name}.attn.c_attn")
        linear(layer.self_attention.linear[1], f"{name}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"{name}.ln_2")
        linear(layer.ffn.linear_0, f"{name}.mlp.c_fc")
        linear(layer.ffn.linear_1, f"{name}.mlp.c_proj")
    tokens = [str(i) for i in range(config["vocab_size"])]
    spec.register_vocabulary(tokens)
    # The end is a row of padding, or at worst one token of 50304, so that no text ends early.
    spec.config.bos_token = spec.config.unk_token = tokens[0]
    spec.config.eos_token = tokens[-1]
    spec.validate()
    spec.optimize("int8" if precision.startswith("int8") else None)
    spec.save(str(out))
    return [out / "model.bin"]


def convert_openvino(hf: Path, out: Path, precision: str) -> list[Path]:
    """By optimum-intel: stateful, weights compressed by NNCF."""
    if not (out / "openvino_model.bin").exists():
        weights = precision.removesuffix("-bf16").replace("bf16", "fp32")
        _optimum("openvino", "--weight-format", weights, hf=hf, out=out)
    return [out / "openvino_model.xml", out / "openvino_model.bin"]


def convert_optimum_onnx(hf: Path, out: Path, precision: str) -> list[Path]:
    """By optimum-onnx; int8 is onnxruntime's stock quantize_dynamic of it."""
    if not (out / "model.onnx").exists():
        _optimum("onnx", hf=hf, out=out)
    if precision == "fp32":
        return [out / "model.onnx"]
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(out / "model.onnx", out / "model_int8.onnx")
    return [out / "model_int8.onnx"]


def convert_genai(hf: Path, out: Path, precision: str) -> list[Path]:
    """Our portable export and the configuration it needs: its model builder knows no GPT-2."""
    config = json.loads((hf / "config.json").read_text())
    place = out / precision
    place.mkdir(exist_ok=True)
    path = place / "model.onnx"
    path.unlink(missing_ok=True)
    os.link(hf.parent / "portable" / f"{precision}.onnx", path)
    decoder = {
        "filename": path.name,
        "hidden_size": config["n_embd"],
        "head_size": config["n_embd"] // config["n_head"],
        "num_attention_heads": config["n_head"],
        "num_key_value_heads": config["n_head"],
        "num_hidden_layers": config["n_layer"],
        "session_options": {"provider_options": []},
        "inputs": {
            **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": "decoder",
        "vocab_size": config["vocab_size"],
        "context_length": config["n_positions"],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), config["eos_token_id"]),
        "decoder": decoder,
    }
    search = {"max_length": config["n_positions"], "past_present_share_buffer": False}
    (place / "genai_config.json").write_text(json.dumps({"model": model, "search": search}))
    return [path]


def _optimum(kind: str, *flags: str, hf: Path, out: Path) -> None:
    command = Path(sys.executable).with_name("optimum-cli")
    task = ["--task", "text-generation-with-past"]
    run = [str(command), "export", kind, "--model", str(hf), *task, *flags, str(out)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["optimum-cli failed"])[-1])


def convert_transformers(hf: Path, out: Path, precision: str) -> list[Path]:
    return [hf / "model.safetensors"]


def convert_ours(hf: Path, out: Path, precision: str) -> list[Path]:
    """peers.py has exported it."""
    return [out / f"{precision}.onnx"]


# Engines. Made of the files, a precision, threads and block_size. `prefill` forgets what was
# before and gives the logits (V,) after the prompt; `step` adds a token; `all_logits` gives (T, V).


class Ours:
    """pico-edge: a Session and its cache."""

    def __init__(self, files: list[Path], precision: str, threads: int, block_size: int) -> None:
        from pico_edge.runtime.session import Session

        self.cache = Session(files[0], threads=threads).new_cache()

    def prefill(self, ids: Sequence[int]) -> Any:
        self.cache.reset()
        return self.cache.prefill([ids])[0]

    def step(self, token: int) -> Any:
        return self.cache.decode([token])[0]

    def all_logits(self, ids: Sequence[int]) -> Any:
        self.cache.reset()
        return self.cache.append(0, ids, all_logits=True)


class Llama:
    """llama.cpp through the functions of llama-cpp-python's C API, its defaults otherwise."""

    def __init__(self, files: list[Path], precision: str, threads: int, block_size: int) -> None:
        import ctypes

        import llama_cpp

        self.lib = llama_cpp
        self.log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(files[0]).encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = block_size
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.token = (llama_cpp.llama_token * 1)()

    def _logits(self, place: int) -> Any:
        pointer = self.lib.llama_get_logits_ith(self.context, place)
        return np.ctypeslib.as_array(pointer, (self.vocab_size,))

    def _decode(self, batch: Any) -> None:
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")

    def prefill(self, ids: Sequence[int]) -> Any:
        self.lib.llama_memory_clear(self.memory, True)
        array = (self.lib.llama_token * len(ids))(*ids)
        self._decode(self.lib.llama_batch_get_one(array, len(ids)))
        return self._logits(-1)

    def step(self, token: int) -> Any:
        self.token[0] = token
        self._decode(self.lib.llama_batch_get_one(self.token, 1))
        return self._logits(-1)

    def all_logits(self, ids: Sequence[int]) -> Any:
        self.lib.llama_memory_clear(self.memory, True)
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        self._decode(batch)
        found = np.stack([self._logits(i).copy() for i in range(len(ids))])
        self.lib.llama_batch_free(batch)
        return found


class CTranslate2:
    """CTranslate2's Generator, which has no single steps: its callback after each token is timed.

    So its own search for the likeliest token is in its figures.
    """

    def __init__(self, files: list[Path], precision: str, threads: int, block_size: int) -> None:
        import ctranslate2

        compute_type = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8_float32"}.get(
            precision, "int8_bfloat16"
        )
        self.lib = ctranslate2
        self.generator = ctranslate2.Generator(
            str(files[0].parent), compute_type=compute_type, intra_threads=threads, inter_threads=1
        )

    def generate(self, ids: Sequence[int], n: int) -> tuple[list[int], list[float]]:
        """n tokens, and the seconds that each took; the first with the prompt."""
        tokens, times = [], []

        def note(result: Any) -> bool:
            times.append(time.perf_counter())
            tokens.append(result.token_id)
            return False

        start = time.perf_counter()
        self.generator.generate_batch(
            [[str(i) for i in ids]],
            max_length=n,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=note,
        )
        return tokens, [b - a for a, b in zip([start, *times], times, strict=False)]

    def all_logits(self, ids: Sequence[int]) -> Any:
        storage = self.generator.forward_batch([[str(i) for i in ids]])
        return np.array(storage.to(self.lib.DataType.float32))[0]


class OpenVino:
    """OpenVINO's CPU plugin for latency; float32 arithmetic, or bfloat16 where the name says so."""

    def __init__(self, files: list[Path], precision: str, threads: int, block_size: int) -> None:
        import openvino

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": str(threads),
            "INFERENCE_PRECISION_HINT": "bf16" if "bf16" in precision else "f32",
        }
        model = openvino.Core().compile_model(str(files[0]), "CPU", settings)
        self.request = model.create_infer_request()
        self.names = {name for port in model.inputs for name in port.get_names()}
        self.length = 0

    def _run(self, ids: Sequence[int]) -> Any:
        n, past = len(ids), self.length
        self.length += n
        values = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": np.arange(past, self.length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer({k: v for k, v in values.items() if k in self.names})
        return self.request.get_output_tensor(0).data[0]

    def prefill(self, ids: Sequence[int]) -> Any:
        return self.all_logits(ids)[-1]

    def step(self, token: int) -> Any:
        return self._run([token])[-1]

    def all_logits(self, ids: Sequence[int]) -> Any:
        self.request.reset_state()
        self.length = 0
        return self._run(ids)


class Transformers:
    """transformers' GPT-2 on torch, eager, with its dynamic cache."""

    def __init__(self, files: list[Path], precision: str, threads: int, block_size: int) -> None:
        import torch
        from transformers import GPT2LMHeadModel

        torch.set_num_threads(threads)
        self.torch = torch
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model = GPT2LMHeadModel.from_pretrained(files[0].parent, dtype=dtype).eval()
        self.past: Any = None

    def _run(self, ids: Sequence[int], keep: int) -> Any:
        with self.torch.inference_mode():
            inputs = self.torch.tensor([ids])
            found = self.model(
                inputs, past_key_values=self.past, use_cache=True, logits_to_keep=keep
            )
        self.past = found.past_key_values
        return found.logits[0].float().numpy()

    def prefill(self, ids: Sequence[int]) -> Any:
        self.past = None
        return self._run(ids, 1)[-1]

    def step(self, token: int) -> Any:
        return self._run([token], 1)[-1]

    def all_logits(self, ids: Sequence[int]) -> Any:
        self.past = None
        return self._run(ids, 0)


class OptimumOnnx:
    """optimum-onnx's ORTModelForCausalLM on onnxruntime."""

    def __init__(self, files: list[Path], precision: str, threads: int, block_size: int) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        torch.set_num_threads(threads)
        self.torch = torch
        self.model = ORTModelForCausalLM.from_pretrained(
            files[0].parent, file_name=files[0].name, session_options=options
        )
        self.past: Any = None
        self.length = 0

    def _run(self, ids: Sequence[int]) -> Any:
        past = self.length
        self.length += len(ids)
        found = self.model(
            input_ids=self.torch.tensor([ids]),
            attention_mask=self.torch.ones((1, self.length), dtype=self.torch.int64),
            position_ids=self.torch.arange(past, self.length)[None],
            past_key_values=self.past,
            use_cache=True,
        )
        self.past = found.past_key_values
        return found.logits[0].numpy()

    def prefill(self, ids: Sequence[int]) -> Any:
        return self.all_logits(ids)[-1]

    def step(self, token: int) -> Any:
        return self._run([token])[-1]

    def all_logits(self, ids: Sequence[int]) -> Any:
        self.past, self.length = None, 0
        return self._run(ids)


class GenAI:
    """onnxruntime-genai, token by token: its generator without its sampler."""

    def __init__(self, files: list[Path], precision: str, threads: int, block_size: int) -> None:
        import onnxruntime_genai

        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config = onnxruntime_genai.Config(str(files[0].parent))
        config.overlay(json.dumps(options))
        self.new_generator = onnxruntime_genai.Generator
        self.model = onnxruntime_genai.Model(config)
        self.params = onnxruntime_genai.GeneratorParams(self.model)
        self.params.set_search_options(max_length=block_size)

    def prefill(self, ids: Sequence[int]) -> Any:
        self.generator = self.new_generator(self.model, self.params)
        self.generator.append_tokens(np.array(ids, np.int32))
        return self.generator.get_logits()[0, -1]

    def step(self, token: int) -> Any:
        self.generator.append_tokens(np.array([token], np.int32))
        return self.generator.get_logits()[0, -1]

    def all_logits(self, ids: Sequence[int]) -> Any:
        self.prefill(ids)
        return self.generator.get_output("logits")[0]


ENGINES: dict[str, tuple[Callable[..., list[Path]], Any]] = {
    "pico-edge": (convert_ours, Ours),
    "llama.cpp": (convert_llama, Llama),
    "ctranslate2": (convert_ctranslate2, CTranslate2),
    "openvino": (convert_openvino, OpenVino),
    "transformers": (convert_transformers, Transformers),
    "optimum-onnx": (convert_optimum_onnx, OptimumOnnx),
    "onnxruntime-genai": (convert_genai, GenAI),
}


def generate(engine: Any, ids: Sequence[int], n: int) -> tuple[list[int], list[float]]:
    """n greedy tokens, and the seconds that each took inside the engine; first with the prompt."""
    if hasattr(engine, "generate"):
        return engine.generate(ids, n)
    start = time.perf_counter()
    logits = engine.prefill(ids)
    times = [time.perf_counter() - start]
    tokens = [int(np.argmax(logits))]
    for _ in range(n - 1):
        start = time.perf_counter()
        logits = engine.step(tokens[-1])
        times.append(time.perf_counter() - start)
        tokens.append(int(np.argmax(logits)))
    return tokens, times


def measure(make: Callable[[], Any], task: dict[str, Any], spawned: float) -> dict[str, float]:
    """Speeds in tokens per second. spawned: time.monotonic() at the start of this process."""
    ids, block_size = task["ids"], task["block_size"]
    prompt = ids[: min(PROMPT_TOKENS, block_size - 1)]
    start = time.perf_counter()
    engine = make()
    loaded = time.perf_counter()
    generate(engine, prompt, 1)
    result = {
        "load_s": loaded - start,
        "cold_first_token_s": time.monotonic() - spawned,
    }
    times = [generate(engine, prompt, 1)[1][0] for _ in range(PROMPTS)]
    result["first_token_s"] = statistics.median(times)
    result["prefill"] = len(prompt) / result["first_token_s"]
    for depth in DEPTHS:
        if depth + STEPS > block_size:
            continue
        steps: list[float] = []
        for _ in range(DECODE_RUNS):
            steps += generate(engine, ids[:depth], STEPS)[1][2:]  # the first step warms up
            if sum(steps) > DECODE_S:
                break
        result[f"decode_{depth}"] = 1 / statistics.median(steps)
    result["peak_rss_bytes"] = peak_rss_bytes()
    return result


def judge(make: Callable[[], Any], task: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens after the first ids, and bits per byte of windows that do not overlap."""
    engine = make()
    tokens = min(GREEDY_TOKENS, task["block_size"] - GREEDY_PROMPT - 1)
    result: dict[str, Any] = {"greedy": generate(engine, task["ids"][:GREEDY_PROMPT], tokens)[0]}
    if not task["trained"]:
        return result
    nats, ids, block_size = 0.0, task["held_out"], task["block_size"]
    for at in range(0, len(ids) - 1, block_size):
        targets = ids[at + 1 : at + 1 + block_size]
        logits = engine.all_logits(ids[at : at + len(targets)])[:, : task["n_vocab"]]
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        nats -= float(log_p[np.arange(len(targets)), targets].sum())
    result["bits_per_byte"] = nats / math.log(2) / task["held_out_bytes"]
    return result


def peak_rss_bytes() -> int:
    """VmHWM: ru_maxrss would start with the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("convert", "judge", "measure"))
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("precision")
    parser.add_argument("folder", type=Path)
    parser.add_argument("task", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--spawned", type=float, default=time.monotonic())
    arguments = parser.parse_args()
    convert, engine = ENGINES[arguments.engine]
    # One folder per engine and form of weights; bfloat16 arithmetic needs no file of its own.
    form = arguments.precision.removesuffix("-bf16").replace("bf16", "fp32")
    place = arguments.folder / arguments.engine
    if arguments.engine in ("ctranslate2", "openvino"):
        place /= form
    files_json = place / f"{arguments.precision}.json"
    task = json.loads(arguments.task.read_text())
    if arguments.what == "convert":
        place.mkdir(parents=True, exist_ok=True)
        files = convert(arguments.folder / "hf", place, arguments.precision)
        files_json.write_text(json.dumps([str(file.resolve()) for file in files]))
        result: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in files)}
    else:
        files = [Path(file) for file in json.loads(files_json.read_text())]
        block_size = task["block_size"]

        def make() -> Any:
            return engine(files, arguments.precision, arguments.threads, block_size)

        if arguments.what == "judge":
            result = judge(make, task)
        else:
            result = measure(make, task, arguments.spawned)
    arguments.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
