"""Training end to end on tiny models: it learns, it resumes exactly, it leaves what it promises."""

import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pico_edge.errors import ArtefactError, UsageError
from pico_edge.train import setup
from pico_edge.train.checkpoint import build_model, load_checkpoint
from pico_edge.train.loop import train
from pico_edge.train.report import Reporter
from pico_edge.train.settings import TrainSettings

TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer. " for i in range(200))
# Dropout and accumulation on: both must survive a resume.
TINY = TrainSettings(
    preset="nano",
    n_layer=2,
    n_head=2,
    n_embd=32,
    block_size=16,
    dropout=0.2,
    batch_size=4,
    grad_accum=2,
    max_iters=100,
    eval_interval=20,
    eval_iters=2,
    threads=1,
    dtype="float32",  # timed anew, a busy machine may choose another
)


class StopAt(Reporter):
    """A reporter that sends this process a real signal at a line that begins so."""

    def __init__(self, beginning, signum):
        super().__init__(io.StringIO())
        self.beginning, self.signum = beginning, signum
        self.lines = []

    def say(self, text):
        self.lines.append(text)
        if text.startswith(self.beginning):
            os.kill(os.getpid(), self.signum)


class Lines(Reporter):
    def __init__(self):
        super().__init__(io.StringIO())
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def quiet():
    return Reporter(io.StringIO(), quiet=True)


def tiny(folder, **changes):
    return dataclasses.replace(TINY, out=str(folder / "ckpt.pt"), **changes)


def weights_hash(path):
    """SHA-256 of the weights in a checkpoint, names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_checkpoint(path).model.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def metrics(folder):
    lines = (folder / "ckpt.run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_times(rows):
    return [
        {k: v for k, v in row.items() if k not in ("elapsed_s", "tokens_per_second")}
        for row in rows
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "data.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """The folder of a run of 100 steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    result = train([data], tiny(folder), reporter=quiet())
    assert (result.stopped, result.iter, result.signal) == ("max_iters", 100, None)
    return folder


def test_a_run_learns_and_leaves_what_it_promises(whole, data):
    rows = metrics(whole)
    assert [row["iter"] for row in rows] == [20, 40, 60, 80, 100]
    assert list(rows[0]) == [
        "iter",
        "tokens",
        "elapsed_s",
        "train_loss",
        "val_loss",
        "val_bits_per_byte",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
    ]
    assert rows[0]["tokens"] == 20 * 2 * 4 * 16
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] < 5.0  # ln 257 = 5.5 at the start
    assert rows[-1]["val_loss"] < 2.5
    folder = whole / "ckpt.run"
    names = {"last.pt", "last.prev.pt", "metrics.jsonl", "samples.txt", "loss.png", "lock"}
    assert names <= {path.name for path in folder.iterdir()}
    assert not [path for path in whole.rglob(".*")], "a temporary file is left"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    samples = (folder / "samples.txt").read_text()
    assert samples.count("=== iteration ") == 5
    best = load_checkpoint(whole / "ckpt.pt").iter
    assert samples.rindex("best so far") > samples.index(f"=== iteration {best}, held-out loss")
    assert f"=== iteration {best}, " in samples[: samples.rindex("best so far")].splitlines()[-1]
    assert not (folder / "tensorboard").exists()


def test_the_best_model_is_kept_with_all_that_export_needs(whole):
    best = load_checkpoint(whole / "ckpt.pt")
    rows = metrics(whole)
    assert best.val_loss == min(row["val_loss"] for row in rows)
    assert best.resume is None
    assert best.held_out and best.held_out in TEXT
    assert best.tokenizer.n_vocab == 257 and best.config.vocab_size == 272
    model = build_model(best)
    logits, _ = model(torch.tensor([best.tokenizer.encode("bottles")]))
    assert logits.shape == (1, 7, 272)
    assert load_checkpoint(whole / "ckpt.run" / "last.prev.pt").iter == 80


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(whole, data, tmp_path):
    train([data], tiny(tmp_path), reporter=quiet())
    assert weights_hash(tmp_path / "ckpt.pt") == weights_hash(whole / "ckpt.pt")
    assert without_times(metrics(tmp_path)) == without_times(metrics(whole))
    one_step = tiny(tmp_path, max_iters=1, force=True)
    train([data], one_step, reporter=quiet())
    first = weights_hash(tmp_path / "ckpt.pt")
    train([data], dataclasses.replace(one_step, seed=1), reporter=quiet())
    assert weights_hash(tmp_path / "ckpt.pt") != first


def test_evaluating_more_often_does_not_change_what_is_trained(whole, data, tmp_path):
    train([data], tiny(tmp_path, eval_interval=33), reporter=quiet())
    run = "ckpt.run/last.pt"
    assert weights_hash(tmp_path / run) == weights_hash(whole / run)


def test_a_run_killed_twice_and_resumed_equals_the_uninterrupted_one(whole, data, tmp_path):
    """SIGKILL at no agreed instant of another process; the metrics have no gap and no repeat."""
    code = (
        "import sys; from pico_edge.train.loop import train;"
        "from pico_edge.train.settings import TrainSettings;"
        "train([sys.argv[1]], TrainSettings(**eval(sys.argv[2])))"
    )
    last = tmp_path / "ckpt.run" / "last.pt"
    for kills in range(2):
        settings = dataclasses.asdict(tiny(tmp_path, resume=kills > 0))
        arguments = [sys.executable, "-c", code, str(data), repr(settings)]
        before = last.stat().st_ino if last.exists() else None
        with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if last.exists() and last.stat().st_ino != before:
                    break
                time.sleep(0.002)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    lines = Lines()
    result = train([data], tiny(tmp_path, resume=True), reporter=lines)
    assert result.iter == 100
    assert any("took over from process" in line for line in lines.lines)
    assert any("bit by bit" in line for line in lines.lines)
    for name in ("ckpt.pt", "ckpt.run/last.pt"):
        assert weights_hash(tmp_path / name) == weights_hash(whole / name)
    assert without_times(metrics(tmp_path)) == without_times(metrics(whole))
    times = [row["elapsed_s"] for row in metrics(tmp_path)]
    assert times == sorted(times)
    samples = "ckpt.run/samples.txt"
    assert (tmp_path / samples).read_bytes() == (whole / samples).read_bytes()


@pytest.fixture
def heard_hangup():
    """SIGHUP as a terminal has it: under nohup the tests would inherit that it is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heard_hangup")
def test_a_signal_ends_the_run_after_its_step_and_a_resume_loses_nothing(whole, data, tmp_path):
    command = f"pico-edge train {data} --out {tmp_path / 'ckpt.pt'} --dtype float32"
    command += " --threads 1 --resume"
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    for i, name in enumerate(names, start=1):
        signum = getattr(signal, name)
        before = signal.getsignal(signum)
        stopper = StopAt(f"iter {20 * i}/100", signum)
        result = train([data], tiny(tmp_path, resume=i > 1), reporter=stopper)
        assert (result.stopped, result.signal, result.iter) == ("signal", signum, 20 * i)
        assert signal.getsignal(signum) is before
        assert result.resume_command == command
        assert "  " + command in stopper.lines
        assert (result.verdict, result.advice) == ("unfinished", command)
        # Two evaluations make a picture, which a stop leaves too.
        assert (tmp_path / "ckpt.run" / "loss.png").exists() == (i > 1)
    train([data], tiny(tmp_path, resume=True), reporter=quiet())
    assert weights_hash(tmp_path / "ckpt.run/last.pt") == weights_hash(whole / "ckpt.run/last.pt")
    assert without_times(metrics(tmp_path)) == without_times(metrics(whole))


def test_a_resume_keeps_the_type_that_was_timed_at_the_start(data, tmp_path, monkeypatch):
    """A busy machine may answer the timing otherwise."""
    monkeypatch.setattr(setup, "has_fast_bfloat16", lambda: True)
    stopper = StopAt("iter 20/100", signal.SIGTERM)
    train([data], tiny(tmp_path, dtype="auto"), reporter=stopper)
    monkeypatch.setattr(setup, "has_fast_bfloat16", lambda: False)
    stopper = StopAt("iter 40/100", signal.SIGTERM)
    train([data], tiny(tmp_path, dtype="auto", resume=True), reporter=stopper)
    assert any("bit by bit" in line for line in stopper.lines)
    stopper = StopAt("iter 60/100", signal.SIGTERM)
    train([data], tiny(tmp_path, resume=True, dtype="float32"), reporter=stopper)
    assert not any("bit by bit" in line for line in stopper.lines)


def test_a_second_ctrl_c_leaves_at_once_with_the_last_checkpoint_whole(data, tmp_path):
    class Impatient(StopAt):
        def say(self, text):
            super().say(text)
            if text.startswith(self.beginning):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train([data], tiny(tmp_path), reporter=Impatient("iter 40/100", signal.SIGINT))
    assert load_checkpoint(tmp_path / "ckpt.run" / "last.pt").iter == 20
    assert not [path for path in tmp_path.rglob(".*")]


def test_a_finished_run_resumes_to_nothing_left_to_do(data, tmp_path):
    train([data], tiny(tmp_path, max_iters=10), reporter=quiet())
    before = weights_hash(tmp_path / "ckpt.run/last.pt")
    lines = Lines()
    result = train([data], tiny(tmp_path, max_iters=10, resume=True), reporter=lines)
    assert result.stopped == "max_iters" and result.val_loss is not None
    assert any("finished" in line for line in lines.lines)
    assert weights_hash(tmp_path / "ckpt.run/last.pt") == before


def test_another_split_of_the_same_batch_goes_on_and_is_said_another_size_is_refused(
    data, tmp_path
):
    train([data], tiny(tmp_path), reporter=StopAt("iter 20/100", signal.SIGTERM))
    lines = Lines()
    with pytest.raises(UsageError, match="keep the product"):
        train([data], tiny(tmp_path, grad_accum=4, resume=True), reporter=lines)
    stopper = StopAt("iter 40/100", signal.SIGTERM)
    train([data], tiny(tmp_path, batch_size=8, grad_accum=1, resume=True), reporter=stopper)
    assert any("statistically equivalent" in line for line in stopper.lines)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"learning_rate": 0.5}, "learning_rate is 0.5"),
        ({"max_iters": 7}, "max_iters is 7, the run to resume has 100"),
        ({"n_layer": 3}, "n_layer is 3, the checkpoint has 2"),
        ({"tokenizer": "bpe"}, "tokenizer is 'bpe'"),
    ],
)
def test_a_resume_refuses_flags_that_are_not_those_of_the_run(flags, named, whole, data):
    with pytest.raises(UsageError, match=named):
        train([data], tiny(whole, resume=True, **flags), reporter=quiet())


def test_a_fine_tune_keeps_tokenizer_and_shape_and_starts_from_the_weights(whole, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("beer", "milk"))
    settings = TrainSettings(
        out=str(tmp_path / "tuned.pt"),
        init_from=str(whole / "ckpt.pt"),
        max_iters=10,
        batch_size=4,
        threads=1,
    )
    result = train([other], settings, reporter=quiet())
    first, tuned = load_checkpoint(whole / "ckpt.pt"), load_checkpoint(tmp_path / "tuned.pt")
    assert tuned.config == first.config
    assert tuned.tokenizer.to_dict() == first.tokenizer.to_dict()
    assert tuned.iter == 10
    fresh = tiny(tmp_path, max_iters=10, eval_interval=10, grad_accum=1)
    assert result.val_loss < train([other], fresh, reporter=quiet()).val_loss - 0.2
    with pytest.raises(UsageError, match="n_embd is 64, the checkpoint has 32"):
        train(
            [other],
            dataclasses.replace(settings, n_embd=64, n_head=2, force=True),
            reporter=quiet(),
        )


def test_another_tokenizer_needs_and_gets_fresh_embeddings(whole, data, tmp_path):
    first = load_checkpoint(whole / "ckpt.pt")
    settings = TrainSettings(
        out=str(tmp_path / "tuned.pt"),
        init_from=str(whole / "ckpt.pt"),
        reinit_embeddings=True,
        tokenizer="bpe",
        vocab_size=300,
        max_iters=10,
        batch_size=4,
        threads=1,
    )
    lines = Lines()
    train([data], dataclasses.replace(settings, max_iters=1, learning_rate=1e-9), reporter=lines)
    tuned = load_checkpoint(tmp_path / "tuned.pt")
    assert tuned.tokenizer.kind == "bpe"
    assert tuned.config == dataclasses.replace(first.config, vocab_size=304)
    assert [line for line in lines.lines if line.startswith("embeddings: 304 fresh rows; ")]
    tables = {"transformer.wte.weight", "lm_head.weight"}
    for name in first.model.keys() - tables:
        assert torch.allclose(tuned.model[name], first.model[name], atol=1e-6), name
    assert 0.01 < tuned.model["lm_head.weight"].std() < 0.03  # as GPT-2 starts
    result = train([data], dataclasses.replace(settings, force=True), reporter=quiet())
    assert result.val_loss < 5.6

    for name in ("tokenizer", "vocab_size"):
        with pytest.raises(UsageError, match=rf"^{name} is given.*add --reinit-embeddings"):
            TrainSettings(init_from="ckpt.pt", **{name: getattr(settings, name)})
    with pytest.raises(UsageError, match="without init_from"):
        TrainSettings(reinit_embeddings=True)
    with pytest.raises(UsageError, match="block_size is 99"):
        train([data], dataclasses.replace(settings, block_size=99, force=True), reporter=quiet())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_optimizer_and_type_trains(optimizer, dtype, data, tmp_path):
    settings = tiny(tmp_path, optimizer=optimizer, dtype=dtype, max_iters=20, dropout=0.0)
    result = train([data], settings, reporter=quiet())
    assert result.val_loss < 5.0


def test_a_time_gets_a_fixed_number_of_iterations_and_a_resume_keeps_it(data, tmp_path):
    begin = time.perf_counter()
    # Both end long before their time, after which a slow machine would lay the rest anew.
    settings = tiny(tmp_path, max_iters=None, minutes=0.5, eval_interval=20)
    result = train([data], settings, reporter=StopAt("iter 20/", signal.SIGTERM), started=begin)
    assert result.max_iters > 40
    again = StopAt("iter 40/", signal.SIGTERM)
    resumed = train([data], dataclasses.replace(settings, resume=True), reporter=again)
    assert (resumed.iter, resumed.max_iters) == (40, result.max_iters)
    assert any("stay in force" in line for line in again.lines)


def test_measuring_the_speed_leaves_no_trace_in_the_weights(data, tmp_path):
    timed, counted = tmp_path / "timed", tmp_path / "counted"
    timed.mkdir()
    counted.mkdir()
    result = train([data], tiny(timed, max_iters=None, minutes=1e-6), reporter=quiet())
    train([data], tiny(counted, max_iters=result.max_iters), reporter=quiet())
    assert weights_hash(timed / "ckpt.run/last.pt") == weights_hash(counted / "ckpt.run/last.pt")


def test_a_run_that_no_longer_improves_ends_and_keeps_its_best_model(tmp_path):
    """What is held out has nothing of the rest: its loss only rises, and the time is not wasted."""
    noise = tmp_path / "noise.txt"
    noise.write_text("abcd" * 200 + "WXYZ" * 20)
    settings = tiny(tmp_path, max_iters=None, minutes=5.0, learning_rate=5e-2, eval_interval=2)
    lines = Lines()
    result = train([noise], settings, reporter=lines)
    assert result.stopped == "patience"
    assert result.best_iter < result.iter < result.max_iters
    assert any("stopped early" in line for line in lines.lines)
    assert result.verdict == "tiny" and "--init-from" in result.advice
    assert any("too small to learn a language from" in line for line in lines.lines)
    assert "the best model writes:" in lines.lines
    assert load_checkpoint(tmp_path / "ckpt.pt").iter == result.best_iter


@pytest.mark.parametrize(
    "text", ["😀🎉🚀 👩‍👩‍👧‍👦🇩🇪" * 40, "床前明月光疑是地上霜。" * 100, "\r\n\t\0" * 300]
)
def test_any_text_just_works(text, tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes(text.encode())
    lines = Lines()
    result = train([path], tiny(tmp_path, max_iters=10, block_size=16), reporter=lines)
    assert Path(result.file).exists()
    assert any(line.startswith("next: pico-edge export") for line in lines.lines)


def test_changed_data_is_refused_and_init_from_suggested(data, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text(TEXT)
    train([path], tiny(tmp_path), reporter=StopAt("iter 20/100", signal.SIGTERM))
    path.write_text(TEXT + "!")
    with pytest.raises(ArtefactError, match=r"data has changed.*--init-from"):
        train([path], tiny(tmp_path, resume=True), reporter=quiet())
