"""Rows of the operators on masks: selection, packed bits, Adam on the scores, masked weights."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from exssnet import ops
from exssnet.kernels import reference
from exssnet.nn.models import ResNet18

from . import plain
from .timing import Case, Cases, Variant, Work, check_accurate, check_equal

AdamState = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def topk_masks(quick: bool) -> Cases:
    """Single tensors, and all layers of a ResNet-18 of width 64."""
    layers = [p.numel() for p in ResNet18(10, 4 if quick else 64).parameters() if p.dim() > 1]
    for sizes in ([10_000], layers) if quick else ([1 << 20], [1 << 24], layers):
        for density in (0.1, 0.02):
            torch.manual_seed(0)
            k, hint = [ops.density_to_k(n, density) for n in sizes], None
            scores = [torch.randn(n) for n in sizes]
            for _ in range(5):  # like optimizer steps: after a few of them the hint holds a bracket
                hint = ops.topk_select(scores, k, hint)[1]
                scores = [s + 1e-3 * torch.randn_like(s) for s in scores]
            yield _topk_masks(scores, k, density, None)
            yield _topk_masks(scores, k, density, hint)


def _topk_masks(scores: list[Tensor], k: list[int], density: float, hint: Tensor | None) -> Case:
    n = sum(s.numel() for s in scores)
    shape = f"{n:,}" + (f" in {len(scores)} layers" if len(scores) > 1 else "")

    def each(select: plain.Selection) -> Variant:
        return lambda: [select(s.abs(), density) for s in scores]

    def check() -> None:
        masks = ops.topk_masks(scores, k, hint).masks
        for mask, truth in zip(masks, reference.topk_masks(scores, k, None, True)[0], strict=True):
            check_equal("the mask", mask, truth)

    return Case(
        shape=shape + ("" if hint is None else ", hint"),
        ours=lambda: ops.topk_masks(scores, k, hint),
        baselines={
            "sort": each(plain.sort_mask), "topk": each(plain.topk_mask), "kthvalue": each(plain.kthvalue_mask),
        },
        check=check,
        work=Work(n * (4 + 1)),
        density=density,
    )  # fmt: skip


def adam_topk(quick: bool) -> Cases:
    """Bytes: reads scores, gradient and both averages; writes scores, both averages and the packed mask."""
    torch.manual_seed(0)
    scores, grad = torch.randn(2, 10_000 if quick else 1 << 20)
    k = [ops.density_to_k(scores.numel(), 0.1)]

    def start(dtype: torch.dtype = torch.float32) -> AdamState:
        own = scores.to(dtype)
        return [own.clone()], [grad.to(dtype)], [torch.zeros_like(own)], [torch.zeros_like(own)], [torch.zeros(())]

    def torchs(select: Callable[[Tensor], object]) -> Variant:
        (leaf,), (leaf_grad,), *_ = start()
        leaf.requires_grad_().grad = leaf_grad
        optimizer = torch.optim.Adam([leaf], fused=True)
        return lambda: (optimizer.step(), select(leaf.detach()))

    def check() -> None:
        ours, plainly, truth = start(), start(), start(torch.float64)
        masks = ops.adam_topk(*ours, k).masks
        check_equal("the mask", masks[0], reference.topk_masks(ours[0], k, None, True)[0][0])
        for state in (plainly, truth):
            reference.adam_topk(*state, [], k, None, 1e-3, 0.9, 0.999, 1e-8, 0.0, False)
        check_accurate("the step", ours[0][0], truth[0][0], plainly[0][0])

    state = start()
    yield Case(
        shape=f"{scores.numel():,}",
        ours=lambda: ops.adam_topk(*state, k, packed=True),
        baselines={
            "Adam, topk_select": torchs(lambda s: ops.topk_select([s], k)),
            "Adam, sort": torchs(lambda s: plain.sort_mask(s.abs(), 0.1)),
        },
        check=check,
        work=Work(scores.numel() * (7 * scores.element_size() + 1 / 8)),
        density=0.1,
    )


def supermask_weights(quick: bool) -> Cases:
    """Convolutions of a ResNet-18 of width 20, packed masks. Bytes: reads weights and masks, writes weights."""
    torch.manual_seed(0)
    widths = (4,) if quick else (20, 20, 20, 20, 40, 40, 40, 40, 80, 80, 80, 80, 160, 160, 160, 160)
    weights = [torch.randn(width, width, 3, 3) for width in widths]
    scores = [torch.randn_like(w) for w in weights]
    masks = ops.topk_masks(scores, [ops.density_to_k(s.numel(), 0.1) for s in scores], packed=True).masks
    factors = [reference.unpack_mask(m, list(w.shape)).to(w.dtype) for m, w in zip(masks, weights, strict=True)]

    def check() -> None:
        for got, w, f in zip(ops.supermask_weights(weights, scores, masks), weights, factors, strict=True):
            check_equal("a weight", got, w * f)

    n = sum(w.numel() for w in weights)
    yield Case(
        shape=f"{n:,} in {len(weights)} layers",
        ours=lambda: ops.supermask_weights(weights, scores, masks),
        baselines={"cached masks": lambda: [w * f for w, f in zip(weights, factors, strict=True)]},
        check=check,
        work=Work(n * (8 + 1 / 8)),
        density=0.1,
    )


def _on_cpu(tensor: Tensor, variant: Variant) -> dict[str, Variant]:
    """The baseline in NumPy, for tensors on the CPU."""
    return {"numpy": variant} if tensor.device.type == "cpu" else {}


def _random_mask(quick: bool, density: float) -> Tensor:
    torch.manual_seed(0)
    return torch.rand(10_000 if quick else 1 << 24) < density


def pack_mask(quick: bool) -> Cases:
    mask = _random_mask(quick, 0.1)
    yield Case(
        shape=f"{mask.numel():,}",
        ours=lambda: ops.pack_mask(mask),
        baselines=_on_cpu(mask, lambda: np.packbits(mask.numpy(), bitorder="little")),
        check=lambda: check_equal("the bytes", ops.pack_mask(mask), reference.pack_mask(mask)),
        work=Work(mask.numel() * (1 + 1 / 8)),
    )


def unpack_mask(quick: bool) -> Cases:
    mask = _random_mask(quick, 0.1)
    packed, n = reference.pack_mask(mask), mask.numel()
    yield Case(
        shape=f"{n:,}",
        ours=lambda: ops.unpack_mask(packed, [n]),
        baselines=_on_cpu(packed, lambda: np.unpackbits(packed.numpy(), count=n, bitorder="little").view(np.bool_)),
        check=lambda: check_equal("the mask", ops.unpack_mask(packed, [n]), mask),
        work=Work(n * (1 + 1 / 8)),
    )


def free_mask(quick: bool) -> Cases:
    mask, used = _random_mask(quick, 0.1), _random_mask(quick, 0.3)
    shape, baselines = f"{mask.numel():,}", {"bool masks": lambda: mask & ~used}
    yield _free_mask(shape, mask, used, baselines)
    yield _free_mask(f"{shape}, packed", reference.pack_mask(mask), reference.pack_mask(used), baselines)


def _free_mask(shape: str, mask: Tensor, used: Tensor, baselines: dict[str, Variant]) -> Case:
    return Case(
        shape=shape,
        ours=lambda: ops.free_mask(mask, used),
        baselines=baselines,
        check=lambda: check_equal("the mask", ops.free_mask(mask, used), mask & ~used),
        work=Work(3 * mask.numel()),
    )
