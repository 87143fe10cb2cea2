"""The Triton kernels behind the operators: registered, compiled, and judged by the operators' own tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton_compile
import triton_guard
from cases import DTYPES
from selections import selected
from torch import Tensor

from exssnet import ops
from exssnet.kernels import triton_backend, triton_bits, triton_norm, triton_topk

pytestmark = pytest.mark.proof

TESTS = Path(__file__).parents[1] / "ops"


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm_step(dtype: torch.dtype, order: torch.memory_format) -> None:
    """Batch norm, residual and ReLU, forward and backward."""
    x = meta(64, 64, 56, 56, dtype=dtype).to(memory_format=order)
    of_channel, batches = meta(64, dtype=torch.float32), meta(dtype=torch.int64)
    given, running = (of_channel, of_channel, None, None), (of_channel, of_channel, batches, 0.1)
    triton_norm.batch_norm_act(x, x, *given, *running, 1e-5, True)
    triton_norm.batch_norm_act_backward(x, x, x, *[of_channel] * 4, 1e-5, True, True, [True] * 4)


CALLS: dict[str, Callable[[], object]] = {
    **{
        f"topk_masks of {name}": lambda dtype=dtype: selected(
            triton_topk.topk_masks, [meta(512, 512, dtype=dtype)] * 2, [20_000] * 2
        )
        for name, dtype in DTYPES.items()
        if name != "float16"  # as bfloat16, but for the constant of infinity
    },
    "packed topk_masks": lambda: selected(
        triton_topk.topk_masks, [meta(512, 512, dtype=torch.float32)] * 2, [20_000] * 2, packed=True
    ),
    "topk_masks of one layer": lambda: selected(triton_topk.topk_masks, [meta(33, 65, dtype=torch.float32)], [20]),
    "pack_mask": lambda: triton_bits.pack_mask(meta(512, 512, dtype=torch.bool)),
    "unpack_mask": lambda: triton_bits.unpack_mask(meta(32_768, dtype=torch.uint8), [512, 512]),
    "free_mask": lambda: triton_bits.free_mask(*[meta(512, 512, dtype=torch.bool)] * 2),
}


@pytest.mark.skipif(triton_guard.interpreting, reason="this process interprets Triton")
@pytest.mark.parametrize("architecture", triton_compile.TARGETS)
@pytest.mark.parametrize("call", CALLS)
def test_selection_and_bits_compile_and_nothing_spills(call: str, architecture: str) -> None:
    kernels = triton_compile.compiled(architecture, CALLS[call])
    assert len(kernels) > 0
    assert [k for k in kernels if k.spilled or k.shared > triton_compile.SHARED[architecture]] == []


@pytest.mark.skipif(triton_guard.interpreting, reason="this process interprets Triton")
@pytest.mark.parametrize(
    ("architecture", "dtype", "order"),
    [(architecture, torch.bfloat16, torch.channels_last) for architecture in triton_compile.TARGETS]
    + [("sm_90", torch.float32, torch.contiguous_format)],
    ids=str,
)
def test_a_norm_with_residual_and_relu_launches_two_kernels_each_way_without_spills(
    architecture: str, dtype: torch.dtype, order: torch.memory_format
) -> None:
    kernels = triton_compile.compiled(architecture, lambda: norm_step(dtype, order))
    assert [k.kernel for k in kernels] == ["_moments_kernel", "_normalise_kernel", "_sums_kernel", "_gradients_kernel"]
    assert [k for k in kernels if k.spilled or k.shared > triton_compile.SHARED[architecture]] == []


def test_operators_launch_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton_guard.interpreting:
        name = test_operators_launch_triton_kernels.__name__
        triton_guard.run(f"{__file__}::{name}", EXSSNET_BACKEND="triton")
        return
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [name for name in triton_backend.kernels() if not registered(f"exssnet::{name}", "CPU")] == []
    launched: list[str] = []
    monkeypatch.setattr(triton_guard.GridExecutor, "__call__", lambda self, *_, **__: launched.append(self.fn.__name__))
    ops.pack_mask(torch.ones(3, dtype=torch.bool))
    ops.topk_select([torch.ones(3)], [2])
    assert launched[:2] == ["_pack", "_count_digit"]


OWN_TESTS = {
    "test_bits.py": "not 1048576",
    "test_topk.py": "of_equal_magnitudes or tie_index or strides or opcheck or compiles or different_dtypes "
    "or (exactly_k and many-ties)",
    "test_norm.py": "nan_in_a_channel or relu_gradient_is_zero",
    "test_supermask.py": "(groups or 7x33x65) and (opcheck or compiles)",
    "test_masked.py": "(groups or 7x33x65) and (opcheck or compiles)",
}
"""Test files, and which of their default tests are quick enough to interpret."""


@pytest.mark.parametrize("file", OWN_TESTS)
def test_operators_pass_their_own_tests_on_triton_kernels(file: str) -> None:
    triton_guard.run(str(TESTS / file), "-m", "not proof", "-k", OWN_TESTS[file], EXSSNET_BACKEND="triton")
