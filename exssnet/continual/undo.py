"""A change of task or phase that fails, for want of memory say, leaves everything as it was."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from ..nn import SupermaskLayer
from .stored import TaskStore


def held(layers: Iterable[SupermaskLayer]) -> Callable[[], None]:
    """A function that gives the layers the modes and dense weights back that they have now."""
    now = [(layer, layer.mode, layer.dense_weight) for layer in layers]

    def put_back() -> None:
        for layer, mode, weight in now:
            layer.mode, layer.dense_weight = mode, weight

    return put_back


@contextmanager
def undone_on_failure(phases: TaskStore) -> Iterator[None]:
    """If the block raises, put back the layers' modes, what the task has of its own, and what `phases` knows."""
    put_back = held(phases.layers.values())
    state = {name: t.clone() for name, t in phases.own.live().items()}
    known = {name: getattr(phases, name) for name in ("phase", "active", "bank", "states", "scores")}
    try:
        yield
    except BaseException:
        put_back()
        phases.own.write(state)
        for name, value in known.items():
            setattr(phases, name, value)
        raise
