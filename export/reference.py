"""A checkpoint in the place of a model file, for what evaluates both.

Try: `evaluate(scored_checkpoint("ckpt.pt", threads=2), ids)`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from pico_edge.runtime.evaluate import CHUNK_TOKENS, FloatArray, IdArray, Scored
from pico_edge.train.checkpoint import build_model, load_checkpoint


def scored_checkpoint(path: str | os.PathLike[str], *, threads: int) -> Scored:
    """The torch model of a checkpoint, in float32, the whole window in one call.

    Raises ArtefactError for a file that is refused. threads: torch's, of the whole process.
    """
    torch.set_num_threads(threads)
    checkpoint = load_checkpoint(path)
    model = build_model(checkpoint).eval()

    @torch.inference_mode()
    def logits_of(window: IdArray) -> FloatArray:
        logits, _ = model(torch.from_numpy(window.copy())[None])
        return logits[0].numpy()  # type: ignore[no-any-return]

    def predict(window: IdArray) -> Iterator[FloatArray]:
        logits = logits_of(window)
        for at in range(0, len(window), CHUNK_TOKENS):
            yield logits[at : at + CHUNK_TOKENS]

    return Scored(predict, checkpoint.tokenizer, checkpoint.config.block_size)
