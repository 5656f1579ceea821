"""What README.md says can be typed, can be typed; the folders and files it shows are there."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from pico_edge.cli import app
from pico_edge.errors import ArtefactError, DivergedError, PicoEdgeError, UsageError
from pico_edge.train.settings import PRESET_BELOW_BYTES, PRESETS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```.*\n((?:.*\n)*?)```$", re.MULTILINE)
BLOCKS = FENCE.findall(README)
SPANS = re.findall(r"`([^`\n]+)`", FENCE.sub("", README))

GROUP: Any = get_command(app)


def flags(command: str | None) -> set[str]:
    """Flags of a command, or of all of them; `--help` is every command's."""
    names = [command] if command else GROUP.commands
    found = {flag for name in names for p in GROUP.commands[name].params for flag in p.opts}
    found |= {
        flag for name in names for p in GROUP.commands[name].params for flag in p.secondary_opts
    }
    return found | {"-h", "--help", "--version"}


def arguments(text: str) -> Iterator[list[str]]:
    """What follows `pico-edge` or `-m pico_edge` in each line of a shell block, word by word."""
    lines = text.replace("\\\n", " ").splitlines()
    prompted = [line.strip()[2:] for line in lines if line.strip().startswith("$ ")]
    for line in prompted or lines:  # behind a prompt is a command, the rest is what it printed
        if "pico-edge " not in line and "-m pico_edge" not in line:
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        for i, word in enumerate(words):
            command_starts = i == 0 or not words[i - 1].strip("|&;(") or "=" in words[i - 1]
            if (word == "pico-edge" and command_starts) or words[i - 1 : i + 1] == [
                "-m",
                "pico_edge",
            ]:
                rest = words[i + 1 :]
                end = next(
                    (j for j, word in enumerate(rest) if not word.strip("|&;<>()")), len(rest)
                )
                yield rest[:end]


COMMANDS = [words for block in BLOCKS for words in arguments(block)]


def parse(words: list[str]) -> None:
    """Parse as the command line does, and run nothing. Raises click's UsageError."""
    try:
        if words[0].startswith("-"):
            GROUP.make_context("pico-edge", list(words))
            return
        parent = GROUP.make_context("pico-edge", words[:1])
        _, command, rest = GROUP.resolve_command(parent, list(words))
        command.make_context(words[0], rest, parent=parent)
    except typer.Exit as stopped:  # --help, --version
        assert stopped.exit_code == 0


def test_every_command_in_the_readme_parses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in COMMANDS:
        for word in words:
            if re.fullmatch(r"[\w-][\w./-]*\.\w+", word):  # a file, which may have to exist
                (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / word).touch()
        parse(words)


def test_every_flag_in_the_readme_exists() -> None:
    for words in COMMANDS:
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= flags(words[0] if words[0] in GROUP.commands else None), words
    for span in SPANS:
        if span.startswith(("--", "pico-edge ")):
            words = span.split()
            command = words[1] if words[0] == "pico-edge" else None
            used = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", span))
            assert used <= flags(command if command in GROUP.commands else None), span


def test_every_command_named_in_the_text_exists() -> None:
    for span in SPANS:
        named = re.match(r"pico-edge ([a-z]+)", span)
        assert named is None or named.group(1) in GROUP.commands, span


def test_the_tree_in_the_readme_is_the_tree() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = settings["tool"]["setuptools"]["package-dir"].values()
    for block in BLOCKS:
        folders = set(re.findall(r"^(?:[├└]── )?([\w.-]+)/", block, re.MULTILINE)) - {"pico-edge"}
        if "pico_edge" not in folders:
            continue
        assert {*packages, "tests", "benchmarks"} <= folders
        assert [name for name in sorted(folders) if not (ROOT / name).is_dir()] == []
        modules = {path.name for name in folders for path in (ROOT / name).rglob("*.py")}
        assert set(re.findall(r"\b\w+\.py\b", block)) <= modules


def test_make_targets_named_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"^(?:\$ )?make ([a-z-]+)", "\n".join([*BLOCKS, *SPANS]), re.MULTILINE)
    assert set(named) <= targets


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (
            "pico-edge train data.txt --minutes 2  # two\n",
            [["train", "data.txt", "--minutes", "2"]],
        ),
        ("$ pico-edge info model.onnx\npico-edge 0.1.0\n", [["info", "model.onnx"]]),
        ("echo Hi | pico-edge generate m.onnx - > out\nls\n", [["generate", "m.onnx", "-"]]),
        ("A=1 pico-edge generate \\\n  m.onnx\n", [["generate", "m.onnx"]]),
        ("torchrun -m pico_edge train a.txt && ls\n", [["train", "a.txt"]]),
        ("pip install pico-edge --no-deps\n", []),
    ],
)
def test_commands_are_found_in_a_block(block: str, expected: list[list[str]]) -> None:
    assert list(arguments(block)) == expected


def test_the_table_of_sizes_is_that_of_the_code() -> None:
    pytest.importorskip("torch")
    from pico_edge.train.bpe import default_tokenizer

    rows = re.findall(
        r"^\| [\w ]+ \| (\w+) \| (\d+) x (\d+) \((\d+)\) \| (\d+) \| (\w+)", README, re.M
    )
    found = {name: tuple(map(int, numbers)) for name, *numbers, _ in rows}
    assert found == {
        name: (p.n_layer, p.n_embd, p.n_head, p.block_size)
        for name, p in PRESETS.items()
        if name in (*PRESET_BELOW_BYTES, "small")
    }
    limits = {"100 kB": "nano", "2 MB": "micro", "50 MB": "mini"}
    sizes = {"kB": 1_000, "MB": 1_000_000}
    for limit, name in limits.items():
        number, unit = limit.split()
        assert f"| below {limit} | {name} |" in README
        assert PRESET_BELOW_BYTES[name] == int(number) * sizes[unit]
    for n_bytes, (*_, tokens) in zip((1, 1_999_999, 2_000_000, 50_000_000), rows, strict=True):
        kind, vocab_size = default_tokenizer(n_bytes)
        assert tokens == ("bytes" if kind == "simple" else str(vocab_size))


def test_the_exit_codes_in_the_readme_are_those_of_the_errors() -> None:
    text = " ".join(README.split())
    said = "1 failed, 2 wrong usage, 3 an input file refused, 4 training diverged, 128+n"
    assert said in text
    errors = (PicoEdgeError, UsageError, ArtefactError, DivergedError)
    assert [error.exit_code for error in errors] == [1, 2, 3, 4]


def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes((ROOT / "tests/data/tiny.onnx").read_bytes())
    blocks = [block for block in BLOCKS if "from pico_edge" in block]
    assert blocks
    for block in blocks:
        exec(block, {})
    assert "block_size" in capsys.readouterr().out
