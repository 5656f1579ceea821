"""How much of the machine training uses: model FLOP utilization, and memory.

The FLOP of a token are those of PaLM (arXiv 2204.02311, appendix B), 6 N + 12 L C T, and count
attention in full, as others do. Knows nothing of lines or terminals.

Try: `Meter(trainer).text(9_000.0)` -> "61 % of matmul speed".
"""

from __future__ import annotations

import sys
import time

import torch

from pico_edge.config import GPTConfig
from pico_edge.train.step import Trainer

# Dense 16-bit tensor-core FLOP/s by a part of the device's name, the first that fits. NVIDIA's data
# sheets, whose numbers "with sparsity" are twice these; of the SXM version where it has one.
DENSE_16_BIT_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}
MEASURED_SIZES = (256, 512, 1024, 2048, 4096, 8192)  # of square matrices
MEASURED_S = 0.01  # a product that takes this long says how fast the machine is
REPEATS = 5


class Meter:
    """What a trainer reaches of what its device can do; measures that when first asked."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._flops_per_token = flops_per_token(
            trainer.model.num_parameters(), trainer.model.config
        )
        self._known = known_peak(_device_name(trainer.device), trainer.dtype)
        self._peak = self._known

    def utilization(self, tokens_per_second: float) -> float:
        """Share of the peak of all devices, from 0 to 1. tokens_per_second: of all ranks."""
        reached = self._flops_per_token * tokens_per_second / self._trainer.world_size
        if self._peak is None:
            self._peak = measured_peak(self._trainer.device, self._trainer.dtype)
        if self._known is None:
            # What was measured on a busy machine is too low; what was reached is possible.
            self._peak = max(self._peak, reached)
        return reached / self._peak

    def text(self, tokens_per_second: float) -> str:
        """ "MFU 41 %" where the data sheet of the device is known, else "61 % of matmul speed"."""
        percent = 100 * self.utilization(tokens_per_second)
        known = self._known is not None
        return f"MFU {percent:.0f} %" if known else f"{percent:.0f} % of matmul speed"


def flops_per_token(n_parameters: int, config: GPTConfig) -> float:
    """Floating-point operations of one trained token, forward and backward."""
    return 6 * n_parameters + 12 * config.n_layer * config.n_embd * config.block_size


def known_peak(device_name: str | None, dtype: torch.dtype) -> float | None:
    """FLOP/s of the data sheet, None for a device or a type that is not in the table."""
    if device_name is None or dtype == torch.float32:
        return None
    fits = (flops for name, flops in DENSE_16_BIT_FLOPS.items() if name in device_name)
    return next(fits, None)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few large matrix products, in a tenth of a second or so."""
    flops = 0.0
    for n in MEASURED_SIZES:
        a = torch.ones(n, n, device=device, dtype=dtype)  # no random numbers: resume is exact
        torch.mm(a, a)
        _wait(device)
        times = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            torch.mm(a, a)
            _wait(device)
            times.append(time.perf_counter() - begin)
        flops = max(flops, 2 * n**3 / min(times))
        if min(times) >= MEASURED_S:
            break
    return flops


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory in use so far: of tensors on CUDA, else of this process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
