"""Run a `model.onnx` with numpy and onnxruntime, nothing else: the public API of pico_edge.runtime.

The names are imported when first asked for: `info` and `doctor` work where onnxruntime does not.
Try: `Model("model.onnx").generate("Hello", max_new_tokens=20, seed=1).text`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pico_edge.runtime.cache import Cache
    from pico_edge.runtime.generate import Generation, Model, Options, Stream
    from pico_edge.runtime.score import TokenLogprob, TokenScore
    from pico_edge.runtime.session import Session

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


def __getattr__(name: str) -> Any:
    if name == "Session":
        from pico_edge.runtime import session as module
    elif name == "Cache":
        from pico_edge.runtime import cache as module  # type: ignore[no-redef]
    elif name in ("Generation", "Model", "Options", "Stream"):
        from pico_edge.runtime import generate as module  # type: ignore[no-redef]
    elif name in ("TokenLogprob", "TokenScore"):
        from pico_edge.runtime import score as module  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
