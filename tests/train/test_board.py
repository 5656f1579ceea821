"""TensorBoard: event files if and only if they are asked for, without gap or repeat on a resume."""

import importlib.util
import io
import os
import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pico_edge.cli import main
from pico_edge.train.board import CURVES, open_board
from pico_edge.train.loop import train
from pico_edge.train.report import Reporter
from pico_edge.train.settings import TrainSettings


class StopAt40(Reporter):
    def say(self, text):
        if text.startswith("iter 40/"):
            os.kill(os.getpid(), signal.SIGTERM)


def settings(folder, **changes):
    return TrainSettings(
        out=str(folder / "ckpt.pt"),
        preset="nano",
        n_layer=1,
        n_head=1,
        n_embd=16,
        block_size=8,
        batch_size=2,
        max_iters=60,
        eval_interval=20,
        threads=1,
        **changes,
    )


def events(folder):
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_a_resumed_run_has_every_point_once_and_starting_over_none_of_the_old(tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    silent = Reporter(io.StringIO(), quiet=True)
    stopped = train([data], settings(tmp_path, tensorboard=True), reporter=StopAt40(io.StringIO()))
    assert (stopped.iter, stopped.verdict) == (40, "unfinished")
    assert stopped.advice.endswith("--tensorboard --resume")
    train([data], settings(tmp_path, tensorboard=True, resume=True), reporter=silent)
    folder = tmp_path / "ckpt.run" / "tensorboard"
    board = events(folder)
    assert set(board.Tags()["scalars"]) == set(CURVES)
    for curve in CURVES:
        assert [event.step for event in board.Scalars(curve)] == [20, 40, 60]
    assert [event.step for event in board.Tensors("sample/text_summary")] == [20, 40, 60]

    train([data], settings(tmp_path, tensorboard=True, force=True), reporter=silent)
    assert len(list(folder.iterdir())) == 1
    train([data], settings(tmp_path, force=True), reporter=silent)
    assert not folder.exists()


def test_what_a_killed_run_wrote_after_its_checkpoint_is_void(tmp_path):
    values = dict.fromkeys(CURVES.values(), 1.0)
    board = open_board(tmp_path, step=0)
    for step in (20, 40, 60):
        board.write(values | {"iter": step}, "killed")
    board.close()
    board = open_board(tmp_path, step=20)
    board.write(values | {"iter": 40, "grad_norm": None}, "resumed")
    board.close()
    found = events(tmp_path)
    assert [event.step for event in found.Scalars("loss/training")] == [20, 40]
    assert [event.step for event in found.Scalars("run/gradient norm")] == [20]


def test_without_the_extra_the_flag_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name)
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["train", "data.txt", "--tensorboard"])
    assert done.value.code == 2
    assert capsys.readouterr().err == (
        "error: --tensorboard needs the extra log: pip install 'pico-edge[log]'\n"
    )
    assert list(tmp_path.iterdir()) == []
