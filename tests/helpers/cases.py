"""Shapes, geometries, dtypes and score patterns of the tests, listed once. A case's name is its test id."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DENSITIES = (0, 0.02, 0.1, 1)


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution; x and weight are shapes, the kind follows from the weight's."""

    name: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    bias: bool = True

    @property
    def kind(self) -> str:
        return {2: "linear", 3: "conv1d", 4: "conv2d"}[len(self.weight)]

    @property
    def steps(self) -> dict[str, Any]:
        """stride, padding and dilation as keyword arguments; none for a linear layer."""
        if self.kind == "linear":
            return {}
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}


LINEAR = (
    Layer("linear-1x1", (1, 1), (1, 1)),
    Layer("linear-7x33x65", (7, 33), (65, 33)),
    Layer("linear-64x300x100", (64, 300), (100, 300), bias=False),
    Layer("linear-leading-dimensions", (2, 3, 5, 17), (9, 17)),
    Layer("linear-vector", (33,), (7, 33)),
    Layer("linear-no-outputs", (3, 5), (0, 5)),
    Layer("linear-empty-batch", (0, 33), (7, 33)),
)
CONV2D = (
    Layer("conv2d-3x3", (4, 8, 10, 10), (16, 8, 3, 3), padding=1),
    Layer("conv2d-odd-sizes", (3, 5, 7, 9), (7, 5, 3, 3), bias=False),
    Layer("conv2d-stride2", (3, 6, 12, 9), (8, 6, 3, 3), stride=2, padding=1),
    Layer("conv2d-stride-beyond-kernel", (2, 3, 11, 10), (4, 3, 2, 2), stride=3),
    Layer("conv2d-rectangular", (3, 4, 9, 12), (6, 4, 3, 5), stride=(2, 1), padding=(0, 3), dilation=(1, 2)),
    Layer("conv2d-dilation", (3, 4, 11, 11), (6, 4, 3, 3), padding=2, dilation=2),
    Layer("conv2d-dilation-stride", (2, 4, 13, 9), (6, 4, 3, 3), stride=2, padding=1, dilation=(3, 2)),
    Layer("conv2d-groups", (3, 6, 8, 8), (10, 3, 3, 3), padding=1, groups=2),
    Layer("conv2d-depthwise", (3, 6, 8, 8), (12, 1, 3, 3), stride=2, padding=1, groups=6),
    Layer("conv2d-1x1", (4, 33, 5, 5), (17, 33, 1, 1), bias=False),
    Layer("conv2d-1x1-stride2", (2, 8, 7, 8), (16, 8, 1, 1), stride=2),
    Layer("conv2d-1x1-image", (7, 33, 1, 1), (65, 33, 1, 1)),
    Layer("conv2d-1x1-lines", (48, 9, 2, 2), (17, 9, 1, 1)),
    Layer("conv2d-7x7-stem", (2, 3, 17, 17), (8, 3, 7, 7), stride=2, padding=3),
    Layer("conv2d-even-kernel", (3, 4, 7, 8), (5, 4, 2, 4), padding=(1, 2)),
    Layer("conv2d-padding-beyond-image", (3, 4, 2, 2), (5, 4, 3, 3), padding=4),
    Layer("conv2d-kernel-covers-image", (5, 4, 6, 5), (7, 4, 6, 5)),
    Layer("conv2d-batch33", (33, 3, 5, 4), (6, 3, 3, 3), padding=1),
    Layer("conv2d-batch1", (1, 3, 21, 19), (6, 3, 3, 3), padding=1),
    Layer("conv2d-padded-stride", (16, 2, 3, 3), (3, 2, 3, 3), stride=2, padding=2),
    Layer("conv2d-padded-stride-batch8", (8, 2, 2, 2), (3, 2, 2, 2), stride=2, padding=1),
    Layer("conv2d-1x1-padded-stride", (16, 2, 2, 2), (3, 2, 1, 1), stride=2, padding=1),
    Layer("conv2d-empty-batch", (0, 4, 6, 6), (5, 4, 3, 3)),
)
CONV1D = (
    Layer("conv1d-5", (4, 8, 21), (6, 8, 5)),
    Layer("conv1d-padded-stride", (16, 6, 3), (4, 6, 3), stride=2, padding=2),
    Layer("conv1d-all", (3, 6, 22), (8, 3, 4), stride=2, padding=3, dilation=2, groups=2),
)
LAYERS = LINEAR + CONV2D + CONV1D
LARGE = (
    Layer("linear-128x784x300", (128, 784), (300, 784)),
    Layer("linear-5x1024x700", (5, 1024), (700, 1024)),
    Layer("conv2d-32x16x16x16", (32, 16, 16, 16), (32, 16, 3, 3), padding=1),
    Layer("conv2d-stride2-large", (16, 32, 17, 15), (64, 32, 3, 3), stride=2, padding=1, bias=False),
    Layer("conv2d-80x70x9x7", (80, 70, 9, 7), (40, 70, 3, 3), padding=1),
    Layer("conv2d-1x1-large", (20, 300, 6, 6), (30, 300, 1, 1)),
    Layer("conv2d-past-the-caches", (48, 9, 26, 26), (10, 9, 3, 3), padding=1),
    Layer("conv2d-stride2-past-the-caches", (32, 7, 39, 37), (26, 7, 3, 3), stride=2, padding=1),
)
"""Large enough that kernels share them among threads, or that results exceed a second-level cache (1 MB); small enough
that float32 sums of small integers are exact."""
TAILS = (
    *(Layer(f"linear-batch{n}", (n, 17), (9, 17)) for n in (*range(1, 18), 31, 33, 48, 63, 64, 65, 127, 129, 240, 256)),
    *(Layer(f"linear-few{n}", (n, 700), (5, 700)) for n in (1, 2, 4, 8, 15, 16)),  # rows of more than 256 entries
    *(Layer(f"linear-lines{i}", (32, i), (i + 1, i)) for i in (*range(1, 18), 31, 33, 300, 600)),
    *(Layer(f"linear-features{i}", (3, i), (i + 1, i)) for i in (*range(1, 18), 31, 33, 63, 65)),
    *(Layer(f"conv2d-batch{n}", (n, 3, 4, 5), (6, 3, 3, 3), padding=1) for n in (*range(1, 18), 31, 33, 63, 65)),
    *(Layer(f"conv2d-stride2-batch{n}", (n, 3, 5, 6), (6, 3, 3, 3), 2, 1) for n in (16, 24, 32, 70, 80)),
    *(Layer(f"conv2d-width{w}", (2, 3, 4, w), (6, 3, 3, 3), padding=1) for w in (*range(1, 18), 31, 33, 63, 65)),
)
"""One dimension after the other through the sizes around which vectors end."""
FEW = tuple(layer for layer in LAYERS if layer.name in ("linear-7x33x65", "conv2d-rectangular", "conv2d-groups"))
SMALL = (
    Layer("linear-3x5x4", (3, 5), (4, 5)),
    Layer("conv2d-small", (2, 4, 5, 4), (6, 2, 3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=2),
)


@st.composite
def any_convolution(draw: st.DrawFn) -> Layer:
    """A convolution of any small geometry."""

    def two(least: int, most: int) -> tuple[int, int]:
        return draw(st.integers(least, most)), draw(st.integers(least, most))

    taps, stride, dilation, padding, beyond = two(1, 4), two(1, 5), two(1, 4), two(0, 5), two(0, 7)
    reach = [d * (t - 1) + 1 for d, t in zip(dilation, taps, strict=True)]
    size = [max(1, r - 2 * p) + b for r, p, b in zip(reach, padding, beyond, strict=True)]
    batch = draw(st.one_of(st.integers(0, 9), st.sampled_from([16, 32, 66])))
    channels, outputs, groups = (draw(st.integers(1, 3)) for _ in range(3))
    x, weight = (batch, channels * groups, *size), (outputs * groups, channels, *taps)
    return Layer("any", x, weight, stride, padding, dilation, groups, draw(st.booleans()))


def layers(which: tuple[Layer, ...] = LAYERS) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("layer", which, ids=lambda layer: layer.name)


def dtypes(*names: str) -> pytest.MarkDecorator:
    chosen = names or tuple(DTYPES)
    return pytest.mark.parametrize("dtype", [DTYPES[n] for n in chosen], ids=chosen)


def _sliced(t: Tensor) -> Tensor:
    """Every second element of a longer last dimension."""
    return torch.stack([t, torch.full_like(t, 7)], dim=-1).flatten(-2)[..., ::2]


def _offset(t: Tensor) -> Tensor:
    """Contiguous, but one element past the start of its memory: aligned to nothing wider than an element."""
    memory = t.new_empty(t.numel() + 1)
    return memory[1:].view(t.shape).copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch-innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "channels-innermost": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else _sliced(t),
    "sliced": _sliced,
    "offset": _offset,
}
"""The same values in other strides."""


def _spread(n: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes over all exponents of the dtype, denormal ones too."""
    info = torch.finfo(dtype)
    low, high = torch.tensor([info.smallest_normal * info.eps, info.max], dtype=torch.float64).log2().tolist()
    return torch.exp2(torch.empty(n, dtype=torch.float64).uniform_(low, high)) * torch.randn(n).sign()


PATTERNS: dict[str, Callable[[int, torch.dtype], Tensor]] = {
    "normal": lambda n, dtype: torch.randn(n),
    "all-equal": lambda n, dtype: torch.full((n,), -0.5),
    "two-values": lambda n, dtype: torch.randint(1, 3, (n,)) * torch.randn(n).sign(),
    "zeros": lambda n, dtype: torch.zeros(n),
    "signed-zeros": lambda n, dtype: torch.zeros(n).copysign(torch.randn(n)),
    "mostly-zeros": lambda n, dtype: torch.randn(n) * (torch.rand(n) < 0.01),
    "denormals": lambda n, dtype: torch.randn(n, dtype=torch.float64) * torch.finfo(dtype).smallest_normal / 4,
    "infinities": lambda n, dtype: torch.where(torch.rand(n) < 0.1, torch.inf, torch.rand(n)) * torch.randn(n).sign(),
    "ascending": lambda n, dtype: torch.linspace(0, 1, n),
    "descending": lambda n, dtype: torch.linspace(-1, 0, n),
    "many-ties": lambda n, dtype: (torch.randn(n) * 4).round() / 4,
    "integers": lambda n, dtype: torch.randint(-3, 4, (n,)),
    "last-bits": lambda n, dtype: 1 + torch.randint(0, 4, (n,)).double() * torch.finfo(dtype).eps,
    "all-exponents": _spread,
    "one-outlier": lambda n, dtype: torch.where(torch.arange(n) == n // 3, 1e4, torch.rand(n)),
}
"""Score tensors that are hard on a selection: name -> (n, dtype) to n values, not yet of the dtype."""


def scores_of(pattern: str, n: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return PATTERNS[pattern](n, dtype).to(dtype).to(device)


SIZES: dict[int, tuple[int, ...]] = {
    0: (0,),
    1: (0, 1),
    7: (0, 1, 3, 6, 7),
    8: (1, 4, 8),
    9: (1, 4, 8, 9),
    63: (1, 13, 62, 63),
    64: (1, 13, 64),
    65: (1, 13, 64, 65),
    1000: (0, 1, 20, 100, 999, 1000),
    33 * 65: (43, 1072, 2145),
    20_011: (401, 20_010),
    100_003: (2001, 100_002),
    1 << 18: (26_214,),
}
"""Number of scores -> numbers to keep."""
