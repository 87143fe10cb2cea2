"""The networks of all finished tasks at once, for inference: a task number with every sample."""

import copy
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import TENSORS, supermask_layers
from ..nn.modes import Constant, NoMask
from . import owners
from .phases import Phases


@dataclass
class _Network:
    module: nn.Module
    history: Tensor  # see Served._history
    size: int = 0  # bytes of its own
    kept: dict[Hashable, Any] = field(default_factory=dict)  # what its layers keep, see `Constant`
    counted: int = 0  # entries of `kept` in size


_all: "weakref.WeakSet[Served]" = weakref.WeakSet()


def _free_locks() -> None:
    """In a forked child, which has none of the threads that may have held the locks."""
    for served in _all:
        served._lock, served._making = threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_locks)


class Served:
    """The finished tasks' networks: ``served(x, task_ids)`` answers each sample by the network of its task.

        served = Served(phases)
        logits = served(x, task_ids)           # x (N, ...), N task numbers in any order: (N, outputs)

    A task's network is made when the task is first asked for, from the weights of that time: the values that its mask
    keeps, where they are, its norms and biases. It answers as ``phases.using(task)`` does in evaluation mode, bit for
    bit for the same samples of the task in one call. Norms are folded into convolutions once, and a layer for which
    dense products are faster keeps its dense weight. The model and its `Phases` stay as they are.

    phases: of a converted model.
    tasks: the tasks to answer for; None for all that are finished, also later.
    cache: bytes that the networks may take together; the one not used for the longest time is dropped first, and made
        again when asked for. A kept float32 weight takes 8: 5 % of a ResNet-18 of 11 M weights are 4.5 MB a task.
    Threads may call it at the same time, with the results of one call after another; only the look-up of networks is
    locked. ValueError for tasks that are not finished, and for a bound that is no whole number of bytes.
    """

    def __init__(self, phases: Phases, tasks: Iterable[int] | None = None, cache: int = 256 << 20) -> None:
        if isinstance(cache, bool) or not isinstance(cache, int) or cache < 0:
            raise ValueError(f"Served: cache must be a whole number of bytes, at least 0, got {repr(cache)[:50]}")
        self._phases, self._cache = phases, cache
        self._tasks = None if tasks is None else sorted(set(tasks))
        for task in self._tasks or ():
            _check_known(task, range(len(phases.bank)))
        self._networks: OrderedDict[int, _Network] = OrderedDict()  # the last used one last
        self._lock, self._making = threading.Lock(), threading.Lock()
        _all.add(self)
        self._blank, self._blank_of = _without_weights(phases), self._history()
        # Values lie in the pattern's order, so the slots of all layers count from 0 on.
        layers = phases.layers.values()
        device = next(iter(layers)).dense_weight.device
        self._slots = torch.arange(
            max(layer.dense_weight.numel() for layer in layers), dtype=torch.int32, device=device
        )

    @property
    def tasks(self) -> Sequence[int]:
        """The tasks that it answers for."""
        return range(len(self._phases.bank)) if self._tasks is None else self._tasks

    @property
    def nbytes(self) -> int:
        """Bytes that the networks take now."""
        with self._lock:
            return sum(network.size for network in self._networks.values())

    @torch.no_grad()
    def __call__(self, x: Tensor, task_ids: Tensor | Sequence[int]) -> Tensor:
        """What the model gives for each sample of x (N, ...) in evaluation mode: (N, outputs), without gradients.

        task_ids: N whole numbers, a sequence or a tensor on any device. ValueError for an unknown task.
        """
        ids = torch.as_tensor(task_ids)
        whole = ids.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8) or not ids.numel()
        if not whole or ids.is_meta or x.dim() == 0 or ids.shape != x.shape[:1]:
            raise ValueError(
                f"Served: expected a whole task number for each sample, got task_ids {ids.dtype} of shape "
                f"{tuple(ids.shape)} and x of shape {tuple(x.shape)}"
            )
        rows: dict[int, list[int]] = {}
        for row, task in enumerate(ids.tolist()):
            rows.setdefault(task, []).append(row)
        tasks = self.tasks
        for task in rows or list(tasks[:1]) or [0]:  # without samples, any network tells how many outputs there are
            _check_known(task, tasks)
        if len(rows) < 2:
            return self._answer(next(iter(rows), tasks[0]), x).clone()
        logits: Tensor | None = None
        for task, of_task in rows.items():
            index = torch.tensor(of_task, device=x.device)
            found = self._answer(task, x.index_select(0, index))
            if logits is None:
                logits = found.new_empty(len(x), *found.shape[1:])
            logits.index_copy_(0, index, found)
        assert logits is not None
        return logits

    def _answer(self, task: int, x: Tensor) -> Tensor:
        """The network's logits, of inference mode: to be copied."""
        network = self._network(task)
        with torch.inference_mode():  # a sixth faster than without gradients, for batches of a few samples
            found = network.module(x)
        if not isinstance(found, Tensor) or found.shape[:1] != x.shape[:1]:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"Served: the model must give a tensor with a row for each of {len(x)} samples, got {got}")
        if len(network.kept) != network.counted:
            self._keep(task, network)
        return found

    def _network(self, task: int) -> _Network:
        network = self._found(task)
        if network is None:
            with self._making:  # one at a time; who asks for another task does not wait
                network = self._found(task)
                if network is None:
                    network = self._make(task)
                    self._keep(task, network)
        return network

    def _found(self, task: int) -> _Network | None:
        with self._lock:
            network = self._networks.get(task)
            if network is None or network.history is not self._history():
                return None
            self._networks.move_to_end(task)
            return network

    def _history(self) -> Tensor | None:
        """The first task's mask, which is another tensor when `Phases.load_state_dict` brings other tasks."""
        bank, name = self._phases.bank, next(iter(self._phases.layers))
        return bank.packed(0, name) if len(bank) else None

    def _keep(self, task: int, network: _Network) -> None:
        """Count the network as it is now, and drop others, or itself, until all that are left fit."""
        with self._lock:
            if network.history is not self._history():
                return
            kept = list(network.kept.values())
            more = (t for made in kept[network.counted :] for t in (made if isinstance(made, tuple) else (made,)))
            network.size += sum(t.nbytes for t in more)
            network.counted = len(kept)
            self._networks[task] = network
            self._networks.move_to_end(task)
            total = sum(n.size for n in self._networks.values())
            while total > self._cache:
                total -= self._networks.popitem(last=False)[1].size

    def _make(self, task: int) -> _Network:
        """The task's network; what all tasks share it has not of its own."""
        phases = self._phases
        owners.check(phases, "Served")
        phases.own.check("Served")
        history = self._history()
        assert history is not None
        if history is not self._blank_of:
            self._blank, self._blank_of = _without_weights(phases), history
        shared = [t for n, t in self._blank.named_parameters() if n not in phases.initial]
        network = _Network(copy.deepcopy(self._blank, {id(t): t for t in shared}), history)
        phases.own.write(phases.states[task], network.module)
        weights = phases.weights_before()
        choices = {name: layer._choices for name, layer in supermask_layers(self._blank)}  # made once for all tasks
        for name, layer in supermask_layers(network.module):
            weight = weights[name]
            mask = phases.bank.mask(task, name).to(weight.device)
            layer.mode = Constant(weight, mask, getattr(layer, "groups", 1), self._slots, network.kept)
            layer._choices = choices[name]
        found = (*network.module.parameters(), *network.module.buffers())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
        for t in (*shared, self._slots):
            storages.pop(t.untyped_storage().data_ptr(), None)
        network.size = sum(storages.values())
        return network


def _check_known(task: int, tasks: Sequence[int]) -> None:
    if task not in tasks:
        raise ValueError(f"Served: task {task} is not known, the tasks are {', '.join(map(str, tasks)) or 'none'}")


def _without_weights(phases: Phases) -> nn.Module:
    """A copy of the model in evaluation mode, of whose masked weights only the shapes are left."""
    phases.own.check("Served")
    known: dict[int, Any] = {}
    for layer in phases.layers.values():
        known[id(layer.dense_weight)] = layer.dense_weight.detach().new_zeros(()).expand(layer.dense_weight.shape)
        for key in TENSORS[1:]:
            if (tensor := getattr(layer, key)) is not None:
                known[id(tensor)] = tensor.detach()
    model = copy.deepcopy(phases.model, known)
    for _, layer in supermask_layers(model):
        layer.mode = NoMask()
    return model.requires_grad_(False).eval()
