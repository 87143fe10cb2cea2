"""Fused norms of blocks: whatever hooks see, and every number, is what the block would give as it was written."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torchvision
from accuracy import assert_accurate
from products import Calls
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CASES

from exssnet import Phases, SupermaskConv2d, TaskBatchNorm2d, convert
from exssnet.nn import unconvert
from exssnet.nn.blocks import normalised
from exssnet.nn.choice import Products
from exssnet.nn.models import ResNet18
from exssnet.nn.norms import TaskBatchNorm


def sequential() -> nn.Module:
    """A ReLU that is used twice, and one that follows no norm."""
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), relu, nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5, affine=False),
        relu, nn.ReLU(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sequential": sequential,
    "ours": lambda: ResNet18(5, width=4),
    "torchvision-basic": CASES["resnet-basic"].make,
    "torchvision-bottleneck": CASES["resnet-bottleneck"].make,
}
FUSED = {"sequential": 2, "ours": 17, "torchvision-basic": 6, "torchvision-bottleneck": 9}
models = pytest.mark.parametrize("name", MODELS)


def converted(name: str, products: Products = "sparse") -> Phases:
    """In its first mask phase. Norms are folded into sparse products alone, and to measure all shapes takes long."""
    torch.manual_seed(0)
    phases = Phases(convert(MODELS[name](), 0.5, products=products))
    phases.start_task()
    return phases


def hook_all(model: nn.Module) -> None:
    """Hooks that do nothing, behind which no norm is fused."""
    for module in model.modules():
        if isinstance(module, (TaskBatchNorm, nn.ReLU)):
            module.register_forward_hook(lambda *_: None)


def calls_with_relu(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many norms take ReLU along in a forward pass."""
    taken = []
    forward = TaskBatchNorm.forward

    def counting(self: TaskBatchNorm, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        taken.append(relu)
        return forward(self, x, residual, relu)

    with monkeypatch.context() as patch:
        patch.setattr(TaskBatchNorm, "forward", counting)
        model(x)
    return sum(taken)


def results(model: nn.Module, phases: Phases, x: Tensor) -> list[Tensor]:
    """Logits, gradients of x and of what the phase trains, and the statistics after the step."""
    x = x.clone().requires_grad_()
    logits = model(x)
    grad = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
    gradients = torch.autograd.grad(logits, [x, *phases.parameters()], grad)
    return [logits.detach(), *gradients, *(b.clone() for n, b in model.named_buffers() if "running" in n)]


@models
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("phase", ["mask", "weight"])
def test_fusion_changes_nothing_but_rounding(name: str, phase: str, training: bool) -> None:
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    found = []
    for hooked in (False, True):
        phases = converted(name)
        if phase == "weight":
            phases.start_weight_phase()
        model = phases.model.double().train(training)
        if hooked:
            hook_all(model)
        found.append(results(model, phases, x))
    for fused, plain in zip(*found, strict=True):
        scale = plain.abs().max().clamp(min=1e-30)
        assert torch.allclose(fused / scale, plain / scale, rtol=0, atol=1e-8)


@models
def test_every_norm_before_a_relu_is_fused_unless_one_has_hooks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = converted(name).model, torch.randn(2, 3, 32, 32)
    assert calls_with_relu(model, x, monkeypatch) == FUSED[name]
    hook_all(model)
    assert calls_with_relu(model, x, monkeypatch) == 0


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre", "global"])
@pytest.mark.parametrize("on", [nn.ReLU, TaskBatchNorm], ids=["relu", "norm"])
def test_hooks_see_what_they_saw_before(kind: str, on: type[nn.Module]) -> None:
    model, seen = converted("sequential").model, []

    def hook(module: nn.Module, *values: object) -> None:
        if isinstance(module, on):
            seen.append([len(v) if isinstance(v, tuple) else 1 for v in values])

    if kind == "global":
        handles = [nn.modules.module.register_module_forward_hook(hook)]
    else:
        handles = [getattr(m, f"register_{kind}_hook")(hook) for m in model.modules() if isinstance(m, on)]
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # which full backward hooks refuse
    model(torch.randn(2, 3, 32, 32, requires_grad=True)).sum().backward()
    for handle in handles:
        handle.remove()
    assert len(seen) == 3
    assert all(n == 1 for counts in seen for n in counts)


def test_a_forward_that_was_replaced_is_called() -> None:
    model, seen = converted("sequential").model, []
    for relu in (m for m in model.modules() if isinstance(m, nn.ReLU)):
        relu.forward = lambda x, relu=relu: seen.append(relu) or x.relu()  # type: ignore[method-assign]
    model(torch.randn(2, 3, 32, 32))
    assert len(seen) == 3


@models
def test_unconvert_gives_all_classes_back(name: str) -> None:
    plain = MODELS[name]()
    model = convert(copy.deepcopy(plain), 0.5)
    names = {n: id(m) for n, m in model.named_modules()}
    assert {n for n, _ in plain.named_modules()} == set(names)
    unconvert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert {n: id(m) for n, m in model.named_modules()} == names
    assert set(model.state_dict()) == set(plain.state_dict())


@models
def test_folded_model_is_plain_and_the_same(name: str) -> None:
    phases = converted(name)
    phases.start_weight_phase()
    x = torch.randn(4, 3, 32, 32)
    phases.model(x)  # moves the statistics off where they start
    phases.finish_task()
    folded = phases.fold(0).eval()
    assert [type(m) for m in folded.modules()] == [type(m) for m in MODELS[name]().modules()]
    expected = phases.model.eval()(x)
    assert torch.allclose(folded(x), expected, atol=1e-4 * expected.abs().max().item())


@models
def test_converted_model_can_be_pickled(name: str) -> None:
    model, x = converted(name).model.eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def calls_of_folded(model: nn.Module, x: Tensor) -> int:
    with Calls() as calls, torch.no_grad():
        model(x)
    return [name for name, _ in calls.made].count("sparse_conv2d_folded")


FOLDED = {"sequential": 3, "ours": 20, "torchvision-basic": 7, "torchvision-bottleneck": 11}
"""Norms behind a convolution; torchvision's stem is a function of its own."""


@models
def test_inference_of_a_fixed_mask_folds_the_norms(name: str) -> None:
    phases = converted(name)
    phases.start_weight_phase()
    model, x = phases.model, torch.randn(4, 3, 32, 32)
    model(x)  # moves the statistics off where they start
    expected = model.eval()(x)
    assert calls_of_folded(model, x) == FOLDED[name]
    with torch.no_grad():
        assert torch.allclose(model(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        assert calls_of_folded(model, x) == FOLDED[name]
    hook_all(model)
    assert calls_of_folded(model, x) == 0
    assert calls_of_folded(model.train(), x) == 0


def copied_images(profile: torch.autograd.profiler.profile) -> list[list[int]]:
    """Shapes of the images that PyTorch converted, copied or normalised, also within operators of ours."""
    names = ("aten::_to_copy", "aten::copy_", "aten::native_batch_norm", "aten::native_batch_norm_backward")
    shapes = [e.input_shapes[0] for e in profile.function_events if e.name in names]
    return [shape for shape in shapes if len(shape) == 4]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("cast", ["autocast", "model"])
def test_no_activation_is_converted_in_bfloat16(cast: str, training: bool) -> None:
    """Under autocast the input is, once. PyTorch's mean converts the last images, and its gradient is copied."""
    phases = converted("ours")
    phases.start_weight_phase()
    model, x = phases.model.train(training), torch.randn(6, 3, 16, 16)
    if cast == "model":
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autograd.profiler.profile(record_shapes=True) as profile, torch.set_grad_enabled(training):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
            logits = model(x)
        if training:
            F.cross_entropy(logits.float(), torch.arange(6) % 5).backward()
    assert logits.dtype == torch.bfloat16
    of_input, of_mean = [[6, 3, 16, 16]] * 2 if cast == "autocast" else [], [[6, 32, 2, 2]] * (3 if training else 2)
    assert copied_images(profile) == of_input + of_mean


def folding_pair(products: Products, dtype: torch.dtype = torch.float32) -> tuple[SupermaskConv2d, TaskBatchNorm2d]:
    """A convolution with a fixed mask, and the norm after it, in evaluation."""
    conv, norm = SupermaskConv2d(6, 5, 3, padding=1, bias=True), TaskBatchNorm2d(5, affine=True).eval()
    conv.products = products
    mask = torch.rand(conv.dense_weight.shape) < 0.4
    conv.use_values(mask, torch.zeros_like(mask))
    for t in (*norm.parameters(), norm.running_mean, norm.running_var):
        nn.init.uniform_(t, 0.5, 2)
    return conv.to(dtype), norm.to(dtype)


def assign(p: nn.Parameter | None) -> None:
    p.data = p.detach() + 1  # type: ignore[union-attr, operator]


def train(conv: SupermaskConv2d, norm: TaskBatchNorm2d) -> None:
    norm.train()(torch.randn(3, 5, 4, 4))
    norm.eval()


CHANGES: dict[str, Callable[[SupermaskConv2d, TaskBatchNorm2d], object]] = {
    "running mean": lambda conv, norm: norm.running_mean.add_(1),
    "running variance": lambda conv, norm: norm.running_var.mul_(3),
    "weight": lambda conv, norm: norm.weight.mul_(2),
    "bias": lambda conv, norm: norm.bias.add_(1),
    "no affine": lambda conv, norm: norm.register_parameter("weight", None),
    "bias of the convolution": lambda conv, norm: conv.bias.add_(1),
    "values": lambda conv, norm: conv.frozen_values.mul_(2),
    "eps": lambda conv, norm: setattr(norm, "eps", 1.0),
    "assigned data": lambda conv, norm: assign(norm.weight),
    "training": train,
    "state dict": lambda conv, norm: norm.load_state_dict(TaskBatchNorm2d(5, affine=True).state_dict()),
    "mask": lambda conv, norm: conv.use_values(*[torch.ones_like(conv.mask()), torch.zeros_like(conv.mask())]),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("products", ["sparse", "dense"])
def test_folded_norm_follows_every_change(products: Products, change: str) -> None:
    conv, norm = folding_pair(products)
    x, residual = torch.randn(2, 6, 7, 7), torch.randn(2, 5, 7, 7)
    before = normalised(conv, norm, x, residual)
    CHANGES[change](conv, norm)
    after = normalised(conv, norm, x, residual)
    assert not torch.allclose(before, after)
    for _ in range(2):
        torch.testing.assert_close(normalised(conv, norm, x, residual), norm(conv(x), residual, True))


@torch.no_grad()
@pytest.mark.parametrize("products", ["sparse", "dense"])
def test_norm_is_folded_once(products: Products, monkeypatch: pytest.MonkeyPatch) -> None:
    conv, norm = folding_pair(products)
    x, folds, fold = torch.randn(2, 6, 7, 7), [], SupermaskConv2d._folded
    monkeypatch.setattr(SupermaskConv2d, "_folded", lambda *args: folds.append(1) or fold(*args))
    monkeypatch.setattr(TaskBatchNorm, "forward", lambda *_: pytest.fail("a norm of its own"))
    for _ in range(3):
        normalised(conv, norm, x)
    copied = copy.deepcopy(conv)
    assert len(folds) == 1
    normalised(copied, norm, x)
    assert len(folds) == 2


@torch.no_grad()
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("cast", ["", "model", "autocast"])
@pytest.mark.parametrize("products", ["sparse", "dense"])
def test_folded_norm_errs_at_most_twice_as_much_as_plain_pytorch(
    products: Products, cast: str, order: torch.memory_format
) -> None:
    dtype = torch.bfloat16 if cast == "model" else torch.float32
    conv, norm = folding_pair(products, dtype)
    x, residual = (torch.randn(2, c, 7, 7, dtype=dtype).contiguous(memory_format=order) for c in (6, 5))
    residual = residual.bfloat16() if cast else residual
    norm64 = copy.deepcopy(norm).double()
    truth = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    truth = (norm64(truth) + residual.double()).relu()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        plain = (norm(F.conv2d(x, conv.weight, conv.bias, padding=1)) + residual).relu()
        got = normalised(conv, norm, x, residual)
    assert_accurate({"y": got}, {"y": plain}, {"y": truth})
    if products == "dense":
        assert got.is_contiguous(memory_format=order)


@torch.no_grad()
def test_values_that_train_are_not_folded_into_a_weight() -> None:
    """Averages of weights are swapped in through `.data`, which no version shows."""
    conv, norm = folding_pair("dense")
    mask = torch.ones_like(conv.mask())
    conv.use_values(mask, mask)
    x = torch.randn(2, 6, 7, 7)
    before = normalised(conv, norm, x)
    conv.free_values.data.mul_(2)
    assert not torch.allclose(normalised(conv, norm, x), before)
    torch.testing.assert_close(normalised(conv, norm, x), norm(conv(x), None, True))


def test_a_change_rewrites_what_is_cached_in_place_for_a_captured_graph() -> None:
    conv, _ = folding_pair("dense")
    source = torch.ones(3)
    cached = [conv.mode.once(conv, "test", lambda: (source + 1,), [source])[0] for _ in range(2)]
    assert cached[0] is cached[1]
    source.add_(1)
    assert conv.mode.once(conv, "test", lambda: (source + 1,), [source])[0] is cached[0]
    assert torch.equal(cached[0], torch.full((3,), 3.0))


def test_subclasses_and_sequences_without_a_norm_stay_as_they_are() -> None:
    class Own(nn.Sequential):
        pass

    model = nn.Sequential(
        Own(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    )
    assert [type(m) for m in convert(model).children()] == [Own, nn.Sequential]


@pytest.mark.parametrize(
    "norm", [lambda c: nn.GroupNorm(1, c), nn.InstanceNorm2d, nn.Identity], ids=["group", "instance", "none"]
)
def test_blocks_with_other_norms_run_as_they_are_written(norm: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock(4, 4, norm_layer=norm).eval()
    x = torch.randn(2, 4, 8, 8)
    expected = copy.deepcopy(block)(x)
    assert torch.equal(convert(nn.Sequential(block), 1.0, products="dense")(x), expected)


def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    phases = converted("ours", products="auto")
    phases.start_weight_phase()
    model, x = phases.model.eval(), torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_nobody_imports_torchvision_for_the_user() -> None:
    code = (
        "import sys; from torch import nn; from exssnet import convert; convert(nn.Linear(2, 2)); "
        "assert not any(name.startswith('torchvision') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
