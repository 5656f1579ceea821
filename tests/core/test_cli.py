"""The command line as its users meet it: exit codes, streams, one-line errors, signals, pipes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import typer

from pico_edge import cli, terminal

TINY = Path(__file__).parents[1] / "data" / "tiny.onnx"
COMMAND = [sys.executable, "-c", "from pico_edge.cli import main; main()"]
# Every command and its flags: growth is a decision.
FLAGS = {
    "bench": (
        "--debug --depth --format --json --new-tokens --prompt-tokens --provider --quiet "
        "--repeats --threads"
    ),
    "compare": (
        "--data --debug --depth --encoding --json --new-tokens --prompt-tokens --quiet --rounds "
        "--text-field --threads"
    ),
    "eval": "--compare --debug --encoding --json --quiet --stride --text-field --threads",
    "doctor": "--debug --json --quiet",
    "export": (
        "--bits --debug --encoding --eval-data --force --json --max-loss-increase --out --quantize "
        "--quiet --target --text-field"
    ),
    "generate": (
        "--allow-foreign --allow-special --banned-tokens --context-overflow --debug "
        "--frequency-penalty --json --logit-bias --logprobs --max-new-tokens --min-new-tokens "
        "--min-p --no-repeat-ngram-size --num-samples --presence-penalty --provider --quiet "
        "--repetition-penalty --seed --speculate --stop --stream --temperature --threads --top-k "
        "--top-p --typical-p"
    ),
    "info": "--debug --json --quiet",
    "train": (
        "--batch-size --beta1 --beta2 --bias --block-size --compile --debug --device --dropout "
        "--dtype --encoding --eval-interval --eval-iters --force --gelu --grad-accum --grad-clip "
        "--init-from --json --learning-rate --max-iters --min-lr --minutes --n-embd --n-head "
        "--n-layer --optimizer --out --preset --quiet --ranks --reinit-embeddings --resume "
        "--sample-prompt --seed --target-bytes --target-tokens-per-second --tensorboard "
        "--text-field --threads --tokenizer --val-data --val-fraction --vocab-size --warmup-iters "
        "--weight-decay"
    ),
    "verify": "--debug --json --provider --quiet --threads",
}
JSON_KEYS = {
    "prompt",
    "text",
    "token_ids",
    "finish_reason",
    "prompt_tokens",
    "new_tokens",
    "time_to_first_token_s",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "provider",
    "threads",
    "seed",
    "drafted_tokens",
    "accepted_tokens",
}


def run(
    *arguments: str | bytes, stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_the_flags_are_those_that_were_decided() -> None:
    group = typer.main.get_command(cli.app)
    found = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        options = [p.opts for p in command.params if p.param_type_name == "option"]
        found[name] = {o for opts in options for o in opts if o.startswith("--")} - {"--help"}
    assert found == {name: set(flags.split()) for name, flags in FLAGS.items()}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate"], 2, "Missing argument 'MODEL'.*pico-edge generate --help"),
        (["generate", "{tiny}", "--tempp", "1"], 2, "No such option: --tempp"),
        (["generat"], 2, "No such command 'generat'"),
        (["generate", "{tiny}", "x", "--provider", "tpu"], 2, "'tpu' is not one of"),
        (["generate", "{tiny}", "x", "--top-k", "many"], 2, "--top-k"),
        (["generate", "{tiny}", "x", "--top-k", "-1"], 2, "top_k is -1"),
        (["generate", "{tiny}", "x", "--top-p", "0"], 2, "top_p is 0"),
        (["generate", "{tiny}", "x", "--top-p", "1.5"], 2, "top_p is 1.5"),
        (["generate", "{tiny}", "x", "--temperature", "-1"], 2, "temperature is -1"),
        (["generate", "{tiny}", "x", "--temperature", "inf"], 2, "temperature is inf"),
        (["generate", "{tiny}", "x", "--temperature", "nan"], 2, "temperature is nan"),
        (["generate", "{tiny}", "x", "--seed", "-1"], 2, "seed is -1"),
        (["generate", "{tiny}", "x", "--seed", str(2**63)], 2, "seed is 9223372036854775808"),
        (["generate", "{tiny}", "x", "--max-new-tokens", "-1"], 2, "max_new_tokens is -1"),
        (["generate", "{tiny}", "x", "--num-samples", "0"], 2, "--num-samples is 0"),
        (["generate", "{tiny}", "x", "--threads", "0"], 2, "threads"),
        (["generate", "{tiny}", "x", "--stop", ""], 2, "stop"),
        (["generate", "{tiny}", "x", "--typical-p", "0"], 2, "typical_p is 0"),
        (["generate", "{tiny}", "x", "--no-repeat-ngram-size", "-1"], 2, "no_repeat_ngram_size is"),
        (["generate", "{tiny}", "x", "--min-new-tokens", "-1"], 2, "min_new_tokens is -1"),
        (["generate", "{tiny}", "x", "--logprobs", "-1"], 2, "logprobs is -1"),
        (["generate", "{tiny}", "x", "--logit-bias", "a"], 2, "--logit-bias is 'a'.*TOKEN=NUMBER"),
        (["generate", "{tiny}", "x", "--logit-bias", "a=b"], 2, "--logit-bias is 'a=b'"),
        (["generate", "{tiny}", "x", "--logit-bias", "ab=1"], 2, "logit_bias: 'ab' is 2 tokens"),
        (["generate", "{tiny}", "x", "--logit-bias", "a=nan"], 2, "logit_bias of 'a' is nan"),
        (["generate", "{tiny}", "x", "--banned-tokens", "300"], 2, "banned_tokens: token 300"),
        (["generate", "{tmp}/none.onnx", "x"], 3, "none.onnx: No such file"),
        (["generate", "{tmp}", "x"], 3, "{tmp}"),
        (["generate", "{tmp}/" + "x" * 300, "x"], 3, "File name too long"),
        (["generate", "{tmp}/empty/model.onnx", "x"], 3, "Not a directory"),
        (["generate", "{tmp}/empty", "x"], 3, "empty"),
        (["generate", "{tmp}/page", "x"], 3, "web page"),
        (["generate", "{tmp}/zip", "x"], 3, "checkpoint|zip"),
        (["generate", "{tiny}", "x", "--provider", "cuda"], 1, "pip install onnxruntime-gpu"),
    ],
)
def test_a_refusal_is_one_line_and_has_its_exit_code(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PICO_EDGE_DEBUG", raising=False)
    (tmp_path / "empty").touch()
    (tmp_path / "page").write_text("<!DOCTYPE html><html></html>")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    filled = [a.format(tiny=TINY, tmp=tmp_path) for a in arguments]
    assert cli._run(filled) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert re.search(message.format(tmp=re.escape(str(tmp_path))), captured.err)


@pytest.mark.parametrize(("command", "file"), [("train", "data.txt"), ("export", "ckpt.pt")])
def test_a_missing_extra_is_named(
    command: str,
    file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli._run([command, file]) == 2
    expected = f"error: {command} needs PyTorch: pip install 'pico-edge[{command}]'\n"
    assert capsys.readouterr().err == expected


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["generate", "none.onnx", "x", "--debug"]) == 3
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_no_arguments_is_help_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run([]) == 0
    assert "Usage: pico-edge" in capsys.readouterr().out


def test_version_names_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["--version"]) == 0
    assert re.match(r"pico-edge \d+\.\d+\.\d+\nonnxruntime \d", capsys.readouterr().out)


def test_json_is_one_document_with_the_keys_of_the_contract(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["generate", str(TINY), "Hi", "--json", "--seed", "1", "-n", "5"]
    assert cli._run(arguments) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document.keys() == JSON_KEYS
    assert document["prompt"] == "Hi"
    assert document["new_tokens"] == len(document["token_ids"]) == 5
    assert document["seed"] == 1
    assert cli._run([*arguments, "--num-samples", "3", "--quiet"]) == 0
    captured = capsys.readouterr()
    samples = json.loads(captured.out)["samples"]
    assert [sample.keys() for sample in samples] == [JSON_KEYS] * 3
    assert samples[0]["text"] == document["text"] != samples[1]["text"]
    assert captured.err == ""


def generated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON of `generate` on the tiny model."""
    assert cli._run(["generate", str(TINY), *arguments, "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_prompts_and_lengths_at_the_ends_of_their_range(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Empty, blank, as long as the context and longer; no token, and more than ever come."""
    assert generated(capsys, "", "-n", "3", "--min-new-tokens", "3")["prompt_tokens"] == 1
    assert generated(capsys, "  \n", "-n", "3")["prompt_tokens"] == 3
    assert generated(capsys, "x", "-n", "0")["text"] == ""
    billion = ["-n", "1000000000", "--min-new-tokens", "1000000000", "--seed", "1"]
    for n_prompt, n_new in ((62, 3), (64, 1), (65, 0), (500, 0)):
        stopped = generated(capsys, "x" * n_prompt, *billion, "--context-overflow", "stop")
        assert (stopped["finish_reason"], stopped["new_tokens"]) == ("context", n_new)
        slid = generated(capsys, "x" * n_prompt, "-n", "70", "--min-new-tokens", "70")
        assert (slid["finish_reason"], slid["new_tokens"]) == ("length", 70)
        assert slid["prompt_tokens"] == n_prompt


def test_one_seed_is_one_text_with_any_number_of_threads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And twice, streamed or not, or as the first of several samples."""
    flags = ["Hi", "--seed", "5", "-n", "80"]
    text = generated(capsys, *flags)["text"]
    for more in ((), ("--threads", "1"), ("--threads", "4"), ("--no-stream",)):
        assert generated(capsys, *flags, *more)["text"] == text
    assert generated(capsys, *flags, "--num-samples", "3")["samples"][0]["text"] == text


def test_a_prompt_of_a_million_characters_is_cut_to_the_context() -> None:
    done = run("generate", str(TINY), "-n", "3", "--json", "--quiet", stdin=b"a" * 10**6)
    assert done.returncode == 0
    assert json.loads(done.stdout)["prompt_tokens"] == 10**6


def test_biases_bans_and_logprobs_are_given_by_id_or_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["Hi", "-n", "4", "--seed", "1"]
    assert generated(capsys, *flags, "--logit-bias", "z=100")["text"] == "zzzz"
    assert generated(capsys, *flags, "--logit-bias", "122=100")["text"] == "zzzz"
    assert generated(capsys, *flags, "--logit-bias", "==100")["text"] == "===="
    banned = ["--logit-bias", "z=100", "--logit-bias", "y=90", "--banned-tokens", "z"]
    assert generated(capsys, *flags, *banned)["text"] == "yyyy"
    assert generated(capsys, *flags, *banned, "--banned-tokens", "121")["text"] not in (
        "yyyy",
        "zzzz",
    )
    made = generated(capsys, *flags, "--logprobs", "2")
    assert made.keys() == JSON_KEYS | {"logprobs"}
    assert [entry["token_id"] for entry in made["logprobs"]] == made["token_ids"]
    assert [len(entry["top"]) for entry in made["logprobs"]] == [2] * 4
    assert generated(capsys, *flags, "--logprobs", "0")["logprobs"][0]["top"] == []


def test_streaming_or_not_the_text_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(TINY), "Hi", "--seed", "1", "-n", "40", "--quiet"]
    assert cli._run(arguments) == 0
    streamed = capsys.readouterr()
    assert cli._run([*arguments, "--no-stream"]) == 0
    assert capsys.readouterr().out == streamed.out
    assert streamed.out.startswith("Hi")
    assert streamed.out.endswith("\n")
    assert streamed.err == ""


def test_names_from_other_tools_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    known = ["--temperature", "0", "--top-k", "3", "--max-new-tokens", "4"]
    others = ["--temp", "0", "--top_k", "3", "--max_tokens", "4"]
    texts = []
    for flags in (known, others):
        assert cli._run(["generate", str(TINY), "Hi", "--quiet", *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_the_prompt_comes_from_the_argument_a_dash_or_a_pipe() -> None:
    flags = ["--seed", "1", "-n", "8", "--quiet"]
    texts = [
        run("generate", str(TINY), "Zoë 👩", *flags).stdout,
        run("generate", str(TINY), "-", *flags, stdin="Zoë 👩".encode()).stdout,
        run("generate", str(TINY), *flags, stdin="Zoë 👩".encode()).stdout,
    ]
    assert texts[0].startswith("Zoë 👩".encode())
    assert texts[1] == texts[2] == texts[0]
    empty = run("generate", str(TINY), *flags)
    assert empty.returncode == 0
    assert empty.stdout.strip()


@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1"])
def test_any_locale_prints_utf8_and_no_escape_codes(locale: str) -> None:
    done = run(
        "generate",
        str(TINY),
        "👩 é",
        "-n",
        "4",
        "--seed",
        "1",
        LC_ALL=locale,
        TERM="dumb",
        NO_COLOR="1",
    )
    assert done.returncode == 0
    assert done.stdout.startswith("👩 é".encode()) or locale == "en_US.ISO-8859-1"
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"\r" not in done.stderr
    assert re.search(rb"decode [\d]+ tokens/s.* seed 1\n$", done.stderr)


@pytest.mark.skipif(os.name == "nt", reason="Windows passes text, not bytes")
def test_bytes_that_are_no_text_in_the_arguments_do_no_harm() -> None:
    for given, read in ((b"a\xffb", "a\ufffdb"), ("é".encode() + b"\xc3", "é\ufffd")):
        for locale in ("C.UTF-8", "C"):
            done = run(
                "generate", str(TINY), given, "-n", "4", "--seed", "1", "--json", LC_ALL=locale
            )
            assert (done.returncode, json.loads(done.stdout)["prompt"]) == (0, read)


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_closed_streams_get_nothing_and_give_nothing_to_others() -> None:
    for command in ("generate {} Hi -n 4 --json", "info {}", "verify {} --json"):
        line = '"$0" -m pico_edge ' + command.format(f'"{TINY}"')
        closed = subprocess.run(
            ["sh", "-c", f"{line} 2>&-", sys.executable], capture_output=True, timeout=120
        )
        assert closed.returncode == 0
        assert b"tokens/s" not in closed.stdout
        if "--json" in command:
            json.loads(closed.stdout)
        closed = subprocess.run(
            ["sh", "-c", f"{line} >&-", sys.executable], capture_output=True, timeout=120
        )
        assert (closed.returncode, closed.stdout) == (1, b"")
        assert re.search(rb"^error: standard output is closed: .*\n\Z", closed.stderr, re.M)


def test_a_reader_that_goes_away_ends_it_silently() -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", str(TINY), "Hi", "-n", "1000000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(3)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_an_error() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "generate", str(TINY), "Hi", "-n", "4"],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=120,
        )
    assert done.returncode == 1
    assert done.stderr == b"error: No space left on device\n"


@pytest.mark.parametrize("samples", ["1", "2"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_after_the_current_token(
    number: signal.Signals, code: int, samples: str
) -> None:
    flags = ["-n", "100000000", "--num-samples", samples]
    process = subprocess.Popen(
        [*COMMAND, "generate", str(TINY), "Hi", *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    if samples == "1":
        process.stdout.read(20)
    else:  # a batch prints at its end: anywhere from start-up on will do
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors == b""


def test_threads_of_pytorch_spin_briefly_unless_the_user_has_a_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {})
    terminal.spin_briefly()
    assert os.environ == {"GOMP_SPINCOUNT": "3000"}
    for chosen in ({"GOMP_SPINCOUNT": "infinity"}, {"OMP_WAIT_POLICY": "passive"}):
        monkeypatch.setattr(os, "environ", dict(chosen))
        terminal.spin_briefly()
        assert os.environ == chosen


@pytest.mark.parametrize("command", ["train", "export", "eval"])
def test_threads_are_told_before_pytorch_is_loaded(command: str, tmp_path: Path) -> None:
    """It reads the variable when it is loaded."""
    pytest.importorskip("torch")
    (tmp_path / "ckpt.pt").write_bytes(b"PK\x03\x04 no checkpoint")
    (tmp_path / "data.txt").write_text("text")
    arguments = {
        "train": ["train", "data.txt", "--init-from", "ckpt.pt", "-o", "new.pt"],
        "export": ["export", "ckpt.pt"],
        "eval": ["eval", "ckpt.pt", "data.txt"],
    }
    code = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print('looking for torch with', os.environ.get('GOMP_SPINCOUNT'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        "from pico_edge.cli import main; main()\n"
    )
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments[command]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3, done.stderr  # the checkpoint is refused
    # The first look asks whether it is there at all, the last is the import.
    assert done.stdout.splitlines()[-1] == "looking for torch with 3000"
