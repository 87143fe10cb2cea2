"""A learned multi-task model in one safetensors file: weights, packed masks, per-task states, kept scores."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .phases import Phases

FORMAT = "exssnet-1"


def save(phases: Phases, path: str | Path, notes: Mapping[str, Any] | None = None) -> None:
    """Write all finished tasks to a file, atomically: the old file stays whole until the new one is.

    notes: whatever JSON can hold, given back by `load` (classes of each task, how to build the model).
    RuntimeError inside a task: finish it first. Keys: weight/LAYER, mask/TASK/LAYER (packed), state/TASK/NAME,
    scores/TASK/LAYER; initial/NAME and frozen/NAME for what has no mask.
    """
    if phases.phase != "idle":
        raise RuntimeError(f"save: a task is open in the {phases.phase} phase; finish it first")
    tensors: dict[str, Tensor] = {f"weight/{n}": layer.weight for n, layer in phases.layers.items()}
    for task in range(len(phases.bank)):
        tensors |= {f"mask/{task}/{n}": phases.bank.packed(task, n) for n in phases.layers}
        tensors |= {f"state/{task}/{n}": t for n, t in phases.states[task].items()}
    for task, scores in enumerate(phases.scores):
        tensors |= {f"scores/{task}/{n}": s for n, s in scores.items()}
    tensors |= {f"initial/{n}": t for n, t in phases.initial.items()}
    tensors |= {f"frozen/{n}": p for n, p in phases.frozen_parameters().items()}
    meta = {"tasks": len(phases.bank), "k": {n: layer.k for n, layer in phases.layers.items()}, "notes": notes}
    path = Path(path)
    part = path.with_name(path.name + ".part")
    # Copies: safetensors refuses tensors that share memory, and a file never needs a device.
    whole = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    save_file(whole, part, {"format": FORMAT, "exssnet": json.dumps(meta)})
    os.replace(part, path)


def load(phases: Phases, path: str | Path) -> Any:
    """Read a file of `save` into a fresh `Phases` over a model of the same layers, and activate the last task.

    Returns the notes. ValueError, before anything is changed, for another format, other layers or shapes;
    RuntimeError if `phases` already has finished tasks.
    """
    if len(phases.bank) or phases.phase != "idle":
        raise RuntimeError(
            f"load: needs a Phases without tasks, this one has {len(phases.bank)} and is in the {phases.phase} phase"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"load: {path} is of format {header.get('format')}, this version reads {FORMAT}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"load: {path} is no safetensors file or is damaged: {error}") from error
    meta = json.loads(header["exssnet"])
    kept = {n: layer.k for n, layer in phases.layers.items()}
    if meta["k"] != kept:
        raise ValueError(f"load: {path} has layers and k {meta['k']}, the model has {kept}")
    targets = {f"weight/{n}": layer.weight for n, layer in phases.layers.items()}
    targets |= {f"frozen/{n}": p for n, p in phases.frozen_parameters().items()}
    targets |= {f"initial/{n}": t for n, t in phases.initial.items()}
    if more := sorted(k for k in tensors if k.startswith(("weight/", "frozen/", "initial/")) and k not in targets):
        raise ValueError(f"load: {path} holds {', '.join(more)}, which has no place in the model")
    for key, target in targets.items():
        if key not in tensors or tensors[key].shape != target.shape:
            found = tuple(tensors[key].shape) if key in tensors else "nothing"
            raise ValueError(f"load: {path} holds {found} for {key}, the model needs {tuple(target.shape)}")
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(tensors[key])

    def group(kind: str, task: int) -> dict[str, Tensor]:
        prefix = f"{kind}/{task}/"
        return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}

    for task in range(meta["tasks"]):
        phases.adopt(group("mask", task), group("state", task), group("scores", task))
    return meta["notes"]
