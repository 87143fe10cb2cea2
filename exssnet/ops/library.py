"""Registration of operators with PyTorch's dispatcher, and the rules that all of them share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from exssnet.kernels import reference

_library = torch.library.Library("exssnet", "DEF")


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Define an operator, its reference for every device, and its shapes for tracing."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"exssnet::{name}", fake, lib=_library)


def differentiable(name: str, gradients: Sequence[int], bias: int) -> Callable[..., Tensor]:
    """A callable for operator `name` (tensors, bias, anything else), whose backward is the operator `<name>_backward`.

    The backward operator takes the output's gradient, then every argument of the forward but the bias, then an
    `output_mask`; it returns one gradient for each argument index in `gradients`. The bias, argument index `bias`,
    has its gradient summed here.
    """
    forward_op = getattr(torch.ops.exssnet, name).default
    backward_op = getattr(torch.ops.exssnet, f"{name}_backward").default

    class Boundary(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:  # type: ignore[override]
            with torch._C._AutoDispatchBelowAutograd():
                output: Tensor = forward_op(*args)
            ctx.save_for_backward(*args[:bias])
            ctx.others = args[bias + 1 :]
            return output

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
            needed = ctx.needs_input_grad
            result: list[Tensor | None] = [None] * len(needed)
            output_mask = [needed[i] for i in gradients]
            if any(output_mask):
                with torch._C._AutoDispatchBelowAutograd():
                    found = backward_op(grad, *ctx.saved_tensors, *ctx.others, output_mask)
                for i, gradient in zip(gradients, found, strict=True):
                    result[i] = gradient if needed[i] else None
            if needed[bias]:
                result[bias] = grad.sum([d for d in range(grad.dim()) if d != 1])
            return tuple(result)

    bind_gradient(name, Boundary)

    def call(*args: Any) -> Tensor:
        # The compiler traces the operator and finds the Function at its Autograd key. In eager mode, calling the
        # Function directly saves one trip through the dispatcher into Python.
        output: Tensor = forward_op(*args) if torch.compiler.is_compiling() else Boundary.apply(*args)
        return output

    return call


def register_gradient(name: str, call: Callable[..., Any]) -> None:
    """Let operator `name`, where gradients are recorded, be a call that applies a Function."""
    _library.impl(name, call, "Autograd")


def bind_gradient(name: str, boundary: type[torch.autograd.Function]) -> None:
    """Give operator `name` the gradient of a Function; its backward operator has none."""
    boundary.__name__ = boundary.__qualname__ = name
    register_gradient(name, boundary.apply)
    refuse_derivative(f"{name}_backward", "second-order gradients are not supported")


def refuse_derivative(name: str, why: str) -> None:
    """Let an operator without a gradient raise when somebody differentiates through it."""
    op = getattr(torch.ops.exssnet, name).default

    def refuse(*args: Any) -> Any:
        tensors = (t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor))
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError(f"exssnet::{name} has no derivative: {why}")
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(name, refuse, "Autograd")


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype, where it is on for the device of x and takes x."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)  # torch 2.11 cannot compile is_autocast_available
    return torch.get_autocast_dtype(kind) if on and x.is_floating_point() and x.dtype != torch.float64 else None


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the operators multiply x."""
    return _autocast_dtype(x) or x.dtype


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The arguments in autocast's dtype where autocast is on for the device of x, else unchanged."""
    dtype = _autocast_dtype(x)
    if dtype is None:
        return x, *others
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))


def same_kind(operator: str, x: Tensor, **others: Tensor | None) -> None:
    """Refuse arguments on another device, or of another dtype, than x."""
    for name, t in others.items():
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{operator}: x is on {x.device} but {name} is on {t.device}")
        if t.dtype != x.dtype:
            raise ValueError(f"{operator}: x is {x.dtype} but {name} is {t.dtype}")


def pair(operator: str, name: str, value: int | Sequence[int], least: int) -> list[int]:
    """Two integers from one or two, each at least `least`."""
    both = [value, value] if isinstance(value, int) else list(value)
    if not (len(both) == 2 and all(v >= least for v in both)):
        raise ValueError(f"{operator}: {name} must be one or two integers of at least {least}, got {value}")
    return both


def single(operator: str, name: str, value: int | Sequence[int], least: int) -> int:
    """The one integer of a one-dimensional geometry argument, given plain or as a sequence of one."""
    one = [value] if isinstance(value, int) else list(value)
    if not (len(one) == 1 and one[0] >= least):
        raise ValueError(f"{operator}: {name} must be one integer of at least {least}, got {value}")
    return one[0]
