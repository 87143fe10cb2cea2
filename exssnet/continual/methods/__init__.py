"""Methods of continual learning, each a `Strategy`: supermask methods, and dense baselines."""

from .ewc import EWC
from .masked import EXSSNET, SSNET, SUPSUP, WSN, Method
from .packnet import PackNet
from .replay import Replay
from .sequential import Sequential

METHODS = {m.name: m for m in (SUPSUP, SSNET, EXSSNET, WSN)}
"""The supermask methods by name."""


def preset(name: str) -> Method:
    """The supermask method of that name.

    Raises:
        ValueError: There is no such method; the sentence lists the known names.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


__all__ = ["EWC", "METHODS", "Method", "PackNet", "Replay", "Sequential", "preset"]
