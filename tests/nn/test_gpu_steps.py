"""Training steps on a GPU: the host never waits, a CUDA graph can hold them, and they compile in one graph.

Without a GPU, tensors on device "meta", which have no memory, take the steps: whoever asks for their values fails.
"""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import images, small_net
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from exssnet import Phases, ScoreAdam, ops
from exssnet.kernels import nan_flag, reference
from exssnet.ops.library import product_dtype

KERNELS = Path(__file__).parents[2] / "kernels"
phases = pytest.mark.parametrize("phase", ["mask", "weight"])
products = pytest.mark.parametrize("products", ["sparse", "dense"])
optimizers = pytest.mark.parametrize("optimizer", ["sgd", "adam", "scores"])
Step = Callable[[], Tensor]


def in_phase(phase: str, **options: object) -> nn.Module:
    model = small_net(**options)
    tasks = Phases(model)
    tasks.start_task()
    if phase == "weight":
        tasks.start_weight_phase()
    return model


def optimizer_of(name: str, model: nn.Module, capturable: bool = False) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, 0.1, momentum=0.9)
    if name == "adam":
        return torch.optim.Adam(parameters, 1e-2, fused=True, capturable=capturable)
    return ScoreAdam(parameters, model, 1e-2, capturable=capturable)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Step:
    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@products
@phases
def test_no_step_asks_for_a_value(phase: str, products: str) -> None:
    model = in_phase(phase, products=products).to("meta")
    y = torch.zeros(24, dtype=torch.int64, device="meta")
    step = step_of(model, optimizer_of("sgd", model), images().to("meta"), y)
    assert [step().device.type for _ in range(2)] == ["meta"] * 2


def test_optimizer_and_selection_ask_for_no_value() -> None:
    scores, grads, exp_avg, exp_avg_sq = ([torch.empty(33, 65, device="meta")] for _ in range(4))
    masks, _, _ = ops.adam_topk(scores, grads, exp_avg, exp_avg_sq, [torch.zeros((), device="meta")], [9], packed=True)
    (weight,) = ops.supermask_weights(grads, scores, masks, torch.bfloat16)
    assert weight.device.type == "meta"


def test_sparse_products_of_the_reference_ask_for_no_value() -> None:
    """They serve a GPU if the library was built without nvcc."""
    shapes = (2, 3, 5, 5), (2, 4, 3, 3), (6,)
    x, grad, values = (torch.empty(shape, device="meta") for shape in shapes)
    pattern = [torch.empty(size, dtype=torch.int32, device="meta") for size in (5, 9, 9, 4, 9, 9)]
    arguments, steps = (values, values[:3], *pattern), ([3, 3], [1, 1], [0, 0], [1, 1])
    y = reference.sparse_conv2d(x, *arguments, None, *steps)
    grads = reference.sparse_conv2d_backward(grad, x, *arguments, *steps, [True, True])
    assert tuple(t.shape for t in (*grads[:1], y, *grads[1:])) == shapes


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_autocast_of_the_tensors_own_device_decides(kind: str) -> None:
    mask = torch.ones(4, 3, 1, 1, dtype=torch.bool)
    pattern, bitmap = ops.sparse_pattern(mask), ops.bitmap_pattern(mask)
    bits = torch.zeros(2, dtype=torch.uint8)
    found = set()
    before = torch.get_autocast_dtype(kind)
    torch.set_autocast_enabled(kind, True)  # `torch.autocast` asks for a GPU
    torch.set_autocast_dtype(kind, torch.bfloat16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            shapes = (2, 3, 5, 5), (4, 3, 1, 1), (12,), (0,)
            x, weight, values, none = (torch.empty(shape, device="cuda") for shape in shapes)
            on_the_gpu = ops.SparsePattern(*(t.to("cuda") for t in pattern[:-1]), 1)
            found.add(ops.sparse_conv2d(x, values, none, on_the_gpu, 1).dtype)
            found.add(ops.bitmap_conv2d(x, values, none, bitmap._replace(words=bitmap.words.to("cuda"))).dtype)
            found.add(ops.supermask_conv2d(x, weight, weight, selection=bits.to("cuda")).dtype)
            found.add(ops.masked_conv2d(x, weight, bits.to("cuda")).dtype)
            found.add(product_dtype(x))
    finally:
        torch.set_autocast_enabled(kind, False)
        torch.set_autocast_dtype(kind, before)
    assert found == {torch.bfloat16 if kind == "cuda" else torch.float32}


def test_such_a_question_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.ones(2, device="meta").any())


@phases
def test_forward_and_backward_compile_in_one_graph(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with dense products."""
    torch._dynamo.reset()
    model = in_phase(phase, products="dense")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    labels = torch.arange(24) % 4
    found = []
    for call in (model, compiled):
        model.zero_grad()
        F.cross_entropy(call(images()), labels).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 3
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "file", sorted(p.name for p in KERNELS.glob("*.py") if p.name.startswith(("triton_", "cuda_")))
)
def test_kernels_ask_for_no_value_on_the_host(file: str) -> None:
    waits = {"item", "tolist", "nonzero", "cpu", "numpy", "synchronize"}
    calls = [n.func.attr for n in ast.walk(ast.parse((KERNELS / file).read_text()))
             if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]  # fmt: skip
    assert waits & set(calls) == set()


def test_flag_of_nan_scores_is_read_and_cleared() -> None:
    assert not ops.nan_scores_seen("cpu")
    nan_flag.flag(torch.device("cpu")).fill_(1)
    assert ops.nan_scores_seen("cpu")
    assert not ops.nan_scores_seen(torch.device("cpu"))


# With a GPU


def on_the_gpu(phase: str, **options: object) -> tuple[nn.Module, Tensor, Tensor]:
    return in_phase(phase, **options).cuda(), images().cuda(), (torch.arange(24) % 4).cuda()


@pytest.mark.gpu
@products
@phases
@optimizers
def test_host_never_waits(phase: str, optimizer: str, products: str) -> None:
    model, x, y = on_the_gpu(phase, products=products)
    step = step_of(model, optimizer_of(optimizer, model), x, y)
    for _ in range(3):  # tunes, measures, and makes the flag for NaN scores
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(loss.isfinite()) for loss in losses)
    assert not ops.nan_scores_seen("cuda")


@pytest.mark.gpu
@products
@phases
@optimizers
def test_steps_of_a_graph_are_those_without(phase: str, optimizer: str, products: str) -> None:
    losses = []
    for captured in (False, True):
        model, x, y = on_the_gpu(phase, products=products)
        step = step_of(model, optimizer_of(optimizer, model, capturable=True), x, y)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = step()
            of_steps = [(graph.replay(), loss.clone())[1] for _ in range(4)]
        else:
            of_steps = [step() for _ in range(4)]
        losses.append(torch.stack(of_steps))
    torch.testing.assert_close(*losses)


@pytest.mark.gpu
@phases
def test_compiled_steps_are_those_of_eager_mode(phase: str) -> None:
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, x, y = on_the_gpu(phase)
        call = torch.compile(model, fullgraph=True) if compiled else model
        step = step_of(call, optimizer_of("adam", model), x, y)
        losses.append(torch.stack([step() for _ in range(4)]))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
