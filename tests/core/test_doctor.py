"""`pico-edge doctor`: facts of a machine, what is wrong, what to do; also where nothing runs."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from pico_edge import cli
from pico_edge.commands.doctor import table
from pico_edge.errors import PicoEdgeError
from pico_edge.runtime import cpu, installed
from pico_edge.runtime.cpu import ARM, X86, cpu_features, parse_cpuinfo
from pico_edge.runtime.doctor import (
    addition_model,
    cgroup_bytes,
    cgroup_cpus,
    diagnose,
    doctor,
    run_a_node,
)
from pico_edge.runtime.session import Session

TINY = Path(__file__).parents[1] / "data" / "tiny.onnx"
COMMAND = [sys.executable, "-c", "from pico_edge.cli import main; main()"]
KEYS = {
    "ok", "pico_edge", "python", "system", "cpu", "threads", "memory", "onnxruntime", "providers",
    "packages", "extras", "telemetry", "environment", "problems", "advice",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PICO_EDGE_THREADS", "PICO_EDGE_PROVIDER", "PICO_EDGE_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def found() -> dict[str, Any]:
    return doctor()


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)
    assert found.keys() == KEYS
    assert found["ok"]
    assert found["providers"]["cpu"] == {"listed": True, "runs": True, "error": None}
    assert found["onnxruntime"]["version"] == onnxruntime.__version__
    assert found["onnxruntime"]["needs"] == "1.30.1"
    assert found["threads"]["auto"] == found["threads"]["physical"]
    assert found["cpu"]["features"].keys() in (X86.keys(), ARM.keys())


def test_people_get_80_columns_that_end_with_what_to_do(
    found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    well = {**found, "problems": [], "advice": []}
    last = 'do          nothing: pico-edge generate model.onnx "Hello"'
    assert table(well).splitlines()[-1] == last
    ill = {**found, "problems": ["\x1b[31m" + "x " * 60], "advice": ["one", "two"]}
    text = table(ill)
    assert text.endswith("do          one\n            two\n")
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_provider_counts_only_if_it_ran_a_node() -> None:
    assert run_a_node(onnxruntime, "CPUExecutionProvider") is None

    class Other(onnxruntime.InferenceSession):  # type: ignore[misc]
        def get_providers(self) -> list[str]:
            return ["OtherExecutionProvider"]

    class Lying:
        SessionOptions = onnxruntime.SessionOptions
        InferenceSession = Other

    assert run_a_node(Lying, "CPUExecutionProvider") == (
        "it did not start, OtherExecutionProvider took its place"
    )


def test_the_model_of_one_node_is_sound() -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_model_from_string(addition_model())
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Add"]


def test_what_is_wrong_is_named_with_the_cure(found: dict[str, Any]) -> None:
    def advise(path: str, value: object) -> str:
        changed = copy.deepcopy(found)
        changed["extras"] = {"train": [], "export": [], "log": []}
        place = changed
        *keys, last = path.split(".")
        for key in keys:
            place = place[key]
        place[last] = value
        problems, advice = diagnose(changed)
        return " | ".join([*problems, "do", *advice])

    assert advise("pico_edge", "0.1.0") == "do"
    assert "pip install numpy" in advise("packages.numpy", None)
    assert "pip install 'pico-edge[train]'" in advise("extras.train", ["torch"])
    broken = {"listed": True, "runs": False, "error": "no libcudart"}
    assert "cuda is listed by onnxruntime and does not run: no libcudart" in advise(
        "providers.cuda", broken
    )
    assert "no AVX2" in advise("cpu.features", {"avx2": False})
    assert advise("cpu.features", {"avx2": None}) == "do"
    old = {**found["onnxruntime"], "version": "1.24.4", "too_old": True, "needs": "1.30.1"}
    assert "pip install --upgrade 'onnxruntime>=1.30.1'" in advise("onnxruntime", old)
    directml = {**old, "distributions": {"onnxruntime-directml": "1.24.4"}}
    assert "files that you trust only" in advise("onnxruntime", directml)


@pytest.fixture
def two_distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path in which a second distribution says it is installed."""
    folder = tmp_path / "site" / "onnxruntime_gpu-9.9.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(folder.parent)
    yield folder.parent


def test_two_distributions_over_each_other_are_named_by_doctor_and_generate(
    two_distributions: Path,
) -> None:
    found = doctor()
    cure = (
        "onnxruntime and onnxruntime-gpu are installed over each other: pip uninstall -y "
        "onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu"
    )
    assert found["ok"]  # it may still run, by luck
    assert found["advice"][0] == cure
    assert Session(TINY, threads=1).notices == [cure]
    done = subprocess.run(
        [*COMMAND, "generate", str(TINY), "x", "-n", "1"],
        env={**os.environ, "PYTHONPATH": str(two_distributions)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert f"note: {cure}\n" in done.stderr


def test_an_onnxruntime_too_old_for_a_file_is_named_with_the_cure(tmp_path: Path) -> None:
    newer = tmp_path / "newer.onnx"
    data = TINY.read_bytes()
    assert data.count(b'"min_onnxruntime":"1.28"') == 1
    newer.write_bytes(data.replace(b'"min_onnxruntime":"1.28"', b'"min_onnxruntime":"9.28"'))
    with pytest.raises(PicoEdgeError) as refused:
        Session(newer)
    assert refused.value.exit_code == 1
    assert str(refused.value) == (
        f"{newer}: needs onnxruntime 9.28 or newer, {onnxruntime.__version__} is installed: "
        "pip install --upgrade 'onnxruntime>=9.28'"
    )


@pytest.mark.parametrize("contents", ["", "raise ImportError('libonnxruntime.so: no such file')"])
def test_a_broken_onnxruntime_is_one_line_for_generate_and_an_answer_of_doctor(
    contents: str, tmp_path: Path
) -> None:
    package = tmp_path / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").write_text(contents)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = run("generate", str(TINY), "x")
    assert done.returncode == 1
    assert done.stderr.startswith("error: onnxruntime cannot be imported (")
    assert done.stderr.count("\n") == 1
    assert "pip install --force-reinstall onnxruntime" in done.stderr
    done = run("doctor", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert not found["ok"]
    assert found["providers"] == {}
    assert found["advice"][0] == "pip install --force-reinstall onnxruntime"
    assert done.stderr.startswith("error: generate cannot run here: onnxruntime cannot be imported")
    assert run("doctor").stdout.endswith("pip install --force-reinstall onnxruntime\n")
    assert run("info", str(TINY)).returncode == 0  # needs none


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICO_EDGE_THREADS", "many")
    monkeypatch.setenv("PICO_EDGE_PROVIDER", "tpu")
    found = doctor()
    assert found["ok"]  # --threads and --provider go before them
    assert found["environment"]["PICO_EDGE_THREADS"] == "many"
    assert "PICO_EDGE_THREADS is 'many'" in found["problems"][0]
    assert "PICO_EDGE_PROVIDER is 'tpu', which does not run here" in found["problems"]
    assert "unset PICO_EDGE_THREADS" in found["advice"][0]


@pytest.mark.parametrize(
    ("found", "needed", "expected"),
    [
        ("1.32.0", "1.28", False),
        ("1.28.0", "1.28", False),
        ("1.24.4", "1.28", True),
        ("1.9.0", "1.28", True),
        ("1.28", "1.28.1", True),
        ("1.32.0+cpu", "1.30.1", False),
        ("1.32.0", None, False),
        ("1.32.0", {"a": 1}, False),
        ("1.32.0", "not a version", False),
    ],
)
def test_releases_are_compared_by_number(found: str, needed: object, expected: bool) -> None:
    assert installed.too_old(found, needed) == expected


def test_processors_are_read_from_cpuinfo() -> None:
    text = "processor\t: 0\nmodel name\t: A\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor : 1\n"
    found = parse_cpuinfo(text, "x86_64")
    assert (found["name"], found["source"]) == ("A", "/proc/cpuinfo")
    assert [name for name, value in found["features"].items() if value] == ["avx2", "avx512_vnni"]
    assert found["features"]["amx_int8"] is False
    text = "processor : 0\nFeatures : fp asimd asimddp i8mm\n"
    found = parse_cpuinfo(text, "aarch64")
    assert [name for name, value in found["features"].items() if value] == [
        "neon",
        "dotprod",
        "i8mm",
    ]
    unknown = parse_cpuinfo("", "x86_64")
    assert unknown == {"name": None, "source": "unknown", "features": dict.fromkeys(X86)}
    assert parse_cpuinfo("processor : 0\n", "arm64")["features"] == dict.fromkeys(ARM)
    if sys.platform == "linux":
        assert cpu_features()["source"] == "/proc/cpuinfo"


def test_limits_of_a_container_are_read(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert (cgroup_cpus(root), cgroup_bytes(root)) == (None, None)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert (cgroup_cpus(root), cgroup_bytes(root)) == (1.5, 1_000_000)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert (cgroup_cpus(root), cgroup_bytes(root)) == (None, None)
    old = tmp_path / "v1"
    for name, text in (
        ("cpu/cpu.cfs_quota_us", "50000"),
        ("cpu/cpu.cfs_period_us", "100000"),
        ("memory/memory.limit_in_bytes", str(2**63 - 4096)),
    ):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text(text)
    assert (cgroup_cpus(str(old)), cgroup_bytes(str(old))) == (0.5, None)
    (old / "cpu/cpu.cfs_quota_us").write_text("-1")
    assert cgroup_cpus(str(old)) is None


def test_doctor_opens_no_model_and_imports_no_torch() -> None:
    code = (
        "import sys; from pico_edge.runtime.doctor import doctor; assert doctor()['ok'];"
        "sys.exit(bool({'torch', 'onnx', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "expected"),
    [
        ("x86_64", "flags : fpu avx2", True),
        ("x86_64", "flags : avx2 avx512f", True),
        ("x86_64", "flags : avx2 avx_vnni", False),
        ("AMD64", "flags : avx2 avx512_vnni", False),
        ("AMD64", "", True),  # does not say
        ("aarch64", "Features : fp asimd", False),
    ],
)
def test_products_may_saturate_on_x86_without_vnni(monkeypatch, machine, cpuinfo, expected):
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(cpu, "cpu_features", lambda: parse_cpuinfo(cpuinfo, machine))
    assert cpu.may_saturate.__wrapped__() is expected
