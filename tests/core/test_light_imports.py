"""The command and the runtime are light, silent and offline: seen from a fresh Python process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parents[1] / "data" / "tiny.onnx"
HEAVY = ["torch", "onnx", "onnxscript", "onnx_ir", "tokenizers", "matplotlib", "requests"]

# Watches the process it runs in, from before the first import of ours.
PREAMBLE = """
import json, os, sys

network = []
telemetry_at_import = []

def audit(event, args):
    if event.startswith("socket."):
        network.append(event)

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            telemetry_at_import.append(os.environ.get("ORT_DISABLE_TELEMETRY"))
        return None

sys.addaudithook(audit)
sys.meta_path.insert(0, Watch())
"""
REPORT = """
sockets = []
if os.path.isdir("/proc/self/fd"):  # native code passes by the audit hooks, but not by the kernel
    for fd in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the one that listdir had open
            continue
        if link.startswith("socket:"):
            sockets.append(link)
report = {
    "modules": sorted(sys.modules),
    "network": network,
    "telemetry_at_import": telemetry_at_import,
    "sockets": sockets,
}
print("\\n" + json.dumps(report))
"""


def watch(code: str, *, cwd: Path) -> dict[str, Any]:
    """What happened in a process that ran this code."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "PICO_EDGE_"))}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PREAMBLE + code + REPORT],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_importing_the_command_and_the_runtime_is_light_and_offline(tmp_path: Path) -> None:
    report = watch("import pico_edge.cli, pico_edge.runtime", cwd=tmp_path)
    assert {"pico_edge.cli", "pico_edge.runtime"} <= set(report["modules"])
    assert not set(HEAVY) & set(report["modules"])
    assert report["network"] == []
    assert report["sockets"] == []


def test_importing_the_command_leaves_onnxruntime_for_later(tmp_path: Path) -> None:
    report = watch("import pico_edge.cli", cwd=tmp_path)
    assert not {"onnxruntime", "tiktoken"} & set(report["modules"])


def test_generating_is_light_and_opens_no_socket(tmp_path: Path) -> None:
    code = f"""
from pico_edge.runtime import Model
text = Model({str(MODEL)!r}, threads=1).generate("Hello", max_new_tokens=8, seed=1).text
assert text, "no text"
"""
    report = watch(code, cwd=tmp_path)
    assert "onnxruntime" in report["modules"]
    assert not set(HEAVY) & set(report["modules"])
    assert report["network"] == []
    assert report["sockets"] == []


def test_the_generate_command_is_light_and_opens_no_socket(tmp_path: Path) -> None:
    code = f"""
from pico_edge.cli import main
sys.argv = ["pico-edge", "generate", {str(MODEL)!r}, "Hello", "-n", "8", "--seed", "1"]
try:
    main()
except SystemExit as stopped:
    assert not stopped.code, stopped.code
"""
    report = watch(code, cwd=tmp_path)
    assert "onnxruntime" in report["modules"]
    assert not set(HEAVY) & set(report["modules"])
    assert report["network"] == []
    assert report["sockets"] == []


def test_telemetry_is_off_before_onnxruntime_is_imported(tmp_path: Path) -> None:
    code = f"""
from pico_edge.runtime import Model
Model({str(MODEL)!r}, threads=1)
"""
    assert watch(code, cwd=tmp_path)["telemetry_at_import"][:1] == ["1"]


def test_the_watch_sees_what_it_forbids(tmp_path: Path) -> None:
    code = """
import socket, requests, onnxruntime
left_open = socket.socket()
"""
    report = watch(code, cwd=tmp_path)
    assert "requests" in report["modules"]
    assert "socket.__new__" in report["network"]
    assert report["telemetry_at_import"][:1] == [None]
    assert sys.platform != "linux" or report["sockets"]
