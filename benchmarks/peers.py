"""The same weights on every engine: speed, start, memory, size and quality, in one table.

    python benchmarks/peers.py install               # each peer into an environment of its own
    python benchmarks/peers.py prepare               # train, export, convert; check greedy tokens
    python benchmarks/peers.py run --rounds 3        # measure, in alternating rounds
    python benchmarks/peers.py table                 # markdown, of all rounds so far

`make bench-peers` does all four. --shapes 4x128,6x384 and --peers llama.cpp,openvino choose a part.
Every measurement is a process of its own and adds a line to FOLDER/runs.jsonl, so rounds can be run
piece by piece; `run --fresh` forgets them. In the first round each file runs with 1 and 2 threads,
in later ones with the count that decoded faster, or with both where they were within 5 %. Shapes
but the largest are trained for minutes on the text that pydoc shows, the largest has random
weights; another checkpoint may be put at FOLDER/SHAPE/ckpt.pt. Needs pico-edge[all]. Run it while
nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import struct
import subprocess
import sys
import time
import venv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
DATE_FORMAT = "%Y-%m-%d"


class Shape(NamedTuple):
    """max_iters: of training; 0 for random weights. The vocabulary is padded to multiples of 16."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int
    max_iters: int
    tokenizer: tuple[str, ...]


SHAPES = {
    "4x128": Shape(4, 4, 128, 272, 64, 1500, ("--tokenizer", "simple")),
    "6x384": Shape(6, 6, 384, 4096, 256, 300, ("--tokenizer", "bpe", "--vocab-size", "4096")),
    "12x768": Shape(12, 12, 768, 50304, 1024, 0, ()),
}

# What pip installs for each; llama.cpp is compiled here, for this CPU.
TORCH = "torch>=2.10"
PACKAGES = {
    "llama.cpp": ("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy"),
    "ctranslate2": ("ctranslate2==4.8.5", "numpy"),
    "openvino": ("openvino==2026.4.1", "optimum-intel[openvino]==2.2.0", "nncf==3.4.0", TORCH),
    "transformers": ("transformers==5.24.0", TORCH),
    "optimum-onnx": ("optimum-onnx[onnxruntime]==0.1.0", "onnxruntime==1.32.0", TORCH),
    "onnxruntime-genai": ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0"),
}
# Comes along, is of no use for text, and stops transformers where it was built for another torch.
UNWANTED = {"openvino": ("torchvision",)}
PIP_FLAGS = {"llama.cpp": ("--no-binary", "llama-cpp-python")}
VERSION_OF = {
    "llama.cpp": "llama-cpp-python",
    "ctranslate2": "ctranslate2",
    "openvino": "openvino",
    "transformers": "transformers",
    "optimum-onnx": "optimum-onnx",
    "onnxruntime-genai": "onnxruntime-genai",
    "pico-edge": "pico-edge",
}

# What each file is, and how it is run. Each engine's own default where nothing is said.
VARIANTS = {
    ("pico-edge", "fp32"): "",
    ("pico-edge", "int8"): "",
    ("pico-edge", "int4"): "",
    ("llama.cpp", "fp32"): "F32, GGML_NATIVE",
    ("llama.cpp", "int8"): "Q8_0, GGML_NATIVE",
    ("llama.cpp", "int4"): "Q4_0, GGML_NATIVE",
    ("ctranslate2", "fp32"): "float32",
    ("ctranslate2", "bf16"): "bfloat16",
    ("ctranslate2", "int8"): "int8_float32",
    ("openvino", "fp32"): "f32, LATENCY",
    ("openvino", "bf16"): "bf16 hint, LATENCY",
    ("openvino", "int8"): "int8 weights, f32",
    ("openvino", "int8-bf16"): "int8 weights, bf16 hint",
    ("openvino", "int4"): "int4 weights, f32",
    ("openvino", "int4-bf16"): "int4 weights, bf16 hint",
    ("transformers", "fp32"): "eager",
    ("transformers", "bf16"): "eager",
    ("optimum-onnx", "fp32"): "",
    ("optimum-onnx", "int8"): "quantize_dynamic",
    ("onnxruntime-genai", "fp32"): "our portable file",
    ("onnxruntime-genai", "int8"): "our portable file",
}
ENGINE_ORDER = list(dict.fromkeys(engine for engine, _ in VARIANTS))
HELD_OUT_TOKENS = 4096
CHILD_TIMEOUT_S = 600


# Environments


def install(venvs: Path, peers: Sequence[str]) -> None:
    """Each peer into venvs/NAME; a failure is noted there and stops nothing."""
    for peer in peers:
        if peer not in PACKAGES:
            continue
        place = venvs / peer
        failed = place / "failed.txt"
        if (place / "installed.txt").exists():
            continue
        print(f"installing {peer}", file=sys.stderr, flush=True)
        venv.create(place, with_pip=True)
        command = [python_of(venvs, peer), "-m", "pip", "install", *PIP_FLAGS.get(peer, ())]
        environment = dict(os.environ, CMAKE_ARGS="-DGGML_NATIVE=ON")
        done = subprocess.run(
            [*command, *PACKAGES[peer]],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if peer in UNWANTED:
            remove = [python_of(venvs, peer), "-m", "pip", "uninstall", "--quiet", "-y"]
            subprocess.run([*remove, *UNWANTED[peer]], capture_output=True, check=False)
        failed.unlink(missing_ok=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line.upper()]
            failed.write_text((lines or ["pip failed"])[-1])
            print(f"{peer}: {(lines or ['pip failed'])[-1]}", file=sys.stderr)
        else:
            (place / "installed.txt").write_text("\n".join(PACKAGES[peer]))


def python_of(venvs: Path, engine: str) -> str:
    if engine == "pico-edge":
        return sys.executable
    windows = venvs / engine / "Scripts" / "python.exe"
    return str(windows if windows.exists() else venvs / engine / "bin" / "python")


def version_of(venvs: Path, engine: str) -> str:
    code = f"from importlib.metadata import version; print(version({VERSION_OF[engine]!r}))"
    done = subprocess.run(
        [python_of(venvs, engine), "-c", code], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "?"


# Weights


def prepare(folder: Path, venvs: Path, name: str, peers: Sequence[str]) -> None:
    """Checkpoint, our files, a Hugging Face folder, every peer's files, and what they answer."""
    from pico_edge.train.checkpoint import load_checkpoint

    shape, place = SHAPES[name], folder / name
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "ckpt.pt").exists():
        _make_checkpoint(place, shape)
    checkpoint = load_checkpoint(place / "ckpt.pt")
    trained = checkpoint.iter > 0
    if not (place / "hf" / "model.safetensors").exists():
        _write_hugging_face(place / "hf", checkpoint)
    if not (place / "task.json").exists():
        _write_task(place / "task.json", checkpoint, trained)
    ours = place / "pico-edge"
    ours.mkdir(exist_ok=True)
    for precision, bits in (("fp32", None), ("int8", 8), ("int4", 4)):
        if "pico-edge" in peers and not (ours / f"{precision}.onnx").exists():
            _export(place / "ckpt.pt", ours / f"{precision}.onnx", bits)
        portable = place / "portable" / f"{precision}.onnx"
        if "onnxruntime-genai" in peers and bits != 4 and not portable.exists():
            portable.parent.mkdir(exist_ok=True)
            _export(place / "ckpt.pt", portable, bits, "portable")
    facts = read_facts(place)
    for engine, precision in VARIANTS:
        if engine not in peers or "bytes" in facts.get(f"{engine} {precision}", {}):
            continue
        print(f"{name}: preparing {engine} {precision}", file=sys.stderr, flush=True)
        fact = child("convert", engine, precision, place, venvs)
        if "error" not in fact:
            fact |= child("judge", engine, precision, place, venvs)
        facts[f"{engine} {precision}"] = fact
        (place / "facts.json").write_text(json.dumps(facts, indent=1))
    expected = facts.get("pico-edge fp32", {}).get("greedy")
    for key, fact in facts.items():
        if key.endswith(" fp32") and "greedy" in fact and fact["greedy"] != expected:
            print(f"{name}: NOTE: {key} has other greedy tokens than pico-edge", file=sys.stderr)


def read_facts(place: Path) -> dict[str, Any]:
    """ "ENGINE PRECISION" -> bytes, greedy tokens, bits per byte, or the error."""
    path = place / "facts.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _make_checkpoint(place: Path, shape: Shape) -> None:
    import pydoc_data.topics

    text = "\n\n".join(pydoc_data.topics.topics.values())
    if shape.max_iters:
        (place / "data.txt").write_text(text, encoding="utf-8")
        sizes = {
            "n-layer": shape.n_layer,
            "n-head": shape.n_head,
            "n-embd": shape.n_embd,
            "block-size": shape.block_size,
            "max-iters": shape.max_iters,
        }
        flags = [f for key, value in sizes.items() for f in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "pico_edge", "train", str(place / "data.txt")]
        command += ["-o", str(place / "ckpt.pt"), *shape.tokenizer, *flags]
        subprocess.run(command, check=True)
        return
    import torch
    from random_model import save_random

    from pico_edge.config import GPTConfig
    from pico_edge.tokenizer import SimpleTokenizer

    torch.manual_seed(0)
    config = GPTConfig(
        shape.block_size, shape.vocab_size, shape.n_layer, shape.n_head, shape.n_embd
    )
    save_random(place / "ckpt.pt", config, SimpleTokenizer(), text[:16_000])


def _export(checkpoint: Path, out: Path, bits: int | None, target: str = "cpu") -> None:
    flags = ["--target", target] + ([] if bits is None else ["--bits", str(bits)])
    command = [sys.executable, "-m", "pico_edge", "export", str(checkpoint), "-o", str(out)]
    subprocess.run([*command, *flags, "--max-loss-increase", "1e9"], check=True)


def _write_hugging_face(place: Path, checkpoint: Any) -> None:
    """config.json and model.safetensors as transformers' GPT-2 has them; float32."""
    import numpy as np

    config = checkpoint.config
    place.mkdir(exist_ok=True)
    values = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
        "torch_dtype": "float32",
    }
    (place / "config.json").write_text(json.dumps(values, indent=1))
    arrays = {}
    for name, tensor in checkpoint.model.items():
        if name == "lm_head.weight":
            name = "transformer.wte.weight"
        array = np.ascontiguousarray(tensor.numpy(), np.float32)
        if ".h." in name and array.ndim == 2:  # Conv1D has inputs first
            array = np.ascontiguousarray(array.T)
        arrays[name] = array
    if not config.bias:
        for name in [name for name in arrays if ".h." in name or "ln_f" in name]:
            array = arrays[name]
            size = array.shape[-1]
            arrays[name.removesuffix("weight") + "bias"] = np.zeros(size, np.float32)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in arrays.items():
        offsets = [at, at + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": offsets}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (place / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(array.tobytes())


def _write_task(path: Path, checkpoint: Any, trained: bool) -> None:
    """The ids that every engine gets: of held-out text."""
    tokenizer, config = checkpoint.tokenizer, checkpoint.config
    held_out = tokenizer.encode(checkpoint.held_out)[: HELD_OUT_TOKENS + 1]
    middle = len(held_out) // 2
    task = {
        "ids": held_out[middle : middle + config.block_size],
        "block_size": config.block_size,
        "n_vocab": tokenizer.n_vocab,
        "trained": trained,
        "held_out": held_out,
        "held_out_bytes": len(tokenizer.decode_bytes(held_out[1:])),
    }
    path.write_text(json.dumps(task))


# Measurements


def child(
    what: str, engine: str, precision: str, place: Path, venvs: Path, threads: int = 2
) -> dict[str, Any]:
    """One process of engines.py; {"error": ...} where it fails."""
    failed = venvs / engine / "failed.txt"
    if failed.exists():
        return {"error": f"not installed: {failed.read_text()}"}
    if not Path(python_of(venvs, engine)).exists():
        return {"error": "not installed"}
    out = place / "out.json"
    out.unlink(missing_ok=True)
    command = [python_of(venvs, engine), str(HERE / "engines.py"), what, engine, precision]
    command += [str(place), str(place / "task.json"), str(out), "--threads", str(threads)]
    environment = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(threads))
    command += ["--spawned", str(time.monotonic())]
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=CHILD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {CHILD_TIMEOUT_S} s"}
    if done.returncode or not out.exists():
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": lines[-1][:200]}
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def run(folder: Path, venvs: Path, names: Sequence[str], peers: Sequence[str], rounds: int) -> None:
    """Rounds over all files of all shapes, each line at once in runs.jsonl."""
    path = folder / "runs.jsonl"
    for _ in range(rounds):
        for name in names:
            place = folder / name
            facts = read_facts(place)
            for engine, precision in VARIANTS:
                if engine not in peers or "bytes" not in facts.get(f"{engine} {precision}", {}):
                    continue
                done = [
                    line
                    for line in read_runs(folder)
                    if (line["shape"], line["engine"], line["precision"])
                    == (name, engine, precision)
                ]
                for threads in next_threads(done):
                    result = child("measure", engine, precision, place, venvs, threads)
                    line = {
                        "shape": name,
                        "engine": engine,
                        "precision": precision,
                        "threads": threads,
                        **result,
                    }
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                    said = result.get("error") or f"{result['decode_16']:.0f} tokens/s"
                    print(
                        f"{name} {engine} {precision}, threads {threads}: {said}", file=sys.stderr
                    )


def read_runs(folder: Path) -> list[dict[str, Any]]:
    path = folder / "runs.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def next_threads(done: Iterable[dict[str, Any]]) -> list[int]:
    """Thread counts of the next round: all at first, then what decoded fastest, within 5 %."""
    counts = sorted({1, min(2, os.cpu_count() or 1)})
    speeds = {
        threads: [r["decode_16"] for r in done if r["threads"] == threads and "error" not in r]
        for threads in counts
    }
    if not all(speeds.values()):
        return counts
    medians = {threads: statistics.median(found) for threads, found in speeds.items()}
    return [threads for threads in counts if medians[threads] > 0.95 * max(medians.values())]


# The table


def collect(folder: Path, venvs: Path, names: Sequence[str]) -> dict[str, Any]:
    """Everything that the table says of these shapes, as it is committed beside it."""
    rows: list[dict[str, Any]] = []
    runs = read_runs(folder)
    for name in names:
        facts = read_facts(folder / name)
        expected = facts.get("pico-edge fp32", {}).get("greedy")
        for engine, precision in VARIANTS:
            fact = facts.get(f"{engine} {precision}")
            if fact is None:
                continue
            row: dict[str, Any] = {
                "shape": name,
                "precision": precision,
                "engine": engine,
                "settings": VARIANTS[engine, precision],
            }
            found = [
                line
                for line in runs
                if (line["shape"], line["engine"], line["precision"]) == (name, engine, precision)
            ]
            errors = [x["error"] for x in (fact, *found) if "error" in x]
            by_threads: dict[int, list[dict[str, Any]]] = {}
            for line in found:
                if "error" not in line:
                    by_threads.setdefault(line["threads"], []).append(line)
            if errors and not by_threads:
                rows.append(row | {"error": errors[0]})
                continue
            row["bytes"] = fact["bytes"]
            row["bits_per_byte"] = fact.get("bits_per_byte")
            if expected and "greedy" in fact:
                row["greedy_equal"] = next(
                    (
                        i
                        for i, (a, b) in enumerate(zip(fact["greedy"], expected, strict=False))
                        if a != b
                    ),
                    len(expected),
                )
                row["greedy_tokens"] = len(expected)
            if by_threads:
                medians = {
                    threads: {
                        key: statistics.median(line[key] for line in lines)
                        for key in lines[0]
                        if isinstance(lines[0][key], int | float)
                    }
                    for threads, lines in by_threads.items()
                }
                best = max(medians, key=lambda threads: medians[threads]["decode_16"])
                row |= medians[best] | {"threads": best, "rounds": len(by_threads[best])}
            rows.append(row)
    engines = [e for e in ENGINE_ORDER if any(row["engine"] == e for row in rows)]
    return {
        "date": time.strftime(DATE_FORMAT),
        "machine": machine(),
        "versions": {engine: version_of(venvs, engine) for engine in engines},
        "rows": rows,
    }


def machine() -> str:
    from pico_edge.runtime.bench import cpu_name

    features = ""
    if sys.platform == "linux":
        flags = Path("/proc/cpuinfo").read_text().split()
        wanted = (
            "avx2",
            "avx_vnni",
            "avx512f",
            "avx512_vnni",
            "avx512_bf16",
            "amx_int8",
            "asimddp",
        )
        features = " (" + " ".join(flag for flag in wanted if flag in flags) + ")"
    cores = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    return f"{cpu_name()}{features}, {cores}"


def render(result: dict[str, Any]) -> str:
    """Markdown of `collect`: for each shape and bits, the fastest decoder first."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"{result['machine']}, {result['date']}; {versions}.", ""]
    for name, shape in SHAPES.items():
        rows = [row for row in result["rows"] if row["shape"] == name]
        if not rows:
            continue
        measured = [row for row in rows if "decode_16" in row]
        depths = sorted({int(k[7:]) for row in measured for k in row if k.startswith("decode_")})
        quality = any(row.get("bits_per_byte") for row in measured)
        header = ["bits", "engine", "settings", "threads", "prompt"]
        header += [f"decode @{depth}" for depth in depths]
        header += ["first token, ms", "cold start, s", "RSS, MB", "file, MB"]
        header += ["bits/byte"] if quality else []
        lines += [
            f"**{shape.n_layer} x {shape.n_embd}**, vocabulary {shape.vocab_size}, context "
            f"{shape.block_size}, " + ("trained" if quality else "random weights"),
            "",
            "| " + " | ".join(header) + " |",
            "|---|---|---|" + "---:|" * (len(header) - 3),
        ]
        for row in sorted(measured, key=lambda row: (-_bits(row), -row["decode_16"])):
            cells = [str(_bits(row)), row["engine"], row["settings"], str(row["threads"])]
            cells.append(f"{row['prefill']:.0f}")
            cells += [f"{row[f'decode_{depth}']:.0f}" for depth in depths]
            cells += [
                f"{1000 * row['first_token_s']:.2f}",
                f"{row['cold_first_token_s']:.2f}",
                f"{row['peak_rss_bytes'] / 1e6:.0f}",
                f"{row['bytes'] / 1e6:.2f}",
            ]
            if quality:
                found = row["bits_per_byte"]
                cells.append("" if found is None else f"{found:.4f}")
            if row["engine"] == "pico-edge":
                cells = [f"**{cell}**" if cell else "" for cell in cells]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        differing = [
            f"{row['engine']} after {row['greedy_equal']}"
            for row in rows
            if row["precision"] == "fp32"
            and row.get("greedy_equal", 0) < row.get("greedy_tokens", 0)
        ]
        said = "are those of pico-edge in every engine"
        if differing:
            said = f"part from pico-edge's in {', '.join(differing)}"
        lines.append(f"Greedy tokens in fp32 {said}.")
        for row in rows:
            if "error" in row:
                lines.append(f"Did not run: {row['engine']} {row['precision']}: {row['error']}")
        lines.append("")
    lines += [
        "Tokens per second of a prompt of 128 tokens (or the context minus one) and of single "
        "steps behind 16, 256 and 1000; first token: that prompt, model loaded; cold start: from "
        "the start of the process to it, imports and loading included; RSS: peak of the process. "
        "Tokenizing and sampling excluded, but for CTranslate2, whose steps include its argmax. "
        "Each run a process of its own, in alternating rounds; medians; the better of 1 and 2 "
        "threads. Bits per byte on 4096 held-out tokens.",
    ]
    return "\n".join(lines) + "\n"


def _bits(row: dict[str, Any]) -> int:
    """Of the weights."""
    return {"fp32": 32, "bf16": 16, "int8": 8, "int8-bf16": 8, "int4": 4, "int4-bf16": 4}[
        row["precision"]
    ]


def draw(result: dict[str, Any], image: Path) -> None:
    """A picture of `collect`: decode behind 16 tokens, each engine's fastest row of 8 bits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, shape) in zip(figure.subplots(1, len(SHAPES)), SHAPES.items(), strict=True):
        best: dict[str, float] = {}
        for row in result["rows"]:
            if row["shape"] == name and _bits(row) == 8 and "decode_16" in row:
                best[row["engine"]] = max(row["decode_16"], best.get(row["engine"], 0.0))
        engines = sorted(best, key=lambda engine: best[engine])
        colors = ["C1" if engine == "pico-edge" else "C7" for engine in engines]
        bars = axes.barh(engines, [best[engine] for engine in engines], color=colors)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
        axes.set_title(f"{shape.n_layer} x {shape.n_embd}, int8", fontsize=9)
        axes.set_xmargin(0.4)
        axes.set_xlabel("decode, tokens/s", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.savefig(image, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("what", choices=("install", "prepare", "run", "table", "all"))
    parser.add_argument("--shapes", default=",".join(SHAPES), help="which, separated by commas")
    parser.add_argument("--peers", default=",".join(ENGINE_ORDER), help="which engines")
    parser.add_argument("--rounds", type=int, default=3, help="of run")
    parser.add_argument("--fresh", action="store_true", help="run: forget earlier rounds")
    parser.add_argument("--folder", type=Path, default=Path(".peers"), help="for files and results")
    parser.add_argument("--venvs", type=Path, default=Path(".venv-peers"), help="environments")
    parser.add_argument("--json", type=Path, help="table: where its numbers go")
    parser.add_argument("--from-json", type=Path, help="table: render numbers of an earlier one")
    parser.add_argument("--plot", type=Path, help="table: and draw its decode figures of 8 bits")
    arguments = parser.parse_args()
    names, peers = arguments.shapes.split(","), arguments.peers.split(",")
    for given, known in ((names, list(SHAPES)), (peers, ENGINE_ORDER)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"{', '.join(unknown)}: expected some of {', '.join(known)}")
    folder, venvs = arguments.folder.resolve(), arguments.venvs.resolve()
    if arguments.what in ("install", "all"):
        install(venvs, peers)
    if arguments.what in ("prepare", "all"):
        for name in names:
            prepare(folder, venvs, name, peers)
    if arguments.what in ("run", "all"):
        if arguments.fresh:
            (folder / "runs.jsonl").unlink(missing_ok=True)
        run(folder, venvs, names, peers, arguments.rounds)
    if arguments.what in ("table", "all"):
        if arguments.from_json:
            result = json.loads(arguments.from_json.read_text(encoding="utf-8"))
        else:
            result = collect(folder, venvs, names)
        if arguments.plot:
            draw(result, arguments.plot)
        if arguments.json:
            text = json.dumps(result, indent=1) + "\n"
            arguments.json.write_text(text, encoding="utf-8")
        print(render(result), end="")


if __name__ == "__main__":
    main()
