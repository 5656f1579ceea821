"""Run the committed models on ARM64 under emulation, and compare with this machine.

    python tests/emulate/aarch64.py --qemu PATH/TO/qemu-aarch64 --mirror URL

Needs Linux with apt-get, a network, and qemu-user 10 or newer: 7.2 ends in a segmentation fault
when it loads onnxruntime. Downloads Debian's Python for arm64 and the aarch64 wheels of what the
runtime needs into `--folder`, nothing is installed. Then, for each file and each kind of processor,
`pico-edge verify` and a greedy `pico-edge generate`, there and here. Exit 1 if a file fails to
verify. No test runs this: it takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODELS = [ROOT / "tests/data" / name for name in ("tiny_fp32.onnx", "tiny.onnx", "tiny_int4.onnx")]
PROMPT = "The "
NEW_TOKENS = 48
# With int8 and bfloat16 matrix products; with dot products; with neither.
PROCESSORS = ("max", "neoverse-n1", "cortex-a72")
RELEASE = "bookworm"  # of Debian: its Python is 3.11
PYTHON = "3.11"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEBS = (
    f"python{PYTHON}-minimal libpython{PYTHON}-minimal libpython{PYTHON}-stdlib libc6 libgcc-s1 "
    "libstdc++6 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libcrypt1 libuuid1"
).split()
WHEELS = ("onnxruntime", "numpy", "tiktoken", "typer")
MAIN = "from pico_edge.cli import main; main()"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", type=Path, nargs="*", default=MODELS)
    parser.add_argument("--qemu", default="qemu-aarch64", help="of qemu-user 10 or newer")
    parser.add_argument("--mirror", required=True, help="URL of a Debian mirror")
    parser.add_argument("--folder", type=Path, help="where downloads are kept; default: nowhere")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        root, site = folder / "root", folder / "site"
        if not root.exists():
            get_python(folder, root, arguments.mirror)
        if not site.exists():
            get_wheels(folder, site)
        package = Path(temporary, "package")
        shape_like_the_wheel(package)
        path = f"{package}{os.pathsep}{site}"
        emulated = [arguments.qemu, "-L", str(root), "-E", f"PYTHONPATH={path}"]
        python = str(root / "usr/bin" / f"python{PYTHON}")
        return compare(emulated, python, [model.resolve() for model in arguments.models])


def compare(emulated: list[str], python: str, models: list[Path]) -> int:
    failed = 0
    for model in models:
        here = [sys.executable, "-c", MAIN]
        text = run([*here, *greedy(model)])["text"]
        for processor in PROCESSORS:
            there = [emulated[0], "-cpu", processor, *emulated[1:], python, "-c", MAIN]
            report = run([*there, "verify", str(model), "--json", "--threads", "1"])
            checks = {check["name"]: check for check in report["checks"]}
            found = run([*there, *greedy(model)])["text"]
            pairs = enumerate(zip(text, found, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(len(text), len(found)))
            failed += not report["ok"]
            print(
                f"{model.name:15} {processor:12} verify {'ok' if report['ok'] else 'FAILED':6} "
                f"text {'equal' if text == found else f'parts after {same} characters':28} "
                f"logits: {checks['logits']['detail']}; bits: {checks['bits per byte']['detail']}",
                flush=True,
            )
            for check in checks.values():
                if not check["ok"]:
                    print(f"    {check['name']}: {check['detail']}")
    return 1 if failed else 0


def greedy(model: Path) -> list[str]:
    flags = ["--temperature", "0", "-n", str(NEW_TOKENS), "--threads", "1", "--json", "--quiet"]
    return ["generate", str(model), PROMPT, *flags]


def run(command: list[str]) -> dict[str, Any]:
    """The JSON of a command; one that fails with 1 has still printed it."""
    # Elsewhere than in the sources, whose ./pico_edge would hide the package.
    where = tempfile.gettempdir()
    done = subprocess.run(command, capture_output=True, text=True, cwd=where)
    if done.returncode not in (0, 1) or not done.stdout:
        raise SystemExit(f"{' '.join(command)}\nexit {done.returncode}: {done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def get_python(folder: Path, root: Path, mirror: str) -> None:
    """Debian's packages, unpacked; apt gets folders of its own, so that the system's stay as is."""
    apt = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial", "debs"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(
        f"deb [arch=arm64 signed-by={KEYRING}] {mirror} {RELEASE} main\n"
    )
    settings = {
        "Dir::State": apt,
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    subprocess.run(["apt-get", *options, "update"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        ["apt-get", *options, "download", *DEBS],
        check=True,
        cwd=apt / "debs",
        stdout=subprocess.DEVNULL,
    )
    partial = folder / "root.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for deb in (apt / "debs").glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(deb), str(partial)], check=True)
    partial.rename(root)


def get_wheels(folder: Path, site: Path) -> None:
    tags = ("manylinux_2_28", "manylinux_2_27", "manylinux2014", "manylinux_2_17")
    platforms = [word for tag in tags for word in ("--platform", f"{tag}_aarch64")]
    partial = folder / "site.partial"
    shutil.rmtree(partial, ignore_errors=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--target", str(partial)),
            *("--only-binary", ":all:", "--implementation", "cp", "--python-version", PYTHON),
            *platforms,
            *("-c", str(ROOT / "constraints.txt"), *WHEELS),
        ],
        check=True,
    )
    partial.rename(site)


def shape_like_the_wheel(package: Path) -> None:
    """Links to the sources, in the folders that an installation has."""
    target = package / "pico_edge"
    for source, name in (
        ("pico_edge", ""),
        ("pico_edge/commands", "commands"),
        ("train", "train"),
        ("export", "export"),
        ("runtime", "runtime"),
    ):
        (target / name).mkdir(parents=True, exist_ok=True)
        for path in (ROOT / source).glob("*.py"):
            (target / name / path.name).symlink_to(path)


if __name__ == "__main__":
    sys.exit(main())
