"""Recipes of experiments: YAML files that say which methods learn which stream how, and the runs they stand for."""

import itertools
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..baselines import BASELINES
from ..kkt import RULES
from ..methods import METHODS
from ..typed import fitting, from_yaml

KKT = "+kkt"


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
        known = {*METHODS, *(m + KKT for m in METHODS), *BASELINES}
        for method in self.methods:
            if method not in known:
                raise ValueError(f"recipe: method must be one of {', '.join(sorted(known))}, got {method!r}")
        if not all(0 < d <= 1 for d in self.densities):
            raise ValueError(f"recipe: densities must be in (0, 1], got {list(self.densities)}")
        if self.seeds < 1 or self.epochs < 1 or self.tuning.tasks < 1 or not self.tuning.rates:
            raise ValueError(
                f"recipe: seeds, epochs, tuning.tasks and the number of tuning.rates must be at least 1, got "
                f"{self.seeds}, {self.epochs}, {self.tuning.tasks}, {len(self.tuning.rates)}"
            )
        if self.kkt not in RULES:
            raise ValueError(f"recipe: kkt must be one of {', '.join(RULES)}, got {self.kkt!r}")
        if not 0 < self.scale <= 1:
            raise ValueError(f"recipe: scale must be in (0, 1], got {self.scale}")

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
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        text = path.read_text()
    elif name in names():
        text = files(__name__).joinpath(f"{name}.yaml").read_text()
    else:
        raise ValueError(f"recipe {name} is none of {', '.join(names())} and no .yaml file")
    return recipe(from_yaml(text, name), name)


def recipe(values: dict[str, Any], where: str) -> Recipe:
    """A recipe from what YAML or JSON gave."""
    values = dict(values)
    values["tuning"] = _fill(Tuning, values.get("tuning", {}), f"{where}: tuning")
    values["rates"] = {m: _fill(Rates, given, f"{where}: rates.{m}") for m, given in values.get("rates", {}).items()}
    made: Recipe = _fill(Recipe, values, where)
    return made


def as_json(made: Recipe) -> dict[str, Any]:
    """What `recipe` makes a recipe of."""
    return asdict(made)


def _fill(kind: Any, values: Any, where: str) -> Any:
    """A dataclass with these values."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected `key: value` lines, got {type(values).__name__}")
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{where}: unknown key {', '.join(map(str, unknown))}; known are {', '.join(known)}")
    made = {}
    for name, value in values.items():
        kind_of = known[name].type
        if isinstance(value, str) and kind_of == tuple[str, ...]:
            value = [value]
        try:
            value = fitting(kind_of, value)
        except ValueError:
            wanted = str(kind_of).removeprefix("<class '").removesuffix("'>")
            raise ValueError(f"{where}: {name} must be {wanted}, got {value!r}") from None
        made[name] = value
    needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [n for n in needed if n not in made]:
        raise ValueError(f"{where}: {', '.join(missing)} must be given")
    return kind(**made)
