"""The command line: ``exssnet train``, ``reproduce``, ``bench`` and ``info``; arguments and the wiring of a run."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from . import checkpoint, reproduce
from .bench import command as bench
from .bench.timing import WrongResult
from .choice import PRODUCTS
from .info import describe
from .kkt import RULES
from .learner import OPTIMIZERS, Learner, PhaseOptions
from .methods import METHODS
from .models import MODELS
from .nn import convert
from .report import Report, observer
from .tasks import Task, load, names, permuted_pixels, rotated, split_by_class, stream, streams


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
    out: str = _option("runs/train", "folder for results, plots and the model")


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


def _from_file(path: str) -> dict[str, Any]:
    """The options in a YAML file; ValueError, naming it, for an unknown key or a value of the wrong kind."""
    try:
        read = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path}: expected options as `name: value` lines, got {type(read).__name__}")
    known = {f.name: f for f in fields(TrainOptions)}
    options = {}
    for key, value in read.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"{path}: unknown option {key!r}; known are {', '.join(known)}")
        f = known[name]
        kind = _kind(f)
        if kind is float and not isinstance(value, bool):
            with suppress(TypeError, ValueError):
                value = float(value)  # YAML reads 1e-2 as a string
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits and not (value is None and f.default is None):
            raise ValueError(f"{path}: {key} must be {kind.__name__}, got {value!r}")
        choices = f.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{path}: {key} must be one of {', '.join(choices)}, got {value!r}")
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


def train(options: TrainOptions) -> int:
    """Run `exssnet train`: learn the stream, print and write the results. Returns the exit status."""
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    phase: dict[str, Any] = {
        "optimizer": options.optimizer,
        "weight_decay": options.weight_decay,
        "patience": options.patience,
    }
    report = Report(asdict(options), tasks, name)
    with observer(tasks) as watching:
        learner = Learner(
            model.to(device), options.method, kkt=kkt,  # type: ignore[arg-type]
            mask=PhaseOptions(options.epochs, options.mask_lr, **phase),
            weight=PhaseOptions(options.weight_epochs, options.weight_lr, **phase),
            batch_size=options.batch_size, all_outputs=options.all_outputs, seed=options.seed,
            keep_scores=None if options.keep_scores == "none" else getattr(torch, options.keep_scores),
            observer=watching,
        )  # fmt: skip
        stopped: BaseException | None = None
        try:
            learner.run(tasks)
        except (KeyboardInterrupt, FloatingPointError) as error:
            stopped = error
    report.write(learner)
    if learner.phases.phase != "idle":
        learner.phases.abandon_task()
    if learner.reports:
        notes = {"model": name, "shape": list(shape), "classes": [r.classes for r in learner.reports]}
        checkpoint.save(learner.phases, Path(options.out) / "model.safetensors", notes)
    report.show(learner)
    if stopped is None:
        return 0
    if learner.reports:
        print(f"Stopped after {len(learner.reports)} of {len(tasks)} tasks; what was learned is in {options.out}.")
    if isinstance(stopped, FloatingPointError):
        raise stopped
    return 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command ``exssnet``; returns the exit status."""
    parser = argparse.ArgumentParser("exssnet", description="Sparse supermasks and continual learning for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser(
        "train",
        help="learn a stream of tasks and report",
        description="Learn a stream of tasks; print, plot and save the outcome.",
    )
    training.add_argument("--config", help="YAML file of the options below; options given here win")
    _add_options(training)
    bench.add_options(
        commands.add_parser("bench", help="measure speed and memory against plain PyTorch and other peers")
    )
    reproduce.add_options(
        commands.add_parser("reproduce", help="run an experiment of the literature from a recipe, and report")
    )
    commands.add_parser("info", help="versions, hardware, and which kernel serves each operator")
    options = parser.parse_args(arguments)
    given = vars(options)
    command = given.pop("command")
    if command == "info":
        print(describe())
        return 0
    try:
        if command == "bench":
            return int(bench.run(options))
        if command == "reproduce":
            return reproduce.run(options)
        config = given.pop("config")
        chosen = _from_file(config) if config else {}
        chosen.update({name: value for name, value in given.items() if value is not None})
        return train(TrainOptions(**chosen))
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError, WrongResult, reproduce.RunFailed) as error:
        print(f"exssnet: {error}", file=sys.stderr)
        return 2
