"""Rows of linear layers on few samples: forward alone, where reading the weights takes the time."""

import warnings
from functools import partial

import torch
from torch import Tensor

from exssnet import ops

from . import plain
from .layer import Layer, accurate
from .timing import Case, Cases, Variant, Work, autocast, check_close, fastest, name_of


def decode(
    quick: bool, dtype: torch.dtype = torch.float32, densities: tuple[float, ...] = (0.1, 0.05, 0.02)
) -> Cases:  # fmt: skip
    """Square layers on 1, 4 and 16 samples. In bfloat16 our values are float32, or stored in bfloat16 too."""
    for n in (40,) if quick else (1024, 4096):
        layer = Layer(16, n, n)
        for density in densities[: 1 if quick else None]:
            mask = layer.mask(density)
            for batch in (1,) if quick else (1, 4, 16):
                yield from _decode(layer.x[:batch], layer.weight, mask, dtype, density)


def _decode(x: Tensor, weight: Tensor, mask: Tensor, dtype: torch.dtype, density: float) -> Cases:
    pattern, kept, inputs = ops.sparse_pattern(mask), weight * mask, x.to(dtype)

    def sparse(x: Tensor, values: Tensor) -> Variant:
        def run() -> Tensor:
            with autocast(x.dtype):
                return ops.sparse_linear(x, values, values[:0], pattern)

        return run

    def dense(dtype: torch.dtype) -> Variant:
        return partial(plain.layer, x.to(dtype), kept.to(dtype))

    baselines = {"dense float32": dense(torch.float32), "dense bfloat16": dense(torch.bfloat16)} | _csr(x, kept)
    values = {"sparse": weight[mask]}
    ours = {"sparse": sparse(inputs, values["sparse"])}
    if dtype != torch.float32:
        baselines["ours in float32"] = sparse(x, values["sparse"])
        stored = f"sparse, stored in {name_of(dtype)}"
        values[stored] = weight[mask].to(dtype)
        ours[stored] = sparse(inputs, values[stored])
    index = dict.fromkeys(ours, 4 * pattern.col.numel())
    if x.is_cuda:  # on a CPU it is the reference
        values["bitmap"], index["bitmap"] = weight[mask].to(dtype), mask.numel() // 4
        ours["bitmap"] = partial(
            ops.bitmap_linear, inputs, values["bitmap"], values["bitmap"][:0], ops.bitmap_pattern(mask)
        )

    def check(how: str) -> None:
        accurate(lambda: (ours[how](),), lambda dtype: lambda: (dense(dtype)(),), dtype)()
        if "torch CSR" in baselines:
            check_close("torch CSR", baselines["torch CSR"](), dense(torch.float64)())

    batch, n = x.shape
    for how, product in ours.items():
        moved = values[how].nbytes + index[how] + 2 * inputs.nbytes
        work = Work(moved, 2 * len(values[how]) * batch, dtype=dtype)
        yield Case(f"{batch} x {n} to {n}, {how}", product, baselines, partial(check, how), work, density)


def _csr(x: Tensor, kept: Tensor) -> dict[str, Variant]:
    """torch's CSR in its fastest form, if this torch has it: int32 or int64, and for one sample a vector or a matrix.

    CSR takes x as (I, B), and returns (O, B).
    """
    columns = [x.t().contiguous()] + ([x[0]] if len(x) == 1 else [])
    variants = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once that CSR is in beta
        csr = kept.to_sparse_csr()
        for kind in (torch.int32, torch.int64):
            index = csr.crow_indices().to(kind), csr.col_indices().to(kind)
            matrix = torch.sparse_csr_tensor(*index, csr.values(), size=kept.shape)
            variants += [partial(_as_rows, matrix, c) for c in columns]
    try:
        return {"torch CSR": variants[fastest(variants)]}
    except (RuntimeError, NotImplementedError):  # a torch without MKL
        return {}


def _as_rows(matrix: Tensor, columns: Tensor) -> Tensor:
    return (matrix @ columns).t() if columns.dim() == 2 else (matrix @ columns)[None]
