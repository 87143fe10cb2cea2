"""Undoes a change of task or phase that fails, for example because memory runs out."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from ..nn import SupermaskLayer
from .task_model import TaskModel


def held(layers: Iterable[SupermaskLayer]) -> Callable[[], None]:
    """A function that puts the layers back into their present modes, with their present dense weights."""
    now = [(layer, layer.mode, layer.dense_weight) for layer in layers]

    def put_back() -> None:
        for layer, mode, weight in now:
            layer.mode, layer.dense_weight = mode, weight

    return put_back


@contextmanager
def undone_on_failure(phases: TaskModel) -> Iterator[None]:
    """If the block raises, restore the layers' modes, the per-task tensors and the attributes of `phases`."""
    put_back = held(phases.layers.values())
    state = {name: t.clone() for name, t in phases.own.live().items()}
    known = {name: getattr(phases, name) for name in ("phase", "active", "bank", "states", "scores", "trained")}
    try:
        yield
    except BaseException:
        put_back()
        phases.own.write(state)
        for name, value in known.items():
            setattr(phases, name, value)
        raise
