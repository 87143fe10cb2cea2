"""Peak rates of the machine, multiply-adds and bytes, and the lower bound of time that follows from them."""

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
    """Peak rates of a device.

    flops: FLOP/s in float32 of the fastest dense product (of a GPU: without tensor cores). bandwidth: bytes/s, read and
    written, of a copy that is larger than all caches. tf32: FLOP/s of a dense product with one pass of tensor cores.
    shared: bytes/s read from the shared memories of all multiprocessors, computed from their clock. bfloat16: FLOP/s of
    a dense product in bfloat16.
    """

    flops: float
    bandwidth: float
    tf32: float = 0.0
    shared: float = math.inf
    bfloat16: float = 0.0

    def __str__(self) -> str:
        said = f"{self.flops / 1e9:.0f} GFLOP/s in float32, {self.bandwidth / 1e9:.1f} GB/s read and written by a copy"
        if self.bfloat16:
            said += f", {self.bfloat16 / 1e9:.0f} GFLOP/s in bfloat16"
        if self.tf32:
            said += f", {self.tf32 / 1e9:.0f} GFLOP/s in tf32, {self.shared / 1e9:.0f} GB/s of shared memory read"
        return said

    def multiplying(self, work: Work) -> float:
        """Peak FLOP/s for this work. Tensor cores need three passes for the accuracy of float32."""
        if work.tiles and work.dtype == torch.bfloat16:
            return max(self.flops, self.bfloat16)
        passes = 3 if torch.get_float32_matmul_precision() == "highest" else 1
        return max(self.flops, self.tf32 / passes) if work.tiles else self.flops

    def floor(self, work: Work) -> float:
        """Lower bound in seconds: the slowest of the three parts, if they overlap completely."""
        return max(work.bytes / self.bandwidth, work.flops / self.multiplying(work), work.shared / self.shared)


PAPER = {
    "A100": Ceilings(19.5e12, 2.04e12, 156e12, 108 * 128 * 1.41e9, 312e12),
    "H100": Ceilings(66.9e12, 3.35e12, 495e12, 132 * 128 * 1.98e9, 989e12),
    "RTX 4090": Ceilings(82.6e12, 1.01e12, 82.6e12, 128 * 128 * 2.52e9, 165e12),
}
"""Three GPUs, from their data sheets: A100 with 80 GB, H100 SXM, RTX 4090 (see docs/internals/gpu-kernels.md)."""


def machine_peak(quick: bool = False) -> Ceilings:
    """Peak rates of the default device with torch's current number of threads: the best of several rounds, cached."""
    return _measured(torch.get_num_threads(), quick, torch.get_default_device().type)


def floors(work: Work, quick: bool = False) -> tuple[float, dict[str, float]]:
    """Lower bound of the seconds for this work on the default device and, if it is a GPU, on the GPUs of `PAPER`."""
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
    with torch.no_grad(), float32_precision("highest"):  # two libraries: the faster one counts
        matrix = flops / _best(lambda: torch.mm(a, b, out=product))
        convolution = 2 * taps.numel() * 64 * 16**2 / _best(lambda: F.conv2d(image, taps))
    tf32 = 0.0
    if device == "cuda":
        with float32_precision("high"):
            tf32 = flops / _best(lambda: torch.mm(a, b, out=product))
    a, b = a.bfloat16(), b.bfloat16()
    bfloat16 = flops / _best(lambda: torch.mm(a, b))
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source))
    shared = _shared_bandwidth() if device == "cuda" else math.inf
    return Ceilings(max(matrix, convolution), bandwidth, tf32, shared, bfloat16)


def _shared_bandwidth() -> float:
    """NVIDIA's GPUs read 128 bytes per clock and multiprocessor."""
    chip = torch.cuda.get_device_properties()
    return 128 * chip.multi_processor_count * chip.clock_rate * 1e3  # kHz


@contextmanager
def float32_precision(which: str) -> Iterator[None]:
    """`torch.set_float32_matmul_precision` within the block, for convolutions too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(which)
    try:
        with cudnn_as_precise_as_products():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def cudnn_as_precise_as_products() -> Iterator[None]:
    """Allow tf32 in cuDNN's convolutions if and only if matrix products, and thus our kernels, may use it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.get_float32_matmul_precision() != "highest"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _best(function: Callable[[], Any], rounds: int = 5) -> float:
    function()
    return min(seconds_of(function) for _ in range(rounds))
