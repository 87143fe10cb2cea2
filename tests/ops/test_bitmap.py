"""bitmap_linear, bitmap_conv1d, bitmap_conv2d: dense products with the compact values of a fixed mask."""

from typing import Any

import pytest
import torch
from accuracy import Results, assert_exact
from cases import FEW, LAYOUTS, Layer, dtypes, layers
from products import Family, LayerFunction, Problem, ProductTests, geometry, problem
from refusals import IMAGES, KERNELS, LINES, NONE, TAPS, VALUES, Calls, M, W, X, refused
from test_sparse import Sparse, frozen_values
from torch import Tensor

import exssnet
from exssnet import ops
from exssnet.ops import former_names
from exssnet.ops.bitmap import as_bitmap

FUNCTIONS = {
    "bitmap_linear": ops.bitmap_linear,
    "bitmap_conv1d": ops.bitmap_conv1d,
    "bitmap_conv2d": ops.bitmap_conv2d,
}


class Bitmap(Family):
    name = "bitmap"
    bias_index = 4
    gradients = ("x", "free_values")
    leaves, effective = Sparse.leaves, Sparse.effective

    def public(self, p: Problem) -> LayerFunction:
        constants = frozen_values(p), ops.bitmap_pattern(p.mask, p.free)
        groups = {} if p.layer.kind == "linear" else {"groups": p.layer.groups}
        function = FUNCTIONS[f"bitmap_{p.layer.kind}"]
        return lambda t: function(t["x"], t["free_values"], *constants, t.get("bias"), **p.layer.steps, **groups)

    def raw(self, p: Problem, t: Results) -> tuple[Any, ...]:
        convolution = () if p.layer.kind == "linear" else (*geometry(p.layer), p.layer.groups)
        words, shape = ops.bitmap_pattern(p.mask, p.free).words, list(p.layer.weight)
        return t["x"], t["free_values"], frozen_values(p), words, t.get("bias"), shape, *convolution


class TestBitmap(ProductTests):
    family = Bitmap()

    @dtypes()
    @layers(FEW)
    def test_exact_on_device(self, layer: Layer, dtype: torch.dtype, device: str) -> None:
        self.family.check_exact(problem(layer, dtype, integers=True, device=device))

    @pytest.mark.parametrize("free_share", [0, 1], ids=["no-free-values", "no-frozen-values"])
    @layers(FEW)
    def test_exact_with(self, layer: Layer, free_share: float) -> None:
        self.family.check_exact(problem(layer, integers=True, free_share=free_share))

    @layers(FEW)
    def test_same_function_as_the_sparse_layer(self, layer: Layer) -> None:
        p = problem(layer, integers=True)
        assert_exact(self.family.kernel(p), Sparse().kernel(p))


def bits_of(words: Tensor, n: int) -> Tensor:
    return (words[:, None] >> torch.arange(32) & 1).bool().reshape(-1)[:n]


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (4, 8), (5, 13), (3, 2, 7), (6, 3, 3, 3), (0, 4), (2, 0, 3, 3)], ids=str)
def test_words_are_bits_and_counts_before_them(shape: tuple[int, ...], density: float) -> None:
    mask = torch.rand(shape) < density
    free = mask & (torch.rand(shape) < 0.5)
    words, of_shape, kept, count = ops.bitmap_pattern(mask, free)
    assert (words.dtype, words.shape, of_shape) == (torch.int64, (-(-mask.numel() // 32), 2), shape)
    assert (kept, count) == (int(mask.sum()), int(free.sum()))
    for i, m in enumerate((mask, free)):
        flat = m.flatten()
        assert torch.equal(bits_of(words[:, i], flat.numel()), flat)
        assert (words[:, i] >> 32).tolist() == [int(flat[: 32 * row].sum()) for row in range(len(words))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_masks_do_not_matter(layout: str) -> None:
    mask = torch.rand(6, 3, 3, 3) < 0.4
    free = mask & (torch.rand(mask.shape) < 0.5)
    strided = ops.bitmap_pattern(LAYOUTS[layout](mask), LAYOUTS[layout](free))
    assert torch.equal(strided.words, ops.bitmap_pattern(mask, free).words)


def test_without_a_free_mask_all_are_free() -> None:
    mask = torch.rand(9, 5) < 0.4
    assert torch.equal(ops.bitmap_pattern(mask).words, ops.bitmap_pattern(mask, mask).words)


@pytest.mark.parametrize(("shape", "groups"), [((9, 5), 1), ((6, 2, 3, 3), 3), ((0, 4), 1), ((5, 3, 2), 1)], ids=str)
def test_bitmap_of_a_sparse_one_is_that_of_its_masks(shape: tuple[int, ...], groups: int) -> None:
    mask = torch.rand(shape) < 0.4
    free = mask & (torch.rand(shape) < 0.5)
    made, expected = (
        as_bitmap(ops.sparse_pattern(mask, free, groups), shape, int(free.sum())), ops.bitmap_pattern(mask, free)
    )  # fmt: skip
    assert torch.equal(made.words, expected.words)
    assert made[1:] == expected[1:]


def test_former_names_are_the_same_functions() -> None:
    for name in former_names.__all__:
        new = name.replace("packed", "bitmap").replace("Packed", "Bitmap")
        assert getattr(exssnet, name) is getattr(ops, name) is getattr(ops, new)


BITMAP = ops.bitmap_pattern(M)
SENTENCES: Calls = {
    "bitmap_pattern: mask and free_mask must be bool of one shape, got torch.bool of (4, 5) and torch.bool of (4,)": (
        lambda: ops.bitmap_pattern(M, M[:, 0])
    ),
    "bitmap_pattern: free_mask has 20 entries outside the mask": lambda: ops.bitmap_pattern(~M, M),
    "bitmap_linear: the pattern must be of a weight (O, I), got (8, 4, 3)": lambda: ops.bitmap_linear(
        X, VALUES, NONE, ops.bitmap_pattern(TAPS == 0)
    ),
    "bitmap_linear: the pattern keeps 20 weights, 20 of them free, got free_values of (19,) and frozen_values of "
    "(0,)": lambda: ops.bitmap_linear(X, VALUES[1:], NONE, BITMAP),
    "bitmap_linear: the pattern keeps 20 weights, 20 of them free, got free_values of (19,) and frozen_values of "
    "(1,)": lambda: ops.bitmap_linear(X, VALUES[1:], VALUES[:1], BITMAP),
    "bitmap_linear: x is on cpu but the pattern is on meta": lambda: ops.bitmap_linear(
        X, VALUES, NONE, BITMAP._replace(words=BITMAP.words.to("meta"))
    ),
    "bitmap_linear: expected x with 5 features in its last dimension, got shape (4, 4)": lambda: ops.bitmap_linear(
        W[:, 1:], VALUES, NONE, BITMAP
    ),
    "bitmap_linear: x is torch.float32 but free_values is torch.float64": lambda: ops.bitmap_linear(
        X, VALUES.double(), NONE, BITMAP
    ),
    "bitmap_conv2d: the pattern must be of a weight (O, C/groups, R, S), got (4, 5)": lambda: ops.bitmap_conv2d(
        IMAGES, VALUES, NONE, BITMAP
    ),
    "bitmap_conv2d: groups must divide the 8 output channels, got 3": lambda: ops.bitmap_conv2d(
        IMAGES, VALUES, NONE, ops.bitmap_pattern(KERNELS == 0), groups=3
    ),
    "bitmap_conv1d: the pattern must be of a weight (O, C/groups, S), got (4, 5)": lambda: ops.bitmap_conv1d(
        LINES, VALUES, NONE, BITMAP
    ),
}
test_wrong_arguments_are_refused_in_a_sentence = refused(SENTENCES)
