"""A change of task or phase that fails, for want of memory say, leaves everything as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from .stored import TaskStore


@contextmanager
def undone_on_failure(phases: TaskStore) -> Iterator[None]:
    """If the block raises, put back the layers' modes, what the task has of its own, and what `phases` knows."""
    held = {layer: layer.hold() for layer in phases.layers.values()}
    state = {name: t.clone() for name, t in phases.own.live().items()}
    known = {name: getattr(phases, name) for name in ("phase", "active", "bank", "states", "scores")}
    try:
        yield
    except BaseException:
        for layer, mode in held.items():
            layer.put_back(mode)
        phases.own.write(state)
        for name, value in known.items():
            setattr(phases, name, value)
        raise
