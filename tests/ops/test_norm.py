"""batch_norm_act: batch norm, a residual and ReLU as one operation, held to the three of plain PyTorch.

Its Triton kernels are tested in tests/kernels/test_triton_norm.py, and run some of these tests too.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from accuracy import Results, assert_accurate, assert_exact, run
from cases import LAYOUTS, dtypes
from products import opcheck_warning
from refusals import IMAGES, LINES, NONE, RAW, VALUES, Calls, W, X, guarded, refused
from torch import Tensor
from torch.nn import functional as F

from exssnet import ops
from exssnet.kernels import reference

T = TypeVar("T")
EPS = 1e-3
OPERATOR = torch.ops.exssnet.batch_norm_act.default
BACKWARD = torch.ops.exssnet.batch_norm_act_backward.default


@dataclass(frozen=True)
class Norm:
    """A shape and which of the options are on."""

    shape: tuple[int, ...]
    training: bool = True
    residual: bool = False
    affine: bool = False
    relu: bool = False

    def __str__(self) -> str:
        on = [name for name in ("training", "residual", "affine", "relu") if getattr(self, name)]
        return "-".join(["x".join(map(str, self.shape)), *on])


# Rows shorter than a vector, of a whole number of vectors, of one element more than a chunk, of several chunks; results
# larger than a second-level cache, with rows that begin at a vector's boundary, and with rows that do not.
SHAPES = [(7, 3, 5, 3), (1, 9, 13, 3), (6, 5), (2, 3, 11), (5, 4, 1, 1), (64, 3, 13, 11), (17, 5, 241), (40, 9, 33, 5),
          (48, 9, 26, 26), (31, 9, 31, 31)]  # fmt: skip


@pytest.fixture
def norm(shape: tuple[int, ...], training: bool, residual: bool, affine: bool, relu: bool) -> Norm:
    return Norm(shape, training, residual, affine, relu)


def norms(*shapes: tuple[int, ...]) -> Callable[[T], T]:
    """Parametrizes `norm`: all options on shapes."""

    def parametrized(test: T) -> T:
        test = pytest.mark.parametrize("shape", shapes, ids=lambda shape: "x".join(map(str, shape)))(test)
        for option in ("training", "residual", "affine", "relu"):
            test = pytest.mark.parametrize(option, [True, False], ids=[option, ""])(test)
        return test

    return parametrized


def innermost(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def leaves(norm: Norm, dtype: torch.dtype = torch.float32) -> Results:
    """Values off zero, as the activations of a network are."""
    torch.manual_seed(0)
    channels = norm.shape[1]
    found = {
        "x": innermost(
            3 * torch.randn(norm.shape) + torch.linspace(-5, 5, channels).reshape(-1, *[1] * (len(norm.shape) - 2))
        )
    }
    if norm.residual:
        found["residual"] = innermost(torch.randn(norm.shape))
    if norm.affine:
        found |= {"weight": torch.randn(channels), "bias": torch.randn(channels)}
    return {name: t.to(dtype) for name, t in found.items()}


def statistics(norm: Norm, like: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Of at least float32."""
    if norm.training:
        return None, None
    options: Any = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
    return torch.linspace(-4, 3, norm.shape[1], **options), torch.linspace(2, 11, norm.shape[1], **options)


def grad_of(norm: Norm, dtype: torch.dtype = torch.float32) -> Tensor:
    return innermost(torch.randn(norm.shape, generator=torch.Generator().manual_seed(2)).to(dtype))


def ours(norm: Norm, t: Results) -> Tensor:
    return ops.batch_norm_act(*arguments(norm, t))[0]


def plain(norm: Norm, t: Results) -> Tensor:
    mean, var = statistics(norm, t["x"])
    y = F.batch_norm(t["x"], mean, var, t.get("weight"), t.get("bias"), norm.training, 0.1, EPS)
    y = y + t["residual"] if norm.residual else y
    return y.relu() if norm.relu else y


def kernel(norm: Norm, dtype: torch.dtype = torch.float32) -> Results:
    return run(lambda t: ours(norm, t), leaves(norm, dtype), grad_of(norm, dtype))


def arguments(norm: Norm, t: Results) -> tuple[Any, ...]:
    """Those of the public function."""
    return t["x"], t.get("residual"), t.get("weight"), t.get("bias"), *statistics(norm, t["x"]), EPS, norm.relu


def raw(norm: Norm, t: Results, running: tuple[Any, ...] = (None,) * 4) -> tuple[Any, ...]:
    """Those of the operator; `running`: mean, variance, number of batches, momentum."""
    return *arguments(norm, t)[:6], *running, EPS, norm.relu


def raw_backward(norm: Norm, output_mask: list[bool], dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    t = leaves(norm, dtype)
    y, mean, var = reference.batch_norm_act(*raw(norm, t))
    seen = y if norm.relu and norm.residual else None
    return (
        grad_of(norm, dtype), t["x"], seen, t.get("weight"), t.get("bias"), mean, var, EPS, norm.relu, norm.training,
        output_mask,
    )  # fmt: skip


@norms(*SHAPES)
def test_errs_at_most_twice_as_much_as_plain_pytorch(norm: Norm) -> None:
    values, grad = leaves(norm), grad_of(norm)
    truth = run(lambda t: plain(norm, t), {n: t.double() for n, t in values.items()}, grad.double())
    assert_accurate(kernel(norm), run(lambda t: plain(norm, t), values, grad), truth)


IN_MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels-innermost": LAYOUTS["channels-innermost"],
    "batch-innermost": innermost,
}


def stored(tensors: Results, dtype: torch.dtype, layout: str, device: str = "cpu") -> Results:
    """Images in a dtype and a layout. Tensors of one dimension stay as they are."""
    return {n: IN_MEMORY[layout](t.to(device, dtype)) if t.dim() > 1 else t.to(device) for n, t in tensors.items()}


@pytest.mark.parametrize("layout", IN_MEMORY)
@dtypes("float32", "bfloat16", "float16")
@norms((7, 3, 5, 3))
def test_dtype_and_layout_are_kept_within_twice_the_error_of_plain_pytorch(
    norm: Norm, dtype: torch.dtype, layout: str, device: str
) -> None:
    """Weight and bias stay in float32, as under autocast."""
    values, grad = stored(leaves(norm), dtype, layout, device), stored({"x": grad_of(norm)}, dtype, layout, device)["x"]
    got = run(lambda t: ours(norm, t), values, grad)
    truth = run(lambda t: plain(norm, t), {n: t.double() for n, t in values.items()}, grad.double())
    assert_accurate(got, run(lambda t: plain(norm, t), values, grad), truth)
    assert {t.stride() for t in got.values() if t.dim() > 1} == {values["x"].stride()}


# As in SHAPES, but of 2 bytes: several chunks; results larger than a second-level cache; and more channels than lanes.
IN_PLACE = pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.bfloat16, "batch-innermost"), (torch.bfloat16, "channels-innermost"),
        (torch.float32, "channels-innermost"),
    ],
    ids=["bfloat16-batch", "bfloat16-channels", "float32-channels"],
)  # fmt: skip


@IN_PLACE
@norms((64, 9, 32, 32), (31, 9, 33, 31), (17, 37, 25), (9, 64, 5, 5), (6, 5), (40, 1, 241))
def test_stored_as_they_are_images_err_at_most_twice_as_much_as_plain_pytorch(
    norm: Norm, dtype: torch.dtype, layout: str
) -> None:
    values, grad = stored(leaves(norm), dtype, layout), stored({"x": grad_of(norm)}, dtype, layout)["x"]
    truth = run(lambda t: plain(norm, t), {n: t.double() for n, t in values.items()}, grad.double())
    got = run(lambda t: ours(norm, t), values, grad)
    assert_accurate(got, run(lambda t: plain(norm, t), values, grad), truth)
    assert {t.stride() for t in got.values() if t.dim() > 1} == {values["x"].stride()}


@pytest.mark.usefixtures("native")
@IN_PLACE
@norms((7, 3, 5, 3))
def test_images_are_neither_converted_nor_copied(norm: Norm, dtype: torch.dtype, layout: str) -> None:
    values, grad = stored(leaves(norm), dtype, layout), stored({"x": grad_of(norm)}, dtype, layout)["x"]
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        run(lambda t: ours(norm, t), values, grad)
    copies = [e for e in profile.function_events if e.name in ("aten::copy_", "aten::_to_copy")]
    assert [e for e in copies if list(norm.shape) in e.input_shapes] == []


@pytest.mark.parametrize("layout", ["channels-innermost", "batch-innermost"])
@pytest.mark.parametrize("shape", [(64, 3, 8, 5), (7, 19, 5, 3)], ids=str)
def test_bfloat16_is_rounded_once_to_nearest_even(shape: tuple[int, ...], layout: str) -> None:
    """Of sums that are exact in float32: ties, results below the normal numbers, infinity and NaN."""
    torch.manual_seed(0)
    scale = 2.0 ** torch.randint(-130, 120, shape)
    x, residual = (torch.randint(-300, 300, shape) * scale * by for by in (1.0, 2.0**-7))
    x[0, 1, 0, :3] = torch.tensor([torch.inf, torch.nan, -torch.inf])
    x, residual = stored({"x": x, "r": residual}, torch.bfloat16, layout).values()
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    y = ops.batch_norm_act(x, residual, None, None, mean, var, 0.0)[0]
    expected = (x.float() + residual.float()).bfloat16()
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@dtypes("bfloat16", "float16")
@norms((7, 3, 5, 3))
def test_half_precision_is_the_reference(norm: Norm, dtype: torch.dtype, device: str) -> None:
    values = {n: t.to(device) for n, t in leaves(norm, dtype).items()}
    ours = OPERATOR(*raw(norm, values))
    theirs = reference.batch_norm_act(*raw(norm, values))
    backward = [t.to(device) if isinstance(t, Tensor) else t for t in raw_backward(norm, [True] * 4, dtype)]
    pairs = [*zip(ours, theirs, strict=True)]
    pairs += zip(BACKWARD(*backward), reference.batch_norm_act_backward(*backward), strict=True)
    for got, want in pairs:  # an ulp of the dtype, where the sums round to different sides
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(got.dtype).eps, atol=1e-3, check_stride=True)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_running_statistics_take_the_step_of_plain_pytorch(
    x_dtype: torch.dtype, momentum: float | None, device: str
) -> None:
    """Unbiased variances; a mean over all batches without a momentum."""
    x = innermost(3 * torch.randn(6, 37, 5, dtype=torch.float64)).to(device, x_dtype)
    start = [torch.randn(37, device=device), torch.rand(37, device=device)]
    running, batches = [t.clone() for t in start], torch.tensor(3, device=device)
    versions = [t._version for t in (*running, batches)]
    OPERATOR(x, None, None, None, None, None, *running, batches, momentum, EPS, False)
    assert batches.item() == 4
    assert all(t._version > v for t, v in zip((*running, batches), versions, strict=True))

    def stepped(dtype: torch.dtype) -> Results:
        var, mean = torch.var_mean(x.to(dtype), (0, 2), correction=1)
        step = 1 / 4 if momentum is None else momentum
        moved = (t.to(dtype).lerp(to, step) for t, to in zip(start, (mean, var), strict=True))
        return dict(zip(("mean", "var"), moved, strict=True))

    got = dict(zip(("mean", "var"), running, strict=True))
    assert_accurate(got, stepped(torch.float32), stepped(torch.float64))


def test_an_empty_batch_is_counted_and_changes_no_running_statistics() -> None:
    running = torch.ones(3), torch.ones(3), torch.tensor(0)
    OPERATOR(torch.empty(0, 3, 2), None, None, None, None, None, *running, 0.1, EPS, False)
    assert [t.sum().item() for t in running] == [3, 3, 1]


@pytest.mark.parametrize("norm", [Norm((64, 3, 40, 33)), Norm((8, 3, 2), affine=True, relu=True)], ids=str)
@pytest.mark.parametrize("layout", ["channels-innermost", "batch-innermost"])
@pytest.mark.parametrize("offset", [0.0, 1e3, 3e4])
def test_statistics_of_values_far_from_zero_are_accurate(norm: Norm, offset: float, layout: str) -> None:
    x = IN_MEMORY[layout](leaves(norm)["x"] + offset)
    _, mean, var = ops.batch_norm_act(x)
    others = [d for d in range(x.dim()) if d != 1]
    truth = dict(zip(("var", "mean"), torch.var_mean(x.double(), others, correction=0), strict=True))
    peer = dict(zip(("var", "mean"), torch.var_mean(x, others, correction=0), strict=True))
    assert_accurate({"mean": mean, "var": var}, peer, truth)


@norms(*SHAPES)
def test_is_the_reference(norm: Norm) -> None:
    values = leaves(norm, torch.float64)
    got = ops.batch_norm_act(*arguments(norm, values))
    for ours, theirs in zip(got, reference.batch_norm_act(*raw(norm, values)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    backward = raw_backward(norm, [True] * 4, torch.float64)
    for ours, theirs in zip(BACKWARD(*backward), reference.batch_norm_act_backward(*backward), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["channels-innermost", "batch-innermost"])
@dtypes("float32", "bfloat16")
@norms(*SHAPES[5:])
def test_threads_change_no_bit(norm: Norm, dtype: torch.dtype, layout: str) -> None:
    values, grad = stored(leaves(norm), dtype, layout), stored({"x": grad_of(norm)}, dtype, layout)["x"]
    alone = run(lambda t: ours(norm, t), values, grad)
    torch.set_num_threads(2)
    assert_exact(run(lambda t: ours(norm, t), values, grad), alone)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["x", "residual", "affine", "grad"])
@norms((7, 3, 5, 3))
def test_strides_change_nothing(norm: Norm, of: str, layout: str) -> None:
    def change(name: str, t: Tensor) -> Tensor:
        return LAYOUTS[layout](t) if of == ("affine" if name in ("weight", "bias") else name) else t

    values = {n: change(n, t) for n, t in leaves(norm).items()}
    torch.testing.assert_close(run(lambda t: ours(norm, t), values, change("grad", grad_of(norm))), kernel(norm))


@norms((7, 3, 5, 3))
def test_expanded_gradient_of_a_sum_is_taken(norm: Norm) -> None:
    ones = torch.ones(()).expand(norm.shape)
    values = leaves(norm)
    assert_exact(
        run(lambda t: ours(norm, t), values, ones), run(lambda t: ours(norm, t), values, innermost(ones.clone()))
    )


@norms(*SHAPES)
def test_output_and_gradients_are_stored_batch_innermost(norm: Norm) -> None:
    got = kernel(norm)
    shaped = [got[n] for n in ("output", "grad_x", "grad_residual") if n in got]
    assert all(t.movedim(0, -1).is_contiguous() for t in shaped)


@norms((7, 3, 5, 3))
def test_inputs_stay_as_they_are(norm: Norm) -> None:
    values = leaves(norm)
    mean, var = statistics(norm, values["x"])
    held = [t for t in (*values.values(), mean, var) if t is not None]
    before = [t.clone() for t in held]
    _, m, v = ops.batch_norm_act(*arguments(norm, values))
    m.zero_()
    v.zero_()
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


@norms((0, 3, 5, 2), (4, 0, 2, 2))
def test_empty_batch_has_an_empty_output_and_gradients_of_zero(norm: Norm) -> None:
    got = kernel(norm)
    assert got["output"].shape == norm.shape
    assert all(not g.any() for n, g in got.items() if n != "output")


def test_statistics_of_an_empty_batch_are_nan() -> None:
    _, mean, var = ops.batch_norm_act(torch.empty(0, 3, 2, 2))
    assert bool(mean.isnan().all() and var.isnan().all())


def test_nan_in_a_channel_stays_in_it_and_passes_relu() -> None:
    norm = Norm((7, 3, 5, 3), residual=True, relu=True)
    values = leaves(norm)
    values["x"][2, 1, 0, 0] = torch.nan
    got = run(lambda t: ours(norm, t), values, grad_of(norm))
    assert [bool(got[n].isnan().any((0, 2, 3))[c]) for n in ("output", "grad_x") for c in range(3)] == [
        False, True, False, False, True, False,
    ]  # fmt: skip
    assert_exact({"g": got["grad_residual"][:, 1]}, {"g": grad_of(norm)[:, 1]})


def test_relu_gradient_is_zero_where_the_output_is_zero() -> None:
    norm = Norm((2, 3, 4, 4), training=False, relu=True)
    x = torch.zeros(norm.shape, requires_grad=True)
    ops.batch_norm_act(x, None, None, None, torch.zeros(3), torch.ones(3), EPS, True)[0].sum().backward()
    assert not x.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", ["channels-innermost", "batch-innermost"])
@dtypes("float32", "bfloat16")
@pytest.mark.parametrize(
    "norm", [Norm((64, 3, 13, 11), relu=True), Norm((64, 3, 13, 11), affine=True, relu=True)], ids=str
)
def test_backward_sees_the_sign_that_forward_had(norm: Norm, dtype: torch.dtype, layout: str) -> None:
    values = stored(leaves(norm), dtype, layout)
    bias = values.setdefault("bias", torch.zeros(3))
    y = ours(norm, values)
    got = run(lambda t: ours(norm, t), values, torch.ones_like(y))["grad_bias"]
    assert torch.equal(got, (y > 0).sum((0, 2, 3)).to(bias.dtype))


@norms((7, 3, 5, 3))
def test_backward_computes_only_what_is_asked(norm: Norm) -> None:
    everything = BACKWARD(*raw_backward(norm, [True] * 4))
    for output_mask in itertools.product((True, False), repeat=4):
        found = BACKWARD(*raw_backward(norm, list(output_mask)))
        for got, full, asked in zip(found, everything, output_mask, strict=True):
            assert got.shape == (full.shape if asked else (0,))
            assert torch.equal(got, full if asked else full.new_empty(0))


@norms((7, 3, 5, 3))
def test_gradient_is_none_where_none_is_required(norm: Norm) -> None:
    for alone in leaves(norm):
        values = leaves(norm)
        values[alone].requires_grad_()
        ours(norm, values).sum().backward()
        assert [n for n, t in values.items() if t.grad is not None] == [alone]


def test_statistics_carry_no_gradient() -> None:
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    y, mean, var = ops.batch_norm_act(x)
    assert [t.requires_grad for t in (y, mean, var)] == [True, False, False]


@pytest.mark.parametrize("layout", ["channels-innermost", "batch-innermost"])
@norms((3, 2, 2, 2))
def test_gradcheck(norm: Norm, layout: str) -> None:
    values = stored(leaves(norm, torch.float64), torch.float64, layout)
    for t in values.values():
        t.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *tensors: ours(norm, dict(zip(values, tensors, strict=True))), tuple(values.values())
    )


def test_second_derivative_is_refused() -> None:
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    (grad_x,) = torch.autograd.grad(ops.batch_norm_act(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad_x.sum().backward()


@norms((3, 2, 2, 2))
def test_compiles_in_one_graph_with_the_same_results(norm: Norm) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: ours(norm, t), fullgraph=True, backend="aot_eager")
    assert_exact(run(compiled, leaves(norm), grad_of(norm)), kernel(norm))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_output_may_be_changed_in_place(compiled: bool) -> None:
    def inplace(t: Results) -> Tensor:
        return ours(norm, t).relu_()

    torch._dynamo.reset()
    norm = Norm((7, 3, 5, 3), affine=True)
    function = torch.compile(inplace, fullgraph=True, backend="aot_eager") if compiled else inplace
    got = run(function, leaves(norm), grad_of(norm))
    torch.testing.assert_close(got, run(lambda t: ours(norm, t).relu(), leaves(norm), grad_of(norm)))


@opcheck_warning
@norms((3, 2, 2, 2))
def test_opcheck_of_forward(norm: Norm) -> None:
    values = {n: t.requires_grad_() for n, t in leaves(norm).items()}
    torch.library.opcheck(OPERATOR, raw(norm, values))


@opcheck_warning
@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
def test_opcheck_of_a_step_of_running_statistics(momentum: float | None) -> None:
    norm = Norm((3, 2, 2, 2), residual=True, affine=True, relu=True)
    values = {n: t.requires_grad_() for n, t in leaves(norm).items()}
    running = torch.zeros(2), torch.ones(2), torch.tensor(1), momentum
    torch.library.opcheck(OPERATOR, raw(norm, values, running))


@opcheck_warning
@pytest.mark.parametrize("asked", [(True,) * 4, (True, False, False, False), (False, True, True, False)], ids=str)
@norms((3, 2, 2, 2))
def test_opcheck_of_backward(norm: Norm, asked: tuple[bool, ...]) -> None:
    torch.library.opcheck(BACKWARD, raw_backward(norm, list(asked)))


SENTENCES: Calls = {
    "batch_norm_act: x must have shape (N, C, ...), got (20,)": lambda: ops.batch_norm_act(VALUES),
    "batch_norm_act: x must be float32, bfloat16, float16 or float64, got torch.int32": lambda: ops.batch_norm_act(
        X.int()
    ),
    "batch_norm_act: x is torch.bfloat16 but weight is torch.float16": lambda: ops.batch_norm_act(
        IMAGES.bfloat16(), weight=W[:, 0].half()
    ),
    "batch_norm_act: residual must have shape (2, 4, 6, 6), got (2, 4, 9)": lambda: ops.batch_norm_act(IMAGES, LINES),
    "batch_norm_act: weight must have shape (4,), got (20,)": lambda: ops.batch_norm_act(IMAGES, weight=VALUES),
    "batch_norm_act: var must have shape (4,), got (0,)": lambda: ops.batch_norm_act(IMAGES, mean=W[:, 0], var=NONE),
    "batch_norm_act: mean and var must be given together, got mean alone": lambda: ops.batch_norm_act(
        IMAGES, mean=W[:, 0]
    ),
    "batch_norm_act: x is torch.float32 but bias is torch.float64": lambda: ops.batch_norm_act(
        IMAGES, bias=W[:, 0].double()
    ),
    "batch_norm_act: x is on cpu but residual is on meta": lambda: ops.batch_norm_act(IMAGES, IMAGES.to("meta")),
}
test_wrong_arguments_are_refused_in_a_sentence = refused(SENTENCES)


NONE_GIVEN = (None,) * 8
FOREIGN_MEMORY: Calls = {
    "a short residual": lambda: RAW.batch_norm_act(X, X[:2], *NONE_GIVEN, 0.1, True),
    "a short weight of a norm": lambda: RAW.batch_norm_act(X, None, X[0, 1:], *NONE_GIVEN[1:], 0.1, True),
    "a short variance": lambda: RAW.batch_norm_act(X, None, None, None, X[0], X[0, 1:], *NONE_GIVEN[4:], 0.1, True),
    "a short running mean": lambda: RAW.batch_norm_act(X, *NONE_GIVEN[:5], X[0, 1:], X[0], None, 0.1, 0.1, True),
    "no number of batches": lambda: RAW.batch_norm_act(
        X, *NONE_GIVEN[:5], X[0], X[0], X.new_empty(0).long(), 0.1, 0.1, True
    ),
    "a short gradient of a norm": lambda: RAW.batch_norm_act_backward(
        X[:2], X, None, None, None, X[0], X[0], 0.1, True, True, [True] * 4
    ),
}
test_native_kernels_touch_no_foreign_memory_given = guarded(FOREIGN_MEMORY)
