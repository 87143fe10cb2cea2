"""The command line: ``exssnet train``, ``reproduce``, ``inspect``, ``bench`` and ``info``; the wiring of a run."""

import argparse
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import torch

from .. import checkpoint
from ..bench import command as bench
from ..bench.timing import WrongResult
from ..continual import distributed
from ..continual.kkt import RULES
from ..continual.learner import OPTIMIZERS, Learner, PhaseOptions
from ..continual.methods import METHODS
from ..experiments import reproduce
from ..experiments.report import Report, observer
from ..io.console import COMMANDS, results_are_files, secondary, warn
from ..io.console import main as main
from ..io.values import fitting, printable, read_yaml, shown
from ..io.writing import alone_in
from ..kernels.memory import keep_freed_memory
from ..nn import convert
from ..nn.choice import PRODUCTS
from ..nn.models import MODELS
from ..tasks import Task, load, names, permuted_pixels, rotated, split_by_class, stream, streams
from .info import describe
from .saving import Saver, Stopped


def _option(default: Any, help_: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help_, **more})


@dataclass
class TrainOptions:
    """One training run; every field is an option of the command line and a key of the YAML file."""

    data: str = _option("mnist5k", f"data set ({', '.join(names())}), an .npz file, or a folder of class folders")
    root: str | None = _option(None, "folder where the data set lies; nothing is ever downloaded")
    stream: str = _option(
        "split", "tasks of --data by class, by pixel permutation or by rotation; or a stream of the literature by name",
        choices=("split", "permuted", "rotated", *streams()),
    )  # fmt: skip
    tasks: int | None = _option(None, "number of tasks; None: 5, or all of a named stream")
    model: str = _option(
        "auto", "network; auto: text-cnn for texts, lenet-300-100 for grey images, resnet18 for others",
        choices=("auto", *MODELS),
    )  # fmt: skip
    method: str = _option("exssnet", "what is trained when", choices=tuple(METHODS))
    density: float = _option(0.1, "share of each layer's weights that a task's mask keeps")
    kkt: str = _option(
        "best", "start a task's scores from earlier tasks, by K nearest neighbours", choices=(*RULES, "none")
    )
    epochs: int = _option(5, "epochs of the mask phase")
    weight_epochs: int = _option(5, "epochs of the weight phase (methods without one add them to the mask phase)")
    mask_lr: float = _option(1e-2, "peak learning rate of the scores (cosine)")
    weight_lr: float = _option(1e-2, "peak learning rate of the weights (cosine)")
    optimizer: str = _option("adam", "optimizer of both phases", choices=OPTIMIZERS)
    weight_decay: float = _option(0.0, "weight decay of both phases")
    batch_size: int = _option(64, "images in a training batch")
    patience: int | None = _option(None, "stop a phase after this many epochs without a better validation result")
    validation: float | None = _option(
        None,
        "share of the training data that picks the best epoch; 0: the last epoch counts; None: 0.1, or a stream's",
    )
    augment: bool | None = _option(
        None,
        "random crop and flip of 32x32 colour images, flip of larger ones (default: no, or as a stream does)",
    )
    per_class: int | None = _option(None, "use at most so many training items of each class (named streams)")
    test_per_class: int | None = _option(None, "the same for test items")
    encoder: str | None = _option(None, "of texts: a model's folder or name, or word vectors; None: all-MiniLM-L6-v2")
    max_tokens: int = _option(64, "tokens of a text that count")
    cache: str | None = _option(None, "folder for the features of texts; None: ~/.cache/exssnet/features")
    init_scale: str = _option("official", "scale of the signed constant weights", choices=("official", "density"))
    allocation: str = _option("uniform", "how the density is spread over layers", choices=("uniform", "er"))
    products: str = _option("auto", "of what a mask keeps alone, of all, or whichever is faster", choices=PRODUCTS)
    all_outputs: bool = _option(False, "let loss and prediction see all outputs of the shared head")
    keep_scores: str = _option(
        "float32", "in which finished tasks' scores are kept for KKT", choices=("float32", "float16", "none")
    )
    seed: int = _option(0, "seed of weights, scores, splits and order of the data")
    threads: int | None = _option(None, "CPU threads (default: torch's)")
    every: int | None = _option(None, "write the checkpoint OUT/checkpoint.safetensors after so many steps")
    every_minutes: float = _option(10.0, "write it after so many minutes; 0: not for that")
    out: str = _option("runs/train", "folder for results, plots and the model")


CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"
MOST_THREADS = 1024
FREE = ("root", "cache", "threads", "every", "every_minutes", "out")
"""Options that a resumed run may be given anew."""


def _kind(option: Field[Any]) -> type:
    """What the values of an option are, also where the default is None."""
    kind: type = (get_args(option.type) or (option.type,))[0]
    return kind


def _add_options(parser: argparse.ArgumentParser) -> None:
    for f in fields(TrainOptions):
        name = "--" + f.name.replace("_", "-")
        text = f"{f.metadata['help']} (default: {f.default})"
        if _kind(f) is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=f.metadata["help"])
            continue
        kind = _kind(f)
        parser.add_argument(name, type=kind, default=None, choices=f.metadata.get("choices"), help=text)


def _checked(path: str | Path, read: dict[Any, Any]) -> dict[str, Any]:
    """Options by name; ValueError, naming the file they are from, for an unknown key or a value of the wrong kind."""
    known = {f.name: f for f in fields(TrainOptions)}
    options = {}
    for key, value in read.items():
        name = key.replace("-", "_") if isinstance(key, str) else ""
        if name not in known:
            raise ValueError(f"{path}: unknown option {shown(key)}; known are {', '.join(known)}")
        f = known[name]
        try:
            value = fitting(f.type, value)
        except ValueError:
            raise ValueError(f"{path}: {key} must be {_kind(f).__name__}, got {shown(value)}") from None
        choices = f.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{path}: {key} must be one of {', '.join(choices)}, got {shown(value)}")
        options[name] = value
    return options


def _tasks(options: TrainOptions) -> list[Task]:
    """The stream that the options name."""
    if options.stream in streams():
        return stream(
            options.stream, options.root, tasks=options.tasks, validation=options.validation, augment=options.augment,
            per_class=options.per_class, test_per_class=options.test_per_class, seed=options.seed,
            encoder=options.encoder, max_tokens=options.max_tokens, cache=options.cache, progress=_say_encoded,
        )  # fmt: skip
    if others := [n for n in ("per_class", "test_per_class", "encoder", "cache") if getattr(options, n) is not None]:
        raise ValueError(f"{', '.join(others)} is for the streams {', '.join(streams())}, got {options.stream}")
    data = load(options.data, options.root)
    cut: Any = {"split": split_by_class, "permuted": permuted_pixels, "rotated": rotated}[options.stream]
    if options.augment and options.stream != "split":
        raise ValueError(f"augment is for the split stream, got {options.stream}")
    augment = {"augment": bool(options.augment)} if options.stream == "split" else {}
    validation = 0.1 if options.validation is None else options.validation
    number = 5 if options.tasks is None else options.tasks
    return cut(*data, number, validation=validation, seed=options.seed, **augment)  # type: ignore[no-any-return]


def _say_encoded(what: str, done: int, texts: int) -> None:
    if done == texts or done % 1024 == 0:
        print(f"{what}: {done} of {texts} texts encoded", flush=True)


def _to_resume(text: str, chosen: dict[str, Any]) -> tuple[TrainOptions, Path]:
    """Options of the run whose checkpoint or folder is named, or lies in OUT, and the checkpoint."""
    path = Path(text or chosen.get("out", TrainOptions.out))
    path = path / CHECKPOINT if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"there is no checkpoint {path}: a run writes one every 10 minutes (--every-minutes), with --every N after "
            "N steps, and when SIGINT, SIGTERM or SIGHUP stops it"
        )
    notes = checkpoint.header(path).notes
    if not _of_run(notes):
        raise ValueError(f"{path} is of no run of `exssnet train`: load it with exssnet.checkpoint")
    options, learned = _checked(path, notes["options"]), len(notes["classes"])
    if options.get("tasks") not in (None, learned):
        raise ValueError(f"{path} is damaged: it tells of {options['tasks']} tasks, and of the classes of {learned}")
    for name, value in chosen.items():
        if name not in FREE and value != options.get(name):
            raise ValueError(
                f"--{name.replace('_', '-')} {value} is not what the run in {path} has ({options.get(name)}): "
                "leave it out, a resumed run keeps its options"
            )
    options |= {"out": str(path.parent)} | {name: value for name, value in chosen.items() if name in FREE}
    cache = options.get("cache")
    if cache is not None and "cache" not in chosen and not Path(cache).is_dir():
        raise ValueError(f"the run in {path} keeps features of texts in {cache}, which is no folder: give --cache")
    return TrainOptions(**options), path


def _of_run(notes: Any) -> bool:
    kinds = {"options": dict, "classes": list}
    return isinstance(notes, dict) and all(isinstance(notes.get(name), kind) for name, kind in kinds.items())


def _began(path: Path, options: TrainOptions) -> bool:
    """Whether the checkpoint, if there is one, is of a run of these options."""
    notes: Any = checkpoint.header(path).notes if path.exists() else None
    asked = {name: value for name, value in asdict(options).items() if name not in FREE}
    return _of_run(notes) and asked.items() <= notes["options"].items()


def _check_room(out: Path, resume: Path | None) -> None:
    """ValueError for a run in the folder that could go on, and for files of our names that this version cannot read.

    resume: the checkpoint from which the run goes on, which may lie there.
    """
    instead = "give another --out, or move it away"
    for path in (out / CHECKPOINT, out / MODEL):
        if not path.exists() or (resume is not None and path.samefile(resume)):
            continue
        try:
            meta = checkpoint.header(path)
        except ValueError as error:
            raise ValueError(f"{error}; a new run would replace it: {instead}") from None
        if path.name == CHECKPOINT and (meta.learner is None or not _of_run(meta.notes)):
            raise ValueError(f"{path} is of no run of `exssnet train`, and a new run would replace it: {instead}")
        if path.name == CHECKPOINT and meta.tasks < len(meta.notes["classes"]):
            raise ValueError(
                f"{out} holds a run that stopped after {meta.tasks} of {len(meta.notes['classes'])} tasks: go on with "
                f"`exssnet train --resume {out}`, give another --out, or delete {path}"
            )


def _resume(learner: Learner, path: Path, tasks: Sequence[Any]) -> None:
    """Put the learner where the checkpoint was taken, and say what is different from there."""
    checkpoint.load_run(learner, path, tasks)
    if distributed.rank() > 0:
        return
    then, now = checkpoint.header(path).versions, checkpoint.versions()
    for name in ("exssnet", "torch", "cpu"):
        if then.get(name) != now[name]:
            told = f"the checkpoint is from {name} {printable(str(then.get(name)))}, this is {now[name]}"
            warn(f"{told}: results may differ in rounding")
    done = len(learner.reports)
    if done == len(tasks):
        print(f"The run of {path} is finished: {done} of {done} tasks are learned; its results are written again.")
    else:
        where = "" if learner.phases.phase == "idle" else f", in the {learner.phases.phase} phase of task {done}"
        print(f"Resumed from {path} after {done} of {len(tasks)} tasks{where}.", flush=True)


def train(options: TrainOptions, resume: Path | None = None) -> int:
    """Run `exssnet train`: learn the stream, print and write the results. Returns the exit status.

    resume: the checkpoint from which to go on.
    """
    distributed.start()
    keep_freed_memory()
    with alone_in(Path(options.out)) if distributed.rank() == 0 else nullcontext():
        return _train(options, resume)


def _train(options: TrainOptions, resume: Path | None) -> int:
    """What `train` does while no other process may write into the folder."""
    threads, kept = options.threads, Path(options.out) / CHECKPOINT
    if distributed.restarted() and _began(kept, options):
        resume = kept
    if distributed.rank() == 0:
        _check_room(kept.parent, resume)
    if resume is not None and threads is None:
        threads = checkpoint.header(resume).notes.get("threads")
    if threads is not None:
        if not isinstance(threads, int) or not 1 <= threads <= MOST_THREADS:
            raise ValueError(f"threads must be in [1, {MOST_THREADS}], got {shown(threads)}")
        torch.set_num_threads(threads)
    if (options.every is not None and options.every < 1) or not options.every_minutes >= 0:
        raise ValueError(
            f"every must be at least 1 and every_minutes at least 0, got {options.every} and {options.every_minutes}"
        )
    kkt = None if options.kkt == "none" else options.kkt
    tasks = _tasks(options)
    shape = tasks[0].train[0][0].shape
    fitting = "text-cnn" if len(shape) == 2 else "lenet-300-100" if shape[0] == 1 else "resnet18"
    name = options.model if options.model != "auto" else fitting
    torch.manual_seed(options.seed)
    model = convert(
        MODELS[name](shape, max(task.classes for task in tasks)), options.density, weights="signed_constant",
        init_scale=options.init_scale, allocation=options.allocation, products=options.products,  # type: ignore[arg-type]
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"  # under torchrun the process' own GPU is the current one
    phase: dict[str, Any] = {
        "optimizer": options.optimizer,
        "weight_decay": options.weight_decay,
        "patience": options.patience,
    }
    report = Report(asdict(options), tasks, name)
    notes = {"model": name, "shape": list(shape), "classes": [task.classes for task in tasks]}
    run_notes = {**notes, "options": asdict(options), "threads": torch.get_num_threads()}
    with observer(tasks) as watching:
        saver = Saver(watching, report.out / CHECKPOINT, run_notes, options.every, options.every_minutes)
        learner = Learner(
            model.to(device), options.method, kkt=kkt,  # type: ignore[arg-type]
            mask=PhaseOptions(options.epochs, options.mask_lr, **phase),
            weight=PhaseOptions(options.weight_epochs, options.weight_lr, **phase),
            batch_size=options.batch_size, all_outputs=options.all_outputs, seed=options.seed,
            keep_scores=None if options.keep_scores == "none" else getattr(torch, options.keep_scores),
            observer=saver,
        )  # fmt: skip
        saver.learner = learner
        if resume is not None:
            _resume(learner, resume, tasks)
            if saver.path.exists() and saver.path.samefile(resume):
                saver.tasks = len(learner.reports)
        saver.replaces = resume != saver.path and saver.path.exists()
        stopped: BaseException | None = None
        with saver.at_signals():  # the first signal does not disturb the saving
            try:
                learner.run(tasks)
            except BaseException as error:
                stopped = error
                traceback.clear_frames(error.__traceback__)  # what a step held in memory is free for saving
            if distributed.rank() == 0:
                unsaved = _save(learner, saver, report.out / MODEL, notes, stopped)
    if distributed.rank() > 0:
        if stopped is not None and not isinstance(stopped, KeyboardInterrupt | FloatingPointError):
            raise stopped
        return 0 if stopped is None else 1
    # What lasts is saved. The rest is only told where it fails.
    report.write(learner)
    with secondary("the results were not shown"):
        report.show(learner)
    if unsaved is not None:
        if stopped is None:
            raise unsaved
        warn(f"the model was not saved: {unsaved or type(unsaved).__name__}")
    return 0 if stopped is None else _stopped(stopped, learner, saver, len(tasks))


def _save(
    learner: Learner, saver: Saver, file: Path, notes: dict[str, Any], stopped: BaseException | None
) -> Exception | None:
    """Save the run's checkpoint and the model of the finished tasks, whatever ended the run; returns why not."""
    unsaved = None
    try:
        if stopped is not None:
            saver.rescue()
        if learner.reports:
            checkpoint.save(learner.phases, file, notes | {"classes": [r.classes for r in learner.reports]})
    except Exception as error:
        unsaved = error
    if stopped is None and (saver.path.exists() or saver.every or unsaved):
        saver.write()
    return unsaved


def _stopped(stopped: BaseException, learner: Learner, saver: Saver, tasks: int) -> int:
    """Say what is left of a run that ended early; returns the exit status, or raises the error that ended it."""
    out = saver.path.parent
    if learner.reports:
        print(f"Stopped after {len(learner.reports)} of {tasks} tasks; what was learned is in {out}.")
    if isinstance(stopped, Stopped):
        print(stopped)
        return stopped.status
    if saver.tasks is not None and not isinstance(stopped, FloatingPointError):
        print(f"Go on with: exssnet train --resume {out}", flush=True)
    if isinstance(stopped, KeyboardInterrupt):
        return 130
    raise stopped


def _options(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command; help and errors end the process."""
    text = "Learn a stream of tasks; print, plot and save the outcome." if command == "train" else COMMANDS[command]
    parser = argparse.ArgumentParser(f"exssnet {command}", description=text)
    if command == "train":
        parser.add_argument("--config", help="YAML file of the options below; options given here win")
        parser.add_argument(
            "--resume", nargs="?", const="", metavar="RUN",
            help="go on from a checkpoint: its file, or its folder (default: OUT); the run keeps its options",
        )  # fmt: skip
        _add_options(parser)
    elif command == "inspect":
        parser.add_argument("file")
        parser.add_argument("--verify", action="store_true", help="read all of it and compare its checksum")
    elif command in ("bench", "reproduce"):
        (bench if command == "bench" else reproduce).add_options(parser)
    return parser.parse_args(arguments)


def run(command: str, arguments: Sequence[str]) -> int:
    """Run one of the commands; returns the exit status."""
    options = _options(command, arguments)
    given = vars(options)
    if command in ("train", "reproduce") or given.get("json"):
        results_are_files()
    try:
        if command == "info":
            print(describe())
            return 0
        if command == "bench":
            return int(bench.run(options))
        if command == "reproduce":
            return reproduce.run(options)
        if command == "inspect":
            file = Path(given["file"])
            print(checkpoint.describe(file / CHECKPOINT if file.is_dir() else file, given["verify"]))
            return 0
        resume = given.pop("resume")
        config = given.pop("config")
        chosen = _checked(config, read_yaml(config)) if config else {}
        chosen.update({name: value for name, value in given.items() if value is not None})
        return train(TrainOptions(**chosen)) if resume is None else train(*_to_resume(resume, chosen))
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError, WrongResult, reproduce.RunFailed) as error:
        warn(shown(error, 2000))
        return 2
