"""Every Triton kernel of the products, in every configuration, compiled for GPUs that are not there.

Nothing is kept in memory that should be in registers, programs fit into the shared memory, products run on the tensor
cores. As a script, with tests/helpers on PYTHONPATH, `--table` prints what was found, as Markdown.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
import triton_compile
from torch import Tensor
from triton_compile import SHARED, TARGETS, Compiled, compiled

from exssnet.kernels import triton_conv, triton_linear, triton_product, triton_weights

pytestmark = pytest.mark.proof

if triton_compile.interpreting:
    pytest.skip("this process interprets Triton", allow_module_level=True)

Call = Callable[[], object]
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


def meta(*shape: int, dtype: torch.dtype = BFLOAT16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def selection_of(weight: Tensor, packed: bool) -> Tensor:
    """A packed mask, as converted models have it, or a row."""
    return meta(-(-weight.numel() // 8), dtype=torch.uint8) if packed else meta(2, dtype=torch.int64)


def supermask_linear(
    dtype: torch.dtype, batch: int = 4096, sparse: bool = False, packed: bool = False
) -> dict[str, Call]:
    x, weight, grad = meta(batch, 1024, dtype=dtype), meta(2048, 1024, dtype=dtype), meta(batch, 2048, dtype=dtype)
    scores, row, bias = meta(2048, 1024, dtype=FLOAT32), selection_of(weight, packed), meta(2048, dtype=dtype)
    backward = triton_linear.supermask_linear_backward
    return {
        "output": lambda: triton_linear.supermask_linear(x, weight, scores, row, bias, sparse),
        "input gradient": lambda: backward(grad, x, weight, scores, row, sparse, [True, False, False]),
        "score gradient": lambda: backward(grad, x, weight, scores, row, sparse, [False, True, False]),
        "both gradients": lambda: backward(grad, x, weight, scores, row, sparse, [False, True, True]),
    }


def gradients_in_parts(dtype: torch.dtype) -> dict[str, Call]:
    x, weight, grad = (meta(*n, dtype=dtype) for n in ((512, 64), (1024, 64), (512, 1024)))
    scores, row = meta(1024, 64, dtype=FLOAT32), meta(2, dtype=torch.int64)
    backward = triton_linear.supermask_linear_backward
    return {"gradients": lambda: backward(grad, x, weight, scores, row, False, [True, True, False])}


def convolution_of(
    dtype: torch.dtype, channels: int = 64, stride: int = 1, groups: int = 1, sparse: bool = False, nchw: bool = False
) -> tuple[Tensor, Tensor, Tensor, list[Any]]:
    """(x, weight, gradient of the output, geometry) of a 3 x 3 convolution of 128 images of 32 x 32 pixels."""
    order = torch.contiguous_format if nchw else torch.channels_last
    size = 32 // stride
    x, grad = (meta(128, c, n, n, dtype=dtype).to(memory_format=order) for c, n in ((channels, 32), (128, size)))
    if sparse:
        x, grad = (meta(*t.shape[1:], 128, dtype=dtype).movedim(-1, 0) for t in (x, grad))
    return x, meta(128, channels // groups, 3, 3, dtype=dtype), grad, [[stride] * 2, [1, 1], [1, 1], groups]


def supermask_conv2d(dtype: torch.dtype, sparse: bool = False, packed: bool = False, **options: Any) -> dict[str, Call]:
    x, weight, grad, geometry = convolution_of(dtype, sparse=sparse, **options)
    scores, row, bias = meta(*weight.shape, dtype=FLOAT32), selection_of(weight, packed), meta(128, dtype=dtype)
    backward = triton_conv.supermask_conv2d_backward
    return {
        "output": lambda: triton_conv.supermask_conv2d(x, weight, scores, row, bias, *geometry, sparse),
        "input gradient": lambda: backward(grad, x, weight, scores, row, *geometry, sparse, [True, False, False]),
        "score gradient": lambda: backward(grad, x, weight, scores, row, *geometry, sparse, [False, True, False]),
    }


def masked_conv2d(dtype: torch.dtype, packed: bool) -> dict[str, Call]:
    x, weight, grad, geometry = convolution_of(dtype)
    bits = meta(weight.numel() // 8, dtype=torch.uint8) if packed else meta(*weight.shape, dtype=torch.bool)
    backward = triton_conv.masked_conv2d_backward
    return {
        "output": lambda: triton_conv.masked_conv2d(x, weight, bits, bits, None, *geometry),
        "gradients": lambda: backward(grad, x, weight, bits, bits, *geometry, [True, True]),
    }


def masked_linear(dtype: torch.dtype, packed: bool) -> dict[str, Call]:
    x, weight, grad = meta(4096, 1024, dtype=dtype), meta(2048, 1024, dtype=dtype), meta(4096, 2048, dtype=dtype)
    bits = meta(weight.numel() // 8, dtype=torch.uint8) if packed else meta(*weight.shape, dtype=torch.bool)
    backward = triton_linear.masked_linear_backward
    return {
        "output": lambda: triton_linear.masked_linear(x, weight, bits, bits, None),
        "gradients": lambda: backward(grad, x, weight, bits, bits, [True, True]),
    }


def bitmap(dtype: torch.dtype, convolution: bool) -> dict[str, Call]:
    x, weight, grad = meta(4096, 1024, dtype=dtype), meta(2048, 1024, dtype=dtype), meta(4096, 2048, dtype=dtype)
    geometry: list[Any] = []
    if convolution:
        x, weight, grad, geometry = convolution_of(dtype)
    values, shape = meta(weight.numel() // 20, dtype=dtype), list(weight.shape)
    words = meta(weight.numel() // 32, 2, dtype=torch.int64)
    forward, backward = (
        (triton_conv.bitmap_conv2d, triton_conv.bitmap_conv2d_backward)
        if convolution
        else (triton_linear.bitmap_linear, triton_linear.bitmap_linear_backward)
    )
    return {
        "output": lambda: forward(x, values, values, words, None, shape, *geometry),
        "gradients": lambda: backward(grad, x, values, values, words, shape, *geometry, [True, True]),
    }


def weights(dtype: torch.dtype, layers: int, last: bool = False) -> dict[str, Call]:
    """last: channels_last."""
    shapes = [(64, 64 + i, 3, 3) for i in range(layers)]
    all_weights, scores = ([meta(*shape, dtype=FLOAT32) for shape in shapes] for _ in range(2))
    bits = [meta(-(-w.numel() // 8), dtype=torch.uint8) for w in all_weights]
    order = torch.channels_last if last else torch.contiguous_format
    grads = [meta(*shape, dtype=dtype).to(memory_format=order) for shape in shapes]
    backward = triton_weights.supermask_weights_backward
    return {
        "weights": lambda: triton_weights.supermask_weights(all_weights, scores, bits, dtype, [last] * layers),
        "gradients": lambda: backward(grads, all_weights, scores, bits, [True, True]),
    }


def values(dtype: torch.dtype, layers: int) -> dict[str, Call]:
    all_values = [meta(1000 + i, dtype=FLOAT32) for i in range(layers)]
    dense, places = ([meta(*n, dtype=d) for _ in all_values] for n, d in (((64, 576), dtype), ((1000,), torch.int32)))
    return {
        "written": lambda: triton_weights.write_values(all_values, places, dense),
        "gathered": lambda: triton_weights.write_values_backward(dense, all_values, places),
    }


def tf32(layer: Callable[[torch.dtype], dict[str, Call]]) -> dict[str, Call]:
    def allowed(call: Call) -> None:
        torch.set_float32_matmul_precision("high")
        try:
            call()
        finally:
            torch.set_float32_matmul_precision("highest")

    return {name: lambda call=call: allowed(call) for name, call in layer(FLOAT32).items()}


EVERYWHERE: dict[str, Callable[[], dict[str, Call]]] = {
    "linear bfloat16": lambda: supermask_linear(BFLOAT16),
    "linear float32": lambda: supermask_linear(FLOAT32),
    "3x3 bfloat16": lambda: supermask_conv2d(BFLOAT16),
    "3x3 float32": lambda: supermask_conv2d(FLOAT32),
}
VARIANTS: dict[str, Callable[[], dict[str, Call]]] = {
    "linear float16": lambda: supermask_linear(FLOAT16),
    "linear tf32": lambda: tf32(supermask_linear),
    "linear in parts": lambda: supermask_linear(BFLOAT16, batch=16),
    "linear batch innermost": lambda: supermask_linear(BFLOAT16, sparse=True),
    "linear packed mask": lambda: masked_linear(BFLOAT16, packed=True),
    "linear bool mask": lambda: masked_linear(BFLOAT16, packed=False),
    "3x3 tf32": lambda: tf32(supermask_conv2d),
    "3x3 contiguous": lambda: supermask_conv2d(BFLOAT16, nchw=True),
    "3x3 batch innermost": lambda: supermask_conv2d(BFLOAT16, sparse=True),
    "3x3 stride 2": lambda: supermask_conv2d(BFLOAT16, stride=2),
    "3x3 of 3 channels": lambda: supermask_conv2d(BFLOAT16, channels=3),
    "3x3 of 3 channels float32": lambda: supermask_conv2d(FLOAT32, channels=3),
    "3x3 depthwise": lambda: supermask_conv2d(BFLOAT16, channels=128, groups=128),
    "3x3 packed mask": lambda: masked_conv2d(BFLOAT16, packed=True),
    "3x3 bool mask": lambda: masked_conv2d(BFLOAT16, packed=False),
    "linear bitmap pattern": lambda: bitmap(BFLOAT16, convolution=False),
    "3x3 bitmap pattern": lambda: bitmap(BFLOAT16, convolution=True),
    "3x3 bitmap pattern float32": lambda: bitmap(FLOAT32, convolution=True),
    "weights of all layers": lambda: weights(BFLOAT16, 64),
    "weights of all layers, channels_last": lambda: weights(BFLOAT16, 64, last=True),
    "free values of all layers": lambda: values(BFLOAT16, 64),
    "linear gradients in parts": lambda: gradients_in_parts(BFLOAT16),
    "linear packed selection": lambda: supermask_linear(BFLOAT16, packed=True),
    "3x3 packed selection": lambda: supermask_conv2d(BFLOAT16, packed=True),
    "3x3 packed selection float32": lambda: supermask_conv2d(FLOAT32, packed=True),
}
CASES = EVERYWHERE | VARIANTS
SUITE = [(architecture, case) for case in EVERYWHERE for architecture in TARGETS]
SUITE += [(("sm_90", "gfx942")[number % 2], case) for number, case in enumerate(VARIANTS)]
IN_FULL = ("3x3 bfloat16", "linear float32")  # which cover every configuration of both dtypes


def most_configurations(architecture: str, case: str) -> int | None:
    """None means all: on sm_90 of every main case, elsewhere of `IN_FULL`."""
    full = case in (EVERYWHERE if architecture == "sm_90" else IN_FULL)
    if "EXSSNET_WHOLE_GRIDS" in os.environ:
        return None if case in EVERYWHERE else 2
    return None if full else 1


def compile_case(architecture: str, case: str) -> list[tuple[str, Compiled]]:
    return [
        (f"{case}, {name}", kernel)
        for name, call in CASES[case]().items()
        for kernel in compiled(architecture, call, most_configurations(architecture, case))
    ]


def compile_all() -> dict[str, list[tuple[str, Compiled]]]:
    found: dict[str, list[tuple[str, Compiled]]] = {architecture: [] for architecture in TARGETS}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for (architecture, _), kernels in zip(SUITE, pool.map(compile_case, *zip(*SUITE, strict=True)), strict=True):
            found[architecture] += kernels
    return found


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[tuple[str, Compiled]]]:
    return compile_all()


architectures = pytest.mark.parametrize("architecture", TARGETS)
Kernels = dict[str, list[tuple[str, Compiled]]]


@architectures
def test_every_kernel_is_compiled_in_every_configuration(kernels: Kernels, architecture: str) -> None:
    tiles = triton_product.PRODUCT_TILES, triton_product.GRADIENT_TILES
    tuned = {"product_kernel", "gradient_kernel"}
    found = {(k.kernel, k.configuration) for _, k in kernels[architecture] if k.kernel in tuned}
    assert len(found) == sum(len(of_dtype) for each in tiles for of_dtype in each.values())


@architectures
def test_nothing_spills(kernels: Kernels, architecture: str) -> None:
    assert [(case, k) for case, k in kernels[architecture] if k.spilled] == []


@architectures
def test_shared_memory_is_there(kernels: Kernels, architecture: str) -> None:
    assert [(case, k) for case, k in kernels[architecture] if k.shared > SHARED[architecture]] == []


@architectures
def test_products_run_on_tensor_cores(kernels: Kernels, architecture: str) -> None:
    def meant(k: Compiled) -> str:
        if "BLOCK_O" not in k.launch:
            return ""
        narrow = k.launch["BLOCK_O"] < 64  # too few rows for the asynchronous instructions
        return {"sm_80": "HMMA", "gfx942": "v_mfma"}.get(
            architecture, "HMMA" if narrow else {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(architecture, "")
        )

    assert [(case, k) for case, k in kernels[architecture] if k.tensor_cores != meant(k)] == []


def table() -> None:
    print("| case | kernel | tile | architecture | registers | spilled | shared | instructions | tensor cores |")
    print("|---|---|---|---|---|---|---|---|---|")
    for architecture, found in compile_all().items():
        for case, k in found:
            cells = case, k.kernel, k.configuration, architecture, k.registers, k.spilled, k.shared, k.instructions()
            print("|", " | ".join(map(str, cells)), "|", k.tensor_cores or "none", "|")


if __name__ == "__main__":
    if sys.argv[1:] != ["--table"]:
        raise SystemExit("usage: PYTHONPATH=tests/helpers python tests/kernels/test_triton_compile.py --table")
    table()
