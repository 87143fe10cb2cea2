"""Rebuilds the network of a run of `exssnet train`, with the tasks that it has finished, from its folder alone."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..continual.phases import Phases
from ..continual.pretrained import DESCRIPTION
from ..io import container
from ..io.values import shown, typed
from ..nn import convert, supermask_layers
from ..nn.models import MODELS
from . import format

CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"
HEAD = "weight/head"
"""Name of the output layer's weight in a file of any network in `exssnet.nn.models`."""


def load(path: str | Path) -> Phases:
    """The finished tasks of a run of `exssnet train`, with its network, on the CPU. The last task is active.

    Args:
        path: The folder of a run, finished or not, or a checkpoint or model in it. Or a folder of
            `Phases.save_pretrained`.

    Returns:
        The `Phases` of the rebuilt network. To go on with the run instead, use ``exssnet train --resume``.

    Raises:
        ValueError: If the file is damaged, holds no finished task, or does not say how its network is built.
        OSError: If there is no such file.

    Example:
        >>> phases = exssnet.load("runs/train")
        >>> logits = phases.fold(0).eval()(x)
    """
    if (Path(path) / DESCRIPTION).is_file():
        return Phases.from_pretrained(path)
    return rebuilt(path)[0]


def rebuilt(path: str | Path) -> tuple[Phases, list[int]]:
    """What `load` returns, and the shape of one input without the batch."""
    path = Path(path)
    if path.is_dir():
        there = [path / name for name in (MODEL, CHECKPOINT) if (path / name).is_file()]
        if not there:
            raise FileNotFoundError(f"load: {shown(path)} holds no {MODEL} and no {CHECKPOINT}")
        path = max(there, key=lambda file: format.header(file).tasks)
    meta = format.header(path)
    with container.named("load", path):
        if not meta.tasks:
            raise ValueError("none of its tasks is finished")
        with container.opened(path) as file:
            entries = file.entries
        name, shape, classes = _built(meta.notes, entries)
        try:
            with torch.device("meta"):  # before memory is taken
                _check_shapes(MODELS[name](torch.Size(shape), classes), entries)
        except (RuntimeError, OverflowError) as error:
            raise ValueError(f"its network cannot be built: {shown(error)}") from error
        model = convert(MODELS[name](torch.Size(shape), classes), include=list(meta.k))
        for layer_name, layer in supermask_layers(model):
            layer.keep(meta.k[layer_name])
    scores = [entry.dtype for key, entry in entries.items() if key.startswith("scores/")]
    phases = Phases(model, container.DTYPES[scores[0]] if scores else None)
    format.load(phases, path)
    return phases, shape


def _built(notes: Any, entries: dict[str, container.Entry]) -> tuple[str, list[int], int]:
    """How a file's network is built: its name in `MODELS`, the shape of one input, and the number of its outputs."""
    told = notes if isinstance(notes, dict) else {}
    head = entries.get(HEAD)
    if told.get("model") not in list(MODELS) or "shape" not in told or head is None or len(head.shape) != 2:
        raise ValueError(
            "it does not say how its network is built, as the files of `exssnet train` do: build and convert the "
            "network yourself, then exssnet.checkpoint.load(exssnet.Phases(model), path)"
        )
    return told["model"], typed(list[int], told["shape"], "its shape of an input"), head.shape[0]


def _check_shapes(network: nn.Module, entries: dict[str, container.Entry]) -> None:
    """ValueError if a parameter has not the shape that the file says."""
    for name, parameter in network.named_parameters():
        keys = f"weight/{name.removesuffix('.weight')}", f"initial/{name}", f"frozen/{name}"
        shapes = [entries[key].shape for key in keys if key in entries]
        if list(parameter.shape) not in shapes:
            raise ValueError(
                f"{name} of its network has the shape {list(parameter.shape)}, it holds {shapes or 'none'}"
            )
