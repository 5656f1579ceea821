"""What of this machine pico-edge can use, and what to do about the rest.

A provider counts only if it ran a node: onnxruntime lists those it was built with, also where their
libraries or devices are missing. Works where onnxruntime is absent or broken, which is the point.
Opens no model and no connection. Try: `doctor()["advice"]`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import struct
import sys
from pathlib import Path
from typing import Any

from pico_edge import __version__
from pico_edge.errors import PicoEdgeError
from pico_edge.runtime.cpu import cpu_features
from pico_edge.runtime.installed import (
    DISTRIBUTIONS,
    TELEMETRY_ENV,
    floor,
    import_onnxruntime,
    install_advice,
    onnxruntime_distributions,
    overlap_notice,
    too_old,
)

EXTRAS = {
    "train": ("torch", "tokenizers", "matplotlib"),
    "export": ("torch", "onnx", "onnxscript", "onnx_ir"),
    "log": ("tensorboard",),
}
NEEDED = ("numpy", "tiktoken", "typer")
# What a variable of the environment changes here, for those that are set.
VARIABLES = {
    "PICO_EDGE_PROVIDER": "the provider that auto takes",
    "PICO_EDGE_THREADS": "the threads that auto takes",
    "PICO_EDGE_DEBUG": "errors show their traceback",
    "PICO_EDGE_TIMEOUT_S": "how long processes of one run wait for each other",
    "OMP_NUM_THREADS": "threads of PyTorch in train and export",
    "MKL_NUM_THREADS": "threads of PyTorch in train and export",
    "CUDA_VISIBLE_DEVICES": "the GPUs that are seen",
    "LD_LIBRARY_PATH": "where libraries of GPUs are found",
    "LD_PRELOAD": "libraries loaded before all others",
    "PYTHONPATH": "packages that hide the installed ones",
    "NO_COLOR": "output without colours",
}
CGROUP = "/sys/fs/cgroup"
NO_LIMIT = 1 << 60  # cgroup v1 writes a huge number for none


def doctor() -> dict[str, Any]:
    """Facts, "problems" and "advice"; "ok" unless the runtime cannot run at all. Plain values."""
    telemetry = os.environ.get(TELEMETRY_ENV)
    runtime, ort = _onnxruntime()
    cpu, threads = cpu_features(), _threads(ort is not None)
    found: dict[str, Any] = {
        "pico_edge": __version__,
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "bits": struct.calcsize("P") * 8,
            "executable": sys.executable,
        },
        "system": {"name": platform.system(), "release": platform.release()},
        "cpu": {"machine": platform.machine(), **cpu},
        "threads": threads,
        "memory": _memory(),
        "onnxruntime": runtime,
        "providers": {} if ort is None else _providers(ort),
        "packages": {name: _version(name) for name in NEEDED},
        "extras": {extra: _missing(names) for extra, names in EXTRAS.items()},
        "telemetry": {"variable": telemetry, "state": "off: pico-edge turns it off before loading"},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    problems, advice = diagnose(found)
    runs = found["providers"].get("cpu", {}).get("runs", False)
    return {
        "ok": runs and all(found["packages"].values()),
        **found,
        "problems": problems,
        "advice": advice,
    }


def diagnose(found: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What is wrong, and what to do, the most urgent first; a pure function of the facts."""
    problems, advice = [], []
    runtime = found["onnxruntime"]
    if len(runtime["distributions"]) > 1:
        problems.append("several distributions of onnxruntime are installed over each other")
        advice.append(runtime["cure"])
    elif runtime["error"]:
        problems.append(runtime["error"])
        advice.append(runtime["cure"])
    elif runtime["too_old"]:
        problems.append(f"onnxruntime {runtime['version']} is older than {runtime['needs']}")
        name = next(iter(runtime["distributions"]), "onnxruntime")
        if name == DISTRIBUTIONS["directml"]:
            advice.append("load files that you trust only: its last release lacks safety fixes")
        else:
            advice.append(f"pip install --upgrade '{name}>={runtime['needs']}'")
    for package, version in found["packages"].items():
        if version is None:
            problems.append(f"{package} is not installed")
            advice.append(f"pip install {package}")
    for name, provider in found["providers"].items():
        if provider["listed"] and not provider["runs"]:
            problems.append(
                f"{name} is listed by onnxruntime and does not run: {provider['error']}"
            )
            advice.append(
                "reinstall: pip install --force-reinstall onnxruntime"
                if name == "cpu"
                else f"check the driver and libraries of {name}, or run with --provider cpu"
            )
    if found["threads"]["error"]:
        problems.append(found["threads"]["error"])
        advice.append("unset PICO_EDGE_THREADS, or set it to auto or a number")
    wanted = found["environment"].get("PICO_EDGE_PROVIDER") or "auto"
    if wanted != "auto" and not found["providers"].get(wanted, {}).get("runs"):
        problems.append(f"PICO_EDGE_PROVIDER is {wanted!r}, which does not run here")
        advice.append("unset PICO_EDGE_PROVIDER, or set it to auto or cpu")
    if found["python"]["bits"] < 64:
        problems.append("Python is a 32-bit program")
        advice.append("install a 64-bit Python: onnxruntime has no 32-bit builds")
    features = found["cpu"]["features"]
    if features.get("avx2") is False:
        problems.append("the processor has no AVX2: quantized files will be slow")
        advice.append("compare with pico-edge export without --quantize")
    for extra, missing in found["extras"].items():
        if missing and extra != "log":
            advice.append(f"for pico-edge {extra}: pip install 'pico-edge[{extra}]'")
    return problems, advice


def _onnxruntime() -> tuple[dict[str, Any], Any]:
    """What is installed, and the package itself or None."""
    names = onnxruntime_distributions()
    needs = floor()
    runtime: dict[str, Any] = {
        "version": None,
        "distributions": {name: importlib.metadata.version(name) for name in names},
        "needs": needs,
        "too_old": False,
        "error": None,
        "cure": overlap_notice(),
    }
    try:
        ort = import_onnxruntime()
    except PicoEdgeError as error:
        runtime["error"] = str(error).partition(": pip ")[0]
        runtime["cure"] = overlap_notice() or install_advice("cpu")
        return runtime, None
    runtime["version"] = ort.__version__
    runtime["too_old"] = too_old(ort.__version__, needs)
    return runtime, ort


def _providers(ort: Any) -> dict[str, dict[str, Any]]:
    from pico_edge.runtime import webgpu  # imports onnxruntime
    from pico_edge.runtime.session import ORT_PROVIDERS

    found: dict[str, dict[str, Any]] = {}
    for name, ort_name in ORT_PROVIDERS.items():
        error = None
        if name == "webgpu":  # a plugin, listed once it is registered
            try:
                webgpu.register()
            except PicoEdgeError as failure:
                error = str(failure)
        listed = ort_name in ort.get_available_providers()
        if listed:
            error = run_a_node(ort, ort_name)
        found[name] = {"listed": listed, "runs": listed and error is None, "error": error}
    return found


def run_a_node(ort: Any, ort_name: str) -> str | None:
    """Run one addition on a provider, and on no other; why it failed, or None.

    ort_name: onnxruntime's name of it, "CPUExecutionProvider".
    """
    import numpy as np

    from pico_edge.runtime import webgpu
    from pico_edge.runtime.cache import ORT_ERRORS

    options = ort.SessionOptions()
    options.log_severity_level = 4  # the exception says it
    options.intra_op_num_threads = 1
    if ort_name != "CPUExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        if ort_name == webgpu.NAME:
            session = webgpu.load(addition_model(), options)
        else:
            session = ort.InferenceSession(
                addition_model(), options, providers=[ort_name], enable_fallback=0
            )
        if session.get_providers()[0] != ort_name:
            return f"it did not start, {session.get_providers()[0]} took its place"
        (total,) = session.run(None, {"a": np.array([2], np.float32)})
    except (PicoEdgeError, *ORT_ERRORS) as error:
        return " ".join(str(error).split())
    return None if total.tolist() == [4.0] else f"2 + 2 gave {total.tolist()}"


def addition_model() -> bytes:
    """An ONNX model of one node, b = a + a on float32 (1), in protobuf's wire format."""

    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return bytes([number << 3, value])
        return bytes([number << 3 | 2, len(value)]) + value  # all shorter than 128 bytes

    float_1 = field(1, field(1, 1) + field(2, field(1, field(1, 1))))
    graph = (
        field(1, field(1, b"a") + field(1, b"a") + field(2, b"b") + field(4, b"Add"))
        + field(2, b"g")
        + field(11, field(1, b"a") + field(2, float_1))
        + field(12, field(1, b"b") + field(2, float_1))
    )
    return field(1, 8) + field(7, graph) + field(8, field(2, 17))  # IR 8, opset 17


def _threads(has_onnxruntime: bool) -> dict[str, Any]:
    logical = os.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    found: dict[str, Any] = {
        "logical": logical,
        "usable": usable,
        "cgroup_cpus": cgroup_cpus(),
        "physical": None,
        "auto": None,
        "error": None,
    }
    if has_onnxruntime:
        from pico_edge.runtime.threads import choose_threads, physical_cores

        found["physical"] = physical_cores()
        try:
            found["auto"] = choose_threads("auto")
        except PicoEdgeError as error:
            found["error"] = str(error)
    return found


def cgroup_cpus(root: str = CGROUP) -> float | None:
    """Processors that the container may use, from its quota; None without a limit."""
    quota = _read(f"{root}/cpu.max").split()  # "200000 100000", or "max 100000"
    if not quota:
        quota = [_read(f"{root}/cpu/cpu.cfs_{name}_us") for name in ("quota", "period")]
    if len(quota) == 2 and all(part.isdigit() for part in quota) and int(quota[1]):
        return int(quota[0]) / int(quota[1])
    return None


def cgroup_bytes(root: str = CGROUP) -> int | None:
    """Memory that the container may use; None without a limit."""
    text = _read(f"{root}/memory.max") or _read(f"{root}/memory/memory.limit_in_bytes")
    return int(text) if text.isdigit() and int(text) < NO_LIMIT else None


def _memory() -> dict[str, int | None]:
    """Bytes; None where the system does not say."""
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE))
    total, available = (values.get(name) for name in ("MemTotal", "MemAvailable"))
    return {
        "total": None if total is None else int(total) * 1024,
        "available": None if available is None else int(available) * 1024,
        "cgroup_limit": cgroup_bytes(),
    }


def _missing(packages: tuple[str, ...]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
