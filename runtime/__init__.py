"""Run a `model.onnx` with numpy and onnxruntime, nothing else: the public API of pico_edge.runtime.

Try: `Model("model.onnx").generate("Hello", max_new_tokens=20, seed=1).text`.
"""

from pico_edge.runtime.generate import Generation, Model, Options, Stream
from pico_edge.runtime.score import TokenLogprob, TokenScore
from pico_edge.runtime.session import Cache, Session

__all__ = [
    "Cache",
    "Generation",
    "Model",
    "Options",
    "Session",
    "Stream",
    "TokenLogprob",
    "TokenScore",
]
