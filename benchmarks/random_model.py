"""A checkpoint with random weights, for benchmarks of speed and size.

Try: `save_random(Path("ckpt.pt"), GPTConfig(64, 272, 4, 4, 128), SimpleTokenizer(), "some text")`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pico_edge.config import GPTConfig
    from pico_edge.tokenizer import Tokenizer


def save_random(path: Path, config: GPTConfig, tokenizer: Tokenizer, held_out: str) -> None:
    """held_out: the text that export calibrates and measures on."""
    from pico_edge.train.checkpoint import (
        Checkpoint,
        library_versions,
        model_state,
        save_checkpoint,
    )
    from pico_edge.train.model import GPT

    checkpoint = Checkpoint(
        config=config,
        tokenizer=tokenizer,
        model=model_state(GPT(config)),
        held_out=held_out,
        iter=0,
        tokens=0,
        train_loss=None,
        val_loss=None,
        val_bits_per_byte=None,
        settings={},
        data={},
        versions=library_versions(),
    )
    save_checkpoint(path, checkpoint)
