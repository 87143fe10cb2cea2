"""The phases of a task over a converted model: which task is active, and which parameters it may train."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..kernels import memory
from ..nn import SupermaskLayer, stale, supermask_layers, unconvert
from ..nn.modes import NoMask, Values
from ..ops import unpack_mask
from . import owners, stored
from .freezing import freeze_weights
from .mask_bank import FreeRule, MaskBank
from .shared_weights import SharedWeights
from .task_state import TaskState
from .undo import held, undone_on_failure

Phase = Literal["idle", "mask", "weight", "joint"]
PHASES: tuple[Phase, ...] = ("idle", "mask", "weight", "joint")


class Phases:
    """Takes a converted model from task to task: ``start_task`` -> ``start_weight_phase`` -> ``finish_task``.

    Everything that is not a supermask layer's weight belongs to one task: the parameters that require a gradient when
    this object is made (biases, affine norms), and the buffers (batch norm statistics). They start anew for each task
    from what they are when the first one starts, are stored when it is finished, and come back with ``activate``.
    Parameters that require none are frozen. So nothing that two tasks share can change, except the free weights of the
    task at hand. Pretrained weights are loaded before the first task. A layer that is not called while a
    task is learned (the head of another task) keeps nothing in the task's mask.

        phases = Phases(convert(model, density=0.05))
        phases.start_task()                    # the mask phase: train phases.parameters(), the scores
        optimizer = phases.optimizer(torch.optim.AdamW, lr=1e-2)
        phases.start_weight_phase()            # train phases.parameters(), the free values, with a new optimizer
        phases.finish_task()                   # masks and statistics are stored; the task stays active
        phases.activate(0)                     # the model now is task 0's network

    model: a model that went through `convert`.
    keep_scores: dtype in which the scores of finished tasks are kept for KKT (float32, float16, bfloat16), or None
        to drop them.
    seed: of the random scores; task t's depend on seed and t alone.
    Calls out of order raise RuntimeError and change nothing. So does an optimizer's step after its phase has ended, and
    `load_state_dict` of the model where it would change finished tasks: see `state_dict`. Modules that are put in,
    replaced or removed later are refused. Of several `Phases` of one model, or of models that share layers, the last
    one made is the owner; the others refuse every call.
    """

    def __init__(self, model: nn.Module, keep_scores: torch.dtype | None = torch.float32, seed: int = 0) -> None:
        self.model = model
        self.layers: dict[str, SupermaskLayer] = dict(supermask_layers(model))
        if not self.layers:
            raise ValueError("Phases: the model has no supermask layers: pass it through convert first")
        self.keep_scores = keep_scores
        self.seed = seed
        self.bank = self._empty_bank()
        self.phase: Phase = "idle"
        self.active: int | None = None
        self.scores: list[dict[str, Tensor]] = []  # of finished tasks
        self.states: list[dict[str, Tensor]] = []  # of finished tasks: what differs from the initial state
        self._open_masks: dict[str, Tensor] = {}
        self._open_free: dict[str, Tensor] = {}
        self._open_scores: dict[str, Tensor] = {}
        self._weights = SharedWeights(self.layers)
        self.looking: list[int] = []  # threads that are in a block of `using`
        self.own = TaskState(model, self.layers)
        owners.end_joint(self)
        owners.own(self)
        self._ended("scores from before Phases was made")
        self._clear_modes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        owners.own(self)

    def __repr__(self) -> str:
        use = self.bank.total(len(self.bank) - 1) if len(self.bank) else None
        used = f", {100 * use.capacity:.1f} % of {use.weights:,} weights used" if use else ""
        where = "" if self.active is None else f", task {self.active} {'active' if self.phase == 'idle' else 'open'}"
        return (
            f"Phases({type(self.model).__name__}: {len(self.layers)} layers, {len(self.bank)} tasks finished{used}, "
            f"{self.phase} phase{where})"
        )

    # The phases

    @torch.inference_mode(False)
    def start_task(self, scores: Mapping[str, Tensor] | None = None, joint: bool = False) -> int:
        """Begin the mask phase of the next task and return the task's number.

        scores: initial scores by layer name, copied (KKT); None for random ones.
        joint: train copies of the dense weights together with the scores (WSN, Kang et al. 2022); those that earlier
            tasks use must then be guarded, see `guard`.
        """
        self.require("start_task", "idle")
        if not len(self.bank):
            self._check_finite("start_task")
            self.own.capture()
        if scores is None:
            scores = self.random_scores(len(self.bank))
        if set(scores) != set(self.layers):
            raise ValueError(f"start_task: expected scores of the layers {sorted(self.layers)}, got {sorted(scores)}")
        for name, layer in self.layers.items():
            if scores[name].shape != layer.dense_weight.shape:
                raise ValueError(
                    f"start_task: scores of {name} must have shape {tuple(layer.dense_weight.shape)}, "
                    f"got {tuple(scores[name].shape)}"
                )
        zero = [] if joint else [name for name, layer in self.layers.items() if not bool(layer.dense_weight.any())]
        if zero:
            raise ValueError(
                f"start_task: all weights of {zero[0]} are zero, so neither its scores nor what comes before it would "
                'learn: initialise the layer, exclude it, or convert(..., weights="signed_constant")'
            )
        self._ended("values of an earlier task")
        with undone_on_failure(self):
            self.own.write({})
            for name, layer in self.layers.items():
                layer.use_scores(scores[name])
            if joint:
                self._weights.train_copies()
        self.phase, self.active = "joint" if joint else "mask", len(self.bank)
        return self.active

    @torch.inference_mode(False)
    def start_weight_phase(self, exclusive: bool | FreeRule = True) -> None:
        """Fix the masks and make the compact values trainable.

        exclusive: only the free weights, mask and not used before (ExSSNeT); else the whole mask, which overwrites
        earlier tasks' weights (SSNeT). Or a function of a layer's name and mask that gives the mask of what trains.
        """
        self.require("start_weight_phase", "mask")
        self._check_finite("start_weight_phase")
        scores = self.masked_parameters()
        rule = exclusive if callable(exclusive) else self.bank.free if exclusive else lambda _, mask: mask
        with undone_on_failure(self):
            self._fix_masks()
            for name, layer in self.layers.items():
                mask = self._open_masks[name]
                self._open_free[name] = rule(name, mask)
                layer.use_values(mask, self._open_free[name])
            if not self.parameters():  # a loss needs something to go back to, and optimizers refuse empty lists
                layer.mode = Values(layer, mask, self._open_free[name])
        stale.phase_changes(self, scores, f"the scores of task {self.active}'s mask phase")
        self.phase = "weight"

    @torch.inference_mode(False)
    def prune(self, keep: Mapping[str, Tensor]) -> None:
        """In the weight phase: of the free weights keep those of the bool masks; the others leave the task's mask.

        Training goes on with what is left (PackNet, Mallya & Lazebnik, CVPR 2018). Optimizers must be made anew.
        """
        self.require("prune", "weight")
        self._ended(f"values of task {self.active} from before pruning")
        for name, layer in self.layers.items():
            free = self._open_free[name]
            layer.store_values(free)
            dropped = free & ~keep[name]
            self._open_masks[name], self._open_free[name] = self._open_masks[name] & ~dropped, free & ~dropped
            layer.use_values(self._open_masks[name], self._open_free[name])

    @torch.inference_mode(False)
    def finish_task(self) -> int:
        """Store the task's weights, masks, scores and state; it stays active. Returns its number."""
        self.require("finish_task", "mask", "joint", "weight")
        self._check_finite("finish_task")
        self.own.check_extra("finish_task")
        self._weights.put_back_used("finish_task", self.bank)
        if self.phase != "weight":
            self._fix_masks()
        kept = self.keep_scores is not None and len(self.scores) == len(self.bank)  # else those of earlier tasks lack
        scores = {name: s.to(self.keep_scores) for name, s in self._open_scores.items()} if kept else {}
        bank, states, all_scores = stored.adopted(self, [(self._open_masks, self.own.changed(), scores)])
        self._ended(f"parameters of task {self.active}'s {self.phase} phase")
        for name, free in self._open_free.items():
            self.layers[name].store_values(free)
        self._weights.end(store=True)
        self.states, self.scores, self.bank = states, all_scores, bank  # the bank last: other threads may serve
        self.phase, self.active = "idle", None
        self._close()
        self._activate(len(bank) - 1)
        return len(bank) - 1

    @torch.inference_mode(False)
    def abandon_task(self) -> None:
        """Drop the open task and what it trained; the last finished task, if any, becomes active."""
        self.require("abandon_task", "mask", "joint", "weight")
        self._ended(f"parameters of task {self.active}, which was abandoned")
        self._clear_modes()
        self._weights.end(store=False)
        self._close()
        self.phase, self.active = "idle", None
        self.own.write({})
        if len(self.bank):
            self._activate(len(self.bank) - 1)

    def adopt(self, masks: Mapping[str, Tensor], state: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> int:
        """Append a task that is already learned, and activate it: its masks (bool or packed), state and scores."""
        return self.adopt_all([(masks, state, scores)])

    @torch.inference_mode(False)
    def adopt_all(self, tasks: Sequence[stored.Learned]) -> int:
        """Append tasks that are already learned, each (masks, state, scores), and activate the last.

        Everything is copied. ValueError, before anything is changed, for what does not fit the model.
        """
        self.require("adopt", "idle")
        bank, states, scores = stored.adopted(self, tasks)
        with undone_on_failure(self):
            self.states, self.scores, self.bank = states, scores, bank
            if tasks:
                self._activate(len(bank) - 1)
        return len(self.bank) - 1

    @torch.inference_mode(False)
    def activate(self, task: int) -> None:
        """Make the model the network of a finished task: its masks, its batch norms, its biases."""
        self.require("activate", "idle")
        self._activate(task)

    def _activate(self, task: int) -> None:
        with undone_on_failure(self):
            self._use_masks(task)
            self.own.write(self.states[task])
        self.active = task

    def _use_masks(self, task: int) -> None:
        masks = {name: self.bank.mask(task, name).to(layer.dense_weight.device) for name, layer in self.layers.items()}
        with torch.inference_mode(False):
            for name, layer in self.layers.items():
                layer.use_values(masks[name], torch.zeros_like(masks[name]))

    @contextmanager
    def using(self, task: int) -> Iterator[nn.Module]:
        """The network of a finished task for the length of a block, in any phase; then all is as it was.

        Within the block only `using` and `fold` may be called. It belongs to one thread at a time: see
        `exssnet.continual.serving.Served` for several. A backward pass may follow of a forward that went before.
        """
        self.require("using", *PHASES, looking=True)
        put_back = held(self.layers.values())
        phase, active = self.phase, self.active
        self.looking.append(threading.get_ident())
        try:
            for name, weight in self.weights_before().items():
                self.layers[name].dense_weight = weight
            self._use_masks(task)
            with self.own.showing(self.states[task]):
                self.phase, self.active = "idle", task
                yield self.model
        finally:
            put_back()
            self.phase, self.active = phase, active
            self.looking.pop()

    # What is trained

    def parameters(self) -> list[Tensor]:
        """What the present phase trains: scores or free values, then the task's own unmasked parameters."""
        return self.masked_parameters() + self.dense_weights() + self.task_parameters()

    def optimizer(self, kind: Callable[..., torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
        """A new optimizer over what the present phase trains: ``kind(phases.parameters(), **options)``.

        To be made in each phase. In the joint phase it holds the weights that earlier tasks use, see `guard`.
        """
        self.require("optimizer", "mask", "joint", "weight")
        made = kind(self.parameters(), **options)
        if self.phase == "joint":
            self.guard(made)
        return made

    def masked_parameters(self) -> list[Tensor]:
        """Scores (mask and joint phase), or free values (weight phase; possibly none)."""
        return [p for each in self.layers.values() for p in (each.scores, each.free_values) if p is not None]

    @property
    def nbytes(self) -> int:
        """Bytes that are kept of all finished tasks: weights, packed masks, states, and scores where they are kept."""
        tables = [*self.states, *self.scores, {name: layer.dense_weight for name, layer in self.layers.items()}]
        return self.bank.nbytes + sum(t.nbytes for table in tables for t in table.values())

    def statistics(self) -> list[Tensor]:
        """The running statistics of the model's norms, and whatever other floating point state has no gradient."""
        return [t for n, t in self.model.named_buffers() if n in self.initial and t.is_floating_point()]

    def free_mask(self, name: str) -> Tensor:
        """In the weight phase: where a layer's free values lie, bool of its weight's shape, in flat order."""
        self.require("free_mask", "weight")
        return self._open_free[name]

    def dense_weights(self) -> list[Tensor]:
        """The copies of the weights that the joint phase trains; none in other phases."""
        return [layer.dense_weight for layer in self.layers.values()] if self.phase == "joint" else []

    def task_parameters(self) -> list[Tensor]:
        """Parameters without a mask, which each task has its own of."""
        return [p for n, p in self.model.named_parameters() if n in self.own.trainable]

    def frozen_parameters(self) -> dict[str, Tensor]:
        """Parameters without a mask that never train, by name: the same for all tasks."""
        return {n: p for n, p in self.model.named_parameters() if n in self.own.frozen}

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """In the joint phase: hold the weights that earlier tasks use through every step of the optimizer.

        Without it earlier tasks keep theirs as well, but this one is trained with other weights than it ends with.
        """
        self.require("guard", "joint")
        freeze_weights(optimizer, self._weights.put_back_used("guard", self.bank))

    def random_scores(self, task: int) -> dict[str, Tensor]:
        """The random initial scores of a task."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + task)
        return {name: layer.random_scores(generator) for name, layer in self.layers.items()}

    def snapshot(self) -> dict[str, Any]:
        """A copy of all that the open phase trains and of the task's state; `restore` puts it back."""
        self.require("snapshot", *PHASES)
        masked = [p.detach().clone() for p in self.masked_parameters() + self.dense_weights()]
        state = {n: t.clone() for n, t in self.own.live().items()}
        return {"phase": self.phase, "task": self.active, "masked": masked, "state": state}

    @torch.inference_mode(False)
    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Return to a snapshot of the same phase of the same task; RuntimeError, and no change, for another one."""
        self.require("restore", *PHASES)
        parameters, values = self.masked_parameters() + self.dense_weights(), snapshot["masked"]
        taken, now = (
            f"task {task}'s {phase} phase with {sum(t.numel() for t in tensors)} masked parameters"
            for task, phase, tensors in (
                (snapshot["task"], snapshot["phase"], values),
                (self.active, self.phase, parameters),
            )
        )
        if taken != now or [t.shape for t in values] != [p.shape for p in parameters]:
            raise RuntimeError(f"restore: the snapshot is of {taken}, this is {now}")
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        self.own.write(snapshot["state"])

    def weights_before(self) -> dict[str, Tensor]:
        """The weights that finished tasks use, by layer name, in any phase and for any thread; no copies."""
        return self._weights.tensors()

    def open_tensors(self) -> dict[str, Tensor]:
        """All that the open phase has beyond the finished tasks; these tensors themselves, no copies.

        scores/LAYER (in the weight phase those that the masks were taken from), free/LAYER where weights are free,
        weight/LAYER in the joint phase, state/NAME; called: which layers were, in the weight phase those with a mask.
        """
        masks = self._open_masks  # of the weight phase
        called = [bool(masks[name].any()) if masks else layer.mode.called for name, layer in self.layers.items()]
        tensors = {"called": torch.tensor(called)}
        for name, layer in self.layers.items():
            scores = self._open_scores[name] if layer.scores is None else layer.scores.detach()
            tensors[f"scores/{name}"] = scores
            if layer.free_values is not None:
                tensors[f"free/{name}"] = layer.free_values.detach()
            if self.phase == "joint":
                tensors[f"weight/{name}"] = layer.dense_weight.detach()
        return tensors | stored.state_tensors(self, self.own.live(), "state/")

    def reopen(self, phase: Phase, scores: Mapping[str, Tensor], called: Tensor, exclusive: bool | FreeRule) -> None:
        """Open a task again in a phase, from the scores of `open_tensors`; its other tensors are then to be filled."""
        self.start_task(scores, joint=phase == "joint")
        for layer, was in zip(self.layers.values(), called.tolist(), strict=True):
            layer.mode.called = was
        if phase == "weight":
            self.start_weight_phase(exclusive)

    def fold(self, task: int) -> nn.Module:
        """A plain dense copy of a finished task's network, which needs no exssnet."""
        with self.using(task):
            plain = copy.deepcopy(self.model)
        unconvert(plain)
        owners.disown(plain)
        return plain

    def state_dict(self) -> dict[str, Any]:
        """Everything in any phase, for `torch.save`: tensors (no copies) by name, and what they are of.

        The model's own `state_dict` is the network of the active or open task alone.
        """
        self.require("state_dict", *PHASES)
        tensors = stored.finished(self)
        if self.phase != "idle":
            tensors |= {f"open/{n}": t for n, t in self.open_tensors().items()}
            for name, layer in self.layers.items():
                if layer.packed_mask is not None and layer.packed_free_mask is not None:
                    tensors[f"open/mask/{name}"] = layer.packed_mask
                    tensors[f"open/free_mask/{name}"] = layer.packed_free_mask
        where = {"phase": self.phase, "active": self.active, "tasks": len(self.bank), "k": stored.kept(self)}
        return {**where, "tensors": tensors}

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to a `state_dict` of a model with the same layers, whatever this one has learned since.

        Optimizers are to be made anew. ValueError, before anything is changed, for what does not fit.
        """
        self.require("load_state_dict", *PHASES)
        phase, active, tasks = stored.parse(self, state, PHASES)
        pieces = stored.Pieces(state["tensors"])
        finished = stored.take_finished(self, pieces, tasks)
        opened = stored.take_open(self, pieces, phase)
        pieces.end()
        if self.phase != "idle":
            self.abandon_task()
        self._ended("parameters from before load_state_dict")
        self.bank, self.states, self.scores = self._empty_bank(), [], []
        finished.put(self)
        if active is None:
            self.active = None
            self._clear_modes()
        elif phase == "idle":
            self._activate(active)
        else:
            self._put_open(phase, opened)

    def _put_open(self, phase: Phase, opened: Mapping[str, Tensor]) -> None:
        """Open a task in the phase that the tensors of `open_tensors`, and the masks of a weight phase, are of."""
        scores = {name: opened[f"scores/{name}"] for name in self.layers}
        self.start_task(scores, joint=phase == "joint")
        for (name, layer), called in zip(self.layers.items(), opened["called"].tolist(), strict=True):
            layer.mode.called = called
            if phase == "weight":
                self._open_masks[name], self._open_free[name] = (
                    unpack_mask(opened[f"{kind}/{name}"], layer.dense_weight.shape).to(layer.dense_weight.device)
                    for kind in ("mask", "free_mask")
                )
                self._open_scores[name] = scores[name].detach().to(layer.dense_weight.device, copy=True)
                layer.use_values(self._open_masks[name], self._open_free[name])
                if layer.free_values is not None:
                    layer.free_values.data.copy_(opened[f"free/{name}"])
            elif phase == "joint":
                layer.dense_weight.data.copy_(opened[f"weight/{name}"])
        self.phase = phase
        self.own.write({n.removeprefix("state/"): t for n, t in opened.items() if n.startswith("state/")})

    # Inside

    def _close(self) -> None:
        self._open_masks, self._open_free, self._open_scores = {}, {}, {}
        memory.give_back_freed_memory()

    def _clear_modes(self) -> None:
        for layer in self.layers.values():
            layer.mode = NoMask()

    def _empty_bank(self) -> MaskBank:
        return MaskBank({name: layer.dense_weight.shape for name, layer in self.layers.items()})

    def _ended(self, what: str) -> None:
        """What trains now is about to train no more."""
        stale.phase_changes(self, self.masked_parameters(), what)

    def _check_finite(self, call: str) -> None:
        kinds = ("scores", "free_values", "dense_weight")
        trained = {f"{name}.{kind}": getattr(layer, kind) for name, layer in self.layers.items() for kind in kinds}
        stored.check_finite(call, trained | self.own.live())

    def _fix_masks(self) -> None:
        """The masks of the scores; layers that the task never called, while it called others, keep nothing."""
        used = {name for name, layer in self.layers.items() if layer.mode.used(layer)} or set(self.layers)
        self._open_masks = {
            name: layer.mask() if name in used else torch.zeros_like(layer.dense_weight, dtype=torch.bool)
            for name, layer in self.layers.items()
        }
        self._open_scores = {  # copies: an optimizer may still hold the parameters
            name: layer.scores.detach().clone() for name, layer in self.layers.items() if layer.scores is not None
        }

    def require(self, call: str, *phases: Phase, looking: bool = False) -> None:
        """RuntimeError unless this object owns the model as it was, in one of the phases, and no `using` is open."""
        owners.check(self, call)
        who = "this" if threading.get_ident() in self.looking else "another"
        if self.looking and not (looking and who == "this"):
            raise RuntimeError(f"{call}: {who} thread is in a block of `using`, which puts the model back at its end")
        if self.phase not in phases:
            raise RuntimeError(f"{call} belongs to the {' or '.join(phases)} phase, but the phase is {self.phase}")
        if call != "abandon_task":
            self.own.check(call)

    @property
    def initial(self) -> dict[str, Tensor]:
        """What each task has its own of when it starts, by name."""
        return self.own.initial

    @torch.inference_mode(False)
    def reset_state(self) -> None:
        """Bring what each task has its own of to where the first task starts."""
        self.require("reset_state", "idle")
        self.own.write({})
