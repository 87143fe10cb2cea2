"""Task-incremental streams: data sets, the tasks cut from them, and their batches.

Nothing here draws from the global random state: the same seeds and generators give the same stream, bit for bit.
"""

from .data import Labelled, Relabelled, loader
from .datasets import load, names
from .streams import CropFlip, Task, permuted_pixels, rotated, split_by_class, stratified_split

__all__ = [
    "CropFlip",
    "Labelled",
    "Relabelled",
    "Task",
    "load",
    "loader",
    "names",
    "permuted_pixels",
    "rotated",
    "split_by_class",
    "stratified_split",
]


def stream(name, root, tasks=5, validation=0.1, seed=0):  # SHIM
    return split_by_class(
        *load("mnist" if name == "split-mnist" else "mnist5k", root), tasks, validation=validation, seed=seed
    )
