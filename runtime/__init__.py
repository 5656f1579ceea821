"""Run a `model.onnx` with numpy and onnxruntime, nothing else: the public API of pico_edge.runtime.

Try: `Model("model.onnx").generate("Hello", max_new_tokens=20, seed=1).text`.
"""

from pico_edge.runtime.generate import Generation, Model, Stream
from pico_edge.runtime.session import Cache, Session

__all__ = ["Cache", "Generation", "Model", "Session", "Stream"]
