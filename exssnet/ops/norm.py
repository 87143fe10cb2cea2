"""Batch norm fused with the residual and the ReLU that follow it."""

import functools
from typing import Any

import torch
from torch import Tensor

from ..kernels import native
from ..kernels.layouts import empty_in_layout_of
from ..kernels.reference import update_running, wide
from .library import bind_gradient, chosen, define, refuse_tangents, same_kind

__all__ = ["batch_norm_act"]

_Statistics = tuple[Tensor | None, Tensor | None, Tensor | None, float | None]
"""Running mean, running variance, number of batches, momentum."""


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = (x.new_empty(x.shape[1], dtype=wide(x.dtype)) for _ in range(2))
    return empty_in_layout_of(x), mean, var


def _fake_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    per_channel = (x.new_empty(x.shape[1], dtype=(mean if t is None else t).dtype) for t in (weight, bias))
    fresh = empty_in_layout_of(x), empty_in_layout_of(x), *per_channel
    return tuple(t if needed else x.new_empty(0) for t, needed in zip(fresh, rest[-1], strict=True))


define(
    "batch_norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, float? momentum, float eps, bool relu) -> "
    "(Tensor, Tensor, Tensor)",
    _fake,
)
define(
    "batch_norm_act_backward(Tensor grad, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    "float eps, bool relu, bool training, bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
_forward = torch.ops.exssnet.batch_norm_act.default
_backward = torch.ops.exssnet.batch_norm_act_backward.default


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
        var: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None,
        momentum: float | None, eps: float, relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]  # fmt: skip
        running = running_mean, running_var, batches
        with torch._C._AutoDispatchBelowAutograd():
            y, m, v = _forward(x, residual, weight, bias, mean, var, *running, momentum, eps, relu)
        if changed := tuple(t for t in running if t is not None):
            torch.autograd.graph.increment_version(changed)
        ctx.mark_non_differentiable(m, v)
        ctx.set_materialize_grads(False)
        # x tells where ReLU was positive; with a residual y does. The next layer saves y anyway.
        ctx.save_for_backward(x, y if relu and residual is not None else None, weight, bias, m, v)
        ctx.options = eps, relu, mean is None
        return y, m, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:  # type: ignore[override]
        if grad is None:
            return (None,) * 12
        refuse_tangents("batch_norm_act", [grad])
        relu, needed = ctx.options[1], ctx.needs_input_grad[:4]
        output_mask = [needed[0], needed[1] and relu, needed[2], needed[3]]
        results: tuple[Tensor, ...] = (grad,) * 4
        if any(output_mask):
            saved = ctx.saved_tensors  # a checkpoint recomputes the forward here, and autograd must see that
            with torch._C._AutoDispatchBelowAutograd():
                results = _backward(grad, *saved, *ctx.options, output_mask)
        gradients = [g if asked else None for g, asked in zip(results, output_mask, strict=True)]
        if needed[1] and not relu:
            gradients[1] = grad
        return *gradients, *[None] * 8


def _plain(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
    var: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None,
    momentum: float | None, eps: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    channels, dtype = (-1, *[1] * (x.dim() - 2)), x.dtype
    x = x.to(wide(dtype))
    if mean is None or var is None:
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    else:
        mean, var = (t.detach().to(x.dtype, copy=True) for t in (mean, var))
    count = x.numel() // max(x.shape[1], 1)
    update_running(running_mean, running_var, batches, momentum, mean.detach(), var.detach(), count)
    y = (x - mean.reshape(channels)) * (var + eps).rsqrt().reshape(channels)
    y = y if weight is None else y * weight.reshape(channels)
    y = y if bias is None else y + bias.reshape(channels)
    y = y if residual is None else y + residual
    return (y.relu() if relu else y).to(dtype), mean.detach(), var.detach()


@functools.cache
def _served_by(device: str) -> str:
    return native.serving("batch_norm_act", device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def takes_any_layout(device: str) -> bool:
    """Whether a device's kernels take half precision and more layouts than the batch innermost without copies.

    Triton's take every layout, those of the CPU channels_last.
    """
    return _served_by(device).startswith(("kernels/triton", "csrc/"))


bind_gradient("batch_norm_act", _Boundary)
_call = chosen(_forward, _Boundary.apply, _plain)


def batch_norm_act(
    x: Tensor, residual: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None,
    mean: Tensor | None = None, var: Tensor | None = None, eps: float = 1e-5, relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    r"""Batch norm, then a residual added, then ReLU, in one operation.

    :math:`y = \max(0, (x - \mu) / \sqrt{\sigma^2 + \epsilon} \cdot w + b + r)`, computed in float64 if x is float64,
    else in float32. y, and the gradients of x and of the residual, have x's memory layout if x is contiguous,
    channels_last, or stored with the batch innermost, in the order (C, ..., N). For other strides they have the batch
    innermost. On a CPU, x is copied first if it is float16, or neither channels_last nor stored with the batch
    innermost. Source: Ioffe and Szegedy 2015, algorithm 1.

    Args:
        x: (N, C, ...), float32, bfloat16, float16 or float64, of any strides.
        residual: r, of x's shape and dtype.
        weight: w, (C,), of x's dtype, or float32 if x has half precision; default 1.
        bias: b, (C,), of such a dtype; default 0.
        mean: (C,), of such a dtype, the mean to normalise by, for evaluation. Without it, mean and biased variance are
            those of the batch, over all dimensions but 1, and gradients flow through them, for training.
        var: (C,), of such a dtype, the variance to normalise by, together with `mean`.
        eps: Added to the variance.
        relu: Whether the ReLU follows.

    Returns:
        (y, mean, var) with the statistics that were used, as new tensors without gradient, in float32 or float64. It
        has no second derivative.

    Raises:
        ValueError: Shapes, dtypes or devices do not match, or only one of mean and var is given.
    """
    return normalised(x, residual, weight, bias, mean, var, (None, None, None, None), eps, relu)


def normalised(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
    var: Tensor | None, running: _Statistics, eps: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`batch_norm_act` that also takes the step of the running statistics, see `update_running`."""
    if x.dim() < 2:
        raise ValueError(f"batch_norm_act: x must have shape (N, C, ...), got {tuple(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"batch_norm_act: residual must have shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    of_channels = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    for name, t in of_channels.items():
        if t is not None and t.shape != x.shape[1:2]:
            raise ValueError(f"batch_norm_act: {name} must have shape ({x.shape[1]},), got {tuple(t.shape)}")
    if (mean is None) != (var is None):
        raise ValueError(
            f"batch_norm_act: mean and var must be given together, got {'mean' if var is None else 'var'} alone"
        )
    also = wide(x.dtype), x.device
    of_dtype = {n: t for n, t in of_channels.items() if t is not None and (t.dtype, t.device) != also}
    same_kind("batch_norm_act", x, residual=residual, **of_dtype)
    y, mean, var = _call(x, residual, weight, bias, mean, var, *running, eps, relu)
    return y, mean, var
