"""topk_masks, topk_select, topk_mask: exact selection, bit for bit the same everywhere."""

import re

import pytest
import torch
from cases import DTYPES, LAYOUTS, PATTERNS, SIZES, dtypes, scores_of
from hypothesis import given
from hypothesis import strategies as st
from refusals import FAR, RAW, ROW, Calls, W, guarded, refused
from selections import HINTED, HINTS, drawn, selected
from torch import Tensor

from exssnet import ops
from exssnet.kernels import reference
from exssnet.ops.selection import new_hint, new_masks

patterns = pytest.mark.parametrize("pattern", PATTERNS)


def by_sorting(scores: Tensor, k: int) -> Tensor:
    """The definition in plain Python: sort by falling magnitude, then by index."""
    values = scores.flatten().abs().tolist()
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]] = True
    return mask.reshape(scores.shape)


def assert_reference(scores: list[Tensor], k: list[int], result: ops.TopK) -> None:
    masks, selection = selected(reference.topk_masks, scores, k)
    assert torch.equal(result.selection, selection)
    for mask, expected in zip(result.masks, masks, strict=True):
        assert torch.equal(mask, expected)


@patterns
@dtypes()
def test_exactly_k_are_kept(pattern: str, dtype: torch.dtype, device: str) -> None:
    scores, k = drawn(pattern, dtype, device)
    assert [int(m.sum()) for m in ops.topk_masks(scores, k).masks] == k


@patterns
@dtypes()
def test_bitwise_the_reference(pattern: str, dtype: torch.dtype, threads: int, device: str) -> None:
    scores, k = drawn(pattern, dtype, device, SIZES)
    assert_reference(scores, k, ops.topk_masks(scores, k))


@patterns
@dtypes()
def test_masks_are_those_of_a_sort_in_python(pattern: str, dtype: torch.dtype) -> None:
    for n, counts in SIZES.items():
        for k in counts if n <= 1000 else ():
            scores = scores_of(pattern, n, dtype)
            assert torch.equal(ops.topk_mask(scores, k), by_sorting(scores, k)), (n, k)


@pytest.mark.parametrize("n", [7, 64, 1000])
@dtypes()
def test_bitwise_the_reference_for_every_k(n: int, dtype: torch.dtype) -> None:
    scores = [scores_of("many-ties", n, dtype)] * (n + 1)
    k = list(range(n + 1))
    assert_reference(scores, k, ops.topk_masks(scores, k))


@pytest.mark.parametrize(
    ("scores", "k", "kept"),
    [
        ([1.0, -2.0, 2.0, -1.0, 0.5], 1, [1]),
        ([1.0, -2.0, 2.0, -1.0, 0.5], 2, [1, 2]),
        ([1.0, -2.0, 2.0, -1.0, 0.5], 3, [0, 1, 2]),
        ([-0.0, 0.0, -0.0, 0.0], 3, [0, 1, 2]),
        ([0.0, -1e-45, 0.0], 2, [0, 1]),
        ([torch.inf, 3e38, -torch.inf], 2, [0, 2]),
    ],
)
@dtypes("float32", "float64")
def test_of_equal_magnitudes_the_smaller_index_is_kept(
    scores: list[float], k: int, kept: list[int], dtype: torch.dtype
) -> None:
    assert ops.topk_mask(torch.tensor(scores, dtype=dtype), k).nonzero().flatten().tolist() == kept


def test_selection_is_threshold_bits_and_tie_index() -> None:
    scores = torch.tensor([1.0, -2.0, 2.0, -1.0, 0.5])
    threshold = torch.tensor(2.0).view(torch.int32).item()
    selection, _ = ops.topk_select([scores] * 3, [0, 1, 2])
    assert selection.tolist() == [[torch.iinfo(torch.int64).max, -1], [threshold, 1], [threshold, 2]]


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0]) | st.floats(width=16, allow_nan=False), min_size=1, max_size=200),
    st.data(),
)
@dtypes()
def test_no_dropped_magnitude_exceeds_a_kept_one(dtype: torch.dtype, values: list[float], data: st.DataObject) -> None:
    scores = torch.tensor(values, dtype=dtype)
    k = data.draw(st.integers(0, len(values)))
    mask = ops.topk_mask(scores, k)
    assert int(mask.sum()) == k
    kept, dropped = scores.abs()[mask], scores.abs()[~mask]
    assert k in (0, len(values)) or bool(kept.min() >= dropped.max())


@patterns
@dtypes()
def test_many_layers_in_one_call_are_what_they_are_one_by_one(pattern: str, dtype: torch.dtype) -> None:
    scores, k = drawn(pattern, dtype)
    together = ops.topk_masks(scores, k)
    for layer, (s, count) in enumerate(zip(scores, k, strict=True)):
        alone = ops.topk_masks([s], [count])
        assert torch.equal(together.masks[layer], alone.masks[0])
        assert torch.equal(together.selection[layer], alone.selection[0])


def test_layers_of_one_call_may_have_different_dtypes() -> None:
    scores = [scores_of("normal", 1000, dtype) for dtype in DTYPES.values()]
    assert_reference(scores, [20] * len(scores), ops.topk_masks(scores, [20] * len(scores)))


@patterns
@dtypes()
def test_selection_without_masks_is_that_with_masks(pattern: str, dtype: torch.dtype) -> None:
    scores, k = drawn(pattern, dtype)
    with_masks = ops.topk_masks(scores, k)
    selection, hint = ops.topk_select(scores, k)
    assert torch.equal(selection, with_masks.selection)
    assert hint.shape == with_masks.hint.shape


@patterns
@dtypes()
def test_mask_computed_from_the_selection_is_the_mask(pattern: str, dtype: torch.dtype, device: str) -> None:
    scores, k = drawn(pattern, dtype, device)
    result = ops.topk_masks(scores, k)
    for s, row, mask in zip(scores, result.selection, result.masks, strict=True):
        assert torch.equal(reference.mask_of(s, row), mask)


@patterns
@dtypes()
def test_packed_masks_are_the_bits_of_the_masks(pattern: str, dtype: torch.dtype, device: str) -> None:
    scores, k = drawn(pattern, dtype, device)
    result, plain = ops.topk_masks(scores, k, packed=True), ops.topk_masks(scores, k)
    assert torch.equal(result.selection, plain.selection)
    for packed, mask in zip(result.masks, plain.masks, strict=True):
        assert torch.equal(packed, reference.pack_mask(mask))


@pytest.mark.parametrize("hint", HINTS)
@pytest.mark.parametrize("pattern", ["normal", "many-ties", "last-bits", "mostly-zeros"])
@dtypes()
def test_hint_never_changes_results(pattern: str, dtype: torch.dtype, hint: str) -> None:
    scores, k = drawn(pattern, dtype, sizes=HINTED)
    assert_reference(scores, k, ops.topk_masks(scores, k, HINTS[hint](scores, k)))


@dtypes()
def test_hint_handed_from_step_to_step_never_changes_results(dtype: torch.dtype) -> None:
    scores = [scores_of("normal", n, torch.float32) for n in (65, 1000, 100_003)]
    k, hint = [7, 20, 2001], None
    for _ in range(10):
        scores = [s + 0.02 * torch.randn(s.shape) for s in scores]
        result = ops.topk_masks([s.to(dtype) for s in scores], k, hint)
        hint = result.hint
        assert_reference([s.to(dtype) for s in scores], k, result)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("shape", [(33, 65), (6, 5, 4), (9, 8, 3, 5)], ids=str)
@dtypes()
def test_strides_do_not_change_masks(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    scores = (torch.randn(shape) * 4).round().to(dtype)
    strided = scores[:1].expand(shape) if layout == "expanded" else LAYOUTS[layout](scores)
    mask = ops.topk_mask(strided, 100)
    assert torch.equal(mask, ops.topk_mask(strided.contiguous(), 100))
    assert mask.is_contiguous()


@pytest.mark.parametrize("of", [[0], [500], [999], [400, 401], [3, 998]], ids=str)
@pytest.mark.parametrize("operator", [ops.topk_masks, ops.topk_select], ids=["topk_masks", "topk_select"])
@dtypes()
def test_nan_is_refused_with_its_first_index(operator: object, of: list[int], dtype: torch.dtype, threads: int) -> None:
    scores = [scores_of("normal", n, dtype) for n in (64, 1000, 1000)]
    scores[1][of] = -torch.nan
    scores[2][0] = torch.nan
    sentence = f"^topk_masks: scores\\[1\\] holds NaN, first at flat index {of[0]}$"
    with pytest.raises(RuntimeError, match=sentence):
        operator(scores, [1, 20, 20])  # type: ignore[operator]


@pytest.mark.parametrize("k", [0, 1000])
def test_nan_is_refused_even_where_no_order_is_needed(k: int) -> None:
    scores = torch.randn(1000)
    scores[7] = torch.nan
    with pytest.raises(RuntimeError, match=re.escape("topk_masks: scores[0] holds NaN, first at flat index 7")):
        ops.topk_mask(scores, k)


def test_first_nan_of_a_large_tensor_is_named_whatever_the_threads(threads: int) -> None:
    scores = torch.randn(1 << 18)
    scores[[9_999, 200_000, 262_143]] = torch.nan
    with pytest.raises(RuntimeError, match=r"first at flat index 9999$"):
        ops.topk_mask(scores, 26_214)


def test_nan_index_of_strided_scores_is_the_logical_one() -> None:
    scores = torch.randn(20, 30).t()
    scores[3, 4] = torch.nan
    with pytest.raises(RuntimeError, match=f"first at flat index {3 * 20 + 4}$"):
        ops.topk_mask(scores, 5)


def test_scores_that_require_gradients_give_masks_that_do_not() -> None:
    assert not ops.topk_mask(torch.randn(8, requires_grad=True), 3).requires_grad


@pytest.mark.parametrize(
    ("n", "density", "k"),
    [
        (0, 0.5, 0),
        (10, 0, 0),
        (10, 1, 10),
        (10, 0.1, 1),
        (7, 0.1, 1),  # 7 - int(6.3)
        (9, 0.5, 5),  # 9 - int(4.5)
        (1000, 0.02, 20),
        (1000, 0.07, 71),  # (1 - 0.07) * 1000 is 929.9999999999999 in floating point, and int() makes it 929
        (265_000, 0.1, 26_500),
    ],
)
def test_density_to_k_truncates_what_is_dropped(n: int, density: float, k: int) -> None:
    assert ops.density_to_k(n, density) == k


@pytest.mark.parametrize("form", ["masks", "packed", "no-masks"])
@pytest.mark.parametrize("with_hint", [True, False], ids=["hint", "no-hint"])
def test_opcheck(form: str, with_hint: bool) -> None:
    scores = [torch.randn(4, 5, 3).movedim(0, 2), torch.randn(7, dtype=torch.float64), torch.randn(0)]
    hint = torch.zeros(3, 2, dtype=torch.int64) if with_hint else None
    masks = [] if form == "no-masks" else new_masks(scores, form == "packed")
    torch.library.opcheck(torch.ops.exssnet.topk_masks.default, (scores, [10, 7, 0], hint, masks))


def test_compiles_in_one_graph_with_the_same_masks() -> None:
    torch._dynamo.reset()
    scores, k = [torch.randn(33, 65), torch.randn(9)], [107, 4]
    compiled = torch.compile(ops.topk_masks, fullgraph=True, backend="aot_eager")
    assert_reference(scores, k, compiled(scores, k))


def test_hint_changes_in_place_in_a_compiled_graph_too() -> None:
    torch._dynamo.reset()
    scores, k = [torch.randn(5000), torch.randn(9)], [107, 4]
    compiled = torch.compile(ops.topk_masks, fullgraph=True, backend="aot_eager")
    hints = [new_hint(2, "cpu") for _ in range(2)]
    for _ in range(2):
        of_graph, eager = compiled(scores, k, hints[0], True), ops.topk_masks(scores, k, hints[1], True)
        assert torch.equal(*hints)
        assert all(map(torch.equal, of_graph.masks, eager.masks))
    assert not torch.equal(hints[0], new_hint(2, "cpu"))


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_hint_changes_in_place(layout: str, device: str) -> None:
    scores, k = [torch.randn(5000, device=device), torch.randn(7, device=device)], [107, 4]
    hint = new_hint(2, device) if layout == "contiguous" else new_hint(2, device).t()
    result = ops.topk_masks(scores, k, hint)
    assert result.hint is hint
    assert torch.equal(hint, ops.topk_masks(scores, k).hint)
    assert ops.topk_select(scores, k, hint)[1] is hint


def test_packed_masks_are_slices_of_one_allocation(device: str) -> None:
    masks = ops.topk_masks([torch.randn(n, device=device) for n in (9, 0, 2000, 1)], [3, 0, 200, 1], packed=True).masks
    assert len({mask.untyped_storage().data_ptr() for mask in masks}) == 1
    assert all(mask.storage_offset() % 16 == 0 for mask in masks)  # as kernels assume of memory of its own


SENTENCES: Calls = {
    "density must be in [0, 1], got 1.5": lambda: ops.density_to_k(10, 1.5),
    "topk_masks: expected at least one score tensor, got none": lambda: ops.topk_masks([], []),
    "topk_masks: expected one k per score tensor, got 2 scores and 1 k": lambda: ops.topk_masks([W, W], [1]),
    "topk_mask: k must be in [0, 20], got 21": lambda: ops.topk_mask(W, 21),
    "topk_mask: k must be in [0, 20], got -1": lambda: ops.topk_mask(W, -1),
    "topk_select: k must be in [0, 20], got 25": lambda: ops.topk_select([W, W], [3, 25]),
    "topk_mask: scores must be float32, bfloat16, float16 or float64, got torch.int64": lambda: ops.topk_mask(ROW, 1),
    "topk_masks: scores are on two devices, cpu and meta": lambda: ops.topk_masks([W, FAR], [1, 1]),
    "topk_masks: hint must be int64 of shape (2, 2), got torch.int64 of (1, 2)": lambda: ops.topk_masks(
        [W, W], [1, 1], torch.zeros(1, 2, dtype=torch.int64)
    ),
    "topk_masks: scores are on cpu, but hint is on meta": lambda: ops.topk_masks([W], [1], new_hint(1, "meta")),
    "topk_masks: hint is changed in place, and must not be expanded, got strides (0, 1)": lambda: ops.topk_masks(
        [W, W], [1, 1], new_hint(1, "cpu").expand(2, 2)
    ),
    "topk_select: hint must be int64 of shape (1, 2), got torch.float32 of (1, 2)": lambda: ops.topk_select(
        [W], [1], torch.zeros(1, 2)
    ),
}
test_wrong_arguments_are_refused_in_a_sentence = refused(SENTENCES)


FOREIGN_MEMORY: Calls = {
    "more to keep than there is": lambda: RAW.topk_masks([W], [21], None, []),
    "a short hint": lambda: RAW.topk_masks([W, W], [1, 1], torch.zeros(1, 2, dtype=torch.int64), []),
}
test_native_kernels_touch_no_foreign_memory_given = guarded(FOREIGN_MEMORY)
