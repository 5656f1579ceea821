"""Event files for TensorBoard, where they are asked for: one point of each curve per evaluation.

Knows nothing of how the values come about. Needs the extra `log`.

Try: `open_board(Path("ckpt.run/tensorboard"), step=0).write({"iter": 10, ...}, "a sample")`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pico_edge.errors import UsageError

# Names of the curves and of the values in `metrics.jsonl`.
CURVES = {
    "loss/training": "train_loss",
    "loss/held out": "val_loss",
    "loss/bits per byte held out": "val_bits_per_byte",
    "run/learning rate": "learning_rate",
    "run/gradient norm": "grad_norm",
    "run/tokens per second": "tokens_per_second",
}


class Board:
    """An open event file of one run."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, values: Mapping[str, Any], sample: str) -> None:
        """Add an evaluation, as `metrics.jsonl` has it, and its sample; readable at once."""
        step = values["iter"]
        for curve, name in CURVES.items():
            if values[name] is not None:
                self._writer.add_scalar(curve, values[name], step)
        # Text is shown as Markdown: four blanks in front keep it as it is.
        self._writer.add_text("sample", "    " + sample.replace("\n", "\n    "), step)
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()


def require_tensorboard() -> None:
    """Raise UsageError naming the extra unless TensorBoard is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs the extra log: pip install 'pico-edge[log]'")


def open_board(folder: Path, *, step: int) -> Board:
    """A new event file in the folder; what earlier ones say of later steps is void."""
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return Board(SummaryWriter(log_dir=str(folder), purge_step=step + 1))


def remove_events(folder: Path) -> None:
    """Delete the event files of an earlier run, and the folder if nothing else is in it."""
    if not folder.is_dir():
        return
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
