"""The provider webgpu, experimental: a plugin beside onnxruntime, registered when it is asked for.

All of a process shares one queue of commands there, which takes one call at a time. Knows neither
files nor the choice between providers.

Try: `Session("model.onnx", provider="webgpu").new_cache()`, after pip install PLUGIN.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from pico_edge.errors import PicoEdgeError, UsageError
from pico_edge.runtime.cache import ORT_ERRORS, Cache, FloatArray, Ids, ort
from pico_edge.runtime.session import ORT_PROVIDERS, WEBGPU_PLUGIN, Session

NAME = ORT_PROVIDERS["webgpu"]
NO_ADAPTER = (
    "provider webgpu finds no GPU: install its driver (on Linux also the Vulkan loader, "
    "libvulkan1), or run with --provider cpu"
)
# From 32 tokens on it takes another kernel for attention, which is wrong on SwiftShader (logits off
# by 0.4) and once was on NVIDIA (onnxruntime #28520).
MOST_TOKENS = 31  # of one call
ONE_AT_A_TIME = threading.Lock()


def register() -> None:
    """Make the plugin's provider one of onnxruntime's; nothing where it is not installed.

    Raises PicoEdgeError when it does not load, or finds no device.
    """
    if NAME in ort.get_available_providers():  # registered twice and released once, it crashes
        return
    try:
        plugin = importlib.import_module(WEBGPU_PLUGIN.replace("-", "_"))
    except ImportError:
        return  # choose_provider says so
    try:
        ort.register_execution_provider_library(NAME, plugin.get_library_path())
    except ORT_ERRORS as error:
        reason = str(error).splitlines()[0]
        raise PicoEdgeError(
            f"provider webgpu does not load: {reason}: "
            f"pip install --upgrade onnxruntime {WEBGPU_PLUGIN}"
        ) from error
    if NAME not in ort.get_available_providers():
        ort.unregister_execution_provider_library(NAME)
        raise PicoEdgeError(NO_ADAPTER)


def load(path: str | bytes, options: Any) -> Any:
    """onnxruntime's session on the first device. Raises PicoEdgeError where there is none."""
    devices = [device for device in ort.get_ep_devices() if device.ep_name == NAME]
    # Without the option, the reshape of out_index, an int64, is left to the CPU.
    options.add_provider_for_devices(devices[:1], {"enableInt64": "1"})
    try:
        with ONE_AT_A_TIME:
            return ort.InferenceSession(path, options, enable_fallback=0)
    except ORT_ERRORS as error:
        if "Failed to get a WebGPU adapter" in str(error):
            raise PicoEdgeError(NO_ADAPTER) from error
        raise


class WebGPUCache(Cache):
    """A Cache of one row, filled in short calls."""

    def __init__(self, session: Session, batch: int, capacity: int) -> None:
        if batch > 1:
            # Its memory has no addresses, so that a row cannot be bound as a cache of its own.
            raise UsageError(f"batch is {batch}: webgpu runs one text at a time: expected 1")
        with ONE_AT_A_TIME:
            super().__init__(session, batch, capacity)

    def prefill(self, rows: Sequence[Ids]) -> FloatArray:
        if len(rows) == 1 and not any(self.lengths):
            return self.append(0, rows[0])
        return super().prefill(rows)  # says what is wrong

    def append(self, row: int, ids: Ids, *, all_logits: bool = False) -> FloatArray:
        fits = row == 0 and self.lengths[0] + len(ids) <= self.capacity
        if len(ids) <= MOST_TOKENS or not fits:
            with ONE_AT_A_TIME:
                return super().append(row, ids, all_logits=all_logits)  # or it says what is wrong
        self._checked([ids])
        starts = range(0, len(ids), MOST_TOKENS)
        parts = [
            self.append(row, ids[at : at + MOST_TOKENS], all_logits=all_logits) for at in starts
        ]
        return np.concatenate(parts) if all_logits else parts[-1]

    def decode(self, token_ids: Ids) -> FloatArray:
        with ONE_AT_A_TIME:
            return super().decode(token_ids)
