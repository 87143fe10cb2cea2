"""Batch norm fused with the residual and the ReLU that follow it, for a batch that is stored innermost."""

from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import empty_batch_last
from .library import bind_gradient, chosen, define, refuse_tangents, same_kind

__all__ = ["batch_norm_act"]


def _fake_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    fresh = (
        empty_batch_last(x, *x.shape),
        empty_batch_last(x, *x.shape),
        x.new_empty(x.shape[1]),
        x.new_empty(x.shape[1]),
    )
    return tuple(t if needed else x.new_empty(0) for t, needed in zip(fresh, rest[-1], strict=True))


define(
    "batch_norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, "
    "bool relu) -> (Tensor, Tensor, Tensor)",
    lambda x, *_: (empty_batch_last(x, *x.shape), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])),
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
        var: Tensor | None, eps: float, relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]  # fmt: skip
        with torch._C._AutoDispatchBelowAutograd():
            y, m, v = _forward(x, residual, weight, bias, mean, var, eps, relu)
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
            return (None,) * 8
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
        return *gradients, None, None, None, None


def _plain(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
    var: Tensor | None, eps: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    channels = -1, *[1] * (x.dim() - 2)
    if mean is None or var is None:
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    else:
        mean, var = mean.detach().clone(), var.detach().clone()
    y = (x - mean.reshape(channels)) * (var + eps).rsqrt().reshape(channels)
    y = y if weight is None else y * weight.reshape(channels)
    y = y if bias is None else y + bias.reshape(channels)
    y = y if residual is None else y + residual
    return y.relu() if relu else y, mean.detach(), var.detach()


bind_gradient("batch_norm_act", _Boundary)
_call = chosen(_forward, _Boundary.apply, _plain)


def batch_norm_act(
    x: Tensor, residual: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None,
    mean: Tensor | None = None, var: Tensor | None = None, eps: float = 1e-5, relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    r"""Batch norm, then a residual added, then ReLU, in one pass.

    :math:`y = \max(0, (x - \mu) / \sqrt{\sigma^2 + \epsilon} \cdot w + b + r)`. y, and the gradients of x and of the
    residual, are stored with the batch innermost, in the order (C, ..., N). If x is stored this way, a channel is one
    row of memory. Source: Ioffe and Szegedy 2015, algorithm 1.

    Args:
        x: (N, C, ...), float32 or float64, of any strides.
        residual: r, of x's shape.
        weight: w, (C,); default 1.
        bias: b, (C,); default 0.
        mean: (C,), the mean to normalise by, for evaluation. Without it, mean and biased variance are those of the
            batch, over all dimensions but 1, and gradients flow through them, for training.
        var: (C,), the variance to normalise by, together with `mean`.
        eps: Added to the variance.
        relu: Whether the ReLU follows.

    Returns:
        (y, mean, var) with the statistics that were used, as new tensors without gradient. It has no second derivative.

    Raises:
        ValueError: Shapes, dtypes or devices do not match, or only one of mean and var is given.
    """
    if x.dim() < 2:
        raise ValueError(f"batch_norm_act: x must have shape (N, C, ...), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"batch_norm_act: x must be float32 or float64, got {x.dtype}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"batch_norm_act: residual must have shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    for name, t in (("weight", weight), ("bias", bias), ("mean", mean), ("var", var)):
        if t is not None and t.shape != x.shape[1:2]:
            raise ValueError(f"batch_norm_act: {name} must have shape ({x.shape[1]},), got {tuple(t.shape)}")
    if (mean is None) != (var is None):
        raise ValueError(
            f"batch_norm_act: mean and var must be given together, got {'mean' if var is None else 'var'} alone"
        )
    same_kind("batch_norm_act", x, residual=residual, weight=weight, bias=bias, mean=mean, var=var)
    y, mean, var = _call(x, residual, weight, bias, mean, var, eps, relu)
    return y, mean, var
