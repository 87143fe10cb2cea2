"""The tensors that each task has of its own besides its masks: parameters without a mask, and buffers."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import TENSORS, SupermaskLayer, full_name

Slot = tuple[str, nn.Module, str, Tensor | None]  # of a parameter or buffer: its name, its module, its key, its tensor


class TaskState:
    """The parameters without a mask and the buffers of a converted model, with their initial values.

    A buffer that is registered later, or that changes its shape, belongs to a task as well.

    Attributes:
        trainable: Names of the parameters without a mask that required a gradient at the start.
        frozen: Names of the parameters without a mask that required none.
        names: Module -> its name in the model.
        initial: Initial values by name, of everything but the frozen parameters.
        known: Names of all per-task tensors at the start, with those of buffers that were None.
        transient: Names of the non-persistent buffers.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SupermaskLayer]) -> None:
        self._model, self._layers = model, dict(layers)
        self._masked = {full_name(name, key) for name in layers for key in TENSORS}
        named = [(n, p) for n, p in model.named_parameters() if n not in self._masked]
        self.trainable = {n for n, p in named if p.requires_grad}
        self.frozen = {n for n, p in named if not p.requires_grad}
        self.names = {module: name for name, module in model.named_modules()}
        self._late: set[str] = set()  # names of buffers that were registered later and removed for other tasks
        self.capture()

    def capture(self) -> None:
        """Record the present values as the initial values."""
        slots = list(self._slots())
        self.initial = {name: t.detach().clone() for name, _, _, t in slots if t is not None}
        self.known = {name for name, *_ in slots}  # buffers that are None included
        self.transient = {name for name, module, key, _ in slots if key in module._non_persistent_buffers_set}
        self._extra = copy.deepcopy(self._extra_states())

    def live(self) -> dict[str, Tensor]:
        """The present values by name, without copies."""
        return {name: t.detach() for name, _, _, t in self._slots() if t is not None}

    def changed(self) -> dict[str, Tensor]:
        """Copies of the present values that differ from the initial values."""
        return {n: t.clone() for n, t in self.live().items() if not self.is_initial(n, t)}

    def is_initial(self, name: str, value: Tensor) -> bool:
        """Whether a value equals the initial value, up to a lossless cast of one of them."""
        initial = self.initial.get(name)
        if initial is None or initial.shape != value.shape:
            return False
        return torch.equal(initial.to(value), value) and torch.equal(initial, value.to(initial))

    def named(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Per-task tensors, named for a state. Non-persistent buffers with their initial value are left out."""
        return {f"{prefix}{n}": t for n, t in state.items() if n not in self.transient or not self.is_initial(n, t)}

    def has(self, name: str) -> bool:
        """Whether the model has, or had, a per-task parameter or buffer of that name."""
        return name in self.known | self._late or any(name == other for other, *_ in self._slots())

    def write(self, state: Mapping[str, Tensor], model: nn.Module | None = None) -> None:
        """Set the model, or a copy of it, to the values of `state`, and to initial values elsewhere, in place."""
        values = self.initial | dict(state)
        self._set(self._slots(values, model), values)

    @contextmanager
    def showing(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """In the block, the model has the values of `state`, and initial values elsewhere.

        The tensors use other memory in the block. Their own memory is not written, so a backward pass still works.
        """
        values = self.initial | dict(state)
        slots = list(self._slots(values))
        held = [None if tensor is None else tensor.data for *_, tensor in slots]
        try:
            self._set(slots, values, in_place=False)
            yield
        finally:
            for (name, module, key, tensor), data in zip(slots, held, strict=True):
                if tensor is None or data is None:
                    self._put_buffer(name, module, key, None)
                    continue
                tensor.data = data
                if key in module._buffers or key not in module._parameters:
                    module._buffers[key] = tensor
            torch.clear_autocast_cache()

    def check(self, call: str) -> None:
        """Raise RuntimeError if modules were added, replaced or removed, or if another parameter is trainable now."""
        modules = dict(self._model.named_modules())
        unexpected = [name for module, name in self.names.items() if modules.get(name) is not module]
        unexpected += [name for name, module in modules.items() if module not in self.names]
        if unexpected:
            raise RuntimeError(
                f"{call}: the module {unexpected[0]!r} was put in, replaced or removed after Phases was made, which "
                "changes the networks of all tasks: change the model before Phases is made"
            )
        expected = self.trainable | self._masked
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and name not in expected:
                raise RuntimeError(
                    f"{call}: parameter {name} was not trainable when Phases was made: shared by all tasks, it would "
                    "make them forget. Set requires_grad before, or freeze it"
                )

    def check_extra(self, call: str) -> None:
        """Raise RuntimeError if the extra state of a module has changed. Extra states cannot be per-task."""
        for name, extra in self._extra_states().items():
            if not _equal(extra, self._extra.get(name)):
                raise RuntimeError(
                    f"{call}: the extra state (get_extra_state) of module {name!r} has changed since the first task "
                    "started. Tasks have buffers of their own, but no extra state: keep it in a buffer"
                )

    # Inside

    def _slots(self, wanted: Iterable[str] = (), model: nn.Module | None = None) -> Iterator[Slot]:
        """Name, module, key and tensor of each per-task parameter and buffer, then of missing wanted ones."""
        missing = dict.fromkeys(wanted)
        model = self._model if model is None else model
        for prefix, module in list(model.named_modules()):
            own = TENSORS if isinstance(module, SupermaskLayer) else ()
            for key, tensor in (module._parameters | module._buffers).items():
                name = full_name(prefix, key)
                if key not in own and name not in self.frozen:
                    missing.pop(name, None)
                    yield name, module, key, tensor
        for name in missing:
            prefix, _, key = name.rpartition(".")
            yield name, model.get_submodule(prefix), key, None

    def _set(self, slots: Iterable[Slot], values: Mapping[str, Tensor], in_place: bool = True) -> None:
        """Set the slots to the values by name, None where there is none. Tensors that fit are written in place."""
        with torch.inference_mode(False), torch.no_grad():
            for name, module, key, tensor in slots:
                value = values.get(name)
                if tensor is None or value is None:
                    self._put_buffer(name, module, key, value)
                elif in_place and tensor.shape == value.shape and 0 not in tensor.stride():
                    tensor.copy_(value)
                else:
                    tensor.data = value.to(tensor, copy=True)
        torch.clear_autocast_cache()  # the cache identifies parameters by their objects

    def _put_buffer(self, name: str, module: nn.Module, key: str, value: Tensor | None) -> None:
        """Register a missing buffer, or remove one if the value is None."""
        if key in module._parameters:
            return
        if value is not None:
            device = next(iter(self._layers.values())).dense_weight.device
            module._buffers[key] = value.detach().to(device, copy=True)
        elif name in self.known:
            module._buffers[key] = None
        else:
            module._buffers.pop(key, None)
            self._late.add(name)

    def _extra_states(self) -> dict[str, Any]:
        own = nn.Module.get_extra_state
        return {n: m.get_extra_state() for n, m in self._model.named_modules() if type(m).get_extra_state is not own}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b.to(a.device))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)
