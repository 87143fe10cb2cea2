"""Warnings and errors for optimizers, schedulers and replicas of an earlier phase, which would train nothing now."""

import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

ANEW = "Make a new one for each phase: phases.optimizer(torch.optim.AdamW, lr=1e-3)"


class Watched(Protocol):
    """The part of `Phases` that tells which parameters train now."""

    def masked_parameters(self) -> list[Tensor]: ...
    def parameters(self) -> list[Tensor]: ...


_watched: weakref.WeakSet[Any] = weakref.WeakSet()
_optimizers: weakref.WeakKeyDictionary[torch.optim.Optimizer, "_Seen"] = weakref.WeakKeyDictionary()
_phase = 0  # number of phase changes of all models
_hooked = False


class _Seen:
    """An optimizer that stepped in a phase. `doubtful` are masked parameters that no optimizer has trained yet."""

    def __init__(self, phase: int, owner: Watched | None, doubtful: Sequence[Tensor] = ()) -> None:
        self.phase, self.doubtful = phase, [(p, p._version) for p in doubtful]
        self.owner = None if owner is None else weakref.ref(owner)


class _EndedGroup(dict[str, Any]):
    """A parameter group of an optimizer whose phase has ended."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        warnings.warn(
            f"{name} of an optimizer was set whose phase has ended, by a scheduler perhaps. {ANEW}", stacklevel=3
        )


def watch(owner: Watched) -> None:
    """From now on, warn if an optimizer steps but no optimizer trains the masked parameters of `owner`."""
    global _hooked
    if not _hooked:
        register_optimizer_step_pre_hook(_before_step)
        _hooked = True
    _watched.add(owner)


def phase_changes(owner: Watched | None, ended: Iterable[Tensor], what: str) -> None:
    """Record that a phase has changed: optimizers that hold parameters of the ended phase must not step.

    Args:
        owner: The `Phases` that has changed; None if there is none.
        ended: Parameters that no longer train.
        what: Their name in messages.
    """
    global _phase
    _phase += 1
    for parameter in ended:
        parameter.grad = None
        parameter._exssnet_ended = what  # type: ignore[attr-defined]
    for optimizer, seen in list(_optimizers.items()):
        if owner is not None and seen.owner is not None and seen.owner() is owner:
            optimizer.param_groups[:] = [_EndedGroup(group) for group in optimizer.param_groups]
            del _optimizers[optimizer]


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    seen = _optimizers.get(optimizer)
    if seen is None or seen.phase != _phase:
        _optimizers[optimizer] = _first_step(optimizer)
        return
    trained = any(p._version != version for p, version in seen.doubtful)
    with_gradient = any(p.grad is not None for p, _ in seen.doubtful)
    if with_gradient and not trained:
        warnings.warn(
            f"no optimizer has trained the {len(seen.doubtful)} masked parameters since the phase began, though they "
            f"have gradients. {ANEW}",
            stacklevel=4,
        )
    if with_gradient or trained:
        seen.doubtful = []


def _first_step(optimizer: torch.optim.Optimizer) -> _Seen:
    """The record of an optimizer at its first step in a phase. RuntimeError if its parameters' phase has ended."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        if (ended := getattr(parameter, "_exssnet_ended", None)) is not None:
            raise RuntimeError(f"this optimizer holds {ended}: its step would train nothing. {ANEW}")
    held = {id(p) for p in parameters}
    for owner in _watched:
        if not held.isdisjoint(map(id, owner.parameters())):
            masked = owner.masked_parameters()
            return _Seen(_phase, owner, masked if held.isdisjoint(map(id, masked)) else ())
    return _Seen(_phase, None)


def check_replicas(masked: Iterable[Tensor]) -> None:
    """Raise RuntimeError in a training forward of `DistributedDataParallel` that lacks some masked parameters."""
    replicas = getattr(DistributedDataParallel, "_active_ddp_module", None)  # private, so it may be missing
    if replicas is None or not torch.is_grad_enabled() or replicas.__dict__.get("_exssnet_phase") == _phase:
        return
    known = {id(p) for p in replicas._module_parameters}
    if unknown := sum(id(p) not in known for p in masked):
        raise RuntimeError(
            f"DistributedDataParallel was made before this phase: it does not know {unknown} of the parameters that "
            "train now, and processes would drift apart. Wrap the model anew after start_task and start_weight_phase"
        )
    replicas.__dict__["_exssnet_phase"] = _phase
