"""Blocks of networks whose batch norms take the residual and the ReLU that follow them along, see `batch_norm_act`."""

from collections.abc import Mapping

from torch import Tensor, nn

from . import models
from .layout import TaskBatchNorm


def fuses(norm: nn.Module, relu: nn.Module) -> bool:
    """Whether ``norm(x, relu=True)`` is ``relu(norm(x))`` to everybody: no hook looks at what is between."""
    return (
        isinstance(norm, TaskBatchNorm)
        and type(relu) is nn.ReLU
        and not any(_hooked(module) for module in (norm, relu))
        and not nn.modules.module._has_any_global_hook()
    )


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class FusedSequential(nn.Sequential):
    """`nn.Sequential` in which a batch norm takes the ReLU that follows it along."""

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if layers and fuses(layer, layers[0]):
                x = layer(x, relu=True)
                del layers[0]
            else:
                x = layer(x)
        return x


class ResidualBlock(nn.Module):
    """Mixin for blocks ``relu(norm(conv(...)) + shortcut(x))``; a block with hooks inside runs as it was written."""

    _steps: tuple[tuple[str, str, str], ...]  # names of the convolutions, norms and ReLUs, in order
    _past: str  # name of the shortcut; None stands for the identity

    def forward(self, x: Tensor) -> Tensor:
        *first, last = [[getattr(self, name) for name in step] for step in self._steps]
        if not all(fuses(norm, relu) for _, norm, relu in (*first, last)):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        y = x
        for conv, norm, _ in first:
            y = norm(conv(y), relu=True)
        conv, norm, _ = last
        y, past = conv(y), getattr(self, self._past)
        out: Tensor = norm(y, x if past is None else past(x), relu=True)
        return out


class _BasicBlock(ResidualBlock, models.BasicBlock):
    _steps = (("conv1", "norm1", "relu1"), ("conv2", "norm2", "relu2"))
    _past = "shortcut"


SWAPPED: Mapping[type[nn.Module], type[nn.Module]] = {models.BasicBlock: _BasicBlock}
