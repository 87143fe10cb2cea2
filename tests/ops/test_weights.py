"""supermask_weights and write_values: the dense weights of all layers at once, and their gradients, also in Triton."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_guard
from accuracy import assert_exact, representable
from cases import DTYPES, dtypes
from products import Calls, opcheck_warning
from torch import Tensor

from exssnet import ops
from exssnet.kernels import layouts, reference, triton_weights
from exssnet.ops.weights import WrittenWeight, written_weights

SHAPES = ((33, 65), (7,), (0, 3), (31, 5, 3, 3), (2000,))  # of one block of a kernel and of two
LAST = [len(shape) == 4 for shape in SHAPES]  # stored channels_last
Layers = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def layers(dtype: torch.dtype, scores_dtype: torch.dtype = torch.float32, device: str = "cpu") -> Layers:
    """(weights, scores, packed masks, gradients) of small integers, whose products are exact."""

    def draw(of: torch.dtype) -> list[Tensor]:
        return [torch.randint(-3, 4, shape).to(device, of) for shape in SHAPES]

    weights, scores, grads = draw(dtype), draw(scores_dtype), draw(dtype)
    masks = [reference.pack_mask(torch.rand(shape) < 0.4).to(device) for shape in SHAPES]
    return weights, scores, masks, grads


def results(
    function: Any, backward: Any, of: Layers, dtype: torch.dtype | None = None, last: bool = False
) -> dict[str, Tensor]:
    """last: whether images' weights are stored channels_last, and their gradients with them."""
    weights, scores, masks, grads = of
    order = [last and len(w.shape) == 4 for w in weights]
    found = {f"weight {i}": t for i, t in enumerate(function(weights, scores, masks, dtype, order))}
    formats = map(layouts.order_of, order)
    grads = [g.to(dtype or g.dtype, memory_format=f) for g, f in zip(grads, formats, strict=True)]
    for name, gradients in zip(("score", "weight"), backward(grads, weights, scores, masks, [True, True]), strict=True):
        found |= {f"gradient of {name} {i}": t for i, t in enumerate(gradients)}
    return found


def by_triton(of: Layers, dtype: torch.dtype | None = None, last: bool = False) -> dict[str, Tensor]:
    return results(triton_weights.supermask_weights, triton_weights.supermask_weights_backward, of, dtype, last)


def by_reference(of: Layers, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return results(reference.supermask_weights, reference.supermask_weights_backward, of, dtype)


def leaves(of: Layers) -> tuple[list[Tensor], list[Tensor]]:
    weights, scores, *_ = of
    return [w.clone().requires_grad_() for w in weights], [s.clone().requires_grad_() for s in scores]


@dtypes()
@pytest.mark.parametrize("scores_dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_are_those_of_supermask_linear(dtype: torch.dtype, scores_dtype: torch.dtype, device: str) -> None:
    of = layers(dtype, scores_dtype, device)
    weights, scores = leaves(of)
    found = ops.supermask_weights(weights, scores, of[2])
    torch.autograd.backward(found, of[3])
    for w, s, m, g, masked in zip(weights, scores, *of[2:], found, strict=True):
        mask = reference.unpack_mask(m, list(w.shape))
        assert torch.equal(masked, w.where(mask, 0))
        assert torch.equal(s.grad, (g * w * s.sign()).to(scores_dtype))
        assert torch.equal(w.grad, g.where(mask, 0))


@pytest.mark.parametrize("row", [False, True], ids=["packed", "row"])
def test_written_weight_makes_the_layer_that_the_operator_is(row: bool) -> None:
    x, weight = torch.randint(-2, 3, (6, 5)).float(), torch.randint(-2, 3, (4, 5)).float()
    both = [torch.randn(4, 5).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        both[1].copy_(both[0])
    masks, rows, _ = ops.topk_masks(both[:1], [7], packed=True)
    (written,) = ops.supermask_weights([weight], both[:1], rows.unbind() if row else masks)
    y = torch.nn.functional.linear(x, written)
    expected = ops.supermask_linear(x, weight, both[1], 7)
    assert torch.equal(y, expected)
    for output in (y, expected):
        output.square().sum().backward()
    assert torch.equal(both[0].grad, both[1].grad)


@pytest.mark.parametrize("alone", ["weights", "scores"])
def test_only_what_is_required_has_a_gradient(alone: str) -> None:
    of = layers(torch.float32)
    with_gradient = dict(zip(("weights", "scores"), leaves(of), strict=True))
    without = {"weights": of[0], "scores": of[1]}
    arguments = without | {alone: with_gradient[alone]}
    outputs = ops.supermask_weights(*arguments.values(), of[2])
    with Calls() as calls:
        torch.autograd.backward(outputs, of[3])
    assert all(t.grad is not None for t in arguments[alone])
    assert [asked for _, (*_, asked) in calls.made] == [[alone == "scores", alone == "weights"]]


def test_weights_of_images_are_stored_channels_last_where_asked() -> None:
    of = layers(torch.float32)
    weights, scores = leaves(of)
    found = ops.supermask_weights(weights, scores, of[2], None, LAST)
    assert [not t.is_contiguous() for t in found] == LAST
    assert_exact(dict(enumerate(found)), dict(enumerate(ops.supermask_weights(weights, scores, of[2]))))
    with pytest.raises(ValueError, match=r"channels_last needs a weight \(O, C, R, S\), got \(33, 65\)$"):
        ops.supermask_weights(weights, scores, of[2], None, [True] * 5)


def test_dtype_is_that_of_the_products() -> None:
    of = layers(torch.float32)
    weights, scores = leaves(of)
    found = ops.supermask_weights(weights, scores, of[2], torch.bfloat16)
    assert {t.dtype for t in found} == {torch.bfloat16}
    torch.autograd.backward(found, [g.bfloat16() for g in of[3]])
    assert {t.grad.dtype for t in (*weights, *scores)} == {torch.float32}
    assert torch.equal(scores[0].grad, of[3][0] * of[0][0] * of[1][0].sign())


@opcheck_warning
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype | None) -> None:
    of = layers(torch.float32)
    torch.library.opcheck(torch.ops.exssnet.supermask_weights.default, (*leaves(of), of[2], dtype, LAST))
    for output_mask in ([True, True], [True, False], [False, False]):
        arguments = of[3], *of[:3], output_mask
        torch.library.opcheck(torch.ops.exssnet.supermask_weights_backward.default, arguments)


def test_compiles_in_one_graph_with_the_same_gradients() -> None:
    torch._dynamo.reset()
    of = layers(torch.float32)
    found = []
    for call in (ops.supermask_weights, torch.compile(ops.supermask_weights, fullgraph=True, backend="aot_eager")):
        weights, scores = leaves(of)
        torch.autograd.backward(call(weights, scores, of[2]), of[3])
        found.append([t.grad for t in (*weights, *scores)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda w, s, m: (w, s[:2], m),
            "and a layout per weight, got 5 weights, 2 scores, 5 selections and 5 layouts$",
        ),
        (lambda w, s, m: (w, s[::-1], m), r"must fit the weight, \(33, 65\) on cpu, got \(2000,\) on cpu and torch.ui"),
        (lambda w, s, m: (w, s, m[::-1]), r"must fit the weight, .* and torch.uint8 of \(250,\) on cpu$"),
    ],
)
def test_lists_that_do_not_match_are_refused(change: Callable[..., Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^supermask_weights: .*{sentence}"):
        ops.supermask_weights(*change(*layers(torch.float32)[:3]))


# The free values of a weight phase


def free_values(dtype: torch.dtype, device: str = "cpu", last: bool = False) -> tuple[list[Tensor], ...]:
    """(weights in memory, free values, places, free masks): of layers without free values and without weights too."""
    weights, masks, values, places = [], [], [], []
    for shape, is_last in zip(SHAPES, LAST, strict=True):
        mask = torch.rand(shape) < (0.3 if shape != (7,) else 0)
        order = layouts.order_of(last and is_last)
        index = torch.arange(mask.numel(), dtype=torch.int32).reshape(shape)
        if last and is_last:  # places in the order of memory
            index = index.reshape(shape[0], -1, shape[1]).transpose(1, 2).reshape(shape)
        weights.append(torch.randn(shape, device=device).to(dtype, memory_format=order))
        masks.append(mask.to(device))
        places.append(index[mask].to(device))
        values.append(torch.randn(int(mask.sum()), device=device))
    return weights, values, places, masks


@dtypes("float32", "bfloat16", "float16")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_write_values_writes_the_free_entries_alone_and_gathers_their_gradients(
    dtype: torch.dtype, last: bool, device: str
) -> None:
    weights, values, places, masks = free_values(dtype, device, last)
    before = [w.clone() for w in weights]
    torch.ops.exssnet.write_values(values, places, weights)
    gradients = torch.ops.exssnet.write_values_backward(weights, values, places)
    for w, old, v, m, g in zip(weights, before, values, masks, gradients, strict=True):
        assert torch.equal(w[m], v.to(dtype))
        assert torch.equal(w[~m], old[~m])
        assert torch.equal(g, w[m].to(v.dtype))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_written_weights_have_the_gradients_of_their_values_in_any_layout(last: bool) -> None:
    weights, values, places, masks = free_values(torch.bfloat16, last=last)
    parameters = [v.requires_grad_() for v in values]
    written = [WrittenWeight(*each) for each in zip(weights, parameters, places, strict=True)]
    found = written_weights(written)
    assert [w.data_ptr() for w in weights] == [t.data_ptr() for t in found]
    used = [i for i in range(len(SHAPES)) if i != 4]
    grads = [torch.randn(SHAPES[i]).bfloat16() for i in used]  # contiguous
    torch.autograd.backward([found[i] for i in used], grads)
    for i, g in zip(used, grads, strict=True):
        assert torch.equal(parameters[i].grad, g[masks[i]].float())
    assert parameters[4].grad is None
    assert [w._version for w in weights] == [0] * len(SHAPES)
    with torch.no_grad():
        parameters[0].add_(1)
    written_weights(written)
    assert [w._version for w in weights] == [1, *[0] * 4]
    assert torch.equal(weights[0][masks[0]], parameters[0].bfloat16())


@opcheck_warning
def test_opcheck_of_values() -> None:
    weights, values, places, _ = free_values(torch.bfloat16, last=True)
    torch.library.opcheck(torch.ops.exssnet.write_values.default, (values, places, weights))
    torch.library.opcheck(torch.ops.exssnet.write_values_backward.default, (weights, values, places))


# The native kernels

ODD: tuple[tuple[tuple[int, ...], bool], ...] = (  # shapes, and whether they are stored channels_last
    ((33, 65), False), ((7,), False), ((0, 3), False), ((31, 5, 3, 3), True), ((31, 5, 3, 3), False),
    ((3, 130, 3, 3), True), ((5, 1, 3, 3), True), ((4, 6, 1, 1), True), ((2, 1025, 1, 2), True), ((70, 64, 3, 3), True),
)  # fmt: skip


@pytest.mark.usefixtures("native")
@dtypes()
@pytest.mark.parametrize("dtype_of_products", [None, torch.bfloat16], ids=str)
def test_native_kernels_have_the_bits_of_the_reference(
    dtype: torch.dtype, dtype_of_products: torch.dtype | None
) -> None:
    torch.set_num_threads(2)
    last = [is_last for _, is_last in ODD]
    weights, scores = ([torch.randn(shape).to(dtype) for shape, _ in ODD] for _ in range(2))
    rows = [reference.select(reference.magnitude_bits(s), s.numel() // 3) for s in scores]
    masks = [reference.pack_mask(torch.rand(shape) < 0.4) for shape, _ in ODD]
    selections = [pair[i % 2] for i, pair in enumerate(zip(rows, masks, strict=True))]
    of = weights, scores, selections
    both: tuple[Any, Any] = torch.ops.exssnet, reference
    got, expected = (kernels.supermask_weights(*of, dtype_of_products, last) for kernels in both)
    orders = [layouts.order_of(is_last) for is_last in last]
    like = [torch.empty_like(w, memory_format=order) for w, order in zip(weights, orders, strict=True)]
    assert [t.stride() for t in got] == [t.stride() for t in like]
    assert_exact(dict(enumerate(got)), dict(enumerate(expected)))
    grads = [torch.randn(t.shape).to(t.dtype, memory_format=order) for t, order in zip(got, orders, strict=True)]
    grads[0] = torch.randn(65, 33).to(grads[0].dtype).t()
    pairs = [kernels.supermask_weights_backward(grads, *of, [True, True]) for kernels in both]
    for got, expected in zip(*pairs, strict=True):
        assert_exact(dict(enumerate(got)), dict(enumerate(expected)))


@pytest.mark.usefixtures("native")
@dtypes()
def test_native_values_have_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    sizes = 5000, 7, 0, 1
    weights = [torch.randn(2 * n + 1).to(dtype) for n in sizes]
    places = [torch.randperm(2 * n + 1, dtype=torch.int32)[:n] for n in sizes]
    for of_values in (torch.float32, dtype):
        values, copies = [torch.randn(n).to(of_values) for n in sizes], [w.clone() for w in weights]
        torch.ops.exssnet.write_values(values, places, weights)
        reference.write_values(values, places, copies)
        assert_exact(dict(enumerate(weights)), dict(enumerate(copies)))
        gathered = torch.ops.exssnet.write_values_backward(weights, values, places)
        truth = reference.write_values_backward(copies, values, places)
        assert_exact(dict(enumerate(gathered)), dict(enumerate(truth)))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("wrong", [-1, 9, -(2**31)])
def test_native_kernels_refuse_places_outside_the_weight(wrong: int) -> None:
    arguments = [torch.ones(2)], [torch.tensor([3, wrong], dtype=torch.int32)]
    weight = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=r"^write_values: expected places inside the weights$"):
        torch.ops.exssnet.write_values(*arguments, [weight])
    assert not weight.any()
    with pytest.raises(RuntimeError, match=r"^write_values_backward: expected places inside the weights$"):
        torch.ops.exssnet.write_values_backward([weight], *arguments)


class TestInterpreted:
    """The Triton kernels."""

    @dtypes("float32", "bfloat16", "float16")
    @pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
    def test_free_values_are_written_and_gathered(
        self, dtype: torch.dtype, last: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(triton_weights, "BLOCK", 256)  # several programs a layer
        weights, values, places, _ = free_values(dtype, last=last)
        expected = [w.clone() for w in weights]
        triton_weights.write_values(values, places, weights)
        reference.write_values(values, places, expected)
        assert_exact(dict(enumerate(weights)), dict(enumerate(expected)))
        gathered = triton_weights.write_values_backward(weights, values, places)
        truth = reference.write_values_backward([w.double() for w in weights], values, places)  # no rounding
        assert_exact(dict(enumerate(gathered)), dict(enumerate(truth)))

    def test_free_values_of_all_layers_are_one_launch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        launches = triton_guard.launched(monkeypatch)
        weights, values, places, _ = free_values(torch.float32)
        triton_weights.write_values(values, places, weights)
        triton_weights.write_values_backward(weights, values, places)
        assert launches == ["_values_kernel"] * 2

    def test_weights_of_images_are_stored_channels_last(self) -> None:
        of = layers(torch.bfloat16, torch.float32)
        assert_exact(by_triton(of, last=True), by_reference(of))

    @dtypes("float32", "bfloat16", "float16")
    @pytest.mark.parametrize("dtype_of_products", [None, torch.bfloat16], ids=str)
    def test_exact(self, dtype: torch.dtype, dtype_of_products: torch.dtype | None) -> None:
        of = layers(dtype)
        got, like = by_triton(of, dtype_of_products), by_reference(of, dtype_of_products)
        exact = by_reference(tuple([t.double() if t.is_floating_point() else t for t in x] for x in of))
        assert_exact(got, representable(exact, like))

    def test_layers_of_other_dtypes_are_other_launches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        launches = triton_guard.launched(monkeypatch)
        single, half = layers(torch.float32), layers(torch.bfloat16)
        assert_exact(by_triton(single), by_reference(single))
        assert launches == ["_weights_kernel", "_gradients_kernel"]
        both = tuple([t for pair in zip(a, b, strict=True) for t in pair] for a, b in zip(single, half, strict=True))
        assert_exact(by_triton(both), by_reference(both))
        assert launches[2:] == ["_weights_kernel"] * 2 + ["_gradients_kernel"] * 2

    def test_more_layers_than_a_launch_has(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton_weights, "LAYERS", 2)
        monkeypatch.setattr(triton_weights, "CHUNK", 2 * triton_weights.BLOCK)
        of = layers(torch.float32)
        assert_exact(by_triton(of), by_reference(of))

    def test_no_layer_at_all_is_no_launch(self) -> None:
        of = tuple([t[:0] for t in x[1:2]] for x in layers(torch.float32))
        assert_exact(by_triton(of), by_reference(of))

    @pytest.mark.parametrize("asked", [(True, False), (False, True), (False, False)])
    def test_backward_makes_only_what_is_asked(self, asked: tuple[bool, bool]) -> None:
        *of, grads = layers(torch.float32)
        got = triton_weights.supermask_weights_backward(grads, *of, list(asked))
        for found, expected in zip(got, reference.supermask_weights_backward(grads, *of, list(asked)), strict=True):
            assert len(found) == len(expected)
            assert all(map(torch.equal, found, expected))

    def test_rows_and_float64_are_the_references(self) -> None:
        weights, scores, _, grads = layers(torch.float32)
        rows = [reference.select(reference.magnitude_bits(s), s.numel() // 2) for s in scores]
        for of in ((weights, scores, rows, grads), layers(torch.float64)):
            assert_exact(by_triton(of), by_reference(of))


if not triton_guard.interpreting:
    del TestInterpreted

    @pytest.mark.proof
    def test_triton_kernels_in_the_interpreter() -> None:
        triton_guard.run(__file__, "-k", "TestInterpreted")
