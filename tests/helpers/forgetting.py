"""Five small networks, and the plain record that a finished task of them is compared with."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from accuracy import FLOOR
from torch import Tensor, nn

from exssnet import Phases, convert
from exssnet.nn import TENSORS, evaluation
from exssnet.nn.models import BasicBlock

WIDTH = 6


class Noted(nn.Module):
    """Has a state that is no tensor."""

    note = "a note"

    def forward(self, x: Tensor) -> Tensor:
        return x

    def get_extra_state(self) -> str:
        return self.note

    def set_extra_state(self, state: str) -> None:
        self.note = state


class Net(nn.Module):
    """A body that ends in WIDTH features, a place where a norm may be put in later, and a head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.late, self.head = body, nn.Identity(), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.late(self.body(x)))
        return out


class Text(nn.Module):
    """The maximum over time of a convolution over embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(9, 5), nn.Conv1d(5, WIDTH, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.embedding(x).transpose(1, 2)).relu().amax(2)


class Encoder(nn.Module):
    """The mean over time of one layer of a Transformer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(1)


class Heads(Net):
    """An unmasked head for every second task, an affine norm with two names, a frozen layer, a state that is no
    tensor, and a scale that training updates but a state dict does not hold."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(5, WIDTH), nn.ReLU(), Noted()))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm = self.same_norm = nn.LayerNorm(WIDTH)
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(2))
        self.register_buffer("scale", torch.ones(WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.frozen(self.body(x)))
        if self.training:
            with torch.no_grad():
                self.scale.lerp_(x.abs().mean(0).to(self.scale.dtype), 0.2)
        x = self.head(self.late(self.same_norm(x / self.scale)))
        return torch.cat([head(x) for head in self.heads], 1)


def _perceptron() -> Net:
    return Net(nn.Sequential(nn.Linear(5, WIDTH), nn.ReLU()))


def _residual() -> Net:
    return Net(nn.Sequential(nn.Conv2d(1, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(),
                             BasicBlock(WIDTH, WIDTH, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))  # fmt: skip


NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Tensor]]] = {
    "perceptron": (_perceptron, lambda g: torch.randn(6, 5, generator=g)),
    "residual": (_residual, lambda g: torch.randn(6, 1, 4, 4, generator=g)),
    "text": (lambda: Net(Text()), lambda g: torch.randint(9, (6, 7), generator=g)),
    "transformer": (lambda: Net(Encoder()), lambda g: torch.randn(6, 3, WIDTH, generator=g)),
    "heads": (Heads, lambda g: torch.randn(6, 5, generator=g)),
}


def plain_network(kind: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[kind][0]()


def fresh_phases(kind: str, seed: int = 0) -> Phases:
    """Without tasks, over a converted network."""
    return Phases(convert(plain_network(kind, seed), 0.4, exclude=["heads.*"] if kind == "heads" else []))


def batch(kind: str, seed: int, dtype: torch.dtype) -> Tensor:
    x = NETWORKS[kind][1](torch.Generator().manual_seed(seed))
    return x.to(dtype) if x.is_floating_point() else x


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """In evaluation mode; every module is in its mode again afterwards."""
    with evaluation(model):
        out: Tensor = model(x)
    return out.clone()


@dataclass
class Finished:
    """A finished task as anybody could have written it down: dense tensors, copied when it was finished."""

    masks: dict[str, Tensor]
    weights: dict[str, Tensor]  # what each masked layer multiplies by
    state: dict[str, Tensor]  # every other parameter and buffer
    frozen: set[str]  # names of the state that no task has its own of
    scores: dict[str, Tensor]  # that were kept
    logits: dict[object, Tensor] = field(default_factory=dict)  # by dtype, or "autocast"

    @classmethod
    def of(cls, phases: Phases) -> "Finished":
        """Of the active task, which the model is the network of."""
        layers = phases.layers
        assert phases.active is not None
        masks = {n: phases.bank.mask(phases.active, n).clone() for n in layers}
        weights = {n: torch.where(masks[n], layer.dense_weight.detach(), 0) for n, layer in layers.items()}
        masked = {f"{n}.{key}" for n in layers for key in TENSORS}
        tensors = {**dict(phases.model.named_parameters()), **dict(phases.model.named_buffers())}
        state = {n: t.detach().clone() for n, t in tensors.items() if n not in masked}
        scores = phases.scores[phases.active] if phases.active < len(phases.scores) else {}
        return cls(masks, weights, state, set(phases.frozen_parameters()), {n: t.clone() for n, t in scores.items()})

    def copy(self) -> "Finished":
        """Its tables anew; the tensors are never written to."""
        tables = (self.masks, self.weights, self.state, self.frozen, self.scores, self.logits)
        return Finished(*map(copy.copy, tables))  # type: ignore[arg-type]

    def move(self, dtype: torch.dtype) -> None:
        """What ``model.to(dtype)`` makes of the task."""
        frozen = {n: t for n, t in self.state.items() if n in self.frozen}
        if any(not torch.equal(t, t.to(dtype).to(t.dtype)) for t in (*self.weights.values(), *frozen.values())):
            self.logits.clear()
        self.weights = {n: w.to(dtype) for n, w in self.weights.items()}
        self.state |= {n: t.to(dtype) for n, t in frozen.items()}

    def plain(self, kind: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What plain PyTorch makes of the record."""
        model = plain_network(kind).to(dtype)
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        given = self.state | self.weights | {f"{n}.weight": w for n, w in self.weights.items()}
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(given[name])
        with torch.autocast("cpu", enabled=False):
            return logits(model, x.to(dtype) if x.is_floating_point() else x)

    def check_logits(self, kind: str, got: Tensor, x: Tensor, dtype: torch.dtype) -> None:
        """Bitwise what they were; at first, as right as plain PyTorch is.

        Or right to FLOOR ulps: of few logits whose layers round to 16 bits, one network may happen to round well.
        """
        if dtype not in self.logits:
            truth, plain = self.plain(kind, x, torch.float64), self.plain(kind, x, dtype)
            error, budget = ((t.double() - truth).abs().max() for t in (got, plain))
            assert error <= max(2 * budget, FLOOR * torch.finfo(dtype).eps * truth.abs().max())
            self.logits[dtype] = got
        assert torch.equal(got, self.logits[dtype]), f"logits off by {(got - self.logits[dtype]).abs().max():.3g}"

    def check_stored(self, phases: Phases, task: int) -> None:
        """The masks, the weights below them and the kept scores are bitwise what they were."""
        for name, weight in phases.weights_before().items():
            mask = phases.bank.mask(task, name)
            assert torch.equal(mask, self.masks[name]), f"task {task}'s mask of {name} has changed"
            assert torch.equal(weight[mask], self.weights[name][mask]), f"task {task}'s weights of {name} have changed"
            if self.scores:
                assert torch.equal(phases.scores[task][name], self.scores[name]), f"task {task}'s scores have changed"
