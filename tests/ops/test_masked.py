"""masked_linear, masked_conv1d, masked_conv2d: products with a dense weight under a given mask."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import Results, assert_exact, run
from cases import CONV1D, FEW, LAYOUTS, SMALL, Layer, layers
from products import Family, LayerFunction, Problem, ProductTests, geometry, opcheck_warning, problem
from refusals import FAR, IMAGES, KERNELS, LINES, RAW, STEPS, TAPS, Calls, M, W, X, guarded, refused
from torch import Tensor

from exssnet import ops

FUNCTIONS = {
    "masked_linear": ops.masked_linear,
    "masked_conv1d": ops.masked_conv1d,
    "masked_conv2d": ops.masked_conv2d,
}


def masked(p: Problem, t: Results, mask: Tensor, free_mask: Tensor | None) -> Tensor:
    groups = {} if p.layer.kind == "linear" else {"groups": p.layer.groups}
    function = FUNCTIONS[f"masked_{p.layer.kind}"]
    return function(t["x"], t["weight"], mask, free_mask, t.get("bias"), **p.layer.steps, **groups)


class Masked(Family):
    name = "masked"
    bias_index = 4
    gradients = ("x", "weight")

    def leaves(self, p: Problem) -> Results:
        return p.tensors("x", "weight", "bias")

    def public(self, p: Problem) -> LayerFunction:
        return lambda t: masked(p, t, p.mask, p.free)

    def effective(self, p: Problem, t: Results) -> Tensor:
        """W * M, constant outside the free mask."""
        return t["weight"] * p.free + (t["weight"] * (p.mask & ~p.free)).detach()

    def raw(self, p: Problem, t: Results) -> tuple[Any, ...]:
        convolution = () if p.layer.kind == "linear" else (*geometry(p.layer), p.layer.groups)
        return t["x"], t["weight"], p.mask, p.free, t.get("bias"), *convolution


class TestMasked(ProductTests):
    family = Masked()

    @layers(FEW)
    def test_weight_gradient_is_zero_outside_the_free_mask(self, layer: Layer) -> None:
        p = problem(layer)
        gradient = self.family.kernel(p)["grad_weight"]
        assert torch.equal(gradient[~p.free], torch.zeros(int((~p.free).sum())))

    @layers(FEW)
    def test_infinite_gradients_do_not_leave_the_free_mask(self, layer: Layer) -> None:
        p = problem(layer)
        p.grad.fill_(torch.inf)
        gradient = self.family.kernel(p)["grad_weight"]
        assert torch.equal(gradient[~p.free], torch.zeros(int((~p.free).sum())))

    @layers(FEW)
    def test_no_free_mask_means_the_whole_mask(self, layer: Layer) -> None:
        p = problem(layer)
        without = run(lambda t: masked(p, t, p.mask, None), self.family.leaves(p), p.grad)
        assert_exact(without, self.family.kernel(replace(p, free=p.mask)))

    @layers(FEW)
    def test_free_mask_outside_the_mask_frees_nothing(self, layer: Layer) -> None:
        p = problem(layer)
        everything = torch.ones_like(p.mask)
        assert_exact(self.family.kernel(replace(p, free=everything)), self.family.kernel(replace(p, free=p.mask)))

    @pytest.mark.parametrize("packed", ["mask", "free_mask", "both"])
    @layers(FEW + CONV1D)
    def test_packed_masks_give_the_bits_of_bool_masks(self, layer: Layer, packed: str, threads: int) -> None:
        p = problem(layer)
        mask = ops.pack_mask(p.mask) if packed != "free_mask" else p.mask
        free_mask = ops.pack_mask(p.free) if packed != "mask" else p.free
        got = run(lambda t: masked(p, t, mask, free_mask), self.family.leaves(p), p.grad)
        assert_exact(got, self.family.kernel(p))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @layers(FEW)
    def test_exact_with_strided_masks(self, layer: Layer, layout: str) -> None:
        p = problem(layer, integers=True)
        mask, free = (LAYOUTS[layout](m) for m in (p.mask, p.free))
        self.family.check_exact(replace(p, mask=mask, free=free))

    @opcheck_warning
    @pytest.mark.parametrize("layout", LAYOUTS)
    @layers(SMALL)
    def test_opcheck_of_backward_with_strided_masks(self, layer: Layer, layout: str) -> None:
        p = problem(layer)
        p = replace(p, mask=LAYOUTS[layout](p.mask), free=LAYOUTS[layout](p.free))
        torch.library.opcheck(self.family.operator(p, "_backward"), self.family.raw_backward(p, [True, True]))

    @layers(FEW)
    def test_weights_outside_the_mask_are_not_read(self, layer: Layer) -> None:
        p = problem(layer)
        holes = replace(p, weight=p.weight.where(p.mask, torch.nan))
        assert_exact(self.family.kernel(holes), self.family.kernel(p))


SHORT = ops.pack_mask(M)[:2]


def conv(images: Tensor = IMAGES, kernels: Tensor = KERNELS, **options: object) -> Tensor:
    return ops.masked_conv2d(images, kernels, torch.ones(kernels.shape, dtype=torch.bool), **options)  # type: ignore


SENTENCES: Calls = {
    "masked_linear: weight must have shape (O, I), got (8, 4, 3)": lambda: ops.masked_linear(X, TAPS, M),
    "masked_linear: bias must have shape (4,), got (5,)": lambda: ops.masked_linear(X, W, M, bias=X[0]),
    "masked_linear: x is torch.float64 but bias is torch.float32": lambda: ops.masked_linear(
        X.double(), W.double(), M, bias=W[:, 0]
    ),
    "masked_linear: x is on meta but weight is on cpu": lambda: ops.masked_linear(FAR, W, M),
    "masked_linear: mask must be bool of shape (4, 5) or packed uint8 of 3 bytes, got torch.float32 of "
    "(4, 5)": lambda: ops.masked_linear(X, W, W),
    "masked_linear: free_mask must be bool of shape (4, 5) or packed uint8 of 3 bytes, got torch.uint8 "
    "of (2,)": lambda: ops.masked_linear(X, W, M, ops.pack_mask(M)[:2]),
    "masked_linear: weight is on cpu but mask on meta": lambda: ops.masked_linear(X, W, FAR.bool()),
    "masked_conv2d: x must have 4 dimensions (N, C, H, W), got 3": lambda: conv(LINES),
    "masked_conv2d: expected x with 4 channels, got 3": lambda: conv(IMAGES[:, :3]),
    "masked_conv2d: weight must have shape (O, C/groups, R, S), got (8, 4, 3)": lambda: conv(kernels=TAPS),
    "masked_conv2d: groups must divide the 8 output channels, got 3": lambda: conv(groups=3),
    "masked_conv2d: groups must divide the 8 output channels, got 0": lambda: conv(groups=0),
    "masked_conv2d: stride must be one or two integers of at least 1, got 0": lambda: conv(stride=0),
    "masked_conv2d: padding must be one or two integers of at least 0, got (1, -1)": lambda: conv(padding=(1, -1)),
    "masked_conv2d: padding must be one or two integers of at least 0, got same": lambda: conv(padding="same"),
    "masked_conv2d: dilation must be one or two integers of at least 1, got [1, 2, 3]": lambda: conv(
        dilation=[1, 2, 3]
    ),
    "masked_conv2d: the kernel spans 9 pixels but the padded image has only 8": lambda: conv(padding=1, dilation=4),
    "masked_conv2d: bias must have shape (8,), got (4,)": lambda: conv(bias=W[:, 0]),
    "masked_conv1d: x must have 3 dimensions (N, C, L), got 2": lambda: ops.masked_conv1d(X, TAPS, M),
}
test_wrong_arguments_are_refused_in_a_sentence = refused(SENTENCES)


FOREIGN_MEMORY: Calls = {
    "a short packed mask": lambda: RAW.masked_linear(X, W, SHORT, None, None),
    "a short packed mask of a convolution": lambda: RAW.masked_conv2d(IMAGES, KERNELS, SHORT, None, None, *STEPS, 1),
    "a short free mask": lambda: RAW.masked_linear_backward(W[:3, :4], X, W, M, SHORT, [True, True]),
}
test_native_kernels_touch_no_foreign_memory_given = guarded(FOREIGN_MEMORY)
