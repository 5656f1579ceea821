"""`pico-edge doctor`: what of this machine can be used, and what to do about the rest."""

from __future__ import annotations

from typing import Any

from pico_edge.errors import PicoEdgeError
from pico_edge.terminal import Debug, Json, Quiet, folded, print_json, write

LABEL = 12  # columns of the first column


def doctor(json_: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Check this machine: onnxruntime, providers that really run, processor, extras; what to do."""
    from pico_edge.runtime.doctor import doctor as examine

    found = examine()
    if json_:
        print_json(found)
    else:
        write(table(found))
    if not found["ok"]:
        raise PicoEdgeError(f"generate cannot run here: {'; '.join(found['problems'])}")


def table(found: dict[str, Any]) -> str:
    """The facts, then problems, then what to do; at most 80 columns."""
    python, system, cpu = found["python"], found["system"], found["cpu"]
    rows = [
        ("pico-edge", found["pico_edge"]),
        (
            "Python",
            f"{python['version']} ({python['implementation']}, {python['bits']} bits) on "
            f"{system['name']} {system['release'].partition('-')[0]}",
        ),
        ("onnxruntime", _runtime(found["onnxruntime"])),
        *_labelled("providers", [_provider(*item) for item in found["providers"].items()]),
        ("processor", f"{cpu['name'] or 'unknown'}, {cpu['machine']}: {_features(cpu)}"),
        ("threads", _threads(found["threads"])),
        ("memory", _memory(found["memory"])),
        *_labelled(
            "extras",
            [
                f"{extra}: {'installed' if not missing else 'lacks ' + ', '.join(missing)}"
                for extra, missing in found["extras"].items()
            ],
        ),
        ("telemetry", found["telemetry"]["state"]),
        *_labelled("variables", [f"{k}={v}" for k, v in found["environment"].items()] or ["none"]),
        *_labelled("problems", found["problems"] or ["none"]),
        *_labelled("do", found["advice"] or ['nothing: pico-edge generate model.onnx "Hello"']),
    ]
    lines = []
    for label, text in rows:
        lines += folded(label, text, indent=LABEL)
    return "\n".join(lines) + "\n"


def _labelled(label: str, texts: list[str]) -> list[tuple[str, str]]:
    return [("" if i else label, text) for i, text in enumerate(texts)]


def _runtime(runtime: dict[str, Any]) -> str:
    if not runtime["distributions"]:
        return (
            "not installed" if runtime["version"] is None else f"{runtime['version']}, not by pip"
        )
    return ", ".join(f"{name} {version}" for name, version in runtime["distributions"].items())


def _provider(name: str, provider: dict[str, Any]) -> str:
    if provider["runs"]:
        return f"{name}: runs"
    if provider["listed"]:
        return f"{name}: does not run, though it is listed"
    return f"{name}: not in this onnxruntime"


def _features(cpu: dict[str, Any]) -> str:
    """Example: "avx2, avx512_vnni; not amx_int8"."""
    features = cpu["features"]
    groups = (("", True), ("not ", False), ("unknown: ", None))
    shown = []
    for prefix, state in groups:
        names = [name for name, value in features.items() if value is state]
        if names:
            shown.append(prefix + ", ".join(names))
    return "; ".join(shown)


def _threads(threads: dict[str, Any]) -> str:
    text = f"auto takes {threads['auto'] if threads['auto'] is not None else 'no number'}; "
    text += f"{threads['physical'] or '?'} physical cores, {threads['usable']} of "
    text += f"{threads['logical']} logical ones usable"
    if threads["cgroup_cpus"] is not None:
        text += f", the container allows {threads['cgroup_cpus']:g}"
    return text


def _memory(memory: dict[str, int | None]) -> str:
    names = {"total": "in all", "available": "available", "cgroup_limit": "for this container"}
    shown = [
        f"{value / 1e9:.1f} GB {names[key]}" for key, value in memory.items() if value is not None
    ]
    return ", ".join(shown) or "unknown"
