"""Recipes of experiments: YAML files that say which methods learn which stream how, and the runs they stand for."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...continual.kkt import RULES
from ...continual.methods import METHODS
from ...io.values import fitting, from_yaml, read_yaml, shown
from ...nn.models import MODELS
from ...tasks import streams
from ..baselines import BASELINES

KKT = "+kkt"
SCALES = ("official", "density")
MOST_RUNS = 100_000


@dataclass(frozen=True)
class Tuning:
    """How a method's learning rates are chosen: by the mean validation accuracy over the first tasks, learned in order.

    rates: tried for each of a method's learning rates; strengths: for EWC's penalty as well. seeds: of the runs, none
    of which is reported. validation: share of the training data held out for this, where the recipe holds out none.
    """

    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    strengths: tuple[float, ...] = (1.0, 100.0, 10000.0)
    tasks: int = 3
    seeds: tuple[int, ...] = (1000,)
    validation: float = 0.1


@dataclass(frozen=True)
class StreamOptions:
    """The arguments of `exssnet.tasks.stream` that a recipe may give."""

    tasks: int | tuple[int, ...] | None = None
    task_order: int | tuple[int, ...] | None = None
    class_order: int | tuple[int, ...] | None = None
    validation: float | None = None
    augment: bool | str | None = None
    per_class: int | None = None
    test_per_class: int | None = None
    seed: int = 0
    encoder: str | None = None
    max_tokens: int = 64
    cache: str | None = None


@dataclass(frozen=True)
class Rates:
    """What tuning chooses: learning rates of scores and weights, and EWC's strength."""

    mask: float
    weight: float
    strength: float | None = None

    def __str__(self) -> str:
        same = self.mask == self.weight
        text = f"{self.weight:g}" if same else f"{self.mask:g}, {self.weight:g}"
        return text if self.strength is None else f"{text}, strength {self.strength:g}"


@dataclass(frozen=True)
class Run:
    """One run: a method on the whole stream with one seed. density is None for dense methods."""

    method: str  # with "+kkt" behind it where KKT is used
    density: float | None
    init_scale: str
    seed: int

    @property
    def base(self) -> str:
        """The method without KKT: the two share their learning rates."""
        return self.method.removesuffix(KKT)

    @property
    def name(self) -> str:
        density = "" if self.density is None else f"-{self.density:g}-{self.init_scale}"
        return f"{self.method}{density}-seed{self.seed}"

    @property
    def group(self) -> "Run":
        """What all seeds of a run have in common."""
        return replace(self, seed=0)


@dataclass(frozen=True)
class Recipe:
    """An experiment. Every field is a key of the YAML file.

    stream: a name that `exssnet.tasks.stream` knows, options: its other arguments. epochs: of each of the two phases;
    methods with one phase train twice as long. rates: by method, instead of tuning. validation: 0 for the last epoch.
    task_inference: also evaluate mask methods without a task id, by each rule and for 1, 16 and 128 samples.
    """

    title: str
    stream: str
    model: str
    methods: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    densities: tuple[float, ...] = (0.1,)
    init_scales: tuple[str, ...] = ("official",)
    seeds: int = 3
    epochs: int = 5
    batch_size: int = 64
    validation: float = 0.1
    memory: int = 20  # items a class that replay keeps
    kkt: str = "best"  # the rule of methods with "+kkt"
    tuning: Tuning = Tuning()
    rates: dict[str, Rates] = field(default_factory=dict)
    task_inference: bool = False
    scale: float = 1.0  # of epochs and training data: a smoke test where it is less than 1

    def __post_init__(self) -> None:
        bases, tuning, rates = {*METHODS, *BASELINES}, self.tuning, self.rates.values()
        for name, given, known in (
            ("stream", [self.stream], streams()), ("model", [self.model], MODELS), ("kkt", [self.kkt], RULES),
            ("method", self.methods, sorted({*bases, *(m + KKT for m in METHODS)})),
            ("the method of rates", self.rates, sorted(bases)), ("init_scale", self.init_scales, SCALES),
        ):  # fmt: skip
            if strange := [value for value in given if value not in known]:
                raise ValueError(f"recipe: {name} must be one of {', '.join(known)}, got {shown(strange[0])}")
        if "ewc" in self.rates and self.rates["ewc"].strength is None:
            raise ValueError("recipe: rates.ewc.strength must be given")
        lists = self.methods, self.densities, self.init_scales, tuning.rates, tuning.strengths, tuning.seeds
        runs = self.seeds * len(self.methods) * len(self.densities) * len(self.init_scales)
        for name, values, fits, wanted in (
            ("densities", self.densities, lambda x: 0 < x <= 1, "in (0, 1]"),
            ("scale", [self.scale], lambda x: 0 < x <= 1, "in (0, 1]"),
            ("validation", [self.validation], lambda x: 0 <= x < 1, "in [0, 1)"),
            ("tuning.validation", [tuning.validation], lambda x: 0 < x < 1, "in (0, 1)"),
            ("seeds, epochs, batch_size, memory and tuning.tasks",
             [self.seeds, self.epochs, self.batch_size, self.memory, tuning.tasks], lambda x: x >= 1, "at least 1"),
            ("the numbers of methods, densities, init_scales, tuning.rates, tuning.strengths and tuning.seeds",
             [*map(len, lists)], lambda x: x >= 1, "at least 1"),
            ("the number of runs", [runs], lambda x: x <= MOST_RUNS, f"at most {MOST_RUNS}"),
            ("rates", [*tuning.rates, *(r for given in rates for r in (given.mask, given.weight))],
             lambda x: 0 < x < math.inf, "above 0 and finite"),
            ("strengths", [*tuning.strengths, *(given.strength or 0 for given in rates)],
             lambda x: 0 <= x < math.inf, "at least 0 and finite"),
        ):  # fmt: skip
            if not all(map(fits, values)):
                raise ValueError(f"recipe: {name} must be {wanted}, got {shown(list(values))[1:-1]}")
        if not self.title.strip().isprintable():
            raise ValueError(f"recipe: title must be printable, got {shown(self.title)}")

    @property
    def scaled_epochs(self) -> int:
        return max(1, round(self.epochs * self.scale))

    def runs(self) -> list[Run]:
        """All runs, seed by seed."""
        return [run for seed in range(self.seeds) for method in self.methods for run in self._of(method, seed)]

    def _of(self, method: str, seed: int) -> Iterator[Run]:
        if method in BASELINES:
            yield Run(method, None, "", seed)
        else:
            for scale, density in itertools.product(self.init_scales, self.densities):
                yield Run(method, density, scale, seed)

    def candidates(self, base: str) -> list[Rates]:
        """What tuning tries for a method; one candidate where the recipe gives its rates."""
        if base in self.rates:
            return [self.rates[base]]
        rates = self.tuning.rates
        if base == "ewc":
            return [Rates(r, r, s) for r, s in itertools.product(rates, self.tuning.strengths)]
        if base in METHODS and METHODS[base].weight_phase:
            return [Rates(a, b) for a, b in itertools.product(rates, rates)]
        return [Rates(r, r) for r in rates]


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in files(__name__).iterdir() if f.name.endswith(".yaml"))


def read(name: str) -> Recipe:
    """The recipe of that name, or in that YAML file; ValueError for unknown names, keys and wrong values."""
    if Path(name).suffix in (".yaml", ".yml"):
        return recipe(read_yaml(name), name)
    if name not in names():
        raise ValueError(f"recipe {name} is none of {', '.join(names())} and no .yaml file")
    return recipe(from_yaml(files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8"), name), name)


def recipe(values: dict[str, Any], where: str) -> Recipe:
    """A recipe from what YAML or JSON gave."""
    values = dict(values)
    values["tuning"] = _fill(Tuning, values.get("tuning", {}), f"{where}: tuning")
    given = _lines(values.get("rates", {}), f"{where}: rates")
    values["rates"] = {m: _fill(Rates, rates, f"{where}: rates.{m}") for m, rates in given.items()}
    options = values.get("options", {})
    filled = _fill(StreamOptions, options, f"{where}: options")
    values["options"] = {name: getattr(filled, name) for name in options}
    made: Recipe = _fill(Recipe, values, where)
    return made


def as_json(made: Recipe) -> dict[str, Any]:
    """What `recipe` makes a recipe of."""
    return asdict(made)


def _lines(values: Any, where: str) -> dict[str, Any]:
    """The values, by name; ValueError for what is not that, and for names that no field and no method can have."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected `key: value` lines, got {type(values).__name__}")
    for name in values:
        if not isinstance(name, str) or not name.isprintable() or len(name) > 80:
            raise ValueError(f"{where}: unknown key {shown(name)}")
    return values


def _fill(kind: Any, values: Any, where: str) -> Any:
    """A dataclass with these values."""
    known = {f.name: f for f in fields(kind)}
    if unknown := [name for name in _lines(values, where) if name not in known]:
        raise ValueError(f"{where}: unknown key {unknown[0]}; known are {', '.join(known)}")
    made = {}
    for name, value in values.items():
        kind_of = known[name].type
        if isinstance(value, str) and kind_of == tuple[str, ...]:
            value = [value]
        try:
            value = fitting(kind_of, value)
        except ValueError:
            wanted = str(kind_of).removeprefix("<class '").removesuffix("'>")
            raise ValueError(f"{where}: {name} must be {wanted}, got {shown(value)}") from None
        made[name] = value
    needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [n for n in needed if n not in made]:
        raise ValueError(f"{where}: {', '.join(missing)} must be given")
    try:
        return kind(**made)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix('recipe: ')}") from None
