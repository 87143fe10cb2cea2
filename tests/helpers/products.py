"""The tests that the product families share: supermask, masked and sparse layers are all x with W * M, plus a bias.

Each family is held to a dense layer of plain PyTorch whose effective weight its `effective` writes out, so that
autograd of that dense layer gives every gradient that the family promises.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from accuracy import Results, assert_accurate, assert_exact, representable, run
from cases import DENSITIES, FEW, LARGE, LAYERS, LAYOUTS, SMALL, TAILS, Layer, any_convolution, dtypes, layers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from exssnet.kernels import reference
from exssnet.ops import density_to_k

Change = Callable[[str, Tensor], Tensor]
LayerFunction = Callable[[Results], Tensor]

STRIDES = {"contiguous": lambda t: t, **LAYOUTS}

# opcheck looks at the .grad of tensors that are no leaves, and hides the warning too late for warnings that are errors.
opcheck_warning = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def unchanged(name: str, t: Tensor) -> Tensor:
    return t


@dataclass
class Problem:
    """A layer's tensors. free: the part of the mask that a weight phase trains."""

    layer: Layer
    x: Tensor
    weight: Tensor
    scores: Tensor
    bias: Tensor | None
    grad: Tensor
    k: int
    mask: Tensor
    free: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        tensors = {n: t.to(dtype) for n, t in vars(self).items() if isinstance(t, Tensor) and t.is_floating_point()}
        return replace(self, **tensors)

    def tensors(self, *names: str) -> Results:
        """The named tensors; a bias only where there is one."""
        return {n: t for n in names if (t := getattr(self, n)) is not None}


def dense(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer in plain PyTorch."""
    if layer.kind == "linear":
        return F.linear(x, weight, bias)
    convolution = F.conv1d if layer.kind == "conv1d" else F.conv2d
    return convolution(x, weight, bias, groups=layer.groups, **layer.steps)


def problem(
    layer: Layer,
    dtype: torch.dtype = torch.float32,
    *,
    integers: bool = False,
    density: float = 0.4,
    free_share: float = 0.5,
    scores_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Problem:
    """Normal values; or integers so small that every order of summation is exact, with scores full of ties."""

    def draw(shape: tuple[int, ...], largest: int = 1) -> Tensor:
        if integers:
            return torch.randint(-largest, largest + 1, shape).to(dtype).to(device)
        return torch.randn(shape).to(dtype).to(device)

    weight = draw(layer.weight, 2)
    scores = draw(layer.weight, 3).to(scores_dtype or dtype)
    k = density_to_k(weight.numel(), density)
    mask = reference.mask_of(scores, reference.select(reference.magnitude_bits(scores), k))
    x = draw(layer.x)
    return Problem(
        layer=layer,
        x=x,
        weight=weight,
        scores=scores,
        bias=draw((layer.weight[0],)) if layer.bias else None,
        grad=draw(tuple(dense(layer, x.float(), weight.float(), None).shape)),
        k=k,
        mask=mask,
        free=mask & (torch.rand(layer.weight).to(device) < free_share),
    )


class Family:
    """What distinguishes a family; its tests are below."""

    name: str
    bias_index: int  # place of the bias among the arguments of the raw operators
    gradients: tuple[str, ...]  # what the backward operators return

    def leaves(self, p: Problem) -> Results:
        """The tensors that can require a gradient."""
        raise NotImplementedError

    def public(self, p: Problem) -> LayerFunction:
        """The public function of exssnet.ops, ready for the leaves."""
        raise NotImplementedError

    def effective(self, p: Problem, t: Results) -> Tensor:
        """The dense weight that the layer stands for, with the family's gradients written out for autograd."""
        raise NotImplementedError

    def raw(self, p: Problem, t: Results) -> tuple[Any, ...]:
        """The arguments of the raw operator."""
        raise NotImplementedError

    def plain(self, p: Problem) -> LayerFunction:
        """The same layer in plain PyTorch."""
        return lambda t: dense(p.layer, t["x"], self.effective(p, t), t.get("bias"))

    def operator(self, p: Problem, suffix: str = "") -> Any:
        return getattr(torch.ops.exssnet, f"{self.name}_{p.layer.kind}{suffix}").default

    def kernel(self, p: Problem, change: Change = unchanged) -> Results:
        """Output and gradients of the public function; `change` may give tensors other strides."""
        leaves = {n: change(n, t) for n, t in self.leaves(p).items()}
        return run(self.public(p), leaves, change("grad", p.grad))

    def raw_backward(self, p: Problem, output_mask: Sequence[bool], change: Change = unchanged) -> tuple[Any, ...]:
        """The arguments of the raw backward operator."""
        arguments = self.raw(p, {n: change(n, t) for n, t in self.leaves(p).items()})
        without_bias = arguments[: self.bias_index] + arguments[self.bias_index + 1 :]
        return change("grad", p.grad), *without_bias, list(output_mask)

    def truth(self, p: Problem) -> Results:
        """Output and gradients in float64, of the dense layer."""
        p = p.to(torch.float64)
        return run(self.plain(p), self.leaves(p), p.grad)

    def check_exact(self, p: Problem, change: Change = unchanged) -> None:
        got = self.kernel(p, change)
        assert_exact(got, representable(self.truth(p), got))


def output_masks(count: int) -> list[tuple[bool, ...]]:
    return list(itertools.product([False, True], repeat=count))


def geometry(layer: Layer) -> list[Any]:
    """stride, padding and dilation as a raw convolution takes them."""
    return [[v, v] if isinstance(v, int) else list(v) for v in layer.steps.values()]


class Calls(TorchDispatchMode):
    """Notes our operators as they are called: (name, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "exssnet":
            self.made.append((func._opname, args))
        return func(*args, **(kwargs or {}))


class ProductTests:
    """Inherited by the test class of each family."""

    family: Family

    @layers(LAYERS)
    @dtypes()
    def test_integers_give_exact_output_and_gradients(self, layer: Layer, dtype: torch.dtype) -> None:
        self.family.check_exact(problem(layer, dtype, integers=True))

    @layers(TAILS)
    @dtypes("float32", "float64", "bfloat16")
    def test_exact_around_the_ends_of_vectors(self, layer: Layer, dtype: torch.dtype) -> None:
        self.family.check_exact(problem(layer, dtype, integers=True))

    @settings(suppress_health_check=[HealthCheck.differing_executors])
    @given(any_convolution(), st.sampled_from([0.1, 0.5, 1.0]))
    def test_exact_in_any_geometry(self, layer: Layer, density: float) -> None:
        torch.manual_seed(0)
        self.family.check_exact(problem(layer, integers=True, density=density))

    @layers(LAYERS + LARGE)
    def test_exact_with_threads(self, layer: Layer, threads: int) -> None:
        self.family.check_exact(problem(layer, integers=True, density=0.1))

    @pytest.mark.parametrize("density", DENSITIES)
    @layers(FEW)
    def test_exact_at_density(self, layer: Layer, density: float) -> None:
        self.family.check_exact(problem(layer, integers=True, density=density))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("of", ["x", "parameters", "grad"])
    @layers(FEW)
    def test_exact_with_strides(self, layer: Layer, of: str, layout: str) -> None:
        def change(name: str, t: Tensor) -> Tensor:
            return LAYOUTS[layout](t) if of == (name if name in ("x", "grad") else "parameters") else t

        self.family.check_exact(problem(layer, integers=True), change)

    @layers(FEW)
    def test_exact_with_the_expanded_gradient_of_a_sum(self, layer: Layer) -> None:
        p = problem(layer, integers=True)
        p.grad = torch.ones(()).expand(p.grad.shape)
        self.family.check_exact(p)

    @layers(LAYERS)
    @dtypes()
    def test_errs_at_most_twice_as_much_as_plain_pytorch(self, layer: Layer, dtype: torch.dtype, device: str) -> None:
        p = problem(layer, dtype, device=device)
        plain = run(self.family.plain(p), self.family.leaves(p), p.grad)
        assert_accurate(self.family.kernel(p), plain, self.family.truth(p))

    @layers(FEW)
    def test_reference_is_the_dense_layer(self, layer: Layer) -> None:
        p = problem(layer, torch.float64, integers=True)
        truth = self.family.truth(p)
        name = f"{self.family.name}_{layer.kind}"
        output = getattr(reference, name)(*self.family.raw(p, self.family.leaves(p)))
        arguments = self.family.raw_backward(p, [True] * len(self.family.gradients))
        gradients = getattr(reference, f"{name}_backward")(*arguments)
        got = {f"grad_{n}": g for n, g in zip(self.family.gradients, gradients, strict=True)}
        assert_exact(got | {"output": output}, {n: t for n, t in truth.items() if n != "grad_bias"})

    @layers(FEW)
    def test_repeats_bit_for_bit(self, layer: Layer, threads: int) -> None:
        p = problem(layer)
        assert_exact(self.family.kernel(p), self.family.kernel(p))

    @layers(FEW)
    def test_output_without_gradients_is_the_same(self, layer: Layer) -> None:
        p = problem(layer)
        expected = self.family.kernel(p)["output"]
        with torch.inference_mode():
            assert torch.equal(self.family.public(p)(self.family.leaves(p)), expected)

    @layers(FEW)
    def test_backward_computes_only_what_is_asked(self, layer: Layer) -> None:
        p = problem(layer, integers=True)
        count = len(self.family.gradients)
        backward = self.family.operator(p, "_backward")
        everything = backward(*self.family.raw_backward(p, [True] * count))
        for output_mask in output_masks(count):
            gradients = backward(*self.family.raw_backward(p, output_mask))
            for name, wanted, got, full in zip(self.family.gradients, output_mask, gradients, everything, strict=True):
                assert torch.equal(got, full if wanted else full.new_empty(0)), (name, output_mask)

    @layers(FEW)
    def test_gradient_is_none_where_none_is_required(self, layer: Layer) -> None:
        p = problem(layer)
        for alone, leaf in self.family.leaves(p).items():
            leaves = {**self.family.leaves(p), alone: leaf.detach().requires_grad_()}
            self.family.public(p)(leaves).sum().backward()
            assert [n for n, t in leaves.items() if t.grad is not None] == [alone]

    @layers(FEW)
    def test_backward_operator_is_asked_for_what_is_required(self, layer: Layer) -> None:
        p = problem(layer)
        for number, alone in enumerate(self.family.gradients):
            leaves = self.family.leaves(p)
            leaves[alone] = leaves[alone].detach().requires_grad_()
            output = self.family.public(p)(leaves)
            with Calls() as calls:
                output.backward(p.grad)
            asked = [arguments[-1] for name, arguments in calls.made if name.endswith("_backward")]
            assert asked == [[i == number for i in range(len(self.family.gradients))]]

    @layers(FEW)
    def test_raw_operator_has_the_gradients_of_the_public_function(self, layer: Layer) -> None:
        p = problem(layer)
        raw = run(lambda t: self.family.operator(p)(*self.family.raw(p, t)), self.family.leaves(p), p.grad)
        assert_exact(raw, self.family.kernel(p))

    @layers(FEW)
    def test_second_derivative_is_refused(self, layer: Layer) -> None:
        p = problem(layer)
        p.x.requires_grad_()
        loss = self.family.public(p)(self.family.leaves(p)).square().sum()
        (grad_x,) = torch.autograd.grad(loss, p.x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad_x.sum().backward()

    @layers(FEW)
    def test_raw_backward_refuses_to_be_differentiated(self, layer: Layer) -> None:
        p = problem(layer)
        p.grad.requires_grad_()
        name = f"exssnet::{self.family.name}_{layer.kind}_backward"
        sentence = f"^{name} has no derivative: second-order gradients are not supported"
        with pytest.raises(RuntimeError, match=sentence):
            self.family.operator(p, "_backward")(*self.family.raw_backward(p, [True] * len(self.family.gradients)))

    @layers(FEW)
    def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients(self, layer: Layer) -> None:
        p = problem(layer, integers=True)
        p.grad = p.grad.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            got = self.family.kernel(p)
        assert [t.dtype for t in got.values()] == [torch.bfloat16] + [torch.float32] * (len(got) - 1)
        assert_exact(got, representable(self.family.truth(p), got))

    @layers(FEW)
    def test_compiles_in_one_graph_with_the_same_results(self, layer: Layer) -> None:
        torch._dynamo.reset()
        p = problem(layer, integers=True)  # the compiler may give gradients other strides, and sums another order
        compiled = torch.compile(self.family.public(p), fullgraph=True, backend="aot_eager")
        assert_exact(run(compiled, self.family.leaves(p), p.grad), self.family.kernel(p))

    @layers(SMALL)
    def test_gradcheck(self, layer: Layer) -> None:
        p = problem(layer, torch.float64, free_share=1)
        leaves = {n: t.requires_grad_(n != "scores") for n, t in self.family.leaves(p).items()}
        function = self.family.public(p)
        assert torch.autograd.gradcheck(
            lambda *tensors: function(dict(zip(leaves, tensors, strict=True))), tuple(leaves.values())
        )

    @opcheck_warning
    @pytest.mark.parametrize("layout", STRIDES)
    @layers(SMALL)
    def test_opcheck_of_forward(self, layer: Layer, layout: str) -> None:
        p = problem(layer)
        leaves = {n: STRIDES[layout](t).detach().requires_grad_() for n, t in self.family.leaves(p).items()}
        torch.library.opcheck(self.family.operator(p), self.family.raw(p, leaves))

    @opcheck_warning
    @pytest.mark.parametrize("layout", STRIDES)
    @layers(SMALL)
    def test_opcheck_of_backward(self, layer: Layer, layout: str) -> None:
        p = problem(layer)
        arguments = self.family.raw_backward(p, [True] * len(self.family.gradients), lambda _, t: STRIDES[layout](t))
        torch.library.opcheck(self.family.operator(p, "_backward"), arguments)

    @opcheck_warning
    @pytest.mark.parametrize("asked", range(3))
    @layers(SMALL)
    def test_opcheck_of_backward_for_one_gradient(self, layer: Layer, asked: int) -> None:
        p = problem(layer)
        output_mask = [i == asked for i in range(len(self.family.gradients))]
        torch.library.opcheck(self.family.operator(p, "_backward"), self.family.raw_backward(p, output_mask))
