"""masked_linear, masked_conv1d, masked_conv2d: products with a dense weight under a given mask."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import Results, assert_exact, run
from cases import CONV1D, FEW, LAYOUTS, SMALL, Layer, layers
from products import Family, LayerFunction, Problem, ProductTests, geometry, opcheck_warning, problem
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
