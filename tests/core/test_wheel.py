"""The wheel and the sdist, built from a copy of the tree, hold what they must and nothing else."""

import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "pico_edge": "pico_edge",
    "train": "pico_edge/train",
    "export": "pico_edge/export",
    "runtime": "pico_edge/runtime",
}
# What is in a working tree and in no clone.
LOCAL = shutil.ignore_patterns(
    *(
        ".git",
        ".venv",
        ".*_cache",
        "__pycache__",
        ".hypothesis",
        "build",
        "dist",
        "demo",
        ".peers",
        ".venv-peers",
        "*.egg-info",
    )
)


def run(command: Sequence[str | Path], *, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with one sdist and the wheel built from it."""
    tree = tmp_path_factory.mktemp("tree") / "pico-edge"
    shutil.copytree(ROOT, tree, ignore=LOCAL)
    run(["-m", "build", "--no-isolation"], cwd=tree)
    return tree / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    [path] = dist.glob("*.whl")
    return path


def test_the_modules_of_the_wheel_are_exactly_those_of_the_four_folders(wheel: Path) -> None:
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    with zipfile.ZipFile(wheel) as file:
        found = {name for name in file.namelist() if ".dist-info/" not in name}
    assert found == expected | {"pico_edge/py.typed"}


def test_the_wheel_carries_licence_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        [folder] = {name.split("/")[0] for name in file.namelist() if ".dist-info/" in name}
        licence = file.read(f"{folder}/licenses/LICENSE")
        entry_points = configparser.ConfigParser()
        entry_points.read_string(file.read(f"{folder}/entry_points.txt").decode())
        metadata = file.read(f"{folder}/METADATA").decode()
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert {name: dict(entry_points[name]) for name in entry_points.sections()} == {
        "console_scripts": {"pico-edge": "pico_edge.cli:main"}
    }
    assert "License-Expression: MIT\n" in metadata
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in metadata


def test_the_sdist_holds_what_it_takes_to_build_and_test(dist: Path) -> None:
    [sdist] = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        found = {name.partition("/")[2] for name in file.getnames() if not name.endswith(".pyc")}
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in [*FOLDERS, "tests", "benchmarks"]
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {"pyproject.toml", "constraints.txt", "MANIFEST.in", "Makefile", ".ci/run"}
    expected |= {"README.md", "CHANGELOG.md", "NOTES.md", "LICENSE"}
    assert expected <= found
    assert not [name for name in found if name.startswith((".venv", ".git", "build", "demo"))]


def test_the_installed_wheel_starts(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, "--target", site, wheel], cwd=tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); "
        "import pico_edge.cli, pico_edge.train, pico_edge.export, pico_edge.runtime; "
        "print(*(module.__file__ for name, module in sorted(sys.modules.items()) "
        "if name.partition('.')[0] == 'pico_edge'), sep='\\n')"
    )
    # NOTE: -P, or a folder named pico_edge in the working directory would hide the installed one.
    files = run(["-P", "-c", code], cwd=tmp_path).splitlines()
    assert len(files) >= 5
    assert all(Path(file).is_relative_to(site) for file in files)
