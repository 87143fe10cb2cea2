"""What the machine can do at most: multiply-adds, and bytes moved."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from .timing import finish


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s in float32 of the best dense product, and bytes/s read and written by a copy that no cache holds."""

    flops: float
    bandwidth: float

    def of(self, unit: str) -> float:
        """The ceiling of a rate in GFLOP/s or GB/s, in that unit."""
        return (self.flops if unit == "GFLOP/s" else self.bandwidth) / 1e9


def machine_peak(quick: bool = False) -> Ceilings:
    """The ceilings of the default device at torch's present number of threads, measured once each: the best of several
    rounds."""
    return _measured(torch.get_num_threads(), quick, torch.get_default_device().type)


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
    return Ceilings(max(matrix, convolution), 2 * source.nbytes / _best(lambda: target.copy_(source)))


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
