"""topk_masks in Triton, interpreted under the guard: bit for bit the reference."""

from typing import Any

import pytest
import torch
import triton_guard
from cases import DTYPES, LAYOUTS, PATTERNS, SIZES, dtypes, scores_of
from selections import selected
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from exssnet.kernels import nan_flag, reference, triton_topk

pytestmark = pytest.mark.proof

patterns = pytest.mark.parametrize("pattern", PATTERNS)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand scores are two chunks, of two blocks each."""
    monkeypatch.setattr(triton_topk, "BLOCK", 256)
    monkeypatch.setattr(triton_topk, "CHUNK", 512)


def drawn(pattern: str, dtype: torch.dtype, *sizes: int) -> tuple[list[Tensor], list[int]]:
    """Scores and k of every (size, k) of the cases, as the layers of one model."""
    pairs = [(s, k) for n in sizes for s in [scores_of(pattern, n, dtype)] for k in SIZES[n]]
    return [s for s, _ in pairs], [k for _, k in pairs]


def assert_reference(scores: list[Tensor], k: list[int], hint: Tensor | None = None) -> None:
    masks, selection = selected(triton_topk.topk_masks, scores, k, hint=hint)
    expected_masks, expected = selected(reference.topk_masks, scores, k)
    assert torch.equal(selection, expected)
    for mask, expected_mask in zip(masks, expected_masks, strict=True):
        assert torch.equal(mask, expected_mask)


@patterns
@dtypes()
@pytest.mark.usefixtures("small_blocks")
def test_bitwise_the_reference(pattern: str, dtype: torch.dtype) -> None:
    assert_reference(*drawn(pattern, dtype, 0, 7, 0, 64, 1000, 0))


@pytest.mark.parametrize("pattern", ["normal", "many-ties"])
@dtypes()
def test_bitwise_the_reference_in_blocks_of_their_size(pattern: str, dtype: torch.dtype) -> None:
    assert_reference(*drawn(pattern, dtype, 65, 33 * 65, 100_003))


@pytest.mark.parametrize("pattern", ["zeros", "many-ties"])
def test_last_tie_is_found_beyond_a_block_of_chunks(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_topk, "BLOCK", 16)
    monkeypatch.setattr(triton_topk, "CHUNK", 32)
    scores = [scores_of(pattern, 33 * 16 * 2 + 5, torch.float32)] * 8
    assert_reference(scores, [1, 32, 33, 512, 513, 1000, 1024, 1060])


@dtypes("float32", "bfloat16")
def test_bitwise_the_reference_for_every_k(dtype: torch.dtype) -> None:
    scores = [scores_of("many-ties", 40, dtype)] * 41
    assert_reference(scores, list(range(41)))


@pytest.mark.usefixtures("small_blocks")
def test_layers_of_one_call_may_have_different_dtypes() -> None:
    scores = [scores_of("normal", n, dtype) for n in (1000, 7) for dtype in DTYPES.values()]
    assert_reference(scores, [20, 30, 40, 50, 1, 2, 3, 4])


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@dtypes("float32", "bfloat16")
def test_strides_do_not_change_masks(layout: str, dtype: torch.dtype) -> None:
    scores = (torch.randn(9, 8, 3, 5) * 4).round().to(dtype)
    assert_reference([scores[:1].expand(scores.shape) if layout == "expanded" else LAYOUTS[layout](scores)], [100])


@pytest.mark.usefixtures("small_blocks")
def test_hint_never_changes_results() -> None:
    scores, k = drawn("many-ties", torch.float32, 65, 1000)
    assert_reference(scores, k, torch.randint(-(2**63), 2**63 - 1, (len(k), 2)))


def test_without_masks_only_the_selection_is_made() -> None:
    scores, k = drawn("normal", torch.float32, 65, 1000)
    hint = torch.zeros(len(k), 2, dtype=torch.int64)
    selection = triton_topk.topk_masks(scores, k, hint, [])
    assert torch.equal(selection, reference.topk_masks(scores, k, None, []))
    assert torch.equal(hint, selection)


@patterns
@pytest.mark.usefixtures("small_blocks")
def test_packed_masks_are_the_bits_of_the_references(pattern: str) -> None:
    pairs = [drawn(pattern, dtype, 0, 7, 64, 65, 1000) for dtype in (torch.float32, torch.bfloat16)]
    scores, k = ([x for both in zip(*of_each, strict=True) for x in both] for of_each in zip(*pairs, strict=True))
    masks, _ = selected(triton_topk.topk_masks, scores, k, packed=True)
    for packed, expected in zip(masks, selected(reference.topk_masks, scores, k, packed=True)[0], strict=True):
        assert torch.equal(packed, expected)


CPU = torch.device("cpu")


@pytest.mark.parametrize("k", [0, 20, 1000])
@pytest.mark.parametrize("of", [[0], [999], list(range(1000))], ids=["first", "last", "all"])
@dtypes()
def test_nan_is_told_of_once(of: list[int], k: int, dtype: torch.dtype) -> None:
    scores = scores_of("normal", 1000, dtype)
    scores[of] = -torch.nan
    assert not nan_flag.seen(CPU)
    masks, _ = selected(triton_topk.topk_masks, [scores_of("normal", 9, dtype), scores], [3, k])
    assert int(masks[1].sum()) == k
    triton_topk.topk_masks([scores_of("infinities", 9, dtype)], [3], None, [])
    assert nan_flag.seen(CPU)
    assert not nan_flag.seen(CPU)


def test_infinities_are_no_nan() -> None:
    for dtype in DTYPES.values():
        triton_topk.topk_masks([scores_of("infinities", 1000, dtype)], [20], None, [])
    assert not nan_flag.seen(CPU)


class Operations(TorchDispatchMode):
    """Notes the names of PyTorch's operators that are called in it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_host_neither_waits_nor_copies_to_the_device() -> None:
    with Operations() as seen:
        selected(triton_topk.topk_masks, [scores_of("normal", 65, torch.float32)] * 3, [3, 4, 0])
    assert "_foreach_add_" in seen.names
    assert not {"_local_scalar_dense", "lift_fresh", "nonzero", "_to_copy"} & set(seen.names)


@pytest.mark.parametrize(("dtype", "digits"), [("float32", 3), ("float64", 6), ("bfloat16", 2)])
@pytest.mark.parametrize("layers", [1, 50])
def test_launches_depend_on_the_digits_and_not_on_the_layers(
    layers: int, dtype: str, digits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = triton_guard.launched(monkeypatch)
    triton_topk.topk_masks([scores_of("normal", 9, DTYPES[dtype])] * layers, [3] * layers, None, [])
    assert launches == ["_count_digit", "_choose_digit"] * digits + ["_count_ties", "_select"]


triton_guard.interpret(globals())
