"""torchao: the `SupermaskLinear` that torchao had until version 0.18, with its arguments, numbers and state dict."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SupermaskLinear(nn.Linear):
    """A linear layer whose weight keeps the blocks with the largest scores, as in torchao 0.18.

    It needs no torchao. It differs from `exssnet.SupermaskLinear`: scores count by value, not by magnitude; all ties
    are kept; a score belongs to a block of weights; its gradient is the sum of the masked weight's gradient over the
    block, without the factor ``weight * sign(score)``; and the weight, unless it is fixed, trains as if it had no mask.

    Args:
        sparsity_level: Share of the blocks dropped, in [0, 1]. At least one block is kept.
        blocksize: Blocks are squares of this many weights in height and width, at least 1.
        fixed_mask: Whether the scores do not train.
        fixed_weight: Whether the weight does not train.
        args: Those of `nn.Linear`.
        kwargs: Those of `nn.Linear`.

    Attributes:
        scores: Parameter, (ceil(out_features / blocksize), ceil(in_features / blocksize)).

    Raises:
        ValueError: If `sparsity_level` or `blocksize` is out of range.

    Example::

        layer = SupermaskLinear.from_linear(nn.Linear(784, 300), sparsity_level=0.9, blocksize=4)
        ...                                       # train
        plain = SupermaskLinear.to_linear(layer)  # an nn.Linear with the weight weight * mask
    """

    def __init__(
        self, sparsity_level: float, blocksize: int, fixed_mask: bool, fixed_weight: bool, *args: Any, **kwargs: Any
    ) -> None:
        if not 0 <= sparsity_level <= 1:
            raise ValueError(f"SupermaskLinear: sparsity_level must be in [0, 1], got {sparsity_level}")
        if blocksize < 1:
            raise ValueError(f"SupermaskLinear: blocksize must be at least 1, got {blocksize}")
        super().__init__(*args, **kwargs)
        blocks = [math.ceil(size / blocksize) for size in self.weight.shape]
        most = 1 - 1 / math.prod(blocks)
        if sparsity_level > most:
            warnings.warn(
                f"SupermaskLinear: sparsity_level {sparsity_level} is reduced to {most}, the most for "
                f"{math.prod(blocks)} blocks",
                stacklevel=2,
            )
        self.sparsity_level, self.blocksize = min(sparsity_level, most), blocksize
        scores = torch.empty(blocks, device=self.weight.device, dtype=self.weight.dtype)
        self.scores = nn.Parameter(scores, requires_grad=not fixed_mask)
        nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))
        self.weight.requires_grad_(not fixed_weight)

    def get_mask(self) -> Tensor:
        """The mask as 0 and 1, of the weight's shape and dtype. Its gradient goes to the scores of the blocks."""
        mask: Tensor = _Selected.apply(self.scores, self.sparsity_level)
        if self.blocksize > 1:
            for dim, size in enumerate(self.weight.shape):
                mask = mask.repeat_interleave(self.blocksize, dim).narrow(dim, 0, size)
        return mask

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _Masked.apply(self.weight, self.get_mask()), self.bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, sparsity_level: float = 0.0, blocksize: int = 1) -> "SupermaskLinear":
        """A new layer with copies of a linear layer's weight and bias, and random scores.

        Args:
            linear: The linear layer.
            sparsity_level: See the class.
            blocksize: See the class.
        """
        shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
        layer = cls(sparsity_level, blocksize, False, False, *shape, bias=bias).to(linear.weight)
        layer.load_state_dict({**linear.state_dict(), "scores": layer.scores})
        return layer

    @classmethod
    def to_linear(cls, supermask_linear: "SupermaskLinear") -> nn.Linear:
        """A new linear layer with the weight ``weight * mask`` and a copy of the bias.

        Args:
            supermask_linear: The layer.
        """
        own = supermask_linear
        linear = nn.Linear(own.in_features, own.out_features, own.bias is not None).to(own.weight)
        with torch.no_grad():
            linear.weight.copy_(own.weight * own.get_mask())
            if own.bias is not None:
                linear.bias.copy_(own.bias)
        return linear


class _Selected(torch.autograd.Function):
    """1 for the scores that reach the quantile `sparsity`, else 0. The gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, sparsity: float) -> Tensor:
        rank = 1 + round(sparsity * (scores.numel() - 1))
        return (scores >= scores.flatten().kthvalue(rank).values).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Masked(torch.autograd.Function):
    """weight * mask, whose gradient passes straight through to both."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, grad
