"""A run at any step, or a finished multi-task model, in one safetensors file that is read whole or refused."""

import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..continual import owners, state, stored
from ..continual.learner import Learner
from ..continual.phases import Phases
from ..io.values import printable, shown, typed
from ..kernels.autotune import cpu_model
from ..tasks import Task
from . import container
from .container import CHECKSUM, Container
from .mask_coding import decode, encode

FORMAT, FIRST = "exssnet-2", "exssnet-1"


@dataclass
class Meta:
    """What a file holds beside tensors."""

    tasks: int
    k: dict[str, int]
    notes: Any = None
    learner: Any = None  # of a run: what `Learner.state` gives beside tensors
    versions: dict[str, str] = field(default_factory=dict)


def save(phases: Phases, path: str | Path, notes: Mapping[str, Any] | None = None) -> None:
    """Write all finished tasks to a file, atomically: the old file stays whole until the new one is on the disk.

    notes: whatever JSON can hold, given back by `load` (classes of each task, how to build the model).
    RuntimeError inside a task: finish it first. ValueError for NaN or infinity in weights or scores. OSError where
    it cannot be written. Keys: weight/LAYER, mask/TASK/LAYER (see `exssnet.checkpoint.mask_coding`), state/TASK/NAME,
    scores/TASK/LAYER; initial/NAME and frozen/NAME for what has no mask.
    """
    owners.check(phases, "save")
    if phases.phase != "idle":
        raise RuntimeError(f"save: a task is open in the {phases.phase} phase; finish it first")
    _write(Path(path), stored.finished(phases), Meta(len(phases.bank), stored.kept(phases), notes), {})


def load(phases: Phases, path: str | Path) -> Any:
    """Read the finished tasks of a file into a fresh `Phases` over a model of the same layers; activate the last.

    Returns the notes. ValueError, before anything is changed, for a damaged file, another format, other layers or
    shapes; RuntimeError if `phases` already has finished tasks.
    """
    tensors, meta = read(path)
    with _named(path):
        stored.check_layers(meta.k, phases)
        pieces = stored.Pieces(tensors if meta.learner is None else _of_finished_tasks(tensors))
        stored.put_finished(phases, pieces, meta.tasks, complete=True)
    return meta.notes


def save_run(
    learner: Learner, path: str | Path, notes: Mapping[str, Any] | None = None, coded: dict[str, Tensor] | None = None
) -> None:
    """Write all that a learner goes on from, as `save` does: see `Learner.state` for when.

    coded: an empty dict, given again at the next time, saves the work of coding finished tasks' masks again.
    """
    tensors, meta = learner.state()
    _write(Path(path), tensors, Meta(meta["tasks"], meta["k"], notes, meta), {} if coded is None else coded)


def load_run(learner: Learner, path: str | Path, tasks: Sequence[Task]) -> Any:
    """Read a file of `save_run` into a fresh learner of the same options, model and stream: see `Learner.restore`.

    Returns the notes. ValueError, before anything is changed, for whatever does not fit, or is no run.
    """
    tensors, meta = read(path)
    with _named(path):
        if meta.learner is None:
            raise ValueError("it holds a finished model, no run that could go on")
        learner.restore(tensors, meta.learner, tasks)
    return meta.notes


def read(path: str | Path) -> tuple[dict[str, Tensor], Meta]:
    """Tensors, masks packed, and the rest of a file; its checksum is right. ValueError for any other file."""
    with _named(path), container.opened(path) as found:
        meta = _meta(found)
        try:
            tensors = found.tensors()
        except ValueError as error:
            raise ValueError(f"it is damaged: {error}") from error
        for key in [key for key in tensors if key.startswith("mask/") and found.metadata["format"] == FORMAT]:
            weight = tensors.get(f"weight/{key.split('/', 2)[-1]}")
            if weight is None or tensors[key].dtype != torch.uint8 or tensors[key].dim() != 1:
                raise ValueError(f"it holds {key[:99]!r}, which is no mask of a layer")
            tensors[key] = decode(tensors[key], weight.numel())
    return tensors, meta


def header(path: str | Path) -> Meta:
    """What a file holds beside tensors, which are not read; its checksum is not looked at."""
    with _named(path), container.opened(path) as found:
        return _meta(found)


def describe(path: str | Path, verify: bool = False) -> str:
    """What a file holds, as text, from its header alone: nothing is loaded and no model is built.

    verify: read all of it as well, and check what `read` checks. ValueError for what is no file of ours or is damaged.
    """
    with _named(path), container.opened(path) as found:
        meta = _meta(found)
    if verify:
        read(path)
    sizes: dict[str, int] = {}
    for key, entry in found.entries.items():
        kind = key.partition("/")[0]
        kind = {"kept": "best epoch", "open": "open task", "epoch": "open task"}.get(kind, kind)
        sizes[kind] = sizes.get(kind, 0) + entry.size
    weights = {n: math.prod(found.entries[f"weight/{n}"].shape) for n in meta.k if f"weight/{n}" in found.entries}
    notes = meta.notes if isinstance(meta.notes, dict) else {}
    rows = [
        ("file", f"{_size(found.size)}, format {found.metadata['format']}" + (", checksum right" if verify else "")),
        ("written by", ", ".join(f"{name} {version}" for name, version in meta.versions.items())),
        ("model", str(notes.get("model", ""))),
        ("layers", f"{len(weights)} with {sum(weights.values()):,} weights, of which a mask keeps "
                   f"{sum(meta.k.values()):,} ({100 * sum(meta.k.values()) / max(1, sum(weights.values())):.2f} %)"),
        ("tasks", f"{meta.tasks} finished"),
        ("classes", ", ".join(map(str, notes["classes"])) if isinstance(notes.get("classes"), list) else ""),
        ("open task", _open_task(meta)),
        ("sizes", ", ".join(f"{kind} {_size(n)}" for kind, n in sorted(sizes.items()) if kind != CHECKSUM)),
    ]  # fmt: skip
    if isinstance(options := notes.get("options"), dict):
        rows.append(("options", ", ".join(f"{name} {value}" for name, value in options.items())))
    return "\n".join(printable(f"{name:<12}{value}") for name, value in rows if value)


# Inside


def _open_task(meta: Meta) -> str:
    found = meta.learner.get("open") if isinstance(meta.learner, dict) else None
    if found is None:
        return ""
    task: state.OpenMeta = typed(state.OpenMeta, found, "the open task")
    return f"task {meta.tasks}, {task.phase} phase, epoch {task.epoch + 1}, after {task.batch} of its batches"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _of_finished_tasks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kinds = ("weight", "mask", "state", "scores", "initial", "frozen")
    return {key: t for key, t in tensors.items() if key.partition("/")[0] in kinds}


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Puts the file's name before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"load: {shown(Path(path))}: {shown(error, 1000)}") from error


def _meta(found: Container) -> Meta:
    """What a container of ours holds beside tensors."""
    form = found.metadata.get("format")
    if form not in (FIRST, FORMAT) or (form == FORMAT and list(found.entries)[-1:] != [CHECKSUM]):
        newer = form is not None and form.startswith("exssnet-") and form != FORMAT
        raise ValueError(
            f"it is of format {form}"
            + (" without a checksum" if form == FORMAT else f", this version reads {FIRST} and {FORMAT}")
            + (": a newer exssnet wrote it, install that" if newer else "")
        )
    try:
        described = json.loads(found.metadata.get("exssnet", ""))
    except (ValueError, RecursionError):
        raise ValueError("its description is no JSON") from None
    if isinstance(described, dict) and described.keys() == {"tasks", "k", "notes"}:  # as the first format has it
        described |= {"learner": None, "versions": {}}
    meta: Meta = typed(Meta, described, "the description")
    weights = {n: math.prod(found.entries[f"weight/{n}"].shape) for n in meta.k if f"weight/{n}" in found.entries}
    masks = sum(key.startswith("mask/") for key in found.entries)
    if meta.k.keys() != weights.keys() or meta.tasks * max(1, len(meta.k)) != masks:
        raise ValueError(
            f"its description tells of {len(meta.k)} layers and {meta.tasks} tasks, it holds {len(weights)} of their "
            f"weights and {masks} masks"
        )
    if wrong := [f"{k} of {weights[n]} weights in {n}" for n, k in meta.k.items() if not 0 <= k <= weights[n]]:
        raise ValueError(f"its description tells of masks that keep {wrong[0]}")
    return meta


def versions() -> dict[str, str]:
    """What a checkpoint's bits may depend on."""
    from .. import __version__

    return {"exssnet": __version__, "torch": torch.__version__, "python": platform.python_version(), "cpu": cpu_model()}


def _write(path: Path, tensors: Mapping[str, Tensor], meta: Meta, coded: dict[str, Tensor]) -> None:
    flat: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith("mask/"):
            if key not in coded:
                coded[key] = encode(tensor, tensors[f"weight/{key.split('/', 2)[2]}"].numel())
            tensor = coded[key]
        elif key.startswith(state.FINITE) and not bool(tensor.isfinite().all()):
            raise ValueError(f"save: {key} holds NaN or infinity; nothing was written to {path}")
        flat[key] = tensor.detach().cpu().contiguous()
    meta.versions = versions()
    container.write(path, flat, {"format": FORMAT, "exssnet": json.dumps(vars(meta))})
