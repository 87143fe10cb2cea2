"""Precision, layout and batches: what a learner computes in, and that no step waits for a value or a copy."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learning import inputs, learner, watched
from networks import SmallNet, stream
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import exssnet.continual.forward
from exssnet import Learner, PhaseOptions, convert
from exssnet.continual.forward import ForwardOptions, batches, resident
from exssnet.continual.methods import Sequential
from exssnet.continual.strategy import Strategy
from exssnet.continual.task_inference import TaskInference, evaluate_without_task
from exssnet.experiments.baselines import Multitask, baseline
from exssnet.tasks import CropFlip, Labelled, Relabelled, load, loader, split_by_class

CUDA = torch.device("cuda", 0)
precisions = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])


def cases(names: str, usual: list[tuple[Any, ...]], proofs: list[tuple[Any, ...]]) -> pytest.MarkDecorator:
    """Cases that differ in what the tests of each part hold already: a few stand for all, the others are proofs."""
    return pytest.mark.parametrize(names, [*usual, *(pytest.param(*case, marks=pytest.mark.proof) for case in proofs)])


# What is learned


def test_digits_are_learned_in_bfloat16_as_well_as_in_float32() -> None:
    """Of five classes: guessing is right for 0.2 of the items. Over four seeds, the standard deviation was 0.03."""
    pytest.importorskip("sklearn", reason="scikit-learn's digits")
    tasks, phase, found = split_by_class(*load("digits"), [5], validation=0.2), PhaseOptions(3, 0.03), []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = convert(SmallNet(5), 0.3, weights="signed_constant")
        learned = Learner(model, mask=phase, weight=phase, batch_size=32, precision=precision)  # type: ignore[arg-type]
        found.append(float(learned.run(tasks)[0, 0]))
    assert min(found) > 0.75
    assert abs(found[0] - found[1]) < 0.1


@cases("precision, channels_last", [("bf16", True), ("fp16", False)], [("bf16", False), ("fp16", True)])
def test_a_stream_is_learned_in(precision: str, channels_last: bool) -> None:
    phase = PhaseOptions(4, 0.03)
    accuracy = learner(mask=phase, weight=phase, precision=precision, channels_last=channels_last).run(stream(2))
    assert accuracy.diagonal().min() > 0.7


@cases("precision, method", [("bf16", "exssnet"), ("fp16", "wsn")], [("bf16", "wsn"), ("fp16", "exssnet")])
def test_nothing_is_forgotten_in(precision: str, method: str) -> None:
    learned, tasks = learner(method, kkt="best", precision=precision), stream(2)

    def logits() -> Tensor:
        with learned.phases.using(0) as model, learned.autocast(), torch.no_grad():
            out: Tensor = model.eval()(inputs(tasks[0]))
        return out

    learned.learn(tasks[0])
    before = logits()
    assert before.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    learned.learn(tasks[1])
    assert torch.equal(logits(), before)


class Noting(Strategy):
    """Notes the dtypes that a method gets, and the largest gradient."""

    def __init__(self) -> None:
        self.dtypes: set[str] = set()
        self.largest = 0.0

    def loss(self, learner: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits = super().loss(learner, x, y)
        inside = learner.model(x)
        self.dtypes |= {f"loss {loss.dtype}", f"logits {logits.dtype}", f"inside {inside.dtype}"}
        return loss + 0 * inside.sum(), logits

    def gradient(self, learner: Any) -> None:
        for p in learner.phases.parameters():
            self.dtypes |= {f"parameter {p.dtype}", f"gradient {p.grad.dtype}"}
            self.largest = max(self.largest, p.grad.abs().max().item())


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.proof)])
def test_loss_logits_parameters_gradients_and_the_optimizers_state_are_float32(precision: str) -> None:
    learned = Learner(convert(SmallNet(), 0.3), Noting(), batch_size=20, precision=precision)  # type: ignore[arg-type]
    optimizers: set[torch.dtype] = set()

    def note(*_: object) -> None:
        assert learned._open is not None
        assert learned._open.training is not None
        state = learned._open.training.optimizer.state
        optimizers.update(t.dtype for own in state.values() for t in own.values())

    watched(learned).at_step = note
    learned.run(stream(1))
    half = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    wanted = {"loss", "logits", "parameter", "gradient"}
    assert learned.method.dtypes == {f"{name} torch.float32" for name in wanted} | {f"inside torch.{half}"}  # type: ignore[attr-defined]
    assert optimizers == {torch.float32}
    assert 0 < learned.method.largest < 10  # the loss was scaled by 65536, gradients no longer are
    assert {t.dtype for t in learned.phases.weights_before().values()} == {torch.float32}
    assert {t.dtype for t in learned.phases.scores[0].values()} == {torch.float32}


@cases(
    "name, precision", [("multitask", "fp16"), ("replay", "bf16")],
    [(name, p) for name in ("individual", "ewc") for p in ("bf16", "fp16")],
)  # fmt: skip
def test_dense_baselines_compute_in(name: str, precision: str) -> None:
    model = SmallNet()
    seen: set[torch.dtype] = set()
    torch.manual_seed(0)
    made = baseline(name, model, PhaseOptions(4, 0.01), precision=precision)  # type: ignore[arg-type]
    nn.Module.register_forward_hook(model, lambda _, args, out: seen.add(out.dtype))
    assert made.run(stream(2))[1].min() > 0.7
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}


def test_tasks_are_inferred_in_the_precision_of_the_learner() -> None:
    learned, tasks = learner("supsup", PhaseOptions(4, 0.03), PhaseOptions(0), precision="bf16"), stream(2)
    learned.run(tasks)
    seen: set[torch.dtype] = set()
    with learned.autocast():
        inference = TaskInference(learned.phases, samples=16)
        inference._plain.register_forward_hook(lambda _, args, out: seen.add(out.dtype))
        found = evaluate_without_task(inference, [task.test for task in tasks], [2, 2], batch_size=20)
    assert seen == {torch.bfloat16}
    assert found.task_accuracy > 0.6


# Scaled gradients


@cases("method, optimizer", [("exssnet", "sgd"), ("wsn", "adam")], [("exssnet", "adam"), ("exssnet", "adamw")])
def test_a_step_whose_gradients_overflow_changes_nothing_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, method: str, optimizer: str
) -> None:
    monkeypatch.setattr(ForwardOptions, "scaler", lambda *_: torch.amp.GradScaler("cpu", 2.0**30))
    phase = PhaseOptions(5, 0.03, optimizer)  # type: ignore[arg-type]
    learned = learner(method, phase, PhaseOptions(0), precision="fp16")
    scales, changed = [], []
    before = [p.clone() for p in learned.phases.random_scores(0).values()]

    def note(*_: object) -> None:
        assert learned._open is not None
        assert learned._open.training is not None
        assert learned._open.training.scaler is not None
        scales.append(learned._open.training.scaler.get_scale())
        now = [p.detach().clone() for p in learned.phases.masked_parameters()]
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, now, strict=True)))
        before[:] = now

    watched(learned).at_step = note
    learned.learn(stream(1)[0])
    skipped = [scale < last for scale, last in zip(scales, [2.0**30, *scales], strict=False)]
    assert changed == [not skip for skip in skipped]
    assert 0 < sum(skipped) < len(skipped)
    assert all(math.isfinite(record.loss) for record in learned.reports[0].history)


class Steep(Strategy):
    """Its gradients overflow float16 at every scale, its loss does not overflow."""

    def loss(self, learner: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits = super().loss(learner, x, y)
        return loss * 1e20, logits


def test_steps_that_overflow_again_and_again_are_told_as_divergence() -> None:
    learned = Learner(convert(SmallNet()), Steep(), mask=PhaseOptions(1, 0.25), batch_size=3, precision="fp16")
    sentence = (
        "task 0: gradients overflowed float16 until their scale was 0.0625, in epoch 1 of the mask phase; lower the "
        "learning rates, mask 0.25 and weight 0.01"
    )
    with pytest.raises(FloatingPointError, match=f"^{sentence}$"):
        learned.learn(stream(1)[0])


def test_a_loss_that_overflows_is_told_as_divergence() -> None:
    data = Labelled(torch.full((8, 1, 8, 8), 1e30), torch.arange(8) % 2)
    with pytest.raises(FloatingPointError, match="the mean loss became nan in epoch 1 of the mask phase"):
        learner(precision="fp16").run(split_by_class(data, data, 1, validation=0))


# Layout


@pytest.mark.parametrize(("channels_last", "innermost"), [(True, True), (False, False), ("auto", False)])
def test_the_network_gets_images_in_the_layout(channels_last: Any, innermost: bool) -> None:
    seen = Counter[bool]()
    learned = Learner(
        convert(SmallNet(), 0.3), mask=PhaseOptions(1), weight=PhaseOptions(1), kkt="best", channels_last=channels_last,
        precision="bf16",
    )  # fmt: skip
    # A single channel is stored in both layouts alike, but PyTorch goes by the strides.
    learned.model.register_forward_pre_hook(lambda _, args: seen.update([args[0].stride()[1] == 1]))
    learned.run(stream(2))
    assert set(seen) == {innermost}


def test_auto_is_channels_last_on_a_gpu_with_half_precision() -> None:
    found = {p: [ForwardOptions(p).innermost(torch.device(kind)) for kind in ("cpu", "cuda")] for p in ("fp32", "bf16")}  # type: ignore[arg-type]
    assert found == {"fp32": [False, False], "bf16": [False, True]}
    assert ForwardOptions("fp32", True).placed(torch.zeros(2, 3, 4), torch.device("cpu")).stride() == (12, 4, 1)


@pytest.mark.parametrize("made", [lambda **o: Learner(convert(SmallNet()), **o),
                                  lambda **o: Multitask(SmallNet(), PhaseOptions(), **o)])  # fmt: skip
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "half"}, "^precision must be one of fp32, bf16, fp16, got 'half'$"),
        ({"channels_last": 1}, '^channels_last must be True, False or "auto", got 1$'),
    ],
)
def test_wrong_options_are_refused(made: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        made(**options)


# No wait


class Reads(TorchDispatchMode):
    """Counts the calls for which the host waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = call._schema.name
        masked = name.startswith("aten::index") and any(
            i.dtype in (torch.bool, torch.uint8) for given in args[1:] if isinstance(given, list | tuple)
            for i in given if isinstance(i, Tensor)
        )  # fmt: skip
        if masked or name in {f"aten::{n}" for n in ("_local_scalar_dense", "nonzero", "masked_select", "equal")}:
            self.counts[name] += 1
        return call(*args, **(kwargs or {}))


@cases(
    "method, precision", [("exssnet", "fp16"), ("wsn", "bf16")],
    [("exssnet", "fp32"), (Sequential(), "fp32"), (Sequential(), "fp16")],
)  # fmt: skip
def test_no_step_reads_a_value(method: Any, precision: str) -> None:
    """In training or evaluation: four times as many steps read as many values."""
    phase, counts = PhaseOptions(1, 0.03, "sgd"), []
    for batch_size in (20, 5):
        model = SmallNet() if isinstance(method, Strategy) else convert(SmallNet(), 0.3)
        learned = Learner(model, method, mask=phase, weight=phase, batch_size=batch_size, precision=precision)  # type: ignore[arg-type]
        watching = watched(learned)
        watching.learner = None
        with Reads() as reads:
            learned.run(stream(1))
        counts.append(reads.counts)
        assert len(watching.steps) == 2 * 60 // batch_size
    assert counts[0] == counts[1]
    assert counts[0]["aten::_local_scalar_dense"] > 0


def test_such_a_read_is_counted() -> None:
    with Reads() as reads:
        int(torch.ones(2).sum())
        torch.ones(2)[torch.ones(2) > 0]
    assert reads.counts == {"aten::_local_scalar_dense": 1, "aten::index": 1}


# Data on a device


def pictures(**more: Any) -> Relabelled:
    """Colour images of 8 bits, of which a task has some."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (40, 3, 6, 5), dtype=torch.uint8, generator=generator)
    mean, std = torch.rand(2, 3, 1, 1, generator=generator)
    data = Labelled(images, torch.arange(40) % 4, mean=mean, std=std + 1, augment=CropFlip(3, 2))
    return Relabelled.of(replace(data, **more)).select(torch.arange(5, 32))


def passes(data: Any) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.Generator().manual_seed(2)
    data.restart()
    parts = loader(data, 8, shuffle=True, generator=order)
    return (batch for _ in range(2) for batch in parts)


class Places(TorchDispatchMode):
    """Notes where the indices are by which tensors are indexed."""

    def __init__(self) -> None:
        super().__init__()
        self.of_indices: set[str] = set()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if call is torch.ops.aten.index.Tensor:
            self.of_indices |= {i.device.type for i in args[1] if i is not None}
        return call(*args, **(kwargs or {}))


def test_data_on_a_device_are_the_same_batches() -> None:
    for (x, y), (a, b) in zip(passes(pictures()), passes(pictures().to("cpu")), strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)


def test_batches_of_data_on_a_device_are_made_there_and_ask_for_no_value() -> None:
    data, there = pictures().to("meta"), Places()
    assert isinstance(data.dataset, Labelled)
    assert data.dataset.images.dtype == torch.uint8
    assert data.dataset.images.shape == (27, 3, 6, 5)
    with there:
        found = list(batches(passes(data), torch.device("meta"), ForwardOptions("bf16", True)))
    assert there.of_indices == {"meta"}
    assert [x.shape[0] for x, _ in found] == [8, 8, 8, 3] * 2
    assert {t.device.type for batch in found for t in batch} == {"meta"}
    assert {x.dtype for x, _ in found} == {torch.float32}
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in found)


def test_only_data_that_take_a_quarter_of_the_free_memory_go_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes, moved = 27 * 3 * 6 * 5, []
    monkeypatch.setattr(Relabelled, "to", lambda self, device: moved.append(device) or self)
    for free, times in ((4 * nbytes, 1), (4 * nbytes - 1, 0)):
        moved.clear()
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 8 * free))
        resident(pictures(), CUDA)
        assert moved == [CUDA] * times


class Items:
    """Images outside memory."""

    shape = torch.Size((40, 3, 6, 5))

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.zeros(len(index), 3, 6, 5)


@pytest.mark.parametrize(
    "data",
    [pictures(augment=lambda x: x), pictures(transform=lambda x: x), pictures(images=Items()),
     Relabelled.join([pictures(), pictures()], [0, 4])],
    ids=["own augmentation", "transform", "not in memory", "joined"],
)  # fmt: skip
def test_other_data_stay_on_the_cpu(data: Relabelled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    assert resident(data, CUDA) is data


def test_on_a_cpu_data_stay_as_they_are() -> None:
    data = pictures()
    assert resident(data, torch.device("cpu")) is data


def test_data_outside_memory_are_not_copied_to_a_device() -> None:
    with pytest.raises(ValueError, match=r"^to: a Labelled with its images in a tensor is needed, got _Joined$"):
        Relabelled.join([pictures(), pictures()], [0, 4]).to("meta")


class FakeStream:
    """Notes what waits for what."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def __enter__(self) -> None:
        self.log.append(f"{self.name} begins")

    def __exit__(self, *_: object) -> None:
        self.log.append(f"{self.name} ends")

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class OnCpu:
    """A batch that notes its copies."""

    device = torch.device("cpu")

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def to(self, device: torch.device, non_blocking: bool = False) -> "OnCpu":
        self.log.append(f"{self.name} to {device.type}{' without a wait' if non_blocking else ''}")
        return self

    def pin_memory(self) -> "OnCpu":
        self.log.append(f"{self.name} is pinned")
        return self

    def record_stream(self, stream: FakeStream) -> None:
        self.log.append(f"{self.name} is used by {stream.name}")

    def dim(self) -> int:
        return 2


def test_a_batch_is_copied_beside_the_step_before_and_read_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    now, aside = FakeStream(log, "training"), FakeStream(log, "copying")
    fake = SimpleNamespace(Stream=lambda _: aside, current_stream=lambda _: now, stream=lambda stream: stream)
    monkeypatch.setattr(exssnet.continual.forward.torch, "cuda", fake)

    def read() -> Iterator[tuple[OnCpu, OnCpu]]:
        for i in range(2):
            log.append(f"read {i}")
            yield OnCpu(log, f"x{i}"), OnCpu(log, f"y{i}")

    for i, _ in enumerate(batches(read(), CUDA, ForwardOptions())):  # type: ignore[arg-type]
        log.append(f"step {i}")
    assert log[: log.index("step 0") + 1] == [
        "read 0", "copying begins", "x0 is pinned", "x0 to cuda without a wait", "y0 is pinned",
        "y0 to cuda without a wait", "copying ends",
        "training waits for copying", "x0 is used by training", "y0 is used by training",
        "x0 to cuda without a wait", "y0 to cuda without a wait", "step 0",
    ]  # fmt: skip
    assert log.index("read 1") > log.index("step 0")


# With a GPU


@pytest.mark.gpu
@precisions
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("augment", [None, CropFlip(0, 1), lambda x: x], ids=["resident", "crop-flip", "pinned"])
def test_no_step_waits_for_the_gpu(precision: str, optimizer: str, augment: Any) -> None:
    """In the second epoch, the steps 15 to 28 of a phase, when kernels are chosen and compiled."""
    phase = PhaseOptions(2, 0.03, optimizer)  # type: ignore[arg-type]
    learned = Learner(convert(SmallNet(), 0.3).cuda(), mask=phase, weight=phase, batch_size=6, precision=precision)  # type: ignore[arg-type]

    def mode(task: int, name: str, step: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if 16 <= step < 26 else "default")

    watched(learned).at_step = mode
    (task,) = stream(1, validation=0)
    try:
        learned.learn(replace(task, train=task.train.with_source(augment=augment)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@precisions
def test_a_stream_is_learned_on_a_gpu(precision: str) -> None:
    phase = PhaseOptions(4, 0.03)
    learned = Learner(convert(SmallNet(), 0.3).cuda(), mask=phase, weight=phase, batch_size=20, precision=precision)  # type: ignore[arg-type]
    assert learned.run(stream(2)).tril().amax(1).min() > 0.7


@pytest.mark.gpu
def test_data_on_a_gpu_have_the_order_and_the_augmentation_of_the_cpu() -> None:
    for (x, y), (a, b) in zip(passes(pictures()), passes(pictures().to("cuda")), strict=True):
        assert torch.allclose(x, a.cpu(), atol=1e-6)
        assert torch.equal(y, b.cpu())
