"""Experiments from recipes: learning rates are tuned, then every run is made, each in a process of its own.

Every result is a file. What is there is not made again, so an experiment that was stopped goes on where it was.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..continual import metrics
from ..continual.learner import Learner, PhaseOptions
from ..continual.task_inference import RULES, TaskInference, evaluate_without_task
from ..io.values import shown, typed
from ..io.writing import alone_in, write_text
from ..kernels.memory import keep_freed_memory, peak, resident, restart_peak
from ..nn import convert
from ..nn.models import MODELS
from ..tasks import Task, stratified_split, stream
from .baselines import BASELINES, Sequential
from .comparison import write_report
from .recipes import KKT, Rates, Recipe, Run, as_json, names, read, recipe


class RunFailed(Exception):
    """A run's process died, or a method learned with none of the learning rates."""


@dataclass(frozen=True)
class Job:
    """A run with given learning rates, or one of the runs that choose them."""

    recipe: Recipe
    root: str
    run: Run
    rates: Rates
    tuning: bool = False

    @property
    def file(self) -> str:
        if not self.tuning:
            return f"runs/{self.run.name}.json"
        rates = "-".join(f"{r:g}" for r in asdict(self.rates).values() if r is not None)
        return f"tuning/{self.run.name}-{rates}.json"


def tasks_of(job: Job) -> list[Task]:
    """The stream of a job. In tuning: its first tasks, with their validation data in the place of their test data."""
    made = job.recipe
    validation = made.validation or (made.tuning.validation if job.tuning else 0.0)
    tasks: list[Task] = stream(
        made.stream, job.root, **{"validation": validation, "seed": job.run.seed, **made.options}
    )
    if job.tuning:
        tasks = [replace(t, test=t.validation) for t in tasks[: made.tuning.tasks] if t.validation is not None]
    if made.scale < 1:
        tasks = [replace(t, train=_share(t.train, made.scale), test=_share(t.test, made.scale)) for t in tasks]
    return tasks


def _share(data: Any, share: float) -> Any:
    """Some of the items of each class, at least one."""
    generator = torch.Generator().manual_seed(0)
    most = data.labels.bincount().max().item()
    return data.select(stratified_split(data.labels, max(share, 1 / most), generator)[1])


def learner_of(job: Job, tasks: list[Task]) -> Learner:
    """A fresh learner of the run's method, with the same total number of epochs for every method."""
    made, run, rates = job.recipe, job.run, job.rates
    shape = tuple(tasks[0].train[0][0].shape)
    outputs = (sum if run.method == "multitask" else max)(task.classes for task in tasks)
    torch.manual_seed(run.seed)
    model = MODELS[made.model](shape, outputs).to("cuda" if torch.cuda.is_available() else "cpu")
    epochs = made.scaled_epochs
    common: dict[str, Any] = {"batch_size": made.batch_size, "seed": run.seed}
    if run.method in BASELINES:
        more: dict[str, dict[str, Any]] = {
            "ewc": {"strength": rates.strength}, "replay": {"memory": made.memory}, "packnet": {"tasks": len(tasks)},
        }  # fmt: skip
        made_of: Callable[..., Learner] = BASELINES[run.method]
        return made_of(model, PhaseOptions(2 * epochs, rates.weight), **more.get(run.method, {}), **common)
    assert run.density is not None
    convert(model, run.density, weights="signed_constant", init_scale=run.init_scale)  # type: ignore[arg-type]
    kkt = run.method.endswith(KKT)
    return Learner(
        model, run.base, mask=PhaseOptions(epochs, rates.mask), weight=PhaseOptions(epochs, rates.weight),
        kkt=made.kkt if kkt else None,  # type: ignore[arg-type]
        keep_scores=torch.float32 if kkt else None, **common,
    )  # fmt: skip


def perform(job: Job) -> dict[str, Any]:
    """Make a run and say what came of it, in values that JSON can hold. Times in seconds, memory in bytes."""
    torch.set_num_threads(1)
    tasks = tasks_of(job)
    restart_peak()
    before = resident()
    learner = learner_of(job, tasks)
    began = time.perf_counter()
    try:
        accuracy = learner.run(tasks)
    except FloatingPointError as error:
        return {"diverged": str(error)}
    if job.tuning:
        return {"validation": metrics.average_accuracy(accuracy)}
    found: dict[str, Any] = {
        "seconds": time.perf_counter() - began,
        "memory": peak() - before,
        "accuracy": [row[: i + 1] for i, row in enumerate(accuracy.tolist())],
        "average accuracy": metrics.average_accuracy(accuracy),
        "forgetting": metrics.forgetting(accuracy),
        "backward transfer": metrics.backward_transfer(accuracy),
        "learning accuracy": metrics.learning_accuracy(accuracy),
        "kept bytes": learner.nbytes if isinstance(learner, Sequential) else learner.phases.nbytes,
        "tasks": [_of_task(learner, report) for report in learner.reports],
    }
    if job.run.method.endswith(KKT) and len(tasks) > 1:
        pairs = [report.initial_accuracy or (0.0, 0.0) for report in learner.reports]
        found["forward transfer"] = metrics.forward_transfer([a for a, _ in pairs], [b for _, b in pairs])
    if job.recipe.task_inference and job.run.density is not None:
        found["without task id"] = _without_task(learner, tasks)
    return found


def _of_task(learner: Learner, report: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": report.name,
        "classes": report.classes,
        "seconds": report.seconds,
        "reverted": report.reverted,
        "curve": [r.accuracy if r.validation is None else r.validation for r in report.history],
    }
    if report.kkt is not None:
        found["sources"], found["initial accuracy"] = report.kkt.sources, report.initial_accuracy
    if report.task < len(learner.phases.bank):
        body = [name for name in learner.phases.layers if not name.endswith("head")]
        for part, layers in (("body", body), ("head", [n for n in learner.phases.layers if n not in body])):
            use = learner.phases.bank.total(report.task, layers)
            found[part] = {"weights": use.weights, "kept": use.kept, "free": use.free, "used": use.used}
    return found


def _without_task(learner: Learner, tasks: list[Task]) -> dict[str, Any]:
    data, classes = [t.test for t in tasks], [t.classes for t in tasks]
    return {
        f"{rule}, {samples}": asdict(
            evaluate_without_task(TaskInference(learner.phases, rule, samples), data, classes, batches=10)
        )
        for rule in RULES
        for samples in (1, 16, 128)
    }


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _perform_to_file(job: Job, file: Path) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()  # nobody waits for a run whose command was killed
    keep_freed_memory()
    write_text(file, json.dumps(perform(job)))


def perform_all(jobs: Iterable[Job], out: Path, processes: int, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """The results of all jobs, made where their files are not there yet, `processes` at a time.

    RunFailed, naming the job, if a process dies.
    """
    jobs = list(jobs)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["exssnet.experiments.reproduce"])  # what a process imports is imported once
    missing = [job for job in jobs if not (out / job.file).exists()]

    def make(job: Job) -> None:
        file = out / job.file
        file.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        process = context.Process(target=_perform_to_file, args=(job, file))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise RunFailed(f"{job.file} failed with exit status {process.exitcode}; what is finished is in {out}")
        tell(f"{job.file} {time.perf_counter() - began:.0f} s")

    with ThreadPoolExecutor(processes) as pool:
        for future in [pool.submit(make, job) for job in missing]:
            try:
                future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [_read_json(out / job.file) for job in jobs]


def _read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError, naming the file, for any other."""
    try:
        found = typed(dict, json.loads(file.read_bytes()), "its content")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged, delete it to make it again: {shown(error)}") from None
    return found  # type: ignore[no-any-return]


def tune(made: Recipe, root: str, out: Path, processes: int, tell: Callable[[str], None]) -> dict[Run, Rates]:
    """The learning rates of each group of runs, with or without KKT: those with the best mean validation accuracy.

    Of equals the smaller rates. RunFailed for a method that diverges with all of them.
    """
    groups = list(dict.fromkeys(replace(run.group, method=run.base) for run in made.runs()))
    jobs = [
        Job(made, root, replace(group, seed=seed), rates, tuning=True)
        for group in groups
        for rates in made.candidates(group.method)
        for seed in made.tuning.seeds
        if len(made.candidates(group.method)) > 1
    ]
    found: dict[tuple[Run, Rates], list[float]] = {}
    for job, result in zip(jobs, perform_all(jobs, out, processes, tell), strict=True):
        found.setdefault((job.run.group, job.rates), []).append(result.get("validation", float("-inf")))
    chosen = {}
    for group in groups:
        candidates = made.candidates(group.method)
        if len(candidates) == 1:
            chosen[group] = candidates[0]
            continue
        chosen[group] = max(candidates, key=lambda rates: statistics.mean(found[group, rates]))
        if statistics.mean(found[group, chosen[group]]) == float("-inf"):
            raise RunFailed(f"{group.method} diverged with every learning rate of {list(made.tuning.rates)}")
    return chosen


def reproduce(
    made: Recipe, root: str, out: Path, processes: int, tell: Callable[[str], None] = print
) -> dict[str, Any]:
    """Make all runs of a recipe and write report.md, report.json and plots into `out`. Returns what report.json holds.

    ValueError if `out` holds results of another recipe.
    """
    described = json.loads(json.dumps(as_json(made)))
    file = out / "recipe.json"
    before = _read_json(file) if file.exists() else described
    if before.keys() != described.keys() or (before != described and any(out.glob("*/*.json"))):
        raise ValueError(f"{out} holds results of another recipe or another --scale: give another --out")
    began = time.time()
    first = Job(made, root, made.runs()[0], Rates(1, 1, 1))
    learner_of(first, tasks_of(first))  # missing data and a wrong model are told here, texts are encoded once
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(described, indent=1))
    rates = tune(made, root, out, processes, tell)
    runs = made.runs()
    jobs = [Job(made, root, run, rates[replace(run.group, method=run.base)]) for run in runs]
    results = perform_all(jobs, out, processes, tell)
    report = {
        "recipe": described,
        "machine": {
            "cpu": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(), "processes": processes,
            "torch": torch.__version__, "python": platform.python_version(), "platform": platform.platform(),
        },
        "seconds": time.time() - began,
        "runs": [
            {**asdict(job.run), "rates": asdict(job.rates), "shown rates": str(job.rates), **result}
            for job, result in zip(jobs, results, strict=True)
        ],
    }  # fmt: skip
    write_report(report, out)
    return report


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `exssnet reproduce`."""
    parser.add_argument("recipe", help=f"one of {', '.join(names())}, or a YAML file like them")
    parser.add_argument("--root", default="data", help="folder with the data sets (default: data)")
    parser.add_argument("--out", type=Path, help="folder for runs and report (default: runs/RECIPE)")
    parser.add_argument("--scale", type=float, help="shrink epochs and training data, for a smoke test")
    parser.add_argument("--seeds", type=int, help="number of seeds, instead of the recipe's")
    parser.add_argument("--densities", type=float, nargs="+", help="densities, instead of the recipe's")
    parser.add_argument("--methods", nargs="+", help="methods, instead of the recipe's")
    parser.add_argument("--epochs", type=int, help="epochs of each phase, instead of the recipe's")
    parser.add_argument("--tasks", type=int, help="learn only so many tasks of the stream")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")


def run(options: argparse.Namespace) -> int:
    """Run `exssnet reproduce`; returns the exit status."""
    made = as_json(read(options.recipe))
    for name in ("scale", "seeds", "densities", "methods", "epochs"):
        if getattr(options, name) is not None:
            made[name] = getattr(options, name)
    if options.tasks is not None:
        made["options"] = {**made["options"], "tasks": options.tasks}
    if options.processes < 1:
        raise ValueError(f"processes must be at least 1, got {options.processes}")
    out = options.out or Path("runs") / Path(options.recipe).stem
    whole = recipe(made, options.recipe)
    with alone_in(out):
        reproduce(whole, options.root, out, options.processes, lambda line: print(line, flush=True))
    print(f"\n{(out / 'report.md').read_text(encoding='utf-8')}\nPlots and numbers are in {out}")
    return 0
