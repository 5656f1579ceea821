"""`pico-edge info`: what a model.onnx says of itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from pico_edge.terminal import NO_BREAK, Debug, Json, Quiet, folded, print_json, write

LABEL = 12  # columns of the first column


def info(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model.onnx made by export.")],
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a model.onnx holds: shape, sizes, quality, where it runs. Nothing is run."""
    from pico_edge.runtime.info import info as read

    found = read(model)
    if json_:
        print_json(found)
    else:
        write(table(found))


def table(found: dict[str, Any]) -> str:
    """The same for people, at most 80 columns but for the path."""
    config, sizes, needs = found["config"], found["sizes"], found["requires"]
    rows = [
        (
            "model",
            f"{config['n_layer']} layers x {config['n_embd']} ({config['n_head']} heads), context "
            f"{config['block_size']}, vocabulary {config['vocab_size']}, gelu {config['gelu']}, "
            f"{'with' if config['bias'] else 'without'} biases: {_scaled(found['parameters'])} "
            "parameters",
        ),
        ("tokenizer", f"{found['tokenizer']['kind']}, {found['tokenizer']['n_vocab']} tokens"),
        ("precision", f"{found['precision']}: {_pairs(found['weights'])}"),
        ("made for", f"target {found['target']}, which runs on {found['provider']}"),
        ("file", f"{_bytes(sizes['file'])}: " + _sizes(sizes, "weights", "nodes", "metadata")),
        ("weights", _sizes(sizes["weights_by_part"])),
        ("", _sizes(sizes["weights_by_type"])),
        (
            "cache",
            f"{found['cache']['type']}, {_bytes(found['cache']['bytes_per_row'])} for a text of "
            f"{config['block_size']} tokens",
        ),
        (
            "needs",
            f"onnxruntime {needs['onnxruntime']} or newer; opset {needs['opset']}, IR version "
            f"{needs['ir_version']}",
        ),
        *_kernels(found["kernels"], found["nodes"]),
        ("batches", _rows_text(found["rows_are_independent"])),
        ("other CPUs", str(found["across_cpus"])),
        ("parity", _parity(found["parity"])),
        ("quality", _quality(found["quality"])),
        (
            "record",
            "pico-edge verify replays it on this device"
            if found["can_be_verified"]
            else "none, or an older one: export it again",
        ),
        ("sampling", _pairs(found["sampling"])),
        ("drafting", _drafting(found["ngrams"])),
        *_provenance(found["provenance"]),
        *_values("inputs", found["inputs"]),
        *_values("outputs", found["outputs"]),
    ]
    lines = [found["file"]]
    for label, text in rows:
        lines += folded(label, text, indent=LABEL)
    return "\n".join(lines) + "\n"


def _pairs(values: object) -> str:
    if not isinstance(values, dict):
        return str(values)
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _sizes(sizes: dict[str, int], *names: str) -> str:
    return ", ".join(f"{name} {_bytes(sizes[name])}" for name in names or sizes)


def _bytes(count: int) -> str:
    """Example: 65234 -> "65.2 kB", its space one that does not break."""
    return _scaled(count, "B")


def _scaled(number: int, unit: str = "") -> str:
    """Three digits and a prefix. Example: 835584 -> "836 k"."""
    for prefix, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:#.3g}".rstrip(".") + NO_BREAK + prefix + unit
    return f"{number}{NO_BREAK}{unit}".rstrip(NO_BREAK)


def _kernels(kernels: object, nodes: int) -> list[tuple[str, str]]:
    if not isinstance(kernels, dict):
        return [("kernels", "not recorded: export it again")]
    rows: list[tuple[str, str]] = []
    for provider, report in kernels.items():
        missing = report.get("missing") if isinstance(report, dict) else None
        source = report.get("source") if isinstance(report, dict) else None
        if missing == []:
            text = f"all {nodes} nodes have one, by {source}"
        else:
            text = f"by {source}, none for {missing}"
        rows.append(("" if rows else "kernels", f"{provider}: {text}"))
    return rows


def _rows_text(independent: object) -> str:
    if independent is True:
        return "a text depends on nothing beside it, beyond float rounding"
    if independent is False:
        return "a text may depend on those in its batch: one activation scale per call"
    return "not recorded"


def _parity(parity: dict[str, Any]) -> str:
    error, equal = parity["max_abs_error"], parity["greedy_match_tokens"]
    if not isinstance(error, float):
        return "not recorded"
    return f"largest logit error {error:.1e} against PyTorch, {equal} greedy tokens equal"


def _quality(quality: object) -> str:
    if not isinstance(quality, dict):
        return "not recorded: export it again"
    shown = []
    for key, form, what in (
        ("bits_per_byte", "{:.4f}", "bits per byte held out"),
        ("fp32_bits_per_byte", "{:.4f}", "as fp32"),
        ("loss_increase_percent", "{:+.3f} %", "loss"),
        ("top1_agreement", "{:.4f}", "top-1 agreement"),
        ("kl_divergence", "{:.1e}", "nats of KL divergence"),
    ):
        value = quality.get(key)
        if isinstance(value, float):
            shown.append(f"{form.format(value)} {what}")
    return ", ".join(shown)


def _drafting(ngrams: dict[str, Any] | None) -> str:
    return "no n-gram table" if ngrams is None else f"n-gram table of {_bytes(ngrams['bytes'])}"


def _provenance(values: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known of the training: whatever the file has, under its own names."""
    with_ = {name: values.get(name) for name in ("trained_with", "exported_with")}
    numbers = {name: v for name, v in values.items() if name not in (*with_, "data")}
    return [
        ("trained", _pairs(numbers)),
        ("data", _pairs(values.get("data"))),
        ("with", _pairs(with_["trained_with"])),
        ("exported by", _pairs(with_["exported_with"])),
    ]


def _values(label: str, values: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """One row a value; the layers of the cache, which are alike, in one."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for value in values:
        shape = f"({', '.join(str(axis) for axis in value['shape'])})"
        like = re.sub(r"\.\d+\.(key|value)$", ".N.key|value", value["name"])
        groups.setdefault((like, value["type"], shape), []).append(value["name"])
    rows: list[tuple[str, str]] = []
    for (like, elem_type, shape), names in groups.items():
        name = names[0] if len(names) == 1 else like
        rows.append(("" if rows else label, f"{name} {elem_type} {shape}"))
    return rows
