"""What the machine can do at most, multiply-adds and bytes moved, and so the least time that work takes."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from .timing import Work, finish


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s in float32 of the best dense product, and bytes/s read and written by a copy that no cache holds.

    shared: bytes/s that the shared memories of a GPU's multiprocessors can be read with, all together.
    """

    flops: float
    bandwidth: float
    shared: float = math.inf

    def floor(self, work: Work) -> float:
        """Seconds for what takes longest of it, if all else is done meanwhile."""
        return max(work.bytes / self.bandwidth, work.flops / self.flops, work.shared / self.shared)

    def of(self, unit: str) -> float:
        """The ceiling of a rate in GFLOP/s or GB/s, in that unit."""
        return (self.flops if unit == "GFLOP/s" else self.bandwidth) / 1e9


PAPER = {
    "A100": Ceilings(19.5e12, 2.04e12, 108 * 128 * 1.41e9),
    "H100": Ceilings(61.8e12, 3.35e12, 132 * 128 * 1.83e9),
    "RTX 4090": Ceilings(82.6e12, 1.01e12, 128 * 128 * 2.52e9),
}
"""Three GPUs by their data sheets (A100 of 80 GB and H100 as SXM), without tensor cores: docs/gpu-kernels.md."""


def machine_peak(quick: bool = False) -> Ceilings:
    """The ceilings of the default device at torch's present number of threads, measured once each: the best of several
    rounds."""
    return _measured(torch.get_num_threads(), quick, torch.get_default_device().type)


def floors(work: Work, quick: bool = False) -> tuple[float, dict[str, float]]:
    """Seconds that work takes at least: on the default device, and if that is a GPU on those of `PAPER`."""
    paper = PAPER if torch.get_default_device().type == "cuda" else {}
    return machine_peak(quick).floor(work), {gpu: peak.floor(work) for gpu, peak in paper.items()}


@cache
def _measured(threads: int, quick: bool, device: str) -> Ceilings:
    n, channels, size = {"cpu": (2048, 128, 1 << 26), "cuda": (8192, 256, 1 << 30)}[device]
    if quick:
        n, channels, size = 256, 32, 1 << 20
    a, b, product = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    image = torch.randn(64, channels, 18, 18).contiguous(memory_format=torch.channels_last)
    taps = torch.randn(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    source, target = torch.ones(size), torch.ones(size)
    with torch.no_grad():  # the library of one may know this CPU better than that of the other
        matrix = 2 * n**3 / _best(lambda: torch.mm(a, b, out=product))
        convolution = 2 * taps.numel() * 64 * 16**2 / _best(lambda: F.conv2d(image, taps))
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source))
    return Ceilings(max(matrix, convolution), bandwidth, _shared_bandwidth() if device == "cuda" else math.inf)


def _shared_bandwidth() -> float:
    """128 bytes a clock and multiprocessor, as NVIDIA's GPUs have it."""
    chip = torch.cuda.get_device_properties()
    return 128 * chip.multi_processor_count * chip.clock_rate * 1e3  # kHz


def _best(function: Callable[[], Any], rounds: int = 5) -> float:
    function()
    finish()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        finish()
        times.append(time.perf_counter() - begin)
    return min(times)
