"""Stands for a CUDA graph on a CPU: it records the operators of a step and repeats them on the same tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors_in(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


class Recorder(TorchDispatchMode):
    """Records operators. A question for a value is refused, as a GPU refuses it during a capture.

    Attributes:
        operators: (operator, its arguments, its keyword arguments, the new tensors that it returned).
        outside: Address -> tensor that an operator took and no recorded one made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []
        self.outside: dict[int, Tensor] = {}
        self._inside: set[int] = set()
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a captured step asks for a value")
        taken = tensors_in((args, kwargs))
        for t in taken:
            if t.untyped_storage().data_ptr() not in self._inside and t.data_ptr() not in self.outside:
                self.outside[t.data_ptr()] = t
                self._before.append((t, t.clone()))  # of every tensor: batch norms write to some without saying so
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        results = func(*args, **kwargs)
        shared = {t.untyped_storage().data_ptr() for t in taken}
        new = [t for t in tensors_in(results) if t.untyped_storage().data_ptr() not in shared]
        self._inside |= {t.untyped_storage().data_ptr() for t in new}
        if new or writes:
            self.operators.append((func, args, kwargs, new))
        return results

    def undo(self) -> None:
        """Undo all writes, because a capture computes nothing."""
        with torch.no_grad():
            for tensor, value in reversed(self._before):
                tensor.data.copy_(value)
        self._before.clear()


class RecordedGraph:
    """Has the interface of `exssnet.nn.graphs.CudaGraph`."""

    captures = 0
    replays = 0

    def __init__(self, device: torch.device) -> None:
        self.operators: list[Any] = []

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def capture(self, step: Callable[[], Any]) -> Any:
        random, recorder = torch.get_rng_state(), Recorder()
        try:
            with recorder:
                results = step()
        finally:
            recorder.undo()
            torch.set_rng_state(random)
        for *_, new in recorder.operators:
            for t in new:
                t.data.fill_(torch.nan if t.is_floating_point() else 0)  # no value is known before a replay
        self.operators = recorder.operators
        RecordedGraph.captures += 1
        return results

    def replay(self) -> None:
        RecordedGraph.replays += 1
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, new in self.operators:
                results = func(*args, **kwargs)
                taken = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs))}
                made = [t for t in tensors_in(results) if t.untyped_storage().data_ptr() not in taken]
                for old, t in zip(new, made, strict=True):
                    old.data.copy_(t)
