"""What the processor can do that the kernels for small weights care about.

Asked of the system, never by running an instruction: /proc/cpuinfo on Linux, sysctl on macOS, the
Windows API; None stands for "unknown". Try: `cpu_features()["features"]`.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from pathlib import Path
from typing import Any

# name -> flag in /proc/cpuinfo. What they are good for: int8 products (VNNI, dotprod, i8mm), wide
# vectors (AVX2, AVX-512), bfloat16 products and matrix units (BF16, AMX).
X86 = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx_vnni": "avx_vnni",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
}
ARM = {
    "neon": "asimd",
    "dotprod": "asimddp",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
}
# Of `sysctl`. Apple's chips have NEON and no SVE to speak of.
MACOS = {
    "avx2": "hw.optional.avx2_0",
    "avx512f": "hw.optional.avx512f",
    "avx512_vnni": "hw.optional.avx512vnni",
    "avx512_bf16": "hw.optional.avx512_bf16",
    "neon": "hw.optional.neon",
    "dotprod": "hw.optional.arm.FEAT_DotProd",
    "i8mm": "hw.optional.arm.FEAT_I8MM",
    "bf16": "hw.optional.arm.FEAT_BF16",
}
# Of IsProcessorFeaturePresent; winnt.h knows no number for the others.
WINDOWS = {"avx2": 40, "avx512f": 41, "neon": 19, "dotprod": 43}


FIRST_CORE = 1 << 14  # characters of /proc/cpuinfo, which says the same of every core


def is_arm(machine: str) -> bool:
    """Whether `platform.machine()` names a 64-bit ARM processor."""
    return machine.lower() in ("aarch64", "arm64")


def cpu_features() -> dict[str, Any]:
    """{"name", "source", "features": name -> True, False, or None where the system does not say}.

    The names are those of X86 or ARM.
    """
    machine = platform.machine()
    names = ARM if is_arm(machine) else X86
    if sys.platform == "linux":
        try:
            with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
                text = file.read(FIRST_CORE)
        except OSError:
            text = ""
        return parse_cpuinfo(text, machine)
    if sys.platform == "darwin":
        found = {name: _sysctl(MACOS[name]) if name in MACOS else None for name in names}
        return {"name": platform.processor() or None, "source": "sysctl", "features": found}
    if sys.platform == "win32":
        present = ctypes.windll.kernel32.IsProcessorFeaturePresent
        found = {name: bool(present(WINDOWS[name])) if name in WINDOWS else None for name in names}
        return {"name": platform.processor() or None, "source": "Windows", "features": found}
    return {"name": None, "source": "unknown", "features": dict.fromkeys(names)}


@functools.cache
def may_saturate() -> bool:
    """Whether kernels for u8 x s8 may add two products in 16 bits here: x86 without VNNI, or where
    the system does not say whether it has it."""
    if is_arm(platform.machine()):
        return False
    features = cpu_features()["features"]
    return not (features["avx_vnni"] or features["avx512_vnni"])


def parse_cpuinfo(text: str, machine: str) -> dict[str, Any]:
    """`cpu_features` from the text of /proc/cpuinfo; a pure function.

    Example: ("flags : fpu avx2", "x86_64") -> features with "avx2" True and all others False.
    """
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())  # of the first core
    names, key = (ARM, "features") if is_arm(machine) else (X86, "flags")
    name = fields.get("model name")
    if key not in fields:
        return {"name": name, "source": "unknown", "features": dict.fromkeys(names)}
    flags = set(fields[key].split())
    found = {name: flag in flags for name, flag in names.items()}
    return {"name": name, "source": "/proc/cpuinfo", "features": found}


def _sysctl(name: str) -> bool | None:
    value, size = ctypes.c_int(0), ctypes.c_size_t(4)
    libc = ctypes.CDLL(None)
    if libc.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0):
        return None
    return bool(value.value)
