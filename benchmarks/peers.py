"""Layers of other libraries: torch's CSR, sparselab and sparseprop for a fixed mask, torchao for a supermask.

All of them but torch are optional. Each variant is forward and backward. With a fixed mask a call returns the output,
the gradient of the input, and the gradient of the kept weights (of all weights, if the library computes all). Input and
gradient have the batch innermost, which is the layout of these kernels. If a variant has to convert the layout first,
its name says so.
"""

import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .timing import Variant, autocast

INSTALLED = {name: find_spec(name) is not None for name in ("sparselab", "sparseprop", "torchao")}


def supermask_linear(x: Tensor, weight: Tensor, magnitudes: Tensor, k: int, grad: Tensor) -> dict[str, Variant]:
    """Output, gradient of x (B, I) and gradient of the scores, with the k weights of largest magnitude.

    torchao selects by `kthvalue`, keeps all ties and refuses k = 1. Its gradient of the scores lacks the factor
    W sign(S).
    """
    if not INSTALLED["torchao"]:
        return {}
    try:
        from torchao.sparsity import SupermaskLinear
    except ImportError:  # removed after 0.18
        return {}
    threshold = magnitudes.flatten().topk(k).values[-1]
    if k < 2 or int((magnitudes >= threshold).sum()) > k:
        return {}

    out, width = weight.shape
    dropped = (weight.numel() - k) / (weight.numel() - 1)  # the quantile that torchao wants
    layer = SupermaskLinear(dropped, 1, False, True, width, out, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.scores.copy_(magnitudes)
    x = x.detach().requires_grad_()

    def torchao() -> tuple[Tensor, ...]:
        with autocast(x.dtype):
            output = layer(x)
        return output, *torch.autograd.grad(output, (x, layer.scores), grad)

    return {"torchao": torchao}


def linear(x: Tensor, weight: Tensor, mask: Tensor, grad: Tensor) -> dict[str, Variant]:
    """Variants for x (B, I), weight and mask (O, I), grad (B, O)."""
    kept = weight * mask
    variants = _csr(x, kept, grad)
    if x.device.type != "cpu":
        return variants
    if INSTALLED["sparselab"]:
        variants["sparselab"] = _sparselab(x, kept, grad)
    if INSTALLED["sparseprop"]:
        from sparseprop.modules.linear import SparseLinear

        variants["sparseprop from (B, I)"] = _module(SparseLinear(kept), x.contiguous(), grad.contiguous())
    return variants


def linear_kernels(x: Tensor, weight: Tensor, mask: Tensor, grad: Tensor) -> dict[str, Variant]:
    """Variants of `linear` without autograd and modules."""
    variants: dict[str, Variant] = {}
    if x.device.type != "cpu":
        return variants
    kept, columns, grad_columns = weight * mask, x.t().contiguous(), grad.t().contiguous()
    if INSTALLED["sparselab"]:
        from sparselab import PaddedCSR, _core
        from sparselab.ops import _cached_transpose

        matrix = PaddedCSR.from_dense(kept, padding_ratio=0.0)
        live = _live(matrix)

        def sparselab() -> tuple[Tensor, ...]:
            output = _core.spmm_simd(matrix, columns.numpy())
            grad_values = _core.spmm_grad_w_simd(matrix, grad_columns.numpy(), columns.numpy())
            grad_x = _core.spmm_simd(_cached_transpose(matrix), grad_columns.numpy())
            return torch.from_numpy(output).t(), torch.from_numpy(grad_x).t(), torch.from_numpy(grad_values)[live]

        variants["sparselab"] = sparselab
    if INSTALLED["sparseprop"]:
        from sparseprop import backend
        from sparseprop.modules.linear import SparseLinear

        module = SparseLinear(kept)
        values, index = module.W_val.detach(), module.W_idx

        def sparseprop() -> tuple[Tensor, ...]:
            output = torch.zeros(weight.shape[0], x.shape[0])
            backend.sparse_linear_vectorized_forward(columns, *index, values, output)
            grad_x, grad_values = torch.zeros_like(columns), torch.zeros_like(values)
            backend.sparse_linear_vectorized_backward(columns, *index, values, grad_columns, grad_x, grad_values)
            return output.t(), grad_x.t(), grad_values

        variants["sparseprop"] = sparseprop
    return variants


def conv2d(x: Tensor, weight: Tensor, mask: Tensor, grad: Tensor, stride: int) -> dict[str, Variant]:
    """Variants for x (N, C, H, W), weight and mask (O, C, 3, 3), grad (N, O, H', W'), padding 1."""
    if not INSTALLED["sparseprop"] or x.device.type != "cpu":
        return {}
    from sparseprop.modules.conv2d import SparseConv2d

    def module(over_width: bool) -> Any:
        return SparseConv2d(weight * mask, padding=1, stride=stride, vectorizing_over_on=over_width)

    plain = x.contiguous(), grad.contiguous()
    return {
        "sparseprop": _module(module(False), x, grad),
        "sparseprop from NCHW": _module(module(False), *plain),
        "sparseprop over width": _module(module(True), *plain),
    }


def _module(module: Any, x: Tensor, grad: Tensor) -> Variant:
    x = x.detach().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        output = module(x)
        return output, *torch.autograd.grad(output, (x, module.W_val), grad)

    return run


def _sparselab(x: Tensor, kept: Tensor, grad: Tensor) -> Variant:
    from sparselab import PaddedCSR
    from sparselab.ops import _SpMMFunction

    matrix = PaddedCSR.from_dense(kept, padding_ratio=0.0)
    values = torch.from_numpy(np.array(matrix.values, copy=False)).requires_grad_()
    live = _live(matrix)
    columns, grad_columns = x.t().contiguous().requires_grad_(), grad.t().contiguous()

    def run() -> tuple[Tensor, ...]:
        output = _SpMMFunction.apply(values, matrix, columns, "simd")
        grad_x, grad_values = torch.autograd.grad(output, (columns, values), grad_columns)
        return output.t(), grad_x.t(), grad_values[live]

    return run


def _live(matrix: Any) -> Tensor | slice:
    """Which values of a sparselab matrix are kept weights. An empty row holds one entry that is no weight."""
    live = torch.from_numpy(np.array(matrix.col_indices)) >= 0
    return slice(None) if bool(live.all()) else live


def _matrix(index: tuple[Tensor, Tensor], values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_csr_tensor(index[0], index[1], values, size=shape)


class _ByHand(torch.autograd.Function):
    """weight @ x in CSR. The backward pass uses the transposed matrix, which is stored too, and a sampled product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, index: Any, transposed: Any, order: Tensor, shape: Any) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.index, ctx.transposed, ctx.order, ctx.shape = index, transposed, order, shape
        return _matrix(index, values, shape) @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, values = ctx.saved_tensors
        transposed = _matrix(ctx.transposed, values[ctx.order], ctx.shape[::-1])
        weight = _matrix(ctx.index, values, ctx.shape)
        sampled = torch.sparse.sampled_addmm(weight, grad, x.t(), beta=0.0)
        return transposed @ grad, sampled.values(), None, None, None, None


def _csr(x: Tensor, kept: Tensor, grad: Tensor) -> dict[str, Variant]:
    """torch's CSR with autograd and with a hand-written backward pass, if this torch supports them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once that CSR is in beta
        weight = kept.to_sparse_csr()
        numbers = torch.arange(weight.values().numel(), dtype=torch.float64)  # show the order after transposition
        index = weight.crow_indices(), weight.col_indices()
        back = _matrix(index, numbers, weight.shape).to_sparse_coo().t().coalesce().to_sparse_csr()
    transposed, order = (back.crow_indices(), back.col_indices()), back.values().long()
    values = weight.values().clone().requires_grad_()
    weight.requires_grad_()
    columns, grad_columns = x.t().contiguous().requires_grad_(), grad.t().contiguous()

    def automatic() -> tuple[Tensor, ...]:
        output = weight @ columns
        grad_x, grad_weight = torch.autograd.grad(output, (columns, weight), grad_columns)
        return output.t(), grad_x.t(), grad_weight.to_dense()

    def by_hand() -> tuple[Tensor, ...]:
        output = _ByHand.apply(columns, values, index, transposed, order, tuple(kept.shape))
        grad_x, grad_values = torch.autograd.grad(output, (columns, values), grad_columns)
        return output.t(), grad_x.t(), grad_values

    variants = {}
    for name, variant in {"torch CSR": automatic, "torch CSR by hand": by_hand}.items():
        try:
            variant()
        except (RuntimeError, NotImplementedError):
            continue  # a torch without MKL
        variants[name] = variant
    return variants
