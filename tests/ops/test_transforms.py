"""What PyTorch does around a gradient: checkpointing, hooks on saved tensors, torch.func, dual numbers, exports."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
from accuracy import Results, assert_exact, run
from cases import FEW, Layer
from networks import images, small_net
from products import LayerFunction, problem
from test_bitmap import Bitmap
from test_masked import Masked
from test_sparse import Sparse
from test_supermask import SparseSupermask, Supermask
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from exssnet import ops
from exssnet.continual.phases import Phases
from exssnet.nn import SupermaskConv2d, SupermaskLayer, SupermaskLinear, TaskBatchNorm2d

# PyTorch's forward mode compiles its decompositions by what it has deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

CONV1D = Layer("conv1d", (4, 4, 9), (6, 2, 3), stride=2, padding=1, groups=2)
FAMILIES = {
    "supermask": Supermask(), "sparse-supermask": SparseSupermask(), "masked": Masked(), "sparse": Sparse(),
    "bitmap": Bitmap(),
}  # fmt: skip
Case = tuple[LayerFunction, Results]


def product(family: str, layer: Layer) -> Case:
    p = problem(layer, integers=True)
    return FAMILIES[family].public(p), FAMILIES[family].leaves(p)


def small_integers(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape).float()


def weights_case() -> Case:
    leaves = {"weight": small_integers(4, 5), "scores": small_integers(4, 5)}
    rows = ops.topk_select([leaves["scores"]], [7])[0].unbind()
    return lambda t: ops.supermask_weights([t["weight"]], [t["scores"]], rows)[0], leaves


def norm_case(training: bool) -> Case:
    given = (None, None) if training else (torch.zeros(3), torch.ones(3))
    leaves = {"x": torch.randn(6, 3, 4, 2), "residual": torch.randn(6, 3, 4, 2), "weight": torch.randn(3),
              "bias": torch.randn(3)}  # fmt: skip
    return lambda t: ops.batch_norm_act(t["x"], t["residual"], t["weight"], t["bias"], *given, relu=True)[0], leaves


CASES: dict[str, Callable[[], Case]] = {
    **{
        f"{family}-{layer.name}": lambda family=family, layer=layer: product(family, layer)  # type: ignore[misc]
        for family in FAMILIES
        for layer in (*FEW, CONV1D)
    },
    "weights": weights_case,
    "norm": lambda: norm_case(training=True),
    "norm-evaluated": lambda: norm_case(training=False),
}
every_operator = pytest.mark.parametrize("name", CASES)
every_product = pytest.mark.parametrize("name", [n for n in CASES if not n.startswith(("norm", "weights"))])


def after_others(function: LayerFunction) -> LayerFunction:
    """The function behind operators that save tensors of their own."""
    return lambda t: function({name: leaf.sin() for name, leaf in t.items()})


def gradient_of(function: LayerFunction, leaves: Results) -> Tensor:
    return small_integers(*function(leaves).shape)


def assert_close(got: Results, expected: Results, exact: bool) -> None:
    """Equal for integers; else as floating-point sums in another order are."""
    torch.testing.assert_close(got, expected, **({"rtol": 0, "atol": 0} if exact else {}))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@every_operator
def test_checkpointing_changes_no_bit(name: str, reentrant: bool) -> None:
    function, leaves = CASES[name]()
    function = after_others(function)
    upstream = gradient_of(function, leaves)

    def checkpointed(t: Results) -> Tensor:
        again = lambda *tensors: function(dict(zip(t, tensors, strict=True)))  # noqa: E731
        output: Tensor = checkpoint(again, *t.values(), use_reentrant=reentrant)
        return output

    expected = run(function, leaves, upstream)
    with_gradient = {n: leaf.clone().requires_grad_() for n, leaf in leaves.items()}
    output = checkpointed(with_gradient)
    output.backward(upstream)
    got = {"output": output.detach()} | {f"grad_{n}": leaf.grad for n, leaf in with_gradient.items()}
    assert_exact(got, expected)


@every_operator
def test_saved_tensors_are_unpacked_once_where_autograd_records(name: str) -> None:
    function, leaves = CASES[name]()
    upstream = gradient_of(function, leaves)
    unpacked: list[int] = []
    packed: list[int] = []

    def pack(t: Tensor) -> tuple[int, Tensor]:
        packed.append(len(packed))
        return packed[-1], t.clone()

    def unpack(kept: tuple[int, Tensor]) -> Tensor:
        with torch.enable_grad():
            assert torch.ones(1, requires_grad=True).neg().requires_grad
        unpacked.append(kept[0])
        return kept[1]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        got = run(function, leaves, upstream)
    assert sorted(unpacked) == packed
    assert_exact(got, run(function, leaves, upstream))


@every_operator
def test_saved_tensor_that_was_changed_is_noticed(name: str) -> None:
    function, leaves = CASES[name]()
    for changed in [n for n in leaves if n not in ("bias", "residual")]:  # which no gradient needs
        t = {n: leaf.clone().requires_grad_() for n, leaf in leaves.items()}
        output = function(t)
        with torch.no_grad():
            t[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: SupermaskLinear(5, 4, density=0.4), (3, 5)),
    "conv2d": (lambda: SupermaskConv2d(4, 6, 3, density=0.4), (3, 4, 5, 5)),
    "norm": (lambda: TaskBatchNorm2d(4, affine=True), (3, 4, 5, 5)),
}


@pytest.mark.parametrize("phase", ["scores", "values"])
@pytest.mark.parametrize("name", LAYERS)
def test_checkpointed_layer_alone_has_the_same_gradients(name: str, phase: str) -> None:
    make, shape = LAYERS[name]
    module = make()
    if phase == "values" and isinstance(module, SupermaskLayer):
        mask = module.mask()
        module.use_values(mask, mask)
    start = torch.randn(shape).movedim(0, -1).contiguous().movedim(-1, 0)
    found = []
    for whole in (lambda x: module(x.sin()), lambda x: checkpoint(lambda x: module(x.sin()), x, use_reentrant=False)):
        x = start.clone().requires_grad_()
        whole(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
        module.zero_grad()
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@every_operator
def test_transformed_gradient_is_that_of_backward(name: str) -> None:
    function, leaves = CASES[name]()
    upstream = gradient_of(function, leaves)
    output, pullback = vjp(function, leaves)
    got = {"output": output} | {f"grad_{n}": t for n, t in pullback(upstream)[0].items()}
    assert_close(got, run(function, leaves, upstream), exact="norm" not in name)


@every_operator
def test_forward_mode_is_the_transpose_of_backward(name: str) -> None:
    function, leaves = CASES[name]()
    upstream, tangents = gradient_of(function, leaves), {n: small_integers(*t.shape) for n, t in leaves.items()}
    _, moved = jvp(function, (leaves,), (tangents,))
    gradients = run(function, leaves, upstream)
    paired = torch.stack([(tangents[n] * gradients[f"grad_{n}"]).sum() for n in leaves]).sum()
    assert_close({"": (moved * upstream).sum()}, {"": paired}, exact="norm" not in name)


@every_product
def test_gradients_of_each_sample_are_those_of_batches_of_one(name: str) -> None:
    function, leaves = CASES[name]()
    upstream, x = gradient_of(function, leaves), leaves.pop("x")

    def loss(parameters: Results, x: Tensor, upstream: Tensor) -> Tensor:
        return (function({"x": x[None], **parameters}) * upstream).sum()

    got = vmap(grad(loss), (None, 0, 0))(leaves, x, upstream)
    for i in range(len(x)):
        expected = run(lambda t, i=i: function({"x": x[i : i + 1], **t}), leaves, upstream[i : i + 1])
        assert_exact({f"grad_{n}": t[i] for n, t in got.items()}, {n: t for n, t in expected.items() if n != "output"})


@pytest.mark.parametrize("layer", [FEW[0], FEW[2], CONV1D], ids=lambda layer: layer.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_second_derivative_of_a_transform_is_that_of_the_plain_layer(family: str, layer: Layer) -> None:
    p = problem(layer, torch.float64, integers=True)
    leaves = FAMILIES[family].leaves(p)
    tangents = {n: small_integers(*t.shape).double() for n, t in leaves.items()}

    def curvature(function: LayerFunction) -> Results:
        found: Results = jvp(grad(lambda t: function(t).square().sum()), (leaves,), (tangents,))[1]
        return found

    assert_exact(curvature(FAMILIES[family].public(p)), curvature(FAMILIES[family].plain(p)))


@every_operator
def test_dual_numbers_are_refused(name: str) -> None:
    function, leaves = CASES[name]()
    for dual in leaves:
        with fw.dual_level():
            t = {n: fw.make_dual(leaf, leaf) if n == dual else leaf for n, leaf in leaves.items()}
            with pytest.raises(RuntimeError, match=r"^exssnet::\w+ takes no dual numbers: torch.func.jvp has its"):
                function(t)


@every_operator
def test_gradient_of_dual_numbers_is_refused(name: str) -> None:
    function, leaves = CASES[name]()
    output = function({n: leaf.requires_grad_() for n, leaf in leaves.items()})
    ones = torch.ones_like(output)
    with fw.dual_level(), pytest.raises(RuntimeError, match=r"^exssnet::\w+ takes no dual numbers"):
        torch.autograd.grad(output, list(leaves.values()), fw.make_dual(ones, ones))


def test_operator_for_inference_refuses_dual_numbers() -> None:
    mask, x = torch.ones(2, 3, 1, 1, dtype=torch.bool), torch.randn(2, 3, 4, 4)
    arguments = torch.randn(6), torch.empty(0), ops.sparse_pattern(mask), 1, torch.ones(2), torch.zeros(2)
    with torch.no_grad(), fw.dual_level(), pytest.raises(RuntimeError, match="has no derivative: it is for inference"):
        ops.sparse_conv2d_folded(fw.make_dual(x, x), *arguments)


@every_product
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
def test_what_is_not_real_is_refused(name: str, dtype: torch.dtype) -> None:
    function, leaves = CASES[name]()
    with pytest.raises(ValueError, match=rf"must be float32, bfloat16, float16 or float64, got {dtype}$"):
        function({n: leaf.to(dtype) for n, leaf in leaves.items()})


def fixed_net() -> nn.Module:
    model = small_net()
    for module in model.modules():
        if isinstance(module, SupermaskLayer):
            mask = module.mask()
            module.use_values(mask, torch.zeros_like(mask))
    return model.eval()


@pytest.mark.parametrize("model", [small_net, fixed_net])
def test_converted_model_has_gradients_of_each_sample(model: Callable[[], nn.Module]) -> None:
    network, batch = model().eval(), images(3)
    parameters = {n: p.detach() for n, p in network.named_parameters()}

    def loss(parameters: Results, image: Tensor) -> Tensor:
        output: Tensor = functional_call(network, parameters, (image[None],))
        return output.square().sum()

    got = vmap(grad(loss), (None, 0))(parameters, batch)
    for i in range(len(batch)):
        network.zero_grad()
        network(batch[i : i + 1]).square().sum().backward()
        expected = {n: p.grad for n, p in network.named_parameters()}
        torch.testing.assert_close({n: t[i] for n, t in got.items()}, expected)


def folded_net() -> nn.Module:
    phases = Phases(small_net())
    phases.start_task()
    phases.start_weight_phase()
    phases.finish_task()
    return phases.fold(0).eval()


def scripted(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (images(4),)), file)
    file.seek(0)
    loaded: nn.Module = torch.jit.load(file)
    return loaded


def exported(model: nn.Module) -> Any:
    return torch.export.export(model, (images(4),), dynamic_shapes=({0: torch.export.Dim("batch")},))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.10's own reader
def test_fixed_model_exports_for_any_batch() -> None:
    model = fixed_net()
    expected = model(images(7))
    file = io.BytesIO()
    torch.export.save(exported(model), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(images(7)), expected)  # other products, other rounding


@pytest.mark.filterwarnings(r"ignore:`torch.jit.\w+` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings(r"ignore:`torch.jit.\w+` is deprecated:FutureWarning")
@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, scripted, lambda model: exported(model).module()],
                         ids=["fx", "script", "export"])  # fmt: skip
def test_folded_model_traces_as_any_plain_one(trace: Callable[[nn.Module], nn.Module]) -> None:
    model = folded_net()
    assert torch.equal(trace(model)(images(7)), model(images(7)))


def test_free_mask_outside_the_mask_frees_nothing_in_a_transform() -> None:
    p, family = problem(FEW[0]), Masked()
    layer = family.public(replace(p, free=torch.ones_like(p.mask)))
    gradient = grad(lambda weight: layer({**family.leaves(p), "weight": weight}).sum())(p.weight)
    assert not gradient[~p.mask].any()
    assert gradient[p.mask].all()


def test_export_leaves_the_model_as_it_was() -> None:
    model = fixed_net()
    expected, before = model(images(7)), copy.deepcopy(model.state_dict())
    exported(model)
    assert torch.equal(model(images(7)), expected)
    assert_exact(model.state_dict(), before)


def test_export_of_a_mask_phase_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.export takes the network of a finished"):
        exported(small_net())


@pytest.mark.filterwarnings("ignore")
def test_export_after_a_trace_is_right() -> None:
    model = fixed_net()
    torch.jit.trace(model, images(4))
    torch.testing.assert_close(exported(model).module()(images(7)), model(images(7)))
