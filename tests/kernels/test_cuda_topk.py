"""csrc/cuda/topk on the emulator: bit for bit the reference's selection and masks."""

import itertools
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from cases import DTYPES, LAYOUTS, PATTERNS, SIZES, dtypes, scores_of
from cuda import harness
from cuda.harness import order as order
from cuda.topk import FLOATS, Result, select
from selections import HINTED as ALL_HINTED
from selections import HINTS, drawn, selected
from torch import Tensor

from exssnet import ops
from exssnet.kernels import reference

pytestmark = pytest.mark.proof

patterns = pytest.mark.parametrize("pattern", PATTERNS)
PLAIN = harness.MODE == "plain"
"""Where every access is watched, kernels are much slower: fewer and smaller cases do."""
orders = pytest.mark.parametrize("order", harness.ORDERS if PLAIN else ["1"], indirect=True)
LAYERS_OF_A_TABLE = 40
LARGE = 100_003 if PLAIN else 20_011
HINTED = (*ALL_HINTED[:-1], LARGE)


@pytest.fixture
def topk() -> ModuleType:
    return harness.load("topk")


def assert_reference(scores: list[Tensor], k: list[int], result: Result) -> None:
    masks, selection = selected(reference.topk_masks, scores, k)
    assert torch.equal(result.selection, selection)
    for mask, expected in zip(result.masks, masks, strict=False):
        assert torch.equal(mask.view(torch.uint8), expected.view(torch.uint8))
    assert not result.nan


@patterns
@orders
@dtypes()
def test_bitwise_the_reference(topk: ModuleType, pattern: str, dtype: torch.dtype, order: str) -> None:
    scores, k = drawn(pattern, dtype, sizes=[n for n in SIZES if n <= LARGE] if PLAIN else (1, 7, 65, 33 * 65))
    assert_reference(scores, k, select(topk, scores, k))


@pytest.mark.skipif(not PLAIN, reason="the same loads and stores as those of fewer scores")
@dtypes()
def test_bitwise_the_reference_of_many_scores(topk: ModuleType, dtype: torch.dtype) -> None:
    scores, k = drawn("many-ties", dtype, sizes=[1 << 18])
    assert_reference(scores, k, select(topk, scores, k))


@pytest.mark.parametrize("pattern", PATTERNS if PLAIN else ["normal", "many-ties", "two-values"])
@dtypes(*DTYPES if PLAIN else ["float32"])
def test_selection_without_masks_is_the_references(topk: ModuleType, pattern: str, dtype: torch.dtype) -> None:
    scores, k = drawn(pattern, dtype, sizes=HINTED)
    assert_reference(scores, k, select(topk, scores, k, with_masks=False))


@pytest.mark.parametrize("pattern", ["normal", "many-ties", "two-values", "signed-zeros"])
@orders
@dtypes(*DTYPES if PLAIN else ["float32"])
def test_packed_masks_are_the_references(topk: ModuleType, pattern: str, dtype: torch.dtype, order: str) -> None:
    """Small layers, of which all entries are candidates, and one that is not, with ties beyond its candidates."""
    scores = [scores_of(pattern, n, dtype) for n in (1, 7, 64, 65, 1000, 20_011)]
    k = [s.numel() // 3 for s in scores]
    result = select(topk, scores, k, packed=True)
    masks, selection = selected(reference.topk_masks, scores, k, packed=True)
    assert torch.equal(result.selection, selection)
    for mask, expected in zip(result.masks, masks, strict=True):
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("n", [7, 64, 300] if PLAIN else [7, 64])
@dtypes()
def test_bitwise_the_reference_for_every_k(topk: ModuleType, n: int, dtype: torch.dtype) -> None:
    scores, k = [scores_of("many-ties", n, dtype)] * (n + 1), list(range(n + 1))
    assert_reference(scores, k, select(topk, scores, k))


@pytest.mark.parametrize("hint", HINTS)
@pytest.mark.parametrize("pattern", ["normal", "many-ties", "last-bits", "mostly-zeros"] if PLAIN else ["normal"])
@dtypes(*DTYPES if PLAIN else ["float32"])
def test_hint_never_changes_results(topk: ModuleType, pattern: str, dtype: torch.dtype, hint: str) -> None:
    scores, k = drawn(pattern, dtype, sizes=HINTED)
    assert_reference(scores, k, select(topk, scores, k, HINTS[hint](scores, k)))


def training(dtype: torch.dtype, steps: int) -> Iterator[list[Tensor]]:
    """Scores of one model, as they are from step to step."""
    scores = [scores_of("normal", n, torch.float32) for n in (65, 5000, LARGE)]
    for _ in range(steps):
        scores = [s + 0.003 * torch.randn(s.shape) for s in scores]
        yield [s.to(dtype) for s in scores]


@dtypes()
def test_with_the_last_steps_hint_scores_are_read_once_where_it_holds(topk: ModuleType, dtype: torch.dtype) -> None:
    k, hint, right = [7, 500, LARGE // 3], torch.full((3, 2), -1), 0
    for scores in training(dtype, 8):
        result = select(topk, scores, k, hint)
        assert_reference(scores, k, result)
        brackets, thresholds = hint[1:], result.selection[1:, 0]  # the first layer is too small for one
        holds = (brackets[:, 0] <= thresholds) & (thresholds <= brackets[:, 1])
        narrow = brackets[:, 0] < brackets[:, 1]
        assert result.missed == int((narrow & ~holds).sum())
        right += int((narrow & holds).sum())
        hint = result.hint
    assert right > 0, "no bracket was handed on"


@dtypes()
def test_without_a_hint_a_sample_serves_as_well(topk: ModuleType, dtype: torch.dtype) -> None:
    scores = [scores_of("normal", n, dtype) for n in (5000, 20_000, LARGE)] * 3
    k = [s.numel() // d for s, d in zip(scores, [50, 50, 50, 10, 10, 10, 2, 2, 2], strict=True)]
    result = select(topk, scores, k)
    assert_reference(scores, k, result)
    assert result.missed == 0


@dtypes("float32", *["bfloat16"] * PLAIN)
def test_bracket_may_end_at_crowded_magnitudes(topk: ModuleType, dtype: torch.dtype) -> None:
    """Each part of the scores that such a bracket leaves has more entries than there is room for as candidates."""
    scores, k = scores_of("integers", 100_003, dtype), [10_000, 40_000, 70_000, 95_000]
    magnitudes = reference.magnitude_bits(torch.arange(4, dtype=dtype))
    for low, high in [*itertools.combinations(magnitudes.tolist(), 2)][:: 1 if PLAIN else 3]:
        result = select(topk, [scores] * len(k), k, torch.tensor([[low, high]] * len(k)))
        assert_reference([scores] * len(k), k, result)


def test_layers_are_counted_whose_bracket_missed(topk: ModuleType) -> None:
    scores, k = [scores_of("normal", n, torch.float32) for n in (5000, 20_000, 5000, 20_000)], [500] * 4
    hint = HINTS["interval-ending-below"](scores, k)
    hint[1] = HINTS["interval-around"](scores, k)[1]
    result = select(topk, scores, k, hint)
    assert_reference(scores, k, result)
    assert result.missed == 3


@pytest.mark.parametrize("pattern", ["normal", "denormals", "all-exponents"])
@pytest.mark.usefixtures("native")
@dtypes()
def test_next_hint_is_the_cpus_where_the_bracket_held(topk: ModuleType, pattern: str, dtype: torch.dtype) -> None:
    scores, k = drawn(pattern, dtype, sizes=[LARGE])
    threshold = reference.topk_masks(scores, k, None, [])[:, 0]
    held = 0
    for below, above in (-1, 1), (-30, 10), (-1000, 200), (0, 100_000):
        hint = torch.stack([(threshold + below).clamp(min=0), threshold + above], 1)
        result = select(topk, scores, k, hint)
        if result.missed == 0:
            assert torch.equal(result.hint, ops.topk_masks(scores, k, hint).hint)
            held += 1
    assert held > 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_launches_are_as_many_as_the_header_says(topk: ModuleType, dtype: torch.dtype) -> None:
    scores, k = drawn("normal", dtype)
    assert len(scores) < LAYERS_OF_A_TABLE
    assert {select(topk, scores, k, hint).launches for hint in (None, HINTS["garbage"](scores, k))} == {3}


@pytest.mark.parametrize("count", [LAYERS_OF_A_TABLE, LAYERS_OF_A_TABLE + 1, 3 * LAYERS_OF_A_TABLE - 1])
def test_more_layers_than_fit_in_one_table(topk: ModuleType, count: int) -> None:
    scores = [scores_of("normal", 97 * i % 301, torch.float32) for i in range(count)]
    k = [s.numel() // 3 for s in scores]
    result = select(topk, scores, k)
    assert_reference(scores, k, result)
    assert result.launches == -(-count // LAYERS_OF_A_TABLE) + 2


def test_layers_of_one_call_may_have_different_dtypes(topk: ModuleType) -> None:
    scores = [scores_of("normal", 5000, dtype) for dtype in [*DTYPES.values()] * 2]
    assert_reference(scores, [20] * len(scores), select(topk, scores, [20] * len(scores)))


@pytest.mark.parametrize("processors", [1, 3, 1000])
@pytest.mark.parametrize("pattern", ["normal", "many-ties"])
def test_number_of_processors_does_not_change_results(topk: ModuleType, pattern: str, processors: int) -> None:
    scores, k = drawn(pattern, torch.float32, sizes=HINTED)
    assert_reference(scores, k, select(topk, scores, k, HINTS["interval-ending-below"](scores, k), True, 0, processors))


@pytest.mark.parametrize("pattern", ["normal", "many-ties"])
@dtypes()
def test_scores_aligned_to_nothing_wider_than_an_element(topk: ModuleType, pattern: str, dtype: torch.dtype) -> None:
    scores, k = drawn(pattern, dtype)
    scores = [LAYOUTS["offset"](s) for s in scores]
    assert any(s.data_ptr() % 16 for s in scores)
    assert_reference(scores, k, select(topk, scores, k))


@pytest.mark.parametrize("k", [0, 1, 20, 5000])
@pytest.mark.parametrize("at", [0, 4999])
@dtypes()
def test_nan_raises_the_flag(topk: ModuleType, k: int, at: int, dtype: torch.dtype) -> None:
    scores, counts = [scores_of("normal", n, dtype) for n in (65, 5000, 1000)], [1, k, 20]
    hint = HINTS["interval-around"](scores, counts)
    scores[1][at] = -torch.nan
    assert select(topk, scores, counts).nan
    assert select(topk, scores, counts, hint, with_masks=False).nan


def test_flag_of_a_nan_stays_raised(topk: ModuleType) -> None:
    assert select(topk, [torch.ones(5)], [2], nan_flag=1).nan


@pytest.mark.parametrize("hint", [None, (1, 1000)], ids=["no-hint", "hint-below"])
@patterns
@dtypes("float32", "bfloat16")
def test_nan_counts_as_more_than_infinity(
    topk: ModuleType, pattern: str, dtype: torch.dtype, hint: tuple[int, int] | None
) -> None:
    scores = scores_of(pattern, 5000, dtype)
    scores[torch.randint(5000, (300,))] = torch.nan
    for k in (20, 2000):
        result = select(topk, [scores], [k], None if hint is None else torch.tensor([hint]))
        selection = reference.select(reference.magnitude_bits(scores), k)
        assert torch.equal(result.selection[0], selection)
        assert torch.equal(result.masks[0], reference.mask_of(scores, selection))


@harness.other_modes
def test_every_load_and_store_is_right_and_none_races(mode: str) -> None:
    harness.run_again(__file__, mode)
