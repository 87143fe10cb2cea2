"""What the machine can do at most, multiply-adds and bytes moved, and so the least time that work takes."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from .timing import Work, seconds_of


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s in float32 of the best dense product, and bytes/s read and written by a copy that no cache holds.

    Of a GPU, flops: without tensor cores; tf32: of a dense product by one pass of them; shared: bytes/s that the shared
    memories of all multiprocessors are read with, by their clock.
    """

    flops: float
    bandwidth: float
    tf32: float = 0.0
    shared: float = math.inf

    def __str__(self) -> str:
        said = f"{self.flops / 1e9:.0f} GFLOP/s in float32, {self.bandwidth / 1e9:.1f} GB/s read and written by a copy"
        if self.tf32:
            said += f", {self.tf32 / 1e9:.0f} GFLOP/s in tf32, {self.shared / 1e9:.0f} GB/s of shared memory read"
        return said

    def multiplying(self, work: Work) -> float:
        """FLOP/s for it: tensor cores need three passes for what is as good as float32."""
        passes = 3 if torch.get_float32_matmul_precision() == "highest" else 1
        return max(self.flops, self.tf32 / passes) if work.tiles else self.flops

    def floor(self, work: Work) -> float:
        """Seconds for what takes longest of it, if all else is done meanwhile."""
        return max(work.bytes / self.bandwidth, work.flops / self.multiplying(work), work.shared / self.shared)


PAPER = {
    "A100": Ceilings(19.5e12, 2.04e12, 156e12, 108 * 128 * 1.41e9),
    "H100": Ceilings(66.9e12, 3.35e12, 495e12, 132 * 128 * 1.98e9),
    "RTX 4090": Ceilings(82.6e12, 1.01e12, 82.6e12, 128 * 128 * 2.52e9),
}
"""Three GPUs by their data sheets, A100 of 80 GB and H100 as SXM: docs/internals/gpu-kernels.md."""


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
    flops = 2 * n**3
    with torch.no_grad(), _precision("highest"):  # the library of one may know this CPU better than that of the other
        matrix = flops / _best(lambda: torch.mm(a, b, out=product))
        convolution = 2 * taps.numel() * 64 * 16**2 / _best(lambda: F.conv2d(image, taps))
    tf32 = 0.0
    if device == "cuda":
        with _precision("high"):
            tf32 = flops / _best(lambda: torch.mm(a, b, out=product))
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source))
    return Ceilings(max(matrix, convolution), bandwidth, tf32, _shared_bandwidth() if device == "cuda" else math.inf)


def _shared_bandwidth() -> float:
    """128 bytes a clock and multiprocessor, as NVIDIA's GPUs have it."""
    chip = torch.cuda.get_device_properties()
    return 128 * chip.multi_processor_count * chip.clock_rate * 1e3  # kHz


@contextmanager
def _precision(which: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(which)
    try:
        with cudnn_as_precise_as_products():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def cudnn_as_precise_as_products() -> Iterator[None]:
    """Let cuDNN's float32 convolutions use tf32 where matrix products, and so ours, may, and nowhere else."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.get_float32_matmul_precision() != "highest"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _best(function: Callable[[], Any], rounds: int = 5) -> float:
    function()
    return min(seconds_of(function) for _ in range(rounds))
