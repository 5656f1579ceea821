"""How tiny.onnx (int8), tiny_int4.onnx and tiny_fp32.onnx were made.

Two layers, 64 tokens of context, a minute:

    python tests/data/make_tiny.py

Needs pico-edge[all]. Tests and CI run the files where neither torch nor onnx is installed. Make
them again when the format of model.onnx changes; no test depends on their weights. They carry no
table of n-grams, which would be three times as large as the rest.
"""

from __future__ import annotations

import dataclasses
import pydoc_data.topics
import tempfile
from pathlib import Path

from pico_edge.export import quantize
from pico_edge.export.pipeline import export
from pico_edge.train.checkpoint import load_checkpoint, save_checkpoint
from pico_edge.train.loop import train
from pico_edge.train.settings import TrainSettings

HERE = Path(__file__).parent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder, "topics.txt"), Path(folder, "ckpt.pt")
        text.write_text("\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64}
        train([text], TrainSettings(out=out, max_iters=2000, preset="nano", **shape))
        save_checkpoint(out, dataclasses.replace(load_checkpoint(out), ngrams=None))
        export(out, HERE / "tiny_fp32.onnx", force=True)
        quantize.SHORT_CONTEXT = 0  # an int8 cache, as longer contexts have it
        export(out, HERE / "tiny.onnx", quantize=True, force=True)
        export(out, HERE / "tiny_int4.onnx", bits=4, max_loss_increase=2, force=True)


if __name__ == "__main__":
    main()
