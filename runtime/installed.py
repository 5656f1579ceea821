"""Which onnxruntime is installed, whether it is whole and new enough, and what cures it if not.

Three distributions bring the same package, with other providers; pip lets them be installed over
each other, and then neither is whole. Imports onnxruntime only when asked to.

Try: `onnxruntime_distributions()` -> ["onnxruntime"].
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
from typing import Any

from pico_edge.errors import PicoEdgeError

# Read once, when onnxruntime is imported; from 1.29 on its telemetry is on by default.
TELEMETRY_ENV = "ORT_DISABLE_TELEMETRY"

# The distribution of onnxruntime that brings a provider. All install the same files: one at a time.
DISTRIBUTIONS = {
    "cpu": "onnxruntime",
    "cuda": "onnxruntime-gpu",
    "directml": "onnxruntime-directml",
}


def import_onnxruntime() -> Any:
    """The package, its telemetry off. Raises PicoEdgeError with the cure if it is not whole."""
    os.environ[TELEMETRY_ENV] = "1"
    try:
        ort = importlib.import_module("onnxruntime")
        _ = ort.InferenceSession  # one of two distributions, uninstalled, leaves an empty package
    except (ImportError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise PicoEdgeError(
            f"onnxruntime cannot be imported ({reason}): {install_advice('cpu')}"
        ) from error
    return ort


def install_advice(provider: str) -> str:
    """The line that installs onnxruntime with a provider, minding what is installed already."""
    wanted = DISTRIBUTIONS[provider]
    installed = onnxruntime_distributions()
    if len(installed) > 1:
        return (
            f"{' and '.join(installed)} are installed over each other: "
            f"pip uninstall -y {' '.join(installed)}, then pip install {wanted}"
        )
    others = [name for name in installed if name != wanted]
    if others:
        return f"pip uninstall -y {others[0]}, then pip install {wanted}"
    return f"pip install {'--force-reinstall ' if installed else ''}{wanted}"


def onnxruntime_distributions() -> list[str]:
    """The installed distributions that hold onnxruntime; more than one break each other."""
    found = []
    for name in DISTRIBUTIONS.values():
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(name)
    return found


def overlap_notice() -> str | None:
    """What to do where two distributions are installed over each other; None where not.

    The cure keeps the one with more providers, which is why it was installed.
    """
    installed = onnxruntime_distributions()
    if len(installed) < 2:
        return None
    provider = next(name for name, found in DISTRIBUTIONS.items() if found == installed[-1])
    return install_advice(provider)


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version. Example: "1.32.0+cpu" -> (1, 32, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def too_old(found: str, needed: object) -> bool:
    """Whether a release is older than a needed one, which a model file names as it likes."""
    return isinstance(needed, str) and release(found) < release(needed[:20])


def upgrade_advice(found: str, needed: str) -> str:
    """What is here, what is needed, and the line that gets it."""
    installed = onnxruntime_distributions() or ["onnxruntime"]
    if len(installed) > 1:
        return f"needs onnxruntime {needed} or newer, and {install_advice('cpu')}"
    return (
        f"needs onnxruntime {needed} or newer, {found} is installed: "
        f"pip install --upgrade '{installed[0]}>={needed}'"
    )


def floor() -> str | None:
    """The oldest onnxruntime that pico-edge asks pip for; None where it is not installed by pip."""
    try:
        required = importlib.metadata.requires("pico-edge") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (re.match(r"onnxruntime\s*>=\s*([\d.]+)", line) for line in required)
    return next((match[1] for match in found if match), None)
