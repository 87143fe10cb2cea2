"""A thousand score tensors, random and adversarial, on which all kernels select the same masks bit for bit.

Interpreted Triton takes 400 of them, and all of them if EXSSNET_WHOLE_GRIDS is set.
"""

import itertools
import os
import random
from collections.abc import Iterator

import pytest
import torch
from cases import DTYPES, PATTERNS, scores_of
from selections import selected
from torch import Tensor

from exssnet import ops
from exssnet.kernels import reference

LAYERS, MODELS = 50, 20
LARGEST = 3000


def any_bits(n: int, dtype: torch.dtype) -> Tensor:
    """Any number of the dtype, each of its bits drawn; what would be NaN is an infinity."""
    width = torch.finfo(dtype).bits
    integer = {16: torch.int16, 32: torch.int32, 64: torch.int64}[width]
    scores = torch.randint(-(2**63), 2**63 - 1, (n,)).bitwise_right_shift(64 - width).to(integer).view(dtype)
    return scores.where(~scores.isnan(), torch.inf)


def neighbours(n: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes of which each is one bit from another, around a drawn one."""
    centre = any_bits(1, dtype).abs().clamp(max=1)
    return torch.stack([centre, torch.nextafter(centre, torch.ones_like(centre) * 2)]).flatten()[torch.randint(2, (n,))]


SCORES = {name: lambda n, dtype, name=name: scores_of(name, n, dtype) for name in PATTERNS} | {
    "any-bits": any_bits,
    "neighbours": neighbours,
}


def models() -> Iterator[tuple[list[Tensor], list[int]]]:
    """Scores and k of the layers of each of the models, of mixed dtypes, sizes and patterns."""
    drawing = random.Random(0)
    for _ in range(MODELS):
        scores, k = [], []
        for layer in range(LAYERS):
            n = drawing.choice([0, 1, 2, 31, 32, 33, 255, 256, 257, LARGEST, drawing.randrange(LARGEST)])
            dtype = drawing.choice(list(DTYPES.values()))
            scores.append(SCORES[list(SCORES)[layer % len(SCORES)]](n, dtype))
            k.append(drawing.choice([0, n, n // 2, min(n, 1), max(0, n - 1), drawing.randint(0, n)]))
        yield scores, k


def assert_identical(masks: list[Tensor], selection: Tensor, scores: list[Tensor], k: list[int]) -> None:
    expected_masks, expected = selected(reference.topk_masks, scores, k)
    assert torch.equal(selection, expected)
    assert len(masks) == len(expected_masks)
    for mask, expected_mask in zip(masks, expected_masks, strict=True):
        assert torch.equal(mask.view(torch.uint8), expected_mask.view(torch.uint8))


def test_there_are_a_thousand_tensors_of_every_pattern_and_dtype() -> None:
    drawn = [(s, count) for scores, k in models() for s, count in zip(scores, k, strict=True)]
    assert len(drawn) == 1000
    assert {s.dtype for s, _ in drawn} == set(DTYPES.values())
    assert [int(mask.sum()) for mask in selected(reference.topk_masks, *zip(*drawn, strict=True))[0]] == [
        count for _, count in drawn
    ]


@pytest.mark.usefixtures("native")
def test_native_masks_are_the_references(threads: int) -> None:
    for scores, k in models():
        result = ops.topk_masks(scores, k)
        assert_identical(result.masks, result.selection, scores, k)


@pytest.mark.proof
def test_emulated_cuda_masks_are_the_references() -> None:
    from cuda import harness
    from cuda.topk import select

    topk = harness.load("topk")
    for scores, k in models():
        result = select(topk, scores, k)
        assert_identical(result.masks, result.selection, scores, k)


@pytest.mark.proof
def test_interpreted_triton_masks_are_the_references() -> None:
    import triton_guard

    if not triton_guard.interpreting:
        triton_guard.run(f"{__file__}::{test_interpreted_triton_masks_are_the_references.__name__}")
        return

    from exssnet.kernels import triton_topk

    for scores, k in itertools.islice(models(), MODELS if "EXSSNET_WHOLE_GRIDS" in os.environ else 8):
        masks, selection = selected(triton_topk.topk_masks, scores, k)
        assert_identical(masks, selection, scores, k)
