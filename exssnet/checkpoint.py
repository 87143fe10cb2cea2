"""A run at any step, or a finished multi-task model, in one safetensors file that is read whole or refused."""

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import state
from .choice import cpu_model
from .coding import decode, encode
from .learner import Learner
from .phases import Phases
from .tasks import Task
from .typed import typed

FORMAT, FIRST = "exssnet-2", "exssnet-1"
CHECKSUM = "checksum"
"""Name of the last tensor: the SHA-256 of all bytes before it."""
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


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
    it cannot be written. Keys: weight/LAYER, mask/TASK/LAYER (see `exssnet.coding`), state/TASK/NAME,
    scores/TASK/LAYER; initial/NAME and frozen/NAME for what has no mask.
    """
    if phases.phase != "idle":
        raise RuntimeError(f"save: a task is open in the {phases.phase} phase; finish it first")
    _write(Path(path), state.finished(phases), Meta(len(phases.bank), state.kept(phases), notes), {})


def load(phases: Phases, path: str | Path) -> Any:
    """Read the finished tasks of a file into a fresh `Phases` over a model of the same layers; activate the last.

    Returns the notes. ValueError, before anything is changed, for a damaged file, another format, other layers or
    shapes; RuntimeError if `phases` already has finished tasks.
    """
    tensors, meta = read(path)
    with _named(path):
        state.check_layers(meta.k, phases)
        pieces = state.Pieces(tensors if meta.learner is None else _of_finished_tasks(tensors))
        state.put_finished(phases, pieces, meta.tasks, complete=True)
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
    with _opened(path) as (file, form, meta):
        if form == FORMAT and not whole(path):
            raise ValueError("it is damaged: its checksum is wrong")
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        if form == FORMAT:
            if CHECKSUM not in tensors:
                raise ValueError("it holds no checksum")
            del tensors[CHECKSUM]
            for key in [key for key in tensors if key.startswith("mask/")]:
                weight = tensors.get(f"weight/{key.split('/', 2)[-1]}")
                if weight is None or tensors[key].dtype != torch.uint8 or tensors[key].dim() != 1:
                    raise ValueError(f"it holds {key!r}, which is no mask of a layer")
                tensors[key] = decode(tensors[key], weight.numel())
    return tensors, meta


def whole(path: str | Path) -> bool:
    """Whether the checksum at the end of a file is that of its content."""
    found = hashlib.sha256()
    left = os.path.getsize(path) - found.digest_size
    with open(path, "rb") as file:
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            found.update(part)
            left -= len(part)
        return file.read() == found.digest()


def describe(path: str | Path, verify: bool = False) -> str:
    """What a file holds, as text, from its header alone: nothing is loaded and no model is built.

    verify: read all of it once and compare its checksum. ValueError for what is no file of ours or is damaged.
    """
    with _opened(path) as (file, form, meta):
        if verify and not (form == FORMAT and whole(path)):
            raise ValueError("it is damaged: its checksum is wrong" if form == FORMAT else f"{form} has no checksum")
        pieces = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        shapes = {key: piece.get_shape() for key, piece in pieces.items()}
        widths = {name: dtype.itemsize for dtype, name in DTYPES.items()}
        sizes: dict[str, int] = {}
        for key, shape in shapes.items():
            kind = key.partition("/")[0]
            kind = {"kept": "best epoch", "open": "open task", "epoch": "open task"}.get(kind, kind)
            sizes[kind] = sizes.get(kind, 0) + math.prod(shape) * widths.get(pieces[key].get_dtype(), 0)
    weights = {n: math.prod(shapes.get(f"weight/{n}", ())) for n in meta.k}
    notes = meta.notes if isinstance(meta.notes, dict) else {}
    rows = [
        ("file", f"{_size(os.path.getsize(path))}, format {form}" + (", checksum right" if verify else "")),
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
    text = "\n".join(f"{name:<12}{value}" for name, value in rows if value)
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


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
        raise ValueError(f"load: {path}: {error}") from error


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, str, Meta]]:
    """The file for safetensors, its format, and what it holds beside tensors."""
    with _named(path):
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                form = header.get("format")
                if form not in (FIRST, FORMAT):
                    newer = form is not None and form.startswith("exssnet-")
                    raise ValueError(
                        f"it is of format {form}, this version reads {FIRST} and {FORMAT}"
                        + (": a newer exssnet wrote it, install that" if newer else "")
                    )
                yield file, form, _meta(header.get("exssnet", ""))
        except SafetensorError as error:
            raise ValueError(
                f"it is no safetensors file or is damaged ({' '.join(str(error).split())[:200]})"
            ) from error


def _meta(text: str) -> Meta:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("its description is no JSON") from None
    if isinstance(found, dict) and found.keys() == {"tasks", "k", "notes"}:  # as the first format has it
        found |= {"learner": None, "versions": {}}
    meta: Meta = typed(Meta, found, "the description")
    return meta


def versions() -> dict[str, str]:
    """What a checkpoint's bits may depend on."""
    from . import __version__

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
    entries: dict[str, Any] = {"__metadata__": {"format": FORMAT, "exssnet": json.dumps(vars(meta))}}
    # The widest first: then every tensor lies at a multiple of its entries' size.
    order = sorted(flat, key=lambda key: -flat[key].element_size())
    at = 0
    for key in order:
        end = at + flat[key].numel() * flat[key].element_size()
        entries[key] = {"dtype": DTYPES[flat[key].dtype], "shape": list(flat[key].shape), "data_offsets": [at, end]}
        at = end
    size = hashlib.sha256().digest_size
    entries[CHECKSUM] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)

    def parts() -> Iterator[Any]:
        yield len(header).to_bytes(8, "little")
        yield header
        for key in order:
            yield flat[key].reshape(-1).view(torch.uint8).numpy().data

    _replace(path, parts())


def _replace(path: Path, parts: Iterator[Any]) -> None:
    """Write bytes and their SHA-256 beside the file, onto the disk, then put them in its place."""
    part = path.with_name(path.name + ".part")
    found = hashlib.sha256()
    try:
        with open(part, "wb") as file:
            for data in parts:
                found.update(data)
                file.write(data)
            file.write(found.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # that the new name stays, too, needs the folder on the disk
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
