"""supermask_*, masked_* and bitmap_*, linear and conv2d, in Triton, interpreted under the guard.

Truth is the reference in float64.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_guard
from accuracy import assert_accurate, assert_exact, representable
from cases import CONV2D, FEW, LAYOUTS, LINEAR, PATTERNS, Layer, any_convolution, dtypes, layers, scores_of
from hypothesis import HealthCheck, given, settings
from products import Problem, geometry, output_masks, problem
from torch import Tensor

from exssnet.kernels import autotune, layouts, reference, triton_conv, triton_layers, triton_linear, triton_product
from exssnet.ops import bitmap_pattern

pytestmark = pytest.mark.proof

KERNELS = {**vars(triton_linear), **vars(triton_conv)}
HALF, FLOAT32 = (
    max(len(tiles[of]) for tiles in (triton_product.PRODUCT_TILES, triton_product.GRADIENT_TILES))
    for of in ("half", "float32")
)
single = dtypes("float32", "bfloat16", "float16")
Arguments = dict[str, tuple[Any, ...]]
SMALL = (
    Layer("linear-9x21x19", (9, 21), (19, 21)),
    Layer("linear-70x33x67", (70, 33), (67, 33)),
    Layer("conv2d-20-channels", (2, 20, 5, 4), (18, 20, 3, 3), padding=1),
    Layer("conv2d-strides", (2, 34, 5, 6), (10, 17, 3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
    Layer("conv2d-3-channels", (2, 3, 9, 8), (5, 3, 3, 3), stride=2, padding=1),
)
"""For what is done with each tile: edges in every block, more than one tile, channels for both kinds of blocks."""


def unchanged(name: str, t: Tensor) -> Tensor:
    return t


def arguments(p: Problem, *, sparse: bool = False, change: Callable[[str, Tensor], Tensor] = unchanged) -> Arguments:
    """What each raw operator takes, with everything asked of the backward ones."""
    linear = p.layer.kind == "linear"
    leading = p.x.shape[:-1].numel()
    x, grad = (t.reshape(leading, t.shape[-1]) if linear else t for t in (p.x, p.grad))
    tensors = {"x": x, "grad": grad, "weight": p.weight, "scores": p.scores, "mask": p.mask, "free": p.free}
    x, grad, weight, scores, mask, free = (change(name, t) for name, t in tensors.items())
    convolution = () if linear else (*geometry(p.layer), p.layer.groups)
    row = reference.select(reference.magnitude_bits(p.scores), p.k)
    kind, shape = p.layer.kind, list(p.weight.shape)
    words = bitmap_pattern(p.mask, p.free).words
    free_values, frozen_values = (
        change(n, p.weight[m]) for n, m in (("free_values", p.free), ("frozen_values", p.mask & ~p.free))
    )
    return {
        f"supermask_{kind}": (x, weight, scores, row, p.bias, *convolution, sparse),
        f"supermask_{kind}_backward": (grad, x, weight, scores, row, *convolution, sparse, [True] * 3),
        f"masked_{kind}": (x, weight, mask, free, p.bias, *convolution),
        f"masked_{kind}_backward": (grad, x, weight, mask, free, *convolution, [True] * 2),
        f"bitmap_{kind}": (x, free_values, frozen_values, words, p.bias, shape, *convolution),
        f"bitmap_{kind}_backward": (grad, x, free_values, frozen_values, words, shape, *convolution, [True] * 2),
    }


def of_supermasks(calls: Arguments) -> Arguments:
    """Those of one family, where masks do not matter."""
    return {name: args for name, args in calls.items() if name.startswith("supermask")}


def results(name: str, found: Any) -> dict[str, Tensor]:
    return {f"{name} {i}": t for i, t in enumerate(found if isinstance(found, tuple) else (found,))}


def kernel(calls: Arguments) -> dict[str, Tensor]:
    found = {}
    for name, args in calls.items():
        found |= results(name, KERNELS[name](*args))
    return found


def plain(calls: Arguments) -> dict[str, Tensor]:
    found = {}
    for name, args in calls.items():
        found |= results(name, getattr(reference, name)(*args))
    return found


def truth(calls: Arguments) -> dict[str, Tensor]:
    """The reference in float64; scores keep their dtype, by whose bits they are selected."""

    def exact(name: str, i: int, a: Any) -> Any:
        scores = name.startswith("supermask") and i == (3 if name.endswith("_backward") else 2)
        return a.double() if isinstance(a, Tensor) and a.is_floating_point() and not scores else a

    found = plain({name: tuple(exact(name, i, a) for i, a in enumerate(args)) for name, args in calls.items()})
    return {name: t.double() for name, t in found.items()}


def order(t: Tensor) -> tuple[bool, bool]:
    """Whether a tensor is contiguous, and whether it is with the batch innermost."""
    return t.is_contiguous(), t.movedim(0, -1).is_contiguous()


def check_exact(calls: Arguments) -> None:
    assert calls
    got, like = kernel(calls), plain(calls)
    assert_exact(got, representable(truth(calls), like))
    for name, t in got.items():
        assert order(t) == order(like[name]), name
        assert t._base is None, f"{name} is a view, which nobody may change in place"


@layers(LINEAR + CONV2D)
def test_integers_give_exact_results(layer: Layer) -> None:
    check_exact(of_supermasks(arguments(problem(layer, torch.bfloat16, integers=True))))


@layers(FEW)
@single
def test_exact_in_dtype(layer: Layer, dtype: torch.dtype) -> None:
    check_exact(arguments(problem(layer, dtype, integers=True)))


@pytest.mark.parametrize("index", range(HALF))
@layers(SMALL)
def test_exact_in_every_configuration_of_half_types(index: int, layer: Layer) -> None:
    with triton_guard.configuration(index):
        check_exact(of_supermasks(arguments(problem(layer, torch.bfloat16, integers=True))))


@pytest.mark.parametrize("index", range(FLOAT32))
@layers(SMALL)
def test_exact_in_every_configuration_of_float32(index: int, layer: Layer) -> None:
    with triton_guard.configuration(index):
        check_exact(of_supermasks(arguments(problem(layer, integers=True))))


@pytest.mark.parametrize("index", range(max(HALF, FLOAT32)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@layers(SMALL[:1] + SMALL[-1:])
def test_bitmap_products_are_exact_in_every_configuration(layer: Layer, dtype: torch.dtype, index: int) -> None:
    calls = arguments(problem(layer, dtype, integers=True))
    with triton_guard.configuration(index):
        check_exact({name: args for name, args in calls.items() if name.startswith("bitmap")})


@layers(SMALL[:1] + SMALL[-1:])
def test_bitmap_products_are_exact_where_all_weights_are_kept(layer: Layer) -> None:
    calls = arguments(problem(layer, torch.bfloat16, integers=True, density=1))
    check_exact({name: args for name, args in calls.items() if name.startswith("bitmap")})


def test_float32_is_tf32_only_where_pytorch_allows_it() -> None:
    x = torch.full((16, 16), 1 + 2.0**-12)  # 1 in tf32
    weight, scores, selection = torch.eye(16), torch.ones(16, 16), torch.tensor([0, 0])
    found = {}
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            found[precision] = triton_linear.supermask_linear(x, weight, scores, selection, None, False)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert torch.equal(found["highest"], x)
    assert torch.equal(found["high"], torch.ones_like(x))
    assert torch.equal(found["medium"], torch.ones_like(x))


@layers(SMALL)
@single
def test_errs_at_most_twice_as_much_as_plain_pytorch(layer: Layer, dtype: torch.dtype) -> None:
    calls = arguments(problem(layer, dtype))
    assert_accurate(kernel(calls), plain(calls), truth(calls))


def split(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes sums of parts where they are short too; the list will hold the number of parts of each product."""
    counts: list[int] = []
    parts = triton_product._parts
    monkeypatch.setattr(triton_product, "PROGRAMS", 8)
    monkeypatch.setattr(triton_product, "PART", 4)
    monkeypatch.setattr(triton_product, "_parts", lambda *sizes: counts.append(parts(*sizes)) or counts[-1])
    return counts


@layers(SMALL)
def test_exact_in_parts(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = split(monkeypatch)
    check_exact(arguments(problem(layer, torch.bfloat16, integers=True)))
    assert min(counts) > 1


@pytest.mark.parametrize("family", ["supermask", "masked", "bitmap"])
@layers(SMALL[:1] + SMALL[-1:])
def test_backward_is_three_launches_where_both_sums_are_in_parts(
    layer: Layer, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = triton_guard.launched(monkeypatch)
    split(monkeypatch)
    calls = arguments(problem(layer, torch.bfloat16, integers=True))
    check_exact({f"{family}_{layer.kind}": calls[f"{family}_{layer.kind}"]})
    assert launches == ["product_kernel", "_finish_kernel"]
    launches.clear()
    check_exact({f"{family}_{layer.kind}_backward": calls[f"{family}_{layer.kind}_backward"]})
    assert launches == ["product_kernel", "gradient_kernel", "_finish_kernel"]


@layers(SMALL[:1] + SMALL[-1:])
@single
def test_parts_repeat_bit_for_bit_and_err_no_more(
    layer: Layer, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(monkeypatch)
    calls = of_supermasks(arguments(problem(layer, dtype)))
    found = kernel(calls)
    assert_exact(kernel(calls), found)
    assert_accurate(found, plain(calls), truth(calls))


@layers(FEW[:1] + SMALL[-2:])
def test_batch_innermost_in_and_out(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(layer, torch.bfloat16, integers=True)
    for stored in (unchanged, lambda name, t: layouts.batch_last(t) if name in ("x", "grad") else t):
        check_exact(of_supermasks(arguments(p, sparse=True, change=stored)))
    split(monkeypatch)
    check_exact(of_supermasks(arguments(p, sparse=True)))


@pytest.mark.parametrize("layout", LAYOUTS)
@layers(FEW[:1] + SMALL[-2:])
def test_exact_with_strides(layer: Layer, layout: str) -> None:
    p = problem(layer, torch.bfloat16, integers=True)
    check_exact(arguments(p, change=lambda _, t: LAYOUTS[layout](t)))


@layers(FEW)
def test_exact_with_the_expanded_gradient_of_a_sum(layer: Layer) -> None:
    p = problem(layer, torch.bfloat16, integers=True)
    p.grad = torch.ones((), dtype=torch.bfloat16).expand(p.grad.shape)
    check_exact(arguments(p))


@settings(max_examples=8, suppress_health_check=[HealthCheck.differing_executors])
@given(any_convolution())
def test_exact_in_any_geometry(layer: Layer) -> None:
    torch.manual_seed(0)
    check_exact(of_supermasks(arguments(problem(layer, torch.bfloat16, integers=True))))


@pytest.mark.parametrize("pattern", PATTERNS)
@single
def test_selection_is_that_of_the_reference(pattern: str, dtype: torch.dtype) -> None:
    """With x the identity, the output is the effective weight, transposed."""
    scores = scores_of(pattern, 13 * 11, dtype).reshape(13, 11)
    weight = torch.randint(1, 9, (13, 11)).bfloat16()
    eye = torch.eye(11, dtype=torch.bfloat16)
    for k in (0, 1, 60, 142, 143):
        row = reference.select(reference.magnitude_bits(scores), k)
        kept = weight.where(reference.mask_of(scores, row), 0)
        assert torch.equal(KERNELS["supermask_linear"](eye, weight, scores, row, None, False), kept.t()), k
        arguments = (eye.new_ones(11, 13), eye, weight, scores, row, False, [True] * 3)
        grad_x, grad_scores, grad_weight = KERNELS["supermask_linear_backward"](*arguments)
        assert torch.equal(grad_x, kept.sum(0).expand(11, 11)), k
        assert torch.equal(grad_scores, (weight * scores.sign()).to(dtype)), k
        assert torch.equal(grad_weight, (kept != 0).bfloat16()), k


@pytest.mark.parametrize("scores_dtype", [torch.float32, torch.float16, torch.bfloat16])
@layers(SMALL[-2:])
@single
def test_scores_keep_a_dtype_of_their_own(layer: Layer, dtype: torch.dtype, scores_dtype: torch.dtype) -> None:
    check_exact(arguments(problem(layer, dtype, integers=True, scores_dtype=scores_dtype)))


@pytest.mark.parametrize("packed", [("mask",), ("free",), ("mask", "free")], ids=",".join)
@layers(FEW + SMALL[-2:])
def test_packed_masks_give_the_bits_of_bool_masks(layer: Layer, packed: tuple[str, ...]) -> None:
    p = problem(layer, torch.bfloat16)
    pack = arguments(p, change=lambda name, t: reference.pack_mask(t) if name in packed else t)
    bits, bools = ({n: args for n, args in calls.items() if n.startswith("masked")} for calls in (pack, arguments(p)))
    assert_exact(kernel(bits), kernel(bools))


@layers(FEW + SMALL[-2:])
@single
def test_packed_mask_as_selection_gives_the_bits_of_the_row(layer: Layer, dtype: torch.dtype) -> None:
    p = problem(layer, dtype)
    rows = of_supermasks(arguments(p))
    bits = {name: (*args[: 3 + b], reference.pack_mask(p.mask), *args[4 + b :])
            for name, args in rows.items() for b in [name.endswith("_backward")]}  # fmt: skip
    assert_exact(kernel(bits), kernel(rows))


@layers(FEW)
def test_no_free_mask_means_the_whole_mask(layer: Layer) -> None:
    name = f"masked_{layer.kind}_backward"
    grad, x, weight, mask, _, *rest = arguments(problem(layer, integers=True))[name]
    check_exact({name: (grad, x, weight, mask, None, *rest)})


@layers(FEW)
def test_backward_computes_only_what_is_asked(layer: Layer) -> None:
    for name, (*args, everything) in arguments(problem(layer, torch.bfloat16, integers=True)).items():
        if name.endswith("_backward"):
            for asked in output_masks(len(everything)):
                check_exact({name: (*args, list(asked))})


@layers(FEW)
def test_weights_outside_the_mask_are_not_read(layer: Layer) -> None:
    p = problem(layer, torch.bfloat16)
    holes = arguments(p, change=lambda name, t: t.where(p.mask, torch.nan) if name == "weight" else t)
    full = kernel(arguments(p))
    for name, t in kernel(holes).items():
        if name != f"supermask_{layer.kind}_backward 1":  # the score gradient, which is G W sign(S) everywhere
            assert torch.equal(t, full[name]), name


@layers(FEW)
def test_infinite_gradients_do_not_leave_the_free_mask(layer: Layer) -> None:
    p = problem(layer)
    p.grad.fill_(torch.inf)
    name = f"masked_{layer.kind}_backward"
    _, grad_weight = KERNELS[name](*arguments(p)[name])
    assert torch.equal(grad_weight[~p.free], torch.zeros(int((~p.free).sum())))


@pytest.mark.parametrize("ratio", [0.5, 2.0])
@layers(SMALL[:1] + SMALL[-1:])
def test_masked_products_are_the_faster_of_the_kernel_and_of_a_written_weight(
    layer: Layer, ratio: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each operator, and each kind of mask, is measured once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_limits", {})
    monkeypatch.setattr(triton_layers, "_chosen", {})
    monkeypatch.setattr(triton_layers, "_can_be_timed", lambda x: True)
    timed: list[object] = []

    def times(device: torch.device, *ways: Callable[[], object]) -> tuple[list[float], bool]:
        timed.append([way() for way in ways])
        return [ratio, 1.0], True

    monkeypatch.setattr(autotune, "times", times)
    for masks in ((), ("mask", "free")):
        p = problem(layer, torch.bfloat16, integers=True)
        calls = arguments(p, change=lambda name, t, masks=masks: reference.pack_mask(t) if name in masks else t)
        calls = {name: args for name, args in calls.items() if name.startswith("masked")}
        check_exact(calls)
        launches = triton_guard.launched(monkeypatch)
        check_exact(calls)
        assert bool(launches) == (ratio < 1)
    assert len(timed) == 4


def test_environment_decides_how_masked_products_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {name: args for name, args in arguments(problem(SMALL[0])).items() if name.startswith("masked")}
    launches = triton_guard.launched(monkeypatch)
    monkeypatch.setenv("EXSSNET_MASKING", "written")
    kernel(calls)
    assert not launches
    monkeypatch.setenv("EXSSNET_MASKING", "fused")
    kernel(calls)
    assert launches


@layers(FEW)
def test_float64_is_the_reference(layer: Layer) -> None:
    for dtype, other in itertools.product([torch.float64, torch.float32], [torch.float64]):
        calls = arguments(problem(layer, dtype, scores_dtype=other))
        if dtype == torch.float32:
            calls = {name: args for name, args in calls.items() if name.startswith("supermask")}
        assert_exact(kernel(calls), plain(calls))


@layers(SMALL[:1] + SMALL[-1:])
def test_images_farther_apart_than_32_bits_count(layer: Layer, tmp_path: Path) -> None:
    """The last of three in x and in the gradient lies 2^31 elements after the first, in a file with holes."""

    def far(name: str, t: Tensor) -> Tensor:
        if name not in ("x", "grad"):
            return t
        apart, file = 1 << 30, tmp_path / name
        with file.open("wb") as hole:
            hole.truncate((2 * apart + t[0].numel()) * t.element_size())
        memory = torch.from_file(str(file), shared=True, size=2 * apart + t[0].numel(), dtype=t.dtype)
        return memory.as_strided(t.shape, (apart, *t.stride()[1:])).copy_(t)

    p = problem(replace(layer, x=(3, *layer.x[1:])), torch.bfloat16, integers=True)
    calls = of_supermasks(arguments(p))
    got = kernel(of_supermasks(arguments(p, change=far)))
    assert_exact(got, representable(truth(calls), got))


def test_what_32_bits_cannot_count_is_left_to_the_reference() -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    assert triton_layers.served(empty(1, 3, 32767, 32768), (8, 3, 3, 3), padding=[0, 0])
    assert not triton_layers.served(empty(1, 3, 32767, 32768), (8, 3, 3, 3), padding=[1, 1])
    assert not triton_layers.served(empty(1 << 30, 3), (8, 3))
    assert not triton_layers.served(empty(8, 1 << 22), (8, 1 << 22))
    assert triton_layers.served(empty(8, 1 << 21), (1 << 20, 1 << 21))


triton_guard.interpret(globals())
