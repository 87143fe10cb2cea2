"""Whole networks in each phase, ours and in plain PyTorch, from the same weights, scores and masks."""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exssnet import Phases, convert
from exssnet.nn.models import LeNet300100, ResNet18

from . import plain
from .timing import check_error, error, seconds_of

LEARNING_RATE = 1e-3
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Network:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int = 64

    def batches(self) -> Iterator[Batch]:
        """Random batches, so many that no way of training learns them by heart while it is timed."""
        torch.manual_seed(1)
        size = (self.batch, *self.shape)
        return itertools.cycle([(torch.randn(size), torch.randint(10, (self.batch,))) for _ in range(50)])


NETWORKS = {
    "lenet-300-100": Network(lambda: LeNet300100(784, 10), (784,)),
    "resnet18-20": Network(lambda: ResNet18(10, 20), (3, 32, 32)),
    "resnet18-64": Network(lambda: ResNet18(10, 64), (3, 32, 32)),
    "resnet18-4": Network(lambda: ResNet18(10, 4), (3, 16, 16), batch=16),  # for quick runs
}
PEERS = {"mask": ("sort", "no mask"), "weight": ("cached mask", "no mask"), "inference": ("dense", "dense, folded")}
"""What each phase is measured against; the first is what it is checked against."""


class Way:
    """One way to train or to evaluate a network. trained: what Adam changes, none for evaluation."""

    def __init__(self, name: str, model: nn.Module, trained: list[Tensor], channels_last: bool = False) -> None:
        self.name, self.model, self.trained, self.channels_last = name, model, trained, channels_last
        # Fused: the fastest there is for dense weights, and ours has no other.
        self.optimizer = torch.optim.Adam(trained, LEARNING_RATE, fused=True) if trained else None

    def input(self, x: Tensor) -> Tensor:
        x = x.to(next(t for t in (*self.model.parameters(), *self.model.buffers()) if t.is_floating_point()).dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def results(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Gradients of all that is trained, or the logits."""
        if self.optimizer is None:
            with torch.no_grad():
                return [self.model(x)]
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        return [t.grad for t in self.trained if t.grad is not None]

    def steps(self, data: Iterator[Batch]) -> Callable[[], None]:
        """A function that makes one step a call."""
        data = itertools.cycle([(self.input(x), y) for x, y in itertools.islice(data, 50)])

        def step() -> None:
            self.results(*next(data))
            if self.optimizer is not None:
                self.optimizer.step()

        return step


class Start:
    """Where every way starts: one network in plain PyTorch and under supermasks, at one density."""

    def __init__(self, network: Network, density: float) -> None:
        torch.manual_seed(0)
        self.network, self.density = network, density
        self.plain = network.build()
        self.model = convert(copy.deepcopy(self.plain), density, weights="signed_constant")
        self.phases = Phases(self.model)
        self.phases.start_task()
        self.masks, self.scores = {}, {}
        for name, layer in self.phases.layers.items():
            with torch.no_grad():
                self.plain.get_submodule(name).weight.copy_(layer.dense_weight)  # type: ignore[operator, union-attr]
            assert layer.scores is not None
            self.masks[name], self.scores[name] = layer.mask(), layer.scores.detach().clone()

    def ours(self, phase: str) -> Way:
        """Moves the network into a phase; call it once."""
        if phase == "mask":
            return Way("ours", self.model, self.phases.parameters())
        self.phases.start_weight_phase()
        way = Way("ours", self.model, self.phases.parameters())
        if phase == "weight":
            return way
        for x, y in itertools.islice(self.network.batches(), 2):
            way.results(x, y)  # for the statistics of the norms
        self.phases.finish_task()
        return Way("ours", self.model.eval(), [])

    def peer(self, how: str, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Way:
        """The same in plain PyTorch: one of `PEERS`."""
        trained: list[Tensor] = []
        finished = how.startswith("dense")
        model = (self.phases.fold(0).eval() if finished else copy.deepcopy(self.plain)).to(dtype)
        if how == "dense, folded":  # the norms in the convolutions, as `torch.nn.utils.fuse_conv_bn_eval` does it
            from torch.fx.experimental.optimization import fuse  # the module warns in torch 2.10

            model = fuse(model)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name, mask in self.masks.items() if not finished else ():
            layer = model.get_submodule(name)
            factors, scores = mask.to(dtype), self.scores[name].to(dtype)
            if channels_last and mask.dim() == 4:
                factors, scores = (t.contiguous(memory_format=torch.channels_last) for t in (factors, scores))
            trained.append(plain.reweight(layer, how, factors, scores, self.density))
        return Way(f"{how}, channels_last" if channels_last else how, model, trained, channels_last)

    def fastest_peer(self, how: str) -> Way:
        """Of a peer's two layouts, the one with the faster step."""
        ways = [self.peer(how)] + ([self.peer(how, channels_last=True)] if len(self.network.shape) == 3 else [])
        if len(ways) == 1:
            return ways[0]
        best = []
        for way in ways:
            step = way.steps(itertools.islice(self.network.batches(), 1))
            best.append(min(seconds_of(step) for _ in range(3)))
        return self.peer(how, channels_last=best[1] < best[0])  # anew: those have made steps

    def check(self, phase: str, ours: Way) -> None:
        """Our gradients, or logits, of one batch against the first peer's in float64 and float32.

        A ReLU's input near zero may have either sign in float32, and one flip outweighs all rounding: so the peer is
        given the signs that ours has. Where those are wrong, the values are. The peer's own error in float32, twice
        which is the budget, is the largest of all layers and of some orders of the batch: what batch norm cancels in
        one layer is rounding alone, and an ill-conditioned network multiplies one draw of it by chance. The hooks that
        read the signs keep norms and ReLUs apart, which are one operation when timed; tests/nn/test_blocks.py compares.
        """
        # Float64 convolutions are slow: as many images as fill vectors and registers, not a whole batch.
        x, y = (t[:16] for t in next(self.network.batches()))
        signs: dict[str, Tensor] = {}
        with _recorded(ours.model, self._relus(), signs):
            got = ours.results(ours.input(x), y)

        def peer(dtype: torch.dtype, first: int = 0) -> list[Tensor]:
            way = self.peer(PEERS[phase][0], dtype)
            for name, positive in signs.items():
                way.model.get_submodule(name).forward = _pinned(positive.roll(first, 0))  # type: ignore[method-assign]
            results = way.results(way.input(x.roll(first, 0)), y.roll(first, 0))
            if phase == "weight":
                return [r[mask] for r, mask in zip(results, self.masks.values(), strict=True)]
            return [results[0].roll(-first, 0)] if phase == "inference" else results

        truths = peer(torch.float64)
        draws = [peer(torch.float32, first) for first in range(4)]
        budget = max(error(p, truth) for draw in draws for p, truth in zip(draw, truths, strict=True))
        if phase == "inference":  # what is timed has no hooks, and its norms are folded
            folded = error(ours.results(ours.input(x), y)[0], truths[0])
            check_error("inference phase: the logits without hooks", folded, budget, truths[0])
        names = ["logits"] if phase == "inference" else [f"gradient of {name}" for name in self.masks]
        for name, result, truth in zip(names, got, truths, strict=True):
            check_error(f"{phase} phase: the {name}", error(result, truth), budget, truth)

    def _relus(self) -> list[str]:
        return [name for name, module in self.plain.named_modules() if isinstance(module, nn.ReLU)]

    def flops(self, phase: str, dense: bool) -> float:
        """Of the products of one step: output, weight gradient, and input gradient but the first layer's.

        dense: of all weights; else of the kept ones, but for the score gradient of the mask phase, which has all.
        Taps in the padding count, as usual.
        """
        pixels: dict[str, float] = {}
        handles = [
            self.plain.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: pixels.update({name: output.numel() / output.shape[1]})
            )
            for name in self.masks
        ]
        with torch.no_grad():
            copy.deepcopy(self.plain)(next(self.network.batches())[0])
        for handle in handles:
            handle.remove()
        first, total = next(iter(self.masks)), 0.0
        for name, mask in self.masks.items():
            kept = mask.numel() if dense else int(mask.sum())
            if phase == "inference":
                gradients = 0
            else:
                gradients = mask.numel() if phase == "mask" else kept
                gradients += kept if name != first else 0
            total += 2 * pixels[name] * (kept + gradients)
        return total


def _pinned(positive: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x.where(positive, 0)


@contextmanager
def _recorded(model: nn.Module, names: list[str], signs: dict[str, Tensor]) -> Iterator[None]:
    """Fills `signs`: where each activation is positive."""

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
            signs[name] = output.detach() > 0

        return record

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    yield
    for handle in handles:
        handle.remove()


def state_bytes(way: Way) -> int:
    """Of the optimizer's state, after a step."""
    if way.optimizer is None:
        return 0
    tensors = (t for state in way.optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    return sum(t.nbytes for t in tensors)
