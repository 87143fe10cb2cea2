"""`graphed`: replays are the steps of eager mode bit for bit, and whatever a graph cannot repeat is refused.

On the CPU a recorder stands for the CUDA graph.
"""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import images, small_net
from recorded_graph import RecordedGraph, Recorder, tensors_in
from torch import Tensor, nn
from torch.nn import functional as F

from exssnet import Phases, convert, graphed, topk_masks
from exssnet.kernels import nan_flag
from exssnet.nn import graphs, supermask_layers

in_phases = pytest.mark.parametrize("phase", ["mask", "weight"])
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.AdamW(p, 2.0**-6, fused=True, capturable=True),
    "sgd": lambda p: torch.optim.SGD(p, 2.0**-4, momentum=0.9, fused=True),
}


class Training:
    """A model in a phase, with an optimizer, a step and the batches that it takes."""

    def __init__(self, phase: str, optimizer: str = "adam", products: str = "dense", device: str = "cpu") -> None:
        self.model = nn.Sequential(small_net(products=products), nn.Dropout(0.2)).to(device)
        self.phases = Phases(self.model[0])
        self.phases.start_task()
        if phase == "weight":
            self.phases.start_weight_phase()
        self.optimizer = self.phases.optimizer(OPTIMIZERS[optimizer])
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss, "right": (logits.argmax(1) == y).sum()}

    def graphed(self, **options: Any) -> graphs.Graphed:
        return graphed(self.step, model=self.model, optimizer=self.optimizer, **options)

    def state(self) -> list[Tensor]:
        """Copies of all that a step changes."""
        moments = [t for of in self.optimizer.state.values() for t in of.values() if isinstance(t, Tensor)]
        tensors = [*self.model.state_dict().values(), *moments, torch.get_rng_state()]
        return [t.detach().clone() for t in tensors]

    def run(self, train: Callable[..., Any], sizes: list[int]) -> list[Tensor]:
        """Results of a step for each batch size, and the state after each."""
        torch.manual_seed(1)
        found = []
        for seed, size in enumerate(sizes):
            results = train(images(size, seed), torch.arange(size) % 4)
            self.schedule.step()
            found += [t.detach().clone() for t in results.values()] + self.state()
        return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@in_phases
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("products", ["sparse", "dense"])
def test_replays_are_the_steps_of_eager_mode(
    phase: str, optimizer: str, products: str, recorded: type[RecordedGraph]
) -> None:
    """With a schedule, dropout, running statistics, and batches of another size before and after the capture."""
    sizes = [8, 8, 5, 8, 8, 8, 5, 8, 8]
    eager, replayed = (Training(phase, optimizer, products) for _ in range(2))
    expected = eager.run(eager.step, sizes)
    found = replayed.run(replayed.graphed(warmup=2), sizes)
    assert (recorded.captures, recorded.replays) == (1, 5)
    assert same(expected, found)


@in_phases
def test_neither_graphed_nor_the_capture_trains(phase: str, recorded: type[RecordedGraph]) -> None:
    training = Training(phase)
    before = training.state()
    train = training.graphed(warmup=1)
    assert same(training.state(), before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorded, "replay", lambda _: None)
        training.run(train, [8])
        before = training.state()
        training.run(train, [8])  # captures
    torch.manual_seed(1)
    assert recorded.captures == 1
    assert same(training.state()[:-1], before[:-1])


def test_without_a_graph_the_step_runs_itself_with_the_same_checks() -> None:
    eager, again = Training("mask"), Training("mask")
    train = again.graphed()
    assert same(eager.run(eager.step, [8] * 5 + [3]), again.run(train, [8] * 5 + [3]))
    again.phases.start_weight_phase()
    with pytest.raises(graphs.GraphError, match="call graphed again after each change of phase"):
        again.run(train, [8])


def test_results_stay_as_they_are_and_have_no_gradient(recorded: type[RecordedGraph]) -> None:
    training = Training("mask")
    train, y = training.graphed(warmup=1), torch.arange(8) % 4
    losses = [train(images(8, seed), y)["loss"] for seed in range(4)]
    assert len({loss.item() for loss in losses}) == 4
    assert not any(loss.requires_grad for loss in losses)


def test_arguments_may_be_the_model_s_own_batch_or_a_view_and_the_layout_is_that_of_the_examples(
    recorded: type[RecordedGraph],
) -> None:
    model = convert(nn.Conv2d(2, 3, 3), 0.5, products="dense")
    seen = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x.stride())
        y: Tensor = model(x)
        return y

    example = torch.empty(4, 2, 5, 6).to(memory_format=torch.channels_last)
    call = graphed(forward, example, model=model, warmup=1)
    for _ in range(3):
        x = torch.randn(4, 2, 6, 5).transpose(2, 3)
        assert torch.allclose(call(x), model(x), atol=1e-6)
    assert seen[-1] == example.stride()


def test_gradients_are_there_after_a_replay(recorded: type[RecordedGraph]) -> None:
    eager, replayed = (Training("mask") for _ in range(2))
    train = replayed.graphed(warmup=1)
    for training, call in ((eager, eager.step), (replayed, train)):
        training.run(call, [8, 8, 5, 8])
    gradients = [[p.grad for p in t.phases.parameters()] for t in (eager, replayed)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]


def test_the_rates_that_a_user_sees_stay_numbers(recorded: type[RecordedGraph]) -> None:
    training = Training("mask")
    training.run(training.graphed(warmup=1), [8] * 4)
    assert training.optimizer.param_groups[0]["lr"] == 2.0**-8
    assert isinstance(training.optimizer.param_groups[0]["lr"], float)


CHANGES: dict[str, tuple[Callable[[Training], Any], str]] = {
    "phase": (lambda t: t.phases.start_weight_phase(), r"^graphed: [1-9]\d* of the model's parameters, buffers"),
    "moved": (lambda t: setattr(t.model[0].norm.weight, "data", torch.zeros(8)), "^graphed: addresses of"),
    "buffer": (lambda t: setattr(t.model[0].norm, "running_mean", torch.zeros(8)), "^graphed: 1 of"),
    "module": (lambda t: setattr(t.model[0], "pool", nn.AvgPool2d(2)), "^graphed: 1 of"),
    "evaluation": (lambda t: t.model.eval(), r"the model: training, now evaluation\): call graphed again"),
    "one module": (lambda t: t.model[1].eval(), "modules changed between training and evaluation"),
    "weight decay": (lambda t: t.optimizer.param_groups[0].update(weight_decay=0.5), "weight_decay of an optimizer"),
    "groups": (
        lambda t: t.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]}), "other parameter groups"
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("captured", [False, True], ids=["before the capture", "captured"])
def test_what_has_changed_since_the_first_call_is_refused(
    change: str, captured: bool, recorded: type[RecordedGraph]
) -> None:
    training = Training("mask")
    train = training.graphed(warmup=2)
    training.run(train, [8] * (3 if captured else 1))
    act, message = CHANGES[change]
    act(training)
    before = training.state()
    with pytest.raises(graphs.GraphError, match=message):
        train(images(8), torch.arange(8) % 4)
    assert same(training.state(), before)


def test_after_a_glance_at_another_task_replays_go_on(recorded: type[RecordedGraph]) -> None:
    training = Training("mask")
    training.phases.finish_task()
    training.phases.start_task()
    training.optimizer = training.phases.optimizer(OPTIMIZERS["adam"])
    train = training.graphed(warmup=1)
    y = torch.arange(8) % 4
    for seed in range(3):
        with training.phases.using(0) as model:
            model(images())
        train(images(8, seed), y)
    assert recorded.replays == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.Adam(p), "Adam must be made with capturable=True"),
        (lambda p: torch.optim.AdamW(p, fused=True), "AdamW must be made with capturable=True"),
        (lambda p: torch.optim.SGD(p), "SGD must be made with fused=True"),
        (lambda p: torch.optim.LBFGS(p), "cannot capture a step of LBFGS"),
    ],
)
def test_an_optimizer_that_cannot_be_captured_is_refused(
    make: Callable[[Any], torch.optim.Optimizer], message: str, recorded: type[RecordedGraph]
) -> None:
    training = Training("mask")
    training.optimizer = make(training.phases.parameters())
    with pytest.raises(ValueError, match=message):
        training.graphed()


def test_a_step_that_asks_for_a_value_is_refused_and_has_not_trained(recorded: type[RecordedGraph]) -> None:
    training = Training("mask")

    def step(x: Tensor, y: Tensor) -> float:
        return float(training.step(x, y)["loss"].detach())

    train, y = graphed(step, model=training.model, optimizer=training.optimizer, warmup=1), torch.arange(8) % 4
    train(images(8), y)
    before = training.state()
    with pytest.raises(graphs.GraphError, match="cannot be captured in a CUDA graph: a captured step asks"):
        train(images(8), y)
    assert same(training.state(), before)
    assert isinstance(training.optimizer.param_groups[0]["lr"], float)


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(())], ids=["python", "torch"])
def test_random_numbers_of_the_host_are_refused(
    draw: Callable[[], Any], recorded: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = convert(nn.Linear(4, 4), 0.5)

    def forward(x: Tensor) -> Tensor:
        y: Tensor = model(x) * draw()
        return y

    monkeypatch.setattr(recorded, "capture", lambda _, step: step())  # a GPU's numbers are not the host's
    call, x = graphed(forward, model=model, warmup=1), torch.randn(2, 4)
    call(x)
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(graphs.GraphError, match="draws random numbers on the host"):
        call(x)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.graphed(warmup=0), "warmup must be at least 1, got 0"),
        (lambda t: graphed(t.step, 3, model=t.model), "example 0 must be a tensor, got 3"),
        (lambda t: graphed(t.step, torch.empty(2, device="meta"), model=t.model), "on meta, but the model is on cpu"),
        (lambda t: t.graphed()(images(8), 3), "argument 1 must be a tensor, got 3"),
        (lambda t: graphed(t.step, images(8), model=t.model)(images(8), images(8)), "takes 1 tensors"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_told_in_one_sentence(call: Callable[[Training], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^graphed: .*{message}"):
        call(Training("mask"))


# What a capture needs of a converted model


def test_every_step_reads_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exssnet.nn.selector.capturing", lambda: True)
    for phase in ("mask", "weight"):
        training, read = Training(phase), []
        x, y = images(8), torch.arange(8) % 4
        for _ in range(2):
            training.step(x, y)
        for _ in range(2):
            training.optimizer.zero_grad()
            with Recorder() as recorder:
                training.step(x, y)
            read.append(set(recorder.outside))
        assert read[0] == read[1], phase
        if phase == "mask":
            assert training.model[0]._selector.hint.data_ptr() in read[0]


@in_phases
def test_nothing_that_a_captured_step_computes_is_kept_but_gradients(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exssnet.nn.selector.capturing", lambda: True)
    monkeypatch.setattr("exssnet.nn.modes.capturing", lambda: True)
    training = Training(phase)
    training.step(images(8), torch.arange(8) % 4)
    training.optimizer.zero_grad()
    with Recorder() as recorder:
        training.step(images(8), torch.arange(8) % 4)
    computed = {t.untyped_storage().data_ptr() for *_, new in recorder.operators for t in new if t.numel()}
    owners: list[Any] = [*training.model.modules(), training.model[0]._selector]
    owners += [layer.mode for _, layer in supermask_layers(training.model)]
    kept = {(type(o).__name__, name) for o in owners for name, value in vars(o).items()
            for t in tensors_in([value]) if t.untyped_storage().data_ptr() in computed}  # fmt: skip
    assert kept == set()


@in_phases
def test_forward_and_backward_may_be_captured_apart(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `torch.cuda.make_graphed_callables`."""
    model = Training(phase).model[0].eval()
    x, parameters = images(8).requires_grad_(), [p for p in model.parameters() if p.requires_grad]
    model(x)  # first calls outside
    forward, backward = RecordedGraph(torch.device("cpu")), RecordedGraph(torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr("exssnet.nn.selector.capturing", lambda: True)
        y = forward.capture(lambda: model(x))
        grad = torch.ones_like(y)
        gradients = backward.capture(lambda: torch.autograd.grad(y, (x, *parameters), grad))
    with torch.no_grad():
        for t in (x, *parameters):
            t.copy_(torch.randn(t.shape))
    forward.replay()
    backward.replay()
    expected = model(x)
    assert torch.equal(y, expected)
    for a, b in zip(gradients, torch.autograd.grad(expected, (x, *parameters), grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.proof
def test_the_compiler_knows_that_the_hint_stays_where_it_is() -> None:
    """Otherwise `torch.compile(mode="reduce-overhead")` makes no graph of a forward pass that changes it."""
    torch._dynamo.reset()
    model, marks = small_net(products="dense"), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if node.op == "placeholder" and isinstance(value, Tensor) and value.dtype == torch.int64:
                marks.append((tuple(value.shape), node.meta["tensor_dict"].get("_dynamo_static_input_type")))
        return graph.forward

    torch.compile(model, backend=backend)(images())
    torch._dynamo.reset()
    assert ((3, 2), "unguarded") in marks


def test_a_flag_for_nan_is_not_made_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nan_flag, "_flags", {})
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="make one step before the capture, as exssnet"):
            nan_flag.flag(torch.device("cpu"))
    nan_flag.flag(torch.device("cpu"))


# With a GPU


class Wide(nn.Module):
    """Layers of more than 64 k weights, which select with a hint."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 128, 3, padding=1), nn.BatchNorm2d(128)
        self.deep, self.head = nn.Conv2d(128, 128, 3, stride=2), nn.Linear(128 * 9, 512)
        self.out = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.norm(self.conv(x)).relu()).relu()
        out: Tensor = self.out(self.head(x.flatten(1)).relu())
        return out


def wide_training(phase: str, steps: int, replayed: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The losses of some steps on a GPU, and the masks or the values after them."""
    torch.manual_seed(0)
    model = convert(Wide().cuda(), 0.1, products="dense")
    phases = Phases(model)
    phases.start_task()
    if phase == "weight":
        phases.start_weight_phase()
    optimizer = phases.optimizer(torch.optim.Adam, lr=2.0**-9, fused=True, capturable=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, steps // 4), 0.5)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    warmup, losses = 3 if replayed else steps, []  # without replays the rates are the same tensors
    train = graphed(step, model=model, optimizer=optimizer, warmup=warmup)
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        x, y = torch.randn(16, 3, 8, 8, generator=generator), torch.randint(10, (16,), generator=generator)
        losses.append(train(x, y))
        schedule.step()
        if number == 4:
            torch.cuda.empty_cache()
    layers = phases.layers.values()
    return losses, [layer.mask() if phase == "mask" else layer.free_values.detach() for layer in layers]  # type: ignore[union-attr]


@pytest.mark.gpu
@in_phases
def test_five_hundred_replays_are_the_steps_of_eager_mode(phase: str) -> None:
    """Masks and values bit for bit, as the kernels of a run are deterministic."""
    wide_training(phase, 4, replayed=False)  # chooses kernels
    (losses, ends), (expected, wanted) = (wide_training(phase, 504, replayed) for replayed in (True, False))
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert all(torch.equal(a, b) for a, b in zip(ends, wanted, strict=True))


@pytest.mark.gpu
@in_phases
def test_graphed_callables_have_the_gradients_of_the_model(phase: str) -> None:
    model, x = Training(phase, device="cuda").model[0].eval(), images(8).cuda()
    parameters = [p for p in model.parameters() if p.requires_grad]
    model(x)
    twin = copy.deepcopy(model)
    graph = torch.cuda.make_graphed_callables(model, (x.clone(),))
    for seed in range(3):
        x = images(8, seed).cuda()
        found, wanted = (call(x) for call in (graph, twin))
        torch.testing.assert_close(found, wanted)
        own = [p for p in twin.parameters() if p.requires_grad]
        gradients = (torch.autograd.grad(y.square().sum(), p) for y, p in ((found, parameters), (wanted, own)))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            for p, q in zip(parameters, own, strict=True):
                p.add_(0.1)
                q.add_(0.1)


@pytest.mark.gpu
@in_phases
def test_compiled_with_graphs_has_the_losses_of_eager_mode(phase: str) -> None:
    losses = []
    for mode in (None, "reduce-overhead"):
        torch._dynamo.reset()
        training = Training(phase, device="cuda")
        training.model = training.model[0]
        if mode is not None:
            training.model = torch.compile(training.model, mode=mode, fullgraph=True)
        y = (torch.arange(8) % 4).cuda()
        steps = [training.step(images(8, seed).cuda(), y)["loss"].detach().clone() for seed in range(6)]
        losses.append(torch.stack(steps))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_a_first_selection_that_is_captured_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exssnet.kernels.nan_flag._flags", {})
    scores = [torch.randn(1 << 17, device="cuda")]
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="make one step before the capture"), torch.cuda.graph(graph):
        topk_masks(scores, [1000])
