"""Progress, tables, plots and files of a training run."""

import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from ..continual import distributed, metrics
from ..continual.learner import Learner, Observer
from ..continual.records import EpochRecord, TaskReport
from ..io.console import secondary
from ..io.writing import write_text
from ..tasks import Task
from .plotting import pyplot, save

HEAD = "head"
"""The output layer of every network in `exssnet.nn.models`."""


def _line(record: EpochRecord) -> str:
    validation = "" if record.validation is None else f", validation {100 * record.validation:.2f} %"
    return (
        f"task {record.task}, {record.phase} phase, epoch {record.epoch}/{record.epochs}: loss {record.loss:.4f}, "
        f"accuracy {100 * record.accuracy:.2f} %{validation} ({record.seconds:.1f} s)"
    )


class _Silent:
    """Says nothing."""

    def on_step(self, task: int, phase: str, step: int, steps: int, loss: Tensor) -> None:
        pass

    def on_epoch(self, record: EpochRecord) -> None:
        pass


class _PlainLines(_Silent):
    """One line an epoch, for logs and pipes."""

    def on_epoch(self, record: EpochRecord) -> None:
        print(_line(record), flush=True)


class _Bars:
    """A progress bar for each phase of each task, with loss, accuracy and time left."""

    def __init__(self, progress: Progress, tasks: list[Task]) -> None:
        self.progress, self.tasks = progress, tasks
        self.bars: dict[tuple[int, str], Any] = {}
        self.accuracy = ""

    def on_step(self, task: int, phase: str, step: int, steps: int, loss: Tensor) -> None:
        if (task, phase) not in self.bars:
            self.accuracy = ""
            text = f"{self.tasks[task].name} ({task + 1}/{len(self.tasks)}), {phase} phase"
            self.bars[task, phase] = self.progress.add_task(text, total=steps, numbers="")
        if step % 10 == 0 or step == steps:
            self.progress.update(
                self.bars[task, phase], completed=step, numbers=f"loss {loss.item():.3f}{self.accuracy}"
            )

    def on_epoch(self, record: EpochRecord) -> None:
        shown = record.accuracy if record.validation is None else record.validation
        kind = "accuracy" if record.validation is None else "validation"
        self.accuracy = f", {kind} {100 * shown:.1f} %"
        self.progress.update(self.bars[record.task, record.phase], numbers=f"loss {record.loss:.3f}{self.accuracy}")


@contextmanager
def observer(tasks: list[Task]) -> Iterator[Observer]:
    """Progress bars on a terminal, plain lines elsewhere; of several processes the first one talks."""
    if distributed.rank() > 0:
        yield _Silent()
        return
    if not sys.stdout.isatty():
        yield _PlainLines()
        return
    columns = ("{task.description}", BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"))
    with Progress(*columns) as progress:
        yield _Bars(progress, tasks)


def scores_of(learner: Learner) -> dict[str, float]:
    """The continual-learning metrics of the tasks learned so far, in [0, 1]."""
    accuracy = learner.accuracy
    found = {
        "average accuracy": metrics.average_accuracy(accuracy),
        "forgetting": metrics.forgetting(accuracy),
        "backward transfer": metrics.backward_transfer(accuracy),
        "learning accuracy": metrics.learning_accuracy(accuracy),
    }
    if learner.kkt is not None and len(learner.reports) > 1:
        pairs = [r.initial_accuracy or (0.0, 0.0) for r in learner.reports[: len(accuracy)]]
        found["forward transfer"] = metrics.forward_transfer([a for a, _ in pairs], [b for _, b in pairs])
    return found


def _task_entry(learner: Learner, report: TaskReport) -> dict[str, Any]:
    bank, head = learner.phases.bank, learner.head or HEAD
    total = bank.total(report.task)
    body = bank.total(report.task, [n for n in learner.phases.layers if n != head] or [head])
    return {
        "task": report.task,
        "name": report.name,
        "classes": report.classes,
        "kept": total.kept,
        "free": total.free,
        "free_without_head": body.free,
        "sparse_overlap": total.sparse_overlap,
        "total_overlap": total.total_overlap,
        "capacity_used": total.capacity,
        "layers": {name: asdict(use) for name, use in report.use.items()},
        "kkt": None if report.kkt is None else {"sources": report.kkt.sources, "knn_accuracy": report.kkt.accuracies},
        "initial_accuracy": report.initial_accuracy,
        "weight_phase_reverted": report.reverted,
        "seconds": report.seconds,
    }


class Report:
    """Writes and shows the outcome of one run in the folder `options["out"]`."""

    def __init__(self, options: dict[str, Any], tasks: list[Task], model: str) -> None:
        self.options, self.tasks, self.model = options, tasks, model
        self.out = Path(options["out"])
        self.out.mkdir(parents=True, exist_ok=True)

    def write(self, learner: Learner) -> None:
        """Write metrics.jsonl, result.json, accuracy.png and curves.png for the tasks learned so far.

        A file that cannot be written is told on stderr and left out.
        """
        files: dict[str, Callable[[Learner, Path], None]] = {"metrics.jsonl": _metrics, "result.json": self._result}
        if len(learner.accuracy):
            with secondary("no plots were drawn"):
                if plt := pyplot():
                    files["accuracy.png"] = partial(self._plot_accuracy, plt)
                    files["curves.png"] = partial(_plot_curves, plt)
                else:
                    print("No plots: matplotlib is not installed (pip install 'exssnet[plots]').")
        for name, put in files.items():
            with secondary(f"{name} was not written"):
                put(learner, self.out / name)

    def _result(self, learner: Learner, file: Path) -> None:
        from .. import __version__

        result = {
            "options": self.options,
            "model": self.model,
            "versions": {"exssnet": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "threads": torch.get_num_threads(),
            "accuracy": [[None if a != a else a for a in row] for row in learner.accuracy.tolist()],
            "metrics": scores_of(learner) if len(learner.accuracy) else {},
            "tasks": [_task_entry(learner, report) for report in learner.reports],
            "mask_bytes": learner.phases.bank.nbytes,
        }
        write_text(file, json.dumps(result, indent=2) + "\n")

    def show(self, learner: Learner) -> None:
        """The accuracy matrix, the metrics, and what each task uses, as tables on the terminal."""
        console = Console()
        if not len(learner.accuracy):
            return
        matrix = Table(title="Accuracy on task j (columns) after learning task i (rows), %")
        matrix.add_column("")
        for j in range(len(learner.accuracy)):
            matrix.add_column(str(j), justify="right")
        for i, row in enumerate(learner.accuracy.tolist()):
            matrix.add_row(str(i), *("" if a != a else f"{100 * a:.1f}" for a in row))
        console.print(matrix)
        numbers = Table(title="Metrics, %")
        numbers.add_column("metric")
        numbers.add_column("", justify="right")
        for name, value in scores_of(learner).items():
            numbers.add_row(name, f"{100 * value:.2f}")
        console.print(numbers)
        reverted = [r.name for r in learner.reports if r.reverted]
        caption = "overlap: share of the mask that earlier tasks use; used: share of all weights used so far" + (
            f"\nweight phase undone, no better on validation: {', '.join(reverted)}" if reverted else ""
        )
        use = Table(title="Weights of each task's masks, and time", caption=caption)
        for name in ("task", "kept", "free", "overlap %", "used %", "KKT from", "mask s", "weight s"):
            use.add_column(name, justify="right")
        for report in learner.reports:
            entry = _task_entry(learner, report)
            sources = ", ".join(map(str, report.kkt.sources)) if report.kkt and report.kkt.sources else "-"
            seconds = report.seconds
            use.add_row(
                report.name, f"{entry['kept']:,}", f"{entry['free']:,}", f"{100 * entry['sparse_overlap']:.1f}",
                f"{100 * entry['capacity_used']:.1f}", sources, f"{seconds.get('mask', seconds.get('joint', 0)):.1f}",
                f"{seconds.get('weight', 0):.1f}",
            )  # fmt: skip
        console.print(use)
        console.print(f"Results, plots and the model are in {self.out}")

    def _plot_accuracy(self, plt: Any, learner: Learner, file: Path) -> None:
        accuracy = 100 * learner.accuracy
        tasks = len(accuracy)
        figure, axes = plt.subplots(figsize=(1.2 + 0.7 * max(5, tasks), 1 + 0.6 * max(5, tasks)), layout="constrained")
        lowest = min(50.0, float(accuracy.nan_to_num(100).min()))
        image = axes.imshow(accuracy.numpy(), cmap="viridis", vmin=lowest, vmax=100)
        for i in range(tasks if tasks <= 20 else 0):
            for j in range(i + 1):
                value = accuracy[i, j].item()
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value < 85 else "black")
        axes.set(
            xlabel="test data of task", ylabel="after learning task",
            title=f"Accuracy (%), {self.options['method']}, density {self.options['density']:g}",
            xticks=range(tasks), yticks=range(tasks),
        )  # fmt: skip
        figure.colorbar(image, label="accuracy (%)")
        save(figure, file)


def _metrics(learner: Learner, file: Path) -> None:
    """One line of JSON an epoch."""
    lines = (json.dumps(asdict(record)) + "\n" for report in learner.reports for record in report.history)
    write_text(file, "".join(lines))


def _plot_curves(plt: Any, learner: Learner, file: Path) -> None:
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    start = 0
    for report in learner.reports:
        shown: list[tuple[int, EpochRecord]] = [(start + i + 1, r) for i, r in enumerate(report.history)]
        color = f"C{report.task % 10}"
        for phase, style in (("mask", "--"), ("joint", "--"), ("weight", "-")):
            part = [(i, r) for i, r in shown if r.phase == phase]
            label = f"{report.name}, {phase} phase" if len(learner.accuracy) <= 6 else None
            above.plot([i for i, _ in part], [r.loss for _, r in part], style, color=color, marker=".")
            if part:
                best = [100 * (r.accuracy if r.validation is None else r.validation) for _, r in part]
                below.plot([i for i, _ in part], best, style, color=color, marker=".", label=label)
        start += len(report.history)
    validated = any(r.validation is not None for report in learner.reports for r in report.history)
    above.set(ylabel="training loss", yscale="log", title="Learning curves of all tasks, one after another")
    below.set(xlabel="epoch", ylabel=f"{'validation' if validated else 'training'} accuracy (%)")
    if len(learner.accuracy) <= 6 and below.lines:
        below.legend(fontsize="x-small", ncols=2)
    save(figure, file)
