"""The phases of a task over a converted model: which task is active, and which parameters it may train."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .freezing import freeze_weights
from .masks import MaskBank
from .nn import SupermaskLayer, supermask_layers, unconvert
from .ops import unpack_mask

Phase = Literal["idle", "mask", "weight", "joint"]


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients for the length of a block; then every module is in the mode it was in."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode


class Phases:
    """Takes a converted model from task to task: ``start_task`` -> ``start_weight_phase`` -> ``finish_task``.

    Everything that is not a supermask layer's weight belongs to one task: the parameters that require a gradient when
    this object is made (biases, affine norms), and the persistent buffers (batch norm statistics). They start anew
    for each task, are stored when it is finished, and come back with ``activate``. Parameters that require none are
    frozen. So nothing that two tasks share can change, except the free weights of the task at hand.

        phases = Phases(convert(model, density=0.05))
        phases.start_task()                    # the mask phase: train phases.parameters(), the scores
        phases.start_weight_phase()            # train phases.parameters(), the free values
        phases.finish_task()                   # masks and statistics are stored; the task stays active
        phases.activate(0)                     # the model now is task 0's network

    model: a model that went through `convert`.
    keep_scores: dtype in which the scores of finished tasks are kept for KKT (float32, float16, bfloat16), or None
        to drop them.
    seed: of the random scores; task t's depend on seed and t alone.
    Calls out of order raise RuntimeError and change nothing.
    """

    def __init__(self, model: nn.Module, keep_scores: torch.dtype | None = torch.float32, seed: int = 0) -> None:
        self.model = model
        self.layers: dict[str, SupermaskLayer] = dict(supermask_layers(model))
        if not self.layers:
            raise ValueError("Phases: the model has no supermask layers: pass it through convert first")
        self.keep_scores = keep_scores
        self.seed = seed
        self.bank = MaskBank({name: layer.weight.shape for name, layer in self.layers.items()})
        self.phase: Phase = "idle"
        self.active: int | None = None
        self.scores: list[dict[str, Tensor]] = []  # of finished tasks
        self.states: list[dict[str, Tensor]] = []  # of finished tasks: what differs from the initial state
        self._open_masks: dict[str, Tensor] = {}
        self._open_free: dict[str, Tensor] = {}
        self._open_scores: dict[str, Tensor] = {}
        self._weights_before: dict[str, Tensor] = {}  # of the joint phase, which trains them in place
        masked = {f"{name}.{key}".lstrip(".") for name in self.layers for key in ("weight", "scores", "free_values")}
        self._trainable = {n for n, p in model.named_parameters() if p.requires_grad and n not in masked}
        self._frozen = {n for n, p in model.named_parameters() if not p.requires_grad} - masked
        self.initial = {n: t.detach().clone() for n, t in model.state_dict().items() if n not in masked | self._frozen}
        for layer in self.layers.values():
            layer._clear()

    # The phases

    def start_task(self, scores: Mapping[str, Tensor] | None = None, joint: bool = False) -> int:
        """Begin the mask phase of the next task and return the task's number.

        scores: initial scores by layer name, copied (KKT); None for random ones.
        joint: train the dense weights together with the scores (WSN, Kang et al. 2022); the weights that earlier
            tasks use must then be guarded, see `guard`.
        """
        self._require("start_task", "idle")
        self._refuse_strangers()
        if scores is None:
            scores = self.random_scores(len(self.bank))
        if set(scores) != set(self.layers):
            raise ValueError(f"start_task: expected scores of the layers {sorted(self.layers)}, got {sorted(scores)}")
        for name, layer in self.layers.items():
            if scores[name].shape != layer.weight.shape:
                raise ValueError(
                    f"start_task: scores of {name} must have shape {tuple(layer.weight.shape)}, "
                    f"got {tuple(scores[name].shape)}"
                )
        self._load_state({})
        self._weights_before = {name: layer.weight.clone() for name, layer in self.layers.items()} if joint else {}
        for name, layer in self.layers.items():
            layer.use_scores(scores[name])
            layer.weight.requires_grad_(joint)
        self.phase, self.active = "joint" if joint else "mask", len(self.bank)
        return self.active

    def start_weight_phase(self, exclusive: bool = True) -> None:
        """Fix the masks and make the compact values trainable.

        exclusive: only the free weights, mask and not used before (ExSSNeT); else the whole mask, which overwrites
        earlier tasks' weights (SSNeT).
        """
        self._require("start_weight_phase", "mask")
        self._fix_masks()
        for name, layer in self.layers.items():
            mask = self._open_masks[name]
            self._open_free[name] = self.bank.free(name, mask) if exclusive else mask
            layer.use_values(mask, self._open_free[name])
        self.phase = "weight"

    def prune(self, keep: Mapping[str, Tensor]) -> None:
        """In the weight phase: of the free weights keep those of the bool masks; the others leave the task's mask.

        Training goes on with what is left (PackNet, Mallya & Lazebnik, CVPR 2018). Optimizers must be made anew.
        """
        self._require("prune", "weight")
        for name, layer in self.layers.items():
            free = self._open_free[name]
            layer.store_values(free)
            dropped = free & ~keep[name]
            self._open_masks[name], self._open_free[name] = self._open_masks[name] & ~dropped, free & ~dropped
            layer.use_values(self._open_masks[name], self._open_free[name])

    def finish_task(self) -> int:
        """Store the task's weights, masks, scores and state; it stays active. Returns its number."""
        self._require("finish_task", "mask", "joint", "weight")
        if self.phase != "weight":
            self._fix_masks()
        for name, layer in self.layers.items():
            if self.phase == "weight":
                layer.store_values(self._open_free[name])
            layer.weight.requires_grad_(False)
        state = {
            n: t.clone() for n, t in self._live_state().items() if not torch.equal(t, self.initial[n].to(t.device))
        }
        keep = self.keep_scores
        scores = {} if keep is None else {name: s.to(keep) for name, s in self._open_scores.items()}
        self.phase = "idle"
        task = self.adopt(self._open_masks, state, scores)
        self._close()
        return task

    def abandon_task(self) -> None:
        """Drop the open task and what it trained; the last finished task, if any, becomes active."""
        self._require("abandon_task", "mask", "joint", "weight")
        for name, layer in self.layers.items():
            layer._clear()
            layer.weight.requires_grad_(False)
            if name in self._weights_before:
                layer.weight.copy_(self._weights_before[name])
        self._close()
        self.phase, self.active = "idle", None
        self._load_state({})
        if len(self.bank):
            self.activate(len(self.bank) - 1)

    def adopt(self, masks: Mapping[str, Tensor], state: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> int:
        """Append a task that is already learned, and activate it: its masks (bool or packed), state and scores."""
        return self.adopt_all([(masks, state, scores)])

    def adopt_all(
        self, tasks: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]]]
    ) -> int:
        """Append tasks that are already learned, each (masks, state, scores), and activate the last."""
        self._require("adopt", "idle")
        for masks, state, scores in tasks:
            self.bank.add(masks)
            self.states.append(dict(state))
            if scores:
                self.scores.append(dict(scores))
        if tasks:
            self.activate(len(self.bank) - 1)
        return len(self.bank) - 1

    def activate(self, task: int) -> None:
        """Make the model the network of a finished task: its masks, its batch norms, its biases."""
        self._require("activate", "idle")
        masks = {name: self.bank.mask(task, name).to(layer.weight.device) for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            layer.use_values(masks[name], torch.zeros_like(masks[name]))
        self._load_state(self.states[task])
        self.active = task

    @contextmanager
    def using(self, task: int) -> Iterator[nn.Module]:
        """The network of a finished task for the length of a block, in any phase; then all is as it was."""
        held = {
            name: (dict(layer._parameters), dict(layer._buffers), layer._seen, layer._made)
            for name, layer in self.layers.items()
        }  # what was made of a pattern as well: a CUDA graph may hold its address
        state = {n: t.clone() for n, t in self._live_state().items()}
        phase, active = self.phase, self.active
        self.phase = "idle"
        try:
            self.activate(task)
            yield self.model
        finally:
            self._write_state(state)
            for name, layer in self.layers.items():
                parameters, buffers, layer._seen, layer._made = held[name]
                for key in ("scores", "free_values"):
                    layer._parameters[key] = parameters[key]
                layer._buffers.update({k: b for k, b in buffers.items() if k in layer._non_persistent_buffers_set})
            self.phase, self.active = phase, active

    # What is trained

    def parameters(self) -> list[Tensor]:
        """What the present phase trains: scores or free values, then the task's own unmasked parameters."""
        return self.masked_parameters() + self.dense_weights() + self.task_parameters()

    def masked_parameters(self) -> list[Tensor]:
        """Scores (mask and joint phase), or free values (weight phase; possibly none)."""
        found = (p for layer in self.layers.values() for p in (layer.scores, layer.free_values))
        return [p for p in found if p is not None]

    @property
    def nbytes(self) -> int:
        """Bytes that are kept of all finished tasks: weights, packed masks, states, and scores where they are kept."""
        tables = [*self.states, *self.scores, {name: layer.weight for name, layer in self.layers.items()}]
        return self.bank.nbytes + sum(t.nbytes for table in tables for t in table.values())

    def statistics(self) -> list[Tensor]:
        """The running statistics of the model's norms, and whatever other floating point state has no gradient."""
        return [t for n, t in self.model.named_buffers() if n in self.initial and t.is_floating_point()]

    def free_mask(self, name: str) -> Tensor:
        """In the weight phase: where a layer's free values lie, bool of its weight's shape, in flat order."""
        self._require("free_mask", "weight")
        return self._open_free[name]

    def dense_weights(self) -> list[Tensor]:
        """The weights that the joint phase trains in place; none in other phases."""
        return [layer.weight for layer in self.layers.values()] if self.phase == "joint" else []

    def task_parameters(self) -> list[Tensor]:
        """Parameters without a mask, which each task has its own of."""
        return [p for n, p in self.model.named_parameters() if n in self._trainable]

    def frozen_parameters(self) -> dict[str, Tensor]:
        """Parameters without a mask that never train, by name: the same for all tasks."""
        return {n: p for n, p in self.model.named_parameters() if n in self._frozen}

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """In the joint phase: hold the weights that earlier tasks use through every step of the optimizer."""
        self._require("guard", "joint")
        used = {layer.weight: self.bank.used_mask(name) for name, layer in self.layers.items()}
        freeze_weights(
            optimizer, {w: unpack_mask(bits.to(w.device), w.shape) for w, bits in used.items() if bits is not None}
        )

    def random_scores(self, task: int) -> dict[str, Tensor]:
        """The random initial scores of a task."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + task)
        return {name: layer.random_scores(generator) for name, layer in self.layers.items()}

    def snapshot(self) -> dict[str, Any]:
        """A copy of all that the open phase trains and of the task's state; `restore` puts it back."""
        return {
            "phase": self.phase,
            "masked": [p.detach().clone() for p in self.masked_parameters() + self.dense_weights()],
            "state": {n: t.clone() for n, t in self._live_state().items()},
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Return to a snapshot of the same phase."""
        if snapshot["phase"] != self.phase:
            raise RuntimeError(f"restore: the snapshot is of the {snapshot['phase']} phase, this is {self.phase}")
        with torch.no_grad():
            for parameter, value in zip(
                self.masked_parameters() + self.dense_weights(), snapshot["masked"], strict=True
            ):
                parameter.copy_(value)
        self._write_state(snapshot["state"])

    def weights_before(self) -> dict[str, Tensor]:
        """The weights as they were before the open task, by layer name, where the joint phase trains them in place."""
        return dict(self._weights_before)

    def open_tensors(self) -> dict[str, Tensor]:
        """All that the open phase has beyond the finished tasks; these tensors themselves, no copies.

        scores/LAYER (in the weight phase those that the masks were taken from), free/LAYER where weights are free,
        weight/LAYER in the joint phase, state/NAME.
        """
        found: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            scores = self._open_scores[name] if layer.scores is None else layer.scores.detach()
            found[f"scores/{name}"] = scores
            if layer.free_values is not None:
                found[f"free/{name}"] = layer.free_values.detach()
            if self.phase == "joint":
                found[f"weight/{name}"] = layer.weight.detach()
        return found | {f"state/{n}": t.detach() for n, t in self._live_state().items()}

    def reopen(self, phase: Phase, scores: Mapping[str, Tensor], exclusive: bool = True) -> None:
        """Open a task again in a phase, from the scores of `open_tensors`; its other tensors are then to be filled."""
        self.start_task(scores, joint=phase == "joint")
        if phase == "weight":
            self.start_weight_phase(exclusive)

    def fold(self, task: int) -> nn.Module:
        """A plain dense copy of a finished task's network, which needs no exssnet."""
        with self.using(task):
            plain = copy.deepcopy(self.model)
        unconvert(plain)
        return plain

    # Inside

    def _close(self) -> None:
        self._open_masks, self._open_free, self._open_scores, self._weights_before = {}, {}, {}, {}

    def _fix_masks(self) -> None:
        self._open_masks = {name: layer.mask() for name, layer in self.layers.items()}
        self._open_scores = {
            name: layer.scores.detach() for name, layer in self.layers.items() if layer.scores is not None
        }

    def _require(self, call: str, *phases: Phase) -> None:
        if self.phase not in phases:
            raise RuntimeError(f"{call} belongs to the {' or '.join(phases)} phase, but the phase is {self.phase}")

    def _refuse_strangers(self) -> None:
        masked = {id(p) for layer in self.layers.values() for p in (layer.scores, layer.free_values)}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and name not in self._trainable and id(parameter) not in masked:
                raise RuntimeError(
                    f"parameter {name} was not trainable when Phases was made: shared by all tasks, it would make them "
                    "forget. Set requires_grad before, or freeze it"
                )

    def _live_state(self) -> dict[str, Tensor]:
        """The task's own parameters and buffers, as they are in the model now."""
        state = self.model.state_dict()
        return {n: state[n] for n in self.initial}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        self._write_state(self.initial | dict(state))

    def _write_state(self, state: Mapping[str, Tensor]) -> None:
        live = self._live_state()
        with torch.no_grad():
            for name, value in state.items():
                live[name].copy_(value)
