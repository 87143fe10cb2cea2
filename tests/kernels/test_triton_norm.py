"""batch_norm_act in Triton, interpreted under the guard, in tiles so small that every shape has several.

Truth is the reference in float64.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_guard
from accuracy import assert_accurate
from cases import LAYOUTS, dtypes
from torch import Tensor

from exssnet.kernels import reference, triton_norm

pytestmark = pytest.mark.proof

IN_MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels-innermost": LAYOUTS["channels-innermost"],
    "batch-innermost": LAYOUTS["batch-innermost"],
    "sliced": LAYOUTS["sliced"],
}
SHAPES = [(7, 3, 5, 3), (5, 19, 9), (33, 20), (2, 2, 1, 70)]
"""Few channels; more than a tile has; features without pixels, one after another; rows longer than a tile."""
EPS = 1e-3
Results = dict[str, Tensor]
in_memory = pytest.mark.parametrize("layout", IN_MEMORY)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts have several tiles, and channels several parts. Number of parts and tiles are no powers of two."""
    for name, size in (("TILE", 64), ("PARTS", 3), ("PROGRAMS", 9)):
        monkeypatch.setattr(triton_norm, name, size)


def leaves(shape: tuple[int, ...], dtype: torch.dtype, change: Callable[[Tensor], Tensor]) -> Results:
    """Channels away from zero. Per-channel tensors are float32; half of them is negative."""
    torch.manual_seed(0)
    channels = shape[1]
    offset = torch.linspace(-5, 5, channels).reshape(-1, *[1] * (len(shape) - 2))
    images = {"x": 3 * torch.randn(shape) + offset, "residual": torch.randn(shape), "grad": torch.randn(shape)}
    given = {"weight": torch.randn(channels), "bias": torch.randn(channels), "mean": offset.flatten().clone()}
    given |= {"var": torch.linspace(5, 11, channels), "running_mean": torch.randn(channels)}
    given["running_var"] = torch.rand(channels)
    return {n: change(t.to(dtype)) for n, t in images.items()} | given


def results(kernels: Any, t: Results, training: bool, residual: bool, affine: bool, relu: bool) -> Results:
    """All outputs, gradients and running statistics of one step."""
    r, weight, bias = t["residual"] if residual else None, *((t["weight"], t["bias"]) if affine else (None, None))
    given = (None, None) if training else (t["mean"], t["var"])
    running, batches = [t[n].clone() for n in ("running_mean", "running_var")], torch.tensor(3)
    step = (*running, batches, 0.1 if affine else None) if training else (None,) * 4
    y, mean, var = kernels.batch_norm_act(t["x"], r, weight, bias, *given, *step, EPS, relu)
    asked = [True, residual, affine, affine]
    found = kernels.batch_norm_act_backward(
        t["grad"], t["x"], y if relu and residual else None, weight, bias, mean, var, EPS, relu, training, asked
    )
    names = ("grad_x", "grad_residual", "grad_weight", "grad_bias")
    assert batches.item() == 3 + training
    gradients = {n: g for n, g, needed in zip(names, found, asked, strict=True) if needed}
    return {"y": y, "mean": mean, "var": var, "running_mean": running[0], "running_var": running[1]} | gradients


OPTIONS = [(True, True, True, True), (True, False, False, True), (True, True, False, False), (False, True, True, True),
           (False, False, True, True), (False, False, False, False)]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda on: "-".join(str(int(o)) for o in on))
@in_memory
@dtypes("float32", "bfloat16", "float16")
@shapes
def test_errs_at_most_twice_as_much_as_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, options: tuple[bool, ...]
) -> None:
    values = leaves(shape, dtype, IN_MEMORY[layout])
    got, plain = (results(kernels, values, *options) for kernels in (triton_norm, reference))
    truth = results(reference, {n: t.double() for n, t in values.items()}, *options)
    assert_accurate(got, plain, truth)
    assert {n: (t.stride(), t.dtype) for n, t in got.items()} == {n: (t.stride(), t.dtype) for n, t in plain.items()}


@pytest.mark.parametrize("training", [True, False])
def test_two_launches_each_way_and_one_forward_in_evaluation(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a residual, ReLU and the step of the running statistics."""
    launches = triton_guard.launched(monkeypatch)
    results(triton_norm, leaves(SHAPES[0], torch.bfloat16, Tensor.contiguous), training, True, True, True)
    forward = ["_moments_kernel", "_normalise_kernel"] if training else ["_normalise_kernel"]
    assert launches == [*forward, "_sums_kernel", "_gradients_kernel"]


triton_guard.interpret(globals())
