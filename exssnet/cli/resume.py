"""Which checkpoint a run of `exssnet train` continues, and which files a new run may replace."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..checkpoint.rebuild import CHECKPOINT, MODEL
from ..continual import distributed
from ..continual.learner import Learner
from ..io.console import warn
from ..io.values import printable
from ..tasks import Task
from .options import FREE, TrainOptions, checked
from .threads import cores


def run_to_resume(text: str, chosen: dict[str, Any]) -> tuple[TrainOptions, Path]:
    """Find the run that ``--resume`` names.

    Args:
        text: a checkpoint or its folder; empty for the folder OUT.
        chosen: the other options that were given, by name.

    Returns:
        The options of that run, with those of `FREE` that were given anew, and its checkpoint.

    Raises:
        ValueError: There is no checkpoint, it is not of `exssnet train`, or a given option differs from the run's.
    """
    path = Path(text or chosen.get("out", TrainOptions.out))
    path = path / CHECKPOINT if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"there is no checkpoint {path}: a run writes one every 10 minutes (--every-minutes), with --every N after "
            "N steps, and when SIGINT, SIGTERM or SIGHUP stops it"
        )
    notes = checkpoint.header(path).notes
    if not _of_train(notes):
        raise ValueError(f"{path} is of no run of `exssnet train`: load it with exssnet.checkpoint")
    options, learned = checked(path, notes["options"]), len(notes["classes"])
    if options.get("tasks") not in (None, learned):
        raise ValueError(f"{path} is damaged: it tells of {options['tasks']} tasks, and of the classes of {learned}")
    was = TrainOptions(**options)
    for name, value in chosen.items():
        if name not in FREE and value != getattr(was, name):
            raise ValueError(
                f"--{name.replace('_', '-')} {value} is not what the run in {path} has ({getattr(was, name)}): "
                "leave it out, a resumed run keeps its options"
            )
    options |= {"out": str(path.parent)} | {name: value for name, value in chosen.items() if name in FREE}
    cache = options.get("cache")
    if cache is not None and "cache" not in chosen and not Path(cache).is_dir():
        raise ValueError(f"the run in {path} keeps features of texts in {cache}, which is no folder: give --cache")
    return TrainOptions(**options), path


def _of_train(notes: Any) -> bool:
    """Whether the notes of a checkpoint are those that `exssnet train` writes."""
    kinds = {"options": dict, "classes": list}
    return isinstance(notes, dict) and all(isinstance(notes.get(name), kind) for name, kind in kinds.items())


def was_restarted(path: Path, options: TrainOptions) -> bool:
    """Whether torchrun started this process again after the run with these options had written a checkpoint.

    Args:
        path: where the run writes its checkpoint.
        options: the options of the run.
    """
    notes: Any = checkpoint.header(path).notes if distributed.restarts() and path.exists() else None
    own = {name: value for name, value in asdict(options).items() if name not in FREE}
    return _of_train(notes) and own.items() <= notes["options"].items()


def check_replaceable(out: Path, resume: Path | None) -> None:
    """Check that a run may write its files into a folder.

    Args:
        out: the folder.
        resume: the checkpoint that the run continues, which may lie in the folder.

    Raises:
        ValueError: The folder holds a run that is not finished, or a file of our names that this version cannot read.
    """
    instead = "give another --out, or move it away"
    for path in (out / CHECKPOINT, out / MODEL):
        if not path.exists() or (resume is not None and path.samefile(resume)):
            continue
        try:
            meta = checkpoint.header(path)
        except ValueError as error:
            raise ValueError(f"{error}; a new run would replace it: {instead}") from None
        if path.name == CHECKPOINT and (meta.learner is None or not _of_train(meta.notes)):
            raise ValueError(f"{path} is of no run of `exssnet train`, and a new run would replace it: {instead}")
        if path.name == CHECKPOINT and meta.tasks < len(meta.notes["classes"]):
            raise ValueError(
                f"{out} holds a run that stopped after {meta.tasks} of {len(meta.notes['classes'])} tasks: go on with "
                f"`exssnet train --resume {out}`, give another --out, or delete {path}"
            )


def load(learner: Learner, path: Path, tasks: Sequence[Task]) -> None:
    """Bring a learner to the state of a checkpoint; print where it is, and warn of other versions and of fewer cores.

    Args:
        learner: fresh, with the options of the run.
        path: the checkpoint.
        tasks: the stream of the run.
    """
    checkpoint.load_run(learner, path, tasks)
    if distributed.rank() > 0:
        return
    then, now = checkpoint.header(path).versions, checkpoint.versions()
    for name in ("exssnet", "torch", "cpu"):
        if then.get(name) != now[name]:
            told = f"the checkpoint is from {name} {printable(str(then.get(name)))}, this is {now[name]}"
            warn(f"{told}: results may differ in rounding")
    if (threads := torch.get_num_threads()) > (available := cores()):
        warn(
            f"the run has {threads} threads for {available} CPU cores: --threads {available} may be faster, but "
            "results may differ in rounding"
        )
    done = len(learner.reports)
    if done == len(tasks):
        print(f"The run of {path} is finished: {done} of {done} tasks are learned; its results are written again.")
    else:
        where = "" if learner.phases.phase == "idle" else f", in the {learner.phases.phase} phase of task {done}"
        print(f"Resumed from {path} after {done} of {len(tasks)} tasks{where}.", flush=True)
