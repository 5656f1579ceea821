"""loss.png: drawn from the evaluations, and never more often than it is worth."""

import json

from pico_edge.train.plot import EVERY_S, SHARE, LossPlot, draw_losses, is_due


def write_rows(path, losses):
    rows = [
        {"iter": i, "train_loss": v, "val_loss": v, "val_bits_per_byte": 1.44 * v}
        for i, v in enumerate(losses, start=1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_picture_needs_two_evaluations(tmp_path):
    metrics, image = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    assert not draw_losses(metrics, image)
    write_rows(metrics, [2.0])
    assert not draw_losses(metrics, image)
    assert not image.exists()
    write_rows(metrics, [2.0, 0.0])
    assert draw_losses(metrics, image)
    assert image.read_bytes().startswith(b"\x89PNG")


def test_drawing_waits_until_it_costs_next_to_nothing():
    assert not is_due(run_s=40, since_s=40, spent_s=0, next_s=1.0)
    assert is_due(run_s=60, since_s=60, spent_s=0, next_s=1.0)
    assert not is_due(run_s=1000, since_s=EVERY_S - 1, spent_s=0, next_s=0.1)
    assert not is_due(run_s=1000, since_s=500, spent_s=SHARE * 1000, next_s=0.1)


def test_a_refresh_draws_when_due_and_counts_what_it_cost(tmp_path, monkeypatch):
    metrics, image = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    write_rows(metrics, [2.0, 1.0])
    plot = LossPlot(metrics, image)
    plot.refresh()
    assert not image.exists()  # too early
    monkeypatch.setattr("pico_edge.train.plot.EVERY_S", 0.0)
    monkeypatch.setattr("pico_edge.train.plot.SHARE", 1e9)
    plot.refresh()
    assert image.exists()
    plot.refresh()
    assert plot._spent_s > plot._next_s > 0  # two drawings, and the last
    monkeypatch.setattr("pico_edge.train.plot.SHARE", 1e-9)
    image.unlink()
    plot.refresh()
    assert not image.exists()  # all of its share is spent
