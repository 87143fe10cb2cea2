"""Training steps that a GPU replays from a CUDA graph, without Python."""

import operator
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ..io.values import shown


class GraphError(RuntimeError):
    """A step that cannot be captured, or not be replayed any more. Nothing was computed."""


def graphed(
    step: Callable[..., Any], *examples: Tensor, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] = (),
    warmup: int = 3,
) -> "Graphed":  # fmt: skip
    """A step that is captured in a CUDA graph and replayed: same arguments, same results, no Python in between.

    Each call is one step. The first `warmup` calls run `step` itself: they tune the kernels and allocate the
    optimizer's state. The next call captures the step, and it and all later ones replay it. A batch of another shape
    or dtype runs `step` itself, in any order with replays. So does every batch on a device without graphs, such as a
    CPU. Neither `graphed` nor the capture trains: parameters, buffers, optimizer and random state change in calls
    alone.

    A replay repeats the GPU's work of one step. What `step` does in Python runs only in the first calls and during the
    capture: it must not read values of tensors, change attributes that the next step reads, or depend on the host's
    random numbers. It must clear the gradients itself.

    A learning rate may be set or scheduled as usual. Each replay takes the present one from the optimizer. The other
    options of an optimizer are constants of the graph.

    Args:
        step: Takes tensors. Returns a tensor, None, or tuples, lists and dictionaries of them.
        examples: A batch as the graph will take it: tensors on the model's device, whose values are not read. Without
            examples, the first call's arguments.
        model: The model that `step` uses.
        optimizer: The optimizer whose step it makes, or several. Of `torch.optim`, it needs ``capturable=True`` where
            it has this option, and ``fused=True`` otherwise (SGD).
        warmup: Calls before the capture, at least 1.

    Returns:
        A callable with the arguments of `step`. They may be on any device, are copied to the model's, and should be
        pinned if they are on the CPU. Its results are copies without a gradient, which later calls leave alone.

        It raises GraphError, a RuntimeError, if the step cannot be captured, and if something has changed since the
        first call: the phase, another parameter or buffer, training or evaluation, an option of the optimizer other
        than the learning rate. Then nothing was computed, and `graphed` must be called again.

    Raises:
        ValueError: If an optimizer's step cannot be captured, if an example is no tensor on the model's device, or if
            `warmup` is less than 1.

    Example::

        optimizer = phases.optimizer(torch.optim.Adam, lr=1e-3, fused=True, capturable=True)

        def step(x, y):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        train = exssnet.graphed(step, model=model, optimizer=optimizer)
        for x, y in batches:
            loss = train(x, y)
            schedule.step()
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    kind = GRAPHS.get(device.type)
    if warmup < 1:
        raise ValueError(f"graphed: warmup must be at least 1, got {warmup}")
    for number, example in enumerate(examples):
        _check_tensor(f"example {number}", example)
        if example.device != device:
            raise ValueError(f"graphed: example {number} is on {example.device}, but the model is on {device}")
    if kind is not None:
        for each in optimizers:
            _check_capturable(each)
    return Graphed(step, examples, model, optimizers, warmup, device, None if kind is None else kind(device))


class Graphed:
    """What `graphed` returns."""

    def __init__(
        self, step: Callable[..., Any], examples: Sequence[Tensor], model: nn.Module, optimizers: Sequence[Optimizer],
        warmup: int, device: torch.device, graph: "CudaGraph | None",
    ) -> None:  # fmt: skip
        self._step, self._model, self._device, self._graph, self._left = step, model, device, graph, warmup
        self._optimizers = optimizers
        self._inputs = [torch.empty_like(e) for e in examples] if examples else None  # what the graph reads
        self._rates = [torch.zeros((), device=device) for o in optimizers for _ in o.param_groups]  # it reads these too
        self._numbers: dict[int, float] = {}  # what the rates hold
        self._results: Any = None  # what the graph writes
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] | None = None  # and these; None before the capture
        self._seen: _Seen | None = None

    def __call__(self, *tensors: Tensor) -> Any:
        for number, t in enumerate(tensors):
            _check_tensor(f"argument {number}", t)
        if self._inputs is None:
            self._inputs = [torch.empty_like(t, device=self._device) for t in tensors]
        if len(tensors) != len(self._inputs):
            raise ValueError(f"graphed: the step takes {len(self._inputs)} tensors, got {len(tensors)}")
        if self._seen is not None:
            self._seen.check()
        fits = all(t.shape == e.shape and t.dtype == e.dtype for t, e in zip(tensors, self._inputs, strict=True))
        if self._graph is not None and fits and not self._left:
            for own, t in zip(self._inputs, tensors, strict=True):
                own.copy_(t, non_blocking=True)
            return self._replay(self._graph, self._inputs)
        if self._graph is None or not fits:
            results = self._eager(tensors)
        else:
            with self._graph.aside():
                results = self._eager(tensors)
            self._left -= 1
        if self._seen is None:  # now lazy modules have their parameters
            self._seen = _Seen(self._model, self._optimizers)
        return results

    def _eager(self, tensors: Sequence[Tensor]) -> Any:
        with self._rates_on_the_device():
            results = self._step(*(t.to(self._device, non_blocking=self._device.type != "cpu") for t in tensors))
        return tree_map_only(Tensor, Tensor.detach, results)

    def _replay(self, graph: "CudaGraph", inputs: Sequence[Tensor]) -> Any:
        self._set_rates()
        if self._gradients is None:
            self._gradients = self._capture(graph, inputs)
        graph.replay()
        for parameter, gradient in self._gradients:  # which a step of another batch may have replaced
            parameter.grad = gradient
        return tree_map_only(Tensor, Tensor.clone, self._results)

    def _capture(self, graph: "CudaGraph", inputs: Sequence[Tensor]) -> list[tuple[nn.Parameter, Tensor | None]]:
        """Capture the step, which computes nothing. Returns the parameters with their gradients."""
        host = random.getstate(), torch.get_rng_state()
        with self._rates_on_the_device():
            try:
                results = graph.capture(lambda: self._step(*inputs))
            except RuntimeError as error:
                cause: BaseException = error
                while cause.__context__ is not None:
                    cause = cause.__context__
                raise GraphError(
                    f"graphed: the step cannot be captured in a CUDA graph: {str(cause).partition(chr(10))[0]}"
                ) from error
        if random.getstate() != host[0] or not torch.equal(torch.get_rng_state(), host[1]):
            random.setstate(host[0])
            torch.set_rng_state(host[1])
            raise GraphError("graphed: the step draws random numbers on the host, which a replay would repeat")
        self._results = tree_map_only(Tensor, Tensor.detach, results)
        return [(p, p.grad) for p in self._model.parameters()]

    def _groups(self) -> list[dict[str, Any]]:
        return [group for o in self._optimizers for group in o.param_groups]

    def _set_rates(self) -> None:
        for i, (group, rate) in enumerate(zip(self._groups(), self._rates, strict=True)):
            lr = group["lr"]
            if isinstance(lr, Tensor):
                rate.copy_(lr)
            elif lr != self._numbers.get(i):
                rate.fill_(lr)
                self._numbers[i] = lr

    @contextmanager
    def _rates_on_the_device(self) -> Iterator[None]:
        """Within a block, learning rates are tensors that a graph can read again. Without a graph nothing changes."""
        groups = [] if self._graph is None else self._groups()
        before = [group["lr"] for group in groups]
        if groups:
            self._set_rates()
        try:
            for group, rate in zip(groups, self._rates, strict=False):
                group["lr"] = rate
            yield
        finally:
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate


class _Seen:
    """What a captured step depends on: the tensors and modules of a model, and the options of its optimizers."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._modules, self._optimizers = list(model.modules()), optimizers
        self._held, self._addresses, self._training = self._of_model()
        self._options = self._of_optimizers()

    def _of_model(self) -> tuple[list[Any], list[int], list[bool]]:
        """Parameters, buffers, submodules, written weights; the tensors' addresses; whether modules are in training."""
        attributes = [m.__dict__ for m in self._modules]  # each step asks, so no detour through `getattr` of modules
        slots = (t for a in attributes for t in (*a["_parameters"].values(), *a["_buffers"].values()))
        tensors = [t for t in slots if t is not None]
        parts = [part for a in attributes for part in a["_modules"].values()]
        written = [mode.in_graphs() for a in attributes if (mode := a.get("_mode")) is not None]
        return tensors + parts + written, [t.data_ptr() for t in tensors], [a["training"] for a in attributes]

    def _of_optimizers(self) -> list[dict[str, Any]]:
        groups = [(o.defaults, group) for o in self._optimizers for group in o.param_groups]
        return [{name: group[name] for name in names if name != "lr"} for names, group in groups]

    def check(self) -> None:
        """GraphError, in one sentence, for what has changed."""
        held, addresses, training = self._of_model()
        again = "call graphed again"
        if len(held) != len(self._held) or addresses != self._addresses or not all(map(operator.is_, held, self._held)):
            known = set(map(id, self._held))
            new = sum(id(each) not in known for each in held) or "addresses"
            raise GraphError(
                f"graphed: {new} of the model's parameters, buffers and modules are not those of the first call: "
                f"{again} after each change of phase, with a new optimizer"
            )
        if training != self._training:
            modes = ["training" if first else "evaluation" for first in (self._training[0], training[0])]
            raise GraphError(
                f"graphed: modules changed between training and evaluation since the first call (the model: "
                f"{modes[0]}, now {modes[1]}): {again}, once for each"
            )
        options = self._of_optimizers()
        if len(options) != len(self._options):
            raise GraphError(f"graphed: an optimizer has other parameter groups than at the first call: {again}")
        for before, after in zip(self._options, options, strict=True):
            for name, value in before.items():
                if not isinstance(value, Tensor) and after[name] != value:
                    raise GraphError(
                        f"graphed: {name} of an optimizer changed from {value} to {after[name]} since the first call, "
                        f"where only the learning rate may change: {again}"
                    )


class CudaGraph:
    """A CUDA graph of one step, and the stream on which the step is warmed up and captured."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream, self._graph = device, torch.cuda.Stream(device), torch.cuda.CUDAGraph()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within a block, work goes to the graph's stream, after the work before it and before the work after it."""
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            now.wait_stream(self._stream)

    def capture(self, step: Callable[[], Any]) -> Any:
        """Capture a step. Its results are those of the last replay."""
        now = torch.cuda.current_stream(self._device)
        torch.clear_autocast_cache()  # neither does the graph read casts from before it, nor anybody its own
        try:  # other threads, which pin memory, may go on
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                return step()
        finally:
            torch.clear_autocast_cache()
            torch.cuda.set_stream(now)  # a capture that fails leaves its own

    def replay(self) -> None:
        self._graph.replay()


GRAPHS: dict[str, Callable[[torch.device], CudaGraph]] = {"cuda": CudaGraph}
"""Graphs by type of device."""


def _check_tensor(what: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"graphed: {what} must be a tensor, got {shown(value)}")


def _check_capturable(optimizer: Optimizer) -> None:
    """ValueError for an optimizer of torch whose step cannot be captured."""
    name = type(optimizer).__name__
    needed = next((option for option in ("capturable", "fused") if option in optimizer.defaults), None)
    if needed is not None:
        if all(group[needed] for group in optimizer.param_groups):
            return
        raise ValueError(f"graphed: {name} must be made with {needed}=True, or a CUDA graph cannot capture its step")
    if type(optimizer).__module__.startswith("torch.optim"):
        raise ValueError(f"graphed: a CUDA graph cannot capture a step of {name}")
