"""csrc/cuda/sparse on the emulator: exactly, or as nearly as plain PyTorch, the dense layer of a pattern."""

import math
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import pytest
import torch
from accuracy import Results, assert_accurate, assert_exact, representable, run
from cases import DTYPES, FEW, LAYERS, TAILS, Layer, any_convolution, dtypes, layers
from cuda import harness
from cuda.harness import order as order
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from products import Problem, dense, problem
from torch import Tensor
from torch.nn import functional as F

from exssnet import ops
from exssnet.ops.geometry import conv_shape

pytestmark = pytest.mark.proof

PLAIN = harness.MODE == "plain"
"""Where every access is watched, kernels are much slower: fewer and smaller cases do."""
orders = pytest.mark.parametrize("order", harness.ORDERS if PLAIN else ["1"], indirect=True)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
"""In the order of cpu::Float."""
PROCESSORS = 4
SOME = FEW if PLAIN else FEW[:2]
EVERY = LAYERS if PLAIN else FEW
WIDE = (
    Layer("linear-rows-of-all-lengths", (36, 70), (77, 70)),
    Layer("conv2d-rows-for-many-warps", (9, 6, 5, 5), (70, 6, 3, 3), padding=1),
    Layer("conv2d-many-chunks", (16, 40, 6, 6), (9, 40, 3, 3), padding=1),
    Layer("conv2d-many-tiles", (35, 2, 11, 13), (5, 2, 3, 3), padding=1),
    Layer("conv2d-by-columns", (3, 2, 40, 41), (3, 2, 3, 3), padding=(20, 19), dilation=(19, 18), stride=(2, 1)),
    Layer("conv2d-pixels-as-one-batch", (16, 24, 9, 10), (21, 24, 1, 1)),
    Layer("conv1d-longer-than-a-tile", (8, 3, 301), (4, 3, 7), stride=3, padding=3),
)  # fmt: skip
"""Where work is shared in more ways than the smallest layers show."""


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.view(kinds[t.element_size()]).numpy() for t in tensors]


def innermost(t: Tensor, offset: int = 0) -> Tensor:
    """A copy with the batch innermost, `offset` elements past an aligned address and with nothing behind it; flat."""
    memory = t.new_empty(offset + t.numel())
    memory[offset:] = t.movedim(0, -1).reshape(-1)
    return memory[offset:]


@dataclass
class Kernels:
    """The three products of a layer by the kernels of a module."""

    module: ModuleType
    processors: int = PROCESSORS
    offset: int = 0
    bad_pattern: list[Tensor] | None = None
    launches: int = 0

    def pattern(self, p: Problem) -> list[np.ndarray]:
        pattern = self.bad_pattern or ops.sparse_pattern(p.mask, p.free, p.layer.groups).tensors
        return [t.numpy() for t in pattern]

    def geometry(self, p: Problem) -> tuple[list[int], ...]:
        x = self.images(p, p.x)
        taps = [1] * (4 - p.weight.dim()) + list(p.weight.shape[2:])
        both = {n: [v, v] if isinstance(v, int) else list(v) for n, v in p.layer.steps.items()}
        if p.layer.kind == "conv1d":
            both = {n: [0 if n == "padding" else 1, v[0]] for n, v in both.items()}
        stride, padding, dilation = (both.get(n, [v, v]) for n, v in (("stride", 1), ("padding", 0), ("dilation", 1)))
        outputs = conv_shape(x, taps, stride, padding, dilation)
        axes = zip(x.shape[2:], outputs, taps, stride, padding, dilation, strict=True)
        return [x.shape[0], x.shape[1], p.weight.shape[0]], *map(list, axes)

    @staticmethod
    def images(p: Problem, t: Tensor) -> Tensor:
        """t as images (N, C, H, W)."""
        if p.layer.kind == "linear":
            return t.reshape(math.prod(t.shape[:-1]), t.shape[-1], 1, 1)
        return t[:, :, None] if p.layer.kind == "conv1d" else t

    def logical(self, p: Problem, flat: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of a shape, from its images with the batch innermost."""
        batch, *rest = self.images(p, flat.new_empty(shape, device="meta")).shape
        return flat.view(*rest, batch).movedim(-1, 0).reshape(shape)

    def product(
        self, p: Problem, x: Tensor, size: int, transposed: bool = False, scale: Tensor | None = None,
        bias: Tensor | None = None, residual: Tensor | None = None, relu: bool = False,
    ) -> Tensor:  # fmt: skip
        pattern = self.pattern(p)[3:] if transposed else self.pattern(p)[:3]
        values = arrays(p.weight[p.free], p.weight[p.mask & ~p.free])
        then = [None if t is None else arrays(t)[0] for t in (scale, bias, residual)]
        y = innermost(x.new_full((1, size), torch.nan), self.offset)
        self.module.product(
            *self.geometry(p), transposed, pattern, *values, *then, relu, FLOATS.index(x.dtype),
            *arrays(innermost(self.images(p, x), self.offset), y), self.processors,
        )  # fmt: skip
        return y

    def output(self, p: Problem, **then: Tensor | bool | None) -> Tensor:
        return self.logical(p, self.product(p, p.x, p.grad.numel(), bias=p.bias, **then), p.grad.shape)

    def input_gradient(self, p: Problem) -> Tensor:
        return self.logical(p, self.product(p, p.grad, p.x.numel(), True), p.x.shape)

    def value_gradient(self, p: Problem) -> Tensor:
        pattern = self.pattern(p)[:3]
        result = p.x.new_full((int(p.free.sum()),), torch.nan)
        dtype, geometry = FLOATS.index(p.x.dtype), self.geometry(p)
        room = self.module.workspace_bytes(*geometry, pattern, result.numel(), dtype)
        self.launches = self.module.value_gradient(
            *geometry, pattern, dtype, *arrays(*(innermost(self.images(p, t), self.offset) for t in (p.x, p.grad))),
            *arrays(result), torch.empty(room, dtype=torch.uint8).numpy(),
        )  # fmt: skip
        return result

    def all(self, p: Problem) -> Results:
        return {"output": self.output(p), "grad_x": self.input_gradient(p), "grad_free_values": self.value_gradient(p)}


def dense_layer(p: Problem) -> Results:
    """The three by plain PyTorch and autograd."""
    frozen = p.weight.where(p.mask & ~p.free, 0)

    def layer(t: Results) -> Tensor:
        weight = frozen.index_put(p.free.nonzero(as_tuple=True), t["free_values"])
        return dense(p.layer, t["x"], weight, p.bias)

    return run(layer, {"x": p.x, "free_values": p.weight[p.free]}, p.grad)


def truth(p: Problem) -> Results:
    return dense_layer(p.to(torch.float64))


@pytest.fixture
def sparse() -> Kernels:
    return Kernels(harness.load("sparse"))


def check_exact(sparse: Kernels, p: Problem) -> None:
    got = sparse.all(p)
    assert_exact(got, representable(truth(p), got))


@layers(EVERY + WIDE)
@dtypes()
def test_integers_give_exact_output_and_gradients(sparse: Kernels, layer: Layer, dtype: torch.dtype) -> None:
    check_exact(sparse, problem(layer, dtype, integers=True))


@layers(TAILS if PLAIN else TAILS[::9])
@dtypes("float32", "bfloat16")
def test_exact_around_the_ends_of_vectors(sparse: Kernels, layer: Layer, dtype: torch.dtype) -> None:
    check_exact(sparse, problem(layer, dtype, integers=True))


@settings(max_examples=60 if PLAIN else 5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(any_convolution(), st.sampled_from([0.1, 0.5, 1.0]))
def test_exact_in_any_geometry(sparse: Kernels, layer: Layer, density: float) -> None:
    torch.manual_seed(0)
    check_exact(sparse, problem(layer, integers=True, density=density))


@layers(SOME + WIDE if PLAIN else SOME)
@orders
def test_exact_in_any_order_of_threads(sparse: Kernels, layer: Layer, order: str) -> None:
    check_exact(sparse, problem(layer, integers=True))


@layers((
    *(Layer("conv2d-one-image", (1, 40, 56, 78), (256, 40, 2, 2)),) * PLAIN,
    Layer("linear-many-rows", (512, 2), (2048, 2)),
))  # fmt: skip
def test_gradient_of_the_values_is_exact_where_blocks_have_several_tiles_and_chunks(
    sparse: Kernels, layer: Layer
) -> None:
    p = problem(layer, integers=True, density=0.05)
    assert torch.equal(sparse.value_gradient(p), truth(p)["grad_free_values"].float())


@pytest.mark.parametrize("density", [0, 0.02, 1])
@layers(SOME + WIDE[:3])
def test_exact_at_density(sparse: Kernels, layer: Layer, density: float) -> None:
    check_exact(sparse, problem(layer, integers=True, density=density))


@pytest.mark.parametrize("free_share", [0, 1], ids=["no-free-values", "no-frozen-values"])
@layers(SOME)
def test_exact_with(sparse: Kernels, layer: Layer, free_share: float) -> None:
    check_exact(sparse, problem(layer, integers=True, free_share=free_share))


@layers(WIDE[:2])
def test_exact_with_rows_from_empty_to_full(sparse: Kernels, layer: Layer) -> None:
    p = problem(layer, integers=True)
    share = torch.arange(layer.weight[0]).reshape(-1, *[1] * (len(layer.weight) - 1)) / (layer.weight[0] - 1)
    mask = torch.rand(layer.weight) < share[torch.randperm(layer.weight[0])]
    check_exact(sparse, replace(p, mask=mask, free=mask & p.free))


@pytest.mark.parametrize("offset", [1, 2])
@layers((*SOME, WIDE[0], WIDE[2]))
@dtypes(*DTYPES if PLAIN else ["float32", "bfloat16"])
def test_images_aligned_to_nothing_wider_than_an_element(
    sparse: Kernels, layer: Layer, dtype: torch.dtype, offset: int
) -> None:
    check_exact(replace(sparse, offset=offset), problem(layer, dtype, integers=True))


@layers(EVERY)
@dtypes()
def test_errs_at_most_twice_as_much_as_plain_pytorch(sparse: Kernels, layer: Layer, dtype: torch.dtype) -> None:
    p = problem(layer, dtype)
    assert_accurate(sparse.all(p), dense_layer(p), truth(p))


@pytest.mark.skipif(not PLAIN, reason="the same loads and stores as those of shorter sums")
@layers((
    *WIDE,
    Layer("linear-many-features", (8, 6000), (8, 6000)),
    Layer("linear-many-images", (5000, 8), (9, 8)),
    Layer("conv2d-many-channels", (4, 300, 4, 4), (8, 300, 3, 3), padding=1),
    Layer("conv2d-many-pixels", (16, 3, 40, 40), (8, 3, 3, 3), padding=1),
))  # fmt: skip
@dtypes("float32", "bfloat16")
def test_long_sums_err_at_most_twice_as_much_as_plain_pytorch(
    sparse: Kernels, layer: Layer, dtype: torch.dtype
) -> None:
    """Not in float64, of which plain PyTorch's own sums, no better than these, are the truth."""
    p = problem(layer, dtype, density=1)
    assert_accurate(sparse.all(p), dense_layer(p), truth(p))


@layers((*SOME, WIDE[1], WIDE[3]) if PLAIN else SOME[:1])
def test_repeats_bit_for_bit_in_every_order(sparse: Kernels, layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    p, results = problem(layer), []
    for name in harness.ORDERS:
        monkeypatch.setenv("EXSSNET_EMULATOR_ORDER", name)
        results.append(sparse.all(p))
    for other in results[1:]:
        assert_exact(other, results[0])


@layers((*SOME, *WIDE) if PLAIN else SOME)
def test_number_of_processors_does_not_change_results(sparse: Kernels, layer: Layer) -> None:
    p = problem(layer)
    assert_exact(replace(sparse, processors=1).all(p), replace(sparse, processors=1000).all(p))


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@layers(tuple(layer for layer in (*SOME, *WIDE[1:4]) if layer.kind == "conv2d"))
@dtypes("float32", *["float64"] * PLAIN)
def test_exact_with_a_folded_norm(
    sparse: Kernels, layer: Layer, dtype: torch.dtype, with_residual: bool, relu: bool
) -> None:
    p = problem(layer, dtype, integers=True)
    scale = (2.0 ** torch.randint(-1, 2, (layer.weight[0],))).to(dtype)
    bias, residual = torch.randint(-3, 4, (layer.weight[0],)).to(dtype), torch.randint(-9, 10, p.grad.shape).to(dtype)
    expected = F.conv2d(p.x, p.weight.where(p.mask, 0), None, groups=layer.groups, **layer.steps)
    expected = expected * scale[:, None, None] + bias[:, None, None] + (residual if with_residual else 0)
    for offset in (0, 1):
        kernels = replace(sparse, offset=offset)
        past = innermost(residual, offset) if with_residual else None
        got = kernels.output(replace(p, bias=bias), scale=scale, residual=past, relu=relu)
        assert torch.equal(got, expected.relu() if relu else expected)


def test_relu_keeps_nan(sparse: Kernels) -> None:
    p = problem(SOME[0], integers=True, density=1)
    p.x[0, 0] = torch.nan
    assert sparse.output(p, relu=True)[0].isnan().all()


@layers(tuple(layer for layer in SOME if layer.groups == 1))
def test_nan_in_a_channel_does_not_leave_its_gradients(sparse: Kernels, layer: Layer) -> None:
    p = problem(layer, integers=True)
    x = p.x.clone()
    x[:, 1] = torch.nan
    channel = torch.arange(layer.weight[1]).reshape(-1, *[1] * len(layer.weight[2:])).expand(layer.weight)[p.free]
    before, after = (sparse.value_gradient(replace(p, x=t)) for t in (p.x, x))
    assert torch.equal(after[channel != 1], before[channel != 1])


@layers((SOME[0], WIDE[2]))
def test_lanes_without_work_add_nothing_to_infinite_gradients(sparse: Kernels, layer: Layer) -> None:
    p = problem(layer, integers=True)
    p.x[0, 0] = torch.inf
    p.grad = torch.ones_like(p.grad)
    got = sparse.value_gradient(p)
    assert torch.equal(got, dense_layer(p)["grad_free_values"])
    assert got.isinf().any()


@pytest.mark.parametrize(
    ("layer", "dtype", "launches"),
    [
        (SOME[0], torch.float32, 1),
        (SOME[0], torch.bfloat16, 2),
        (WIDE[3], torch.float32, 2),
        (Layer("linear-empty-batch", (0, 3), (4, 3)), torch.float32, 0),
    ],
    ids=["one-tile", "half-type", "many-tiles", "empty-batch"],
)  # fmt: skip
def test_gradient_of_the_values_takes_a_second_launch_where_sums_are_in_parts(
    sparse: Kernels, layer: Layer, dtype: torch.dtype, launches: int
) -> None:
    sparse.value_gradient(problem(layer, dtype))
    assert sparse.launches == launches


@pytest.mark.skipif(harness.MODE == "race", reason="bad pointers give two rows one entry")
@pytest.mark.parametrize("bad", [-1, 1 << 30, -(1 << 31)])
@pytest.mark.parametrize("of", ["pointers", "columns", "slots"])
@layers(SOME[:2])
def test_entries_that_may_not_be_followed_are_left_out(sparse: Kernels, layer: Layer, of: str, bad: int) -> None:
    """Nothing outside the tensors is read or written, whatever the results become where pointers are bad."""
    p, entry = problem(layer, integers=True, free_share=1), 3
    pattern = [t.clone() for t in ops.sparse_pattern(p.mask, p.free, layer.groups).tensors]
    number = ["pointers", "columns", "slots"].index(of)
    for t in (pattern[number], pattern[number + 3]):
        t[entry] = bad
    got = replace(sparse, bad_pattern=pattern).all(p)
    if of != "pointers":
        kept = p.mask.nonzero()[entry]
        weight = p.weight.where(p.mask, 0).index_put(tuple(kept[:, None]), torch.zeros(1))
        assert torch.equal(got["output"], dense(layer, p.x, weight, p.bias))


@harness.other_modes
def test_every_load_and_store_is_right_and_none_races(mode: str) -> None:
    harness.run_again(__file__, mode)
