"""Sparse products of a few columns, and compact patterns: int16 columns, and values in walking order without slots."""

from collections.abc import Callable

import pytest
import torch
from accuracy import Results, assert_accurate, assert_exact, run
from refusals import Calls, guarded
from torch import Tensor
from torch.nn import functional as F

from exssnet import SupermaskLinear, ops
from exssnet.kernels import reference
from exssnet.nn.modes import Fixed
from exssnet.ops.sparse import is_few

RAW = torch.ops.exssnet
# rows with fewer entries than a register, with several registers, with more than a run of 256; empty rows
SIZES = pytest.mark.parametrize(
    ("rows", "width", "density"), [(1, 1, 1.0), (9, 5, 0.5), (33, 65, 0.3), (70, 900, 0.5), (5, 40, 0.0)], ids=str
)
BATCHES = pytest.mark.parametrize("batch", [1, 3, 8, 16])
KINDS = pytest.mark.parametrize(
    ("dtype", "of_values"),
    [(torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2],
    ids=["float32", "float64", "bfloat16-float32", "bfloat16"],
)
FREE = pytest.mark.parametrize("free", [True, False], ids=["free", "frozen"])


def layer(rows: int, width: int, density: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight of small integers, and a mask with an empty row in three."""
    mask = torch.rand(rows, width) < density
    mask[1::3] = False
    return torch.randint(-4, 5, (rows, width)).to(dtype), mask


def values(weight: Tensor, mask: Tensor, free: bool) -> tuple[Tensor, Tensor]:
    kept = weight[mask]
    return (kept, kept[:0]) if free else (kept[:0], kept)


@FREE
@KINDS
@BATCHES
@SIZES
def test_products_are_exact(
    rows: int, width: int, density: float, batch: int, dtype: torch.dtype, of_values: torch.dtype, free: bool
) -> None:
    weight, mask = layer(rows, width, density, of_values)
    x, grad = torch.randint(-4, 5, (batch, width)).to(dtype), torch.randint(-4, 5, (batch, rows)).to(dtype)
    pattern, (values_, frozen), dense = ops.sparse_pattern(mask).compact(), values(weight, mask, free), (weight * mask)
    assert (pattern.col.dtype, pattern.slot.numel()) == (torch.int16, 0)
    bias = torch.randint(-4, 5, (rows,)).to(weight.dtype)
    got = ops.sparse_linear(x, values_, frozen, pattern, bias)
    to_x, to_values = RAW.sparse_linear_backward(grad, x, values_, frozen, *pattern.tensors, [True, True])
    exact = {
        "y": F.linear(x.double(), dense.double(), bias.double()).to(dtype),
        "x": (grad.double() @ dense.double()).to(dtype),
        "values": (grad.double().t() @ x.double())[mask if free else mask & ~mask].to(weight.dtype),
    }
    assert_exact({"y": got, "x": to_x, "values": to_values}, exact)


@pytest.mark.parametrize("name", ["sparse_linear", "sparse_linear_backward"])
@FREE
def test_reference_takes_compact_patterns(free: bool, name: str) -> None:
    weight, mask = layer(9, 5, 0.5, torch.float32)
    x, grad = torch.ones(2, 5), torch.ones(2, 9)
    more = (None,) if name == "sparse_linear" else ([True, True],)
    first = (x,) if name == "sparse_linear" else (grad, x)
    pattern = ops.sparse_pattern(mask)
    by_slots, compact = (
        getattr(reference, name)(*first, *values(weight, mask, free), *p.tensors, *more)
        for p in (pattern, pattern.compact())
    )
    torch.testing.assert_close(compact, by_slots, rtol=0, atol=0)


@BATCHES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_errs_at_most_twice_as_much_as_plain_pytorch(batch: int, dtype: torch.dtype) -> None:
    mask = torch.rand(33, 900) < 0.3
    weight, x = torch.randn(33, 900).to(dtype), torch.randn(batch, 900).to(dtype)
    pattern, none, grad = ops.sparse_pattern(mask).compact(), weight.new_empty(0), torch.randn(batch, 33).to(dtype)

    def ours(t: Results) -> Tensor:
        return ops.sparse_linear(t["x"], t["values"], none, pattern)

    def plain(t: Results) -> Tensor:
        return F.linear(
            t["x"], torch.zeros(33, 900, dtype=t["x"].dtype).index_put(mask.nonzero(as_tuple=True), t["values"])
        )

    leaves = {"x": x, "values": weight[mask]}
    wide = {n: t.double() for n, t in leaves.items()}
    assert_accurate(run(ours, leaves, grad), run(plain, leaves, grad), run(plain, wide, grad.double()))


def test_a_pattern_of_more_columns_than_int16_holds_stays_as_it_is() -> None:
    most = ops.sparse_pattern(torch.ones(1, 2**15, dtype=torch.bool)).compact()
    assert most.col.dtype == torch.int16
    assert ops.sparse_linear(torch.ones(1, 2**15), torch.ones(2**15), torch.empty(0), most) == 2**15
    wide = ops.sparse_pattern(torch.ones(1, 2**15 + 1, dtype=torch.bool))
    assert wide.compact() is wide


def few(batch: int) -> Calls:
    mask = torch.ones(4, 5, dtype=torch.bool)
    p, none, x, grad = ops.sparse_pattern(mask), torch.empty(0), torch.ones(batch, 5), torch.ones(batch, 4)

    def forward(count: int = 20, **changed: Tensor) -> Callable[[], object]:
        where = p.compact()._replace(**changed).tensors
        return lambda: RAW.sparse_linear(x, torch.ones(count), none, *where, None)

    def backward(x_too: bool, **changed: Tensor) -> Callable[[], object]:
        where = p.compact()._replace(**changed).tensors
        return lambda: RAW.sparse_linear_backward(grad, x, torch.ones(20), none, *where, [x_too, not x_too])

    narrow = p.compact().col
    return {
        "a column beyond the last": forward(col=narrow + 1),
        "a negative column": forward(col=narrow - 1),
        "pointers beyond the entries": forward(row_ptr=p.row_ptr * 2),
        "more entries than values": forward(count=19),
        "a column beyond the gradient": backward(True, col=narrow + 1),
        "a column beyond x": backward(False, col=narrow + 1),
    }


FOREIGN: Calls = {f"{what}, batch {batch}": call for batch in (1, 3) for what, call in few(batch).items()}
FOREIGN["a transposed column beyond the last, batch 17"] = lambda: RAW.sparse_linear_backward(
    torch.ones(17, 4), torch.ones(17, 5), torch.ones(20), torch.empty(0),
    *(p := ops.sparse_pattern(torch.ones(4, 5) != 0))._replace(col_t=p.col_t + 1).tensors, [True, False],
)  # fmt: skip
test_native_kernels_touch_no_foreign_memory_given = guarded(FOREIGN)


@pytest.mark.usefixtures("native")
def test_more_columns_are_refused_in_a_sentence() -> None:
    pattern = ops.sparse_pattern(torch.ones(4, 5, dtype=torch.bool)).compact()
    with pytest.raises(RuntimeError, match=r"^sparse_linear: expected .* a compact one is for up to 16 columns"):
        ops.sparse_linear(torch.ones(17, 5), torch.ones(20), torch.empty(0), pattern)


class TestLayer:
    @staticmethod
    def fixed(free_mask: bool) -> SupermaskLinear:
        made = SupermaskLinear(65, 33, density=0.2)
        mask = made.mask()
        made.products = "sparse"
        made.use_values(mask, mask if free_mask else torch.zeros_like(mask))
        return made

    @pytest.mark.parametrize("batch", [1, 16, 17])
    @FREE
    def test_products_are_those_of_the_pattern_with_slots(self, free: bool, batch: int) -> None:
        made, x = self.fixed(free), torch.randn(batch, 65, requires_grad=True)
        mode = made.mode
        assert isinstance(mode, Fixed)
        y, expected = made(x), ops.sparse_linear(x, *mode.values(made))
        assert torch.equal(y, expected)
        gradients = [torch.autograd.grad(t.sum(), (x, *made.parameters())) for t in (y, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    @FREE
    def test_compact_columns_are_made_once(self, free: bool) -> None:
        made, x = self.fixed(free), torch.randn(1, 65)
        with torch.no_grad():
            made(x)
            known = made.mode._pattern(made)[1]["compact"]
            made(x)
        assert known.col.dtype == torch.int16
        assert made.mode._pattern(made)[1]["compact"] is known

    def test_a_part_of_free_values_keeps_its_slots(self) -> None:
        made = SupermaskLinear(65, 33, density=0.2)
        mask, made.products = made.mask(), "sparse"
        made.use_values(mask, mask & (torch.rand(33, 65) < 0.5))
        assert torch.equal(made(torch.eye(65)[:1])[0], made.weight[:, 0])


def test_few_columns_are_those_of_1_to_16_samples() -> None:
    sizes = (0, 1, 16, 17)
    assert [is_few(torch.ones(n, 5)) for n in sizes] == [False, True, True, False]
    assert is_few(torch.ones(5))
    assert not is_few(torch.ones(1, 5, device="meta"))
