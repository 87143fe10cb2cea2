"""A user of `Phases` who makes any public call at any time, and looks at every finished task after each."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from random import Random
from typing import Any

import torch
from forgetting import Finished, batch, fresh_phases, logits
from networks import changes, picture
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

import exssnet
from exssnet import Phases, Served, checkpoint
from exssnet.kernels import registry
from exssnet.nn.optim import ScoreAdam

PACKAGE = str(Path(exssnet.__file__).parent)
OPERATORS = tuple(f"{name}:" for name in registry.OPERATORS)
REFUSALS = (RuntimeError, ValueError, IndexError, FloatingPointError)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.02, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1),
}


class Failure(RuntimeError):
    """Something that has nothing to do with the package went wrong, as memory that ran out."""


class Failing(TorchDispatchMode):
    """Raises in place of the operator of the given number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise Failure(f"no memory for {func}")
        return func(*args, **(kwargs or {}))


def _spoken(error: BaseException) -> bool:
    """Whether the package itself refused the call."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename.startswith(PACKAGE) or str(error).startswith(OPERATORS)


class User:
    """One `Phases` of a network, what is known of its finished tasks, and what was made of them on the way."""

    def __init__(self, kind: str, folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
        self.kind, self.folder, self.say = kind, folder, say
        self.phases = fresh_phases(kind)
        self.nothing = self.phases.model.late  # in whose place a norm may come
        self.dtype = torch.float32
        self.finished: list[Finished] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.written = False  # whether somebody wrote to the model since it became a task's network
        self.blocks: list[tuple[AbstractContextManager[Any], bool]] = []  # open `using` blocks, and `written` before
        self.served: list[Served] = []
        self.folded: list[tuple[nn.Module, Tensor]] = []
        self.copies: list[tuple[nn.Module, Finished]] = []  # of the model alone, when it was that task's network
        self.saved: list[tuple[dict[str, Any], list[Finished]]] = []
        self.model_states: list[dict[str, Any]] = []
        self.snapshots: list[dict[str, Any]] = []
        self.averages: list[AveragedModel] = []
        self.replaced: list[Phases] = []
        self.others: list[User] = []
        self.context: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.autocast: ExitStack | None = None

    # What is looked at

    @property
    def model(self) -> nn.Module:
        return self.phases.model

    @property
    def altered(self) -> bool:
        """Whether a module was replaced: calls may be refused until it is back."""
        return self.model.late is not self.nothing

    def x(self) -> Tensor:
        return batch(self.kind, 99, self.dtype)

    def check(self) -> None:
        """Nothing is forgotten, and to look changes nothing."""
        phases = self.phases
        assert len(phases.bank) == len(phases.states) == len(self.finished), "a task came or went"
        assert phases.active in (None, *range(len(self.finished) + (phases.phase != "idle"))), "no task is active"
        self._check_active()
        before = picture(phases)
        for task, finished in enumerate(self.finished):
            finished.check_stored(phases, task)
            try:
                with phases.using(task) as model:
                    self._compare(model, finished)
            except RuntimeError as error:
                if not (self.altered and _spoken(error)):
                    raise
        changed = changes(before, picture(phases))
        assert changed == [], f"to look at a task changed {changed}"
        if self.autocast is not None:  # what it keeps in its cache must not outlast the next call
            self._check_active()

    def _check_active(self) -> None:
        """The model is the network of the active task, unless somebody wrote to it."""
        phases = self.phases
        if phases.phase == "idle" and phases.active is not None and not self.written and not self.altered:
            self._compare(self.model, self.finished[phases.active])

    def check_all(self) -> None:
        """Also what was made of the tasks on the way, and what was set aside."""
        self.check()
        for served in self.served:
            for task in served.tasks:
                self._compare(lambda x, served=served, task=task: served(x, [task] * len(x)), self.finished[task])
        with torch.autocast("cpu", enabled=False):
            for model, known in self.folded:
                assert torch.equal(logits(model, batch(self.kind, 99, known.dtype)), known), "a folded copy has changed"
        for model, finished in self.copies:
            self._compare(model, finished)
        for phases in self.replaced:
            self._check_refuses(phases)
        for other in self.others:
            other.autocast = self.autocast
            other.check_all()

    def end(self) -> None:
        """Leaves all blocks, and looks at every task in every way."""
        if self.autocast is not None:
            self.autocast.close()
            self.autocast = None
        for user in (self, *self.others):
            user.autocast = None
            while user.blocks:
                user.leave(0)
            user.model.late = user.nothing
        self.check_all()
        for user in (self, *self.others):
            if user.phases.phase != "idle":
                user.phases.abandon_task()
            served = Served(user.phases)
            for task, finished in enumerate(user.finished):
                finished.check_stored(user.phases, task)
                user.phases.activate(task)
                user._compare(user.model, finished)
                user._compare(lambda x, task=task: served(x, [task] * len(x)), finished)  # noqa: B023
            user.fold(0)

    def _compare(self, model: Any, finished: Finished) -> None:
        x = self.x()
        evaluated = (lambda: logits(model, x)) if isinstance(model, nn.Module) else lambda: model(x)
        with torch.autocast("cpu", enabled=False):
            finished.check_logits(self.kind, evaluated(), x, self.dtype)
        if self.autocast is not None and self.dtype == torch.float32:
            got = evaluated()
            if "autocast" not in finished.logits:
                with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                    finished.logits["autocast"] = evaluated()
            assert torch.equal(got, finished.logits["autocast"]), "other logits under autocast"

    def _check_refuses(self, phases: Phases) -> None:
        """A `Phases` whose model belongs to another refuses whatever would read or change the model."""
        before = picture(self.phases)
        for name, call in {
            "start_task": phases.start_task, "start_weight_phase": phases.start_weight_phase,
            "prune": lambda: phases.prune({}), "finish_task": phases.finish_task, "abandon": phases.abandon_task,
            "adopt_all": lambda: phases.adopt_all([]), "activate": lambda: phases.activate(0),
            "using": lambda: phases.using(0).__enter__(), "fold": lambda: phases.fold(0),
            "state_dict": phases.state_dict, "load_state_dict": lambda: phases.load_state_dict({}),
            "optimizer": lambda: phases.optimizer(torch.optim.Adam), "reset_state": phases.reset_state,
            "snapshot": phases.snapshot, "save": lambda: checkpoint.save(phases, self.folder / "replaced"),
        }.items():  # fmt: skip
            said = "nothing"
            try:
                call()
            except RuntimeError as error:
                said = str(error)
            assert "another Phases" in said, f"{name} of a replaced Phases said {said}"
        assert changes(before, picture(self.phases)) == [], "a replaced Phases changed the model"

    # Calls and what they may do

    def attempt(self, what: str, call: Callable[[], Any]) -> bool:
        """Make a call, in the present context: whether it was made, and not refused, which must change nothing."""
        before, random, refusal = picture(self.phases), torch.get_rng_state(), None
        try:
            with self.context():
                call()
        except Failure as error:
            self.say(f"    {what}: {error}")
            self._take_stock()
            return False
        except REFUSALS as error:
            refusal = error
        if refusal is None:
            self.say(f"    {what}")
            return True
        self._hear(what, refusal)
        torch.set_rng_state(random)
        changed = changes(before, picture(self.phases))
        assert changed == [], f"{what} was refused ({refusal}) but changed {changed}"
        return False

    def _hear(self, what: str, refusal: BaseException, known: bool = False) -> None:
        """A refusal must be in the package's own words."""
        if not (known or _spoken(refusal)):
            raise AssertionError(f"{what} ended with {type(refusal).__name__}: {refusal}") from refusal
        self.say(f"    {what}: refused, {refusal}")

    def _take_stock(self) -> None:
        """After a failure inside a call: at most the task at hand was finished."""
        phases, tasks = self.phases, len(self.finished) + 1
        if phases.phase == "idle" and len(phases.bank) == len(phases.states) == tasks and phases.active == tasks - 1:
            self._note_finished()

    def _note_finished(self) -> None:
        self.finished.append(Finished.of(self.phases))
        self.written = False

    def do(self, name: str, number: int) -> None:
        """One call; the number decides about all that is left open."""
        self.say(f"{name} {number}")
        getattr(self, name)(number)
        self.check()

    # Calls in turn

    def learn(self, n: int) -> None:
        """The next task, or what is left of the open one."""
        if self.phases.phase == "idle":
            self.start(n)
        if self.phases.phase != "idle":
            self.train(n)
        if self.phases.phase == "mask" and n % 4:
            self.weight(0)
            self.train(n)
        self.finish(0)

    def start(self, n: int) -> None:
        random = Random(n)
        joint = random.random() < 0.4
        scores = None
        if random.random() < 0.3:
            scores = self.phases.random_scores(random.randrange(5))
        wrong = random.random() < 0.1
        if wrong:
            scores = {name: torch.rand(2, 2) for name in self.phases.layers}
        if self.attempt(f"start_task(joint={joint})", lambda: self.phases.start_task(scores, joint=joint)):
            assert not wrong
            self.optimizers, self.written = self.optimizers[-1:], False
            for s in (scores or {}).values():
                s.zero_()

    def weight(self, n: int) -> None:
        self.attempt("start_weight_phase", self.phases.start_weight_phase)

    def prune(self, n: int) -> None:
        random = torch.Generator().manual_seed(n)
        keep = {
            m: torch.rand(layer.dense_weight.shape, generator=random) < 0.7 for m, layer in self.phases.layers.items()
        }
        self.attempt("prune", lambda: self.phases.prune(keep))

    def finish(self, n: int) -> None:
        if self.attempt("finish_task", self.phases.finish_task):
            self._note_finished()

    def abandon(self, n: int) -> None:
        if self.attempt("abandon_task", self.phases.abandon_task):
            self.written = False

    def activate(self, n: int) -> None:
        task = n % (len(self.finished) + 1)
        if self.attempt(f"activate({task})", lambda: self.phases.activate(task)):
            assert task < len(self.finished)
            self.written = False

    # Training

    def train(self, n: int) -> None:
        """A step or two, with a new optimizer or the last one."""
        random, phases = Random(n), self.phases
        optimizer = self.optimizers[-1] if self.optimizers and random.random() < 0.4 else self._optimizer(random)
        if optimizer is None:
            return
        trouble = random.choice([*[None] * 6, "forward", "backward", "step", "using"])
        phases.model.train()
        self.written |= phases.phase == "idle"
        try:
            for step in range(1 + n % 2):
                self._step(optimizer, n + step, trouble)
        except Failure:
            self.say(f"    a training step that fails in its {trouble}")
        except RuntimeError as error:
            half = self.dtype == torch.float16 and ("dtype" in str(error) or "Half" in str(error))
            self._hear(f"a training step with {trouble}", error, half)
        else:
            self.say(f"    trained by {type(optimizer).__name__}, {trouble}")

    def _optimizer(self, random: Random) -> torch.optim.Optimizer | None:
        phases, kind = self.phases, random.choice(list(OPTIMIZERS))
        parameters = phases.parameters() if random.random() < 0.7 else list(phases.model.parameters())
        if not any(p.requires_grad for p in parameters):
            return None
        if phases.phase == "mask" and random.random() < 0.3:
            made: torch.optim.Optimizer = ScoreAdam(parameters, phases.model, lr=0.02, weight_decay=0.1)
        else:
            made = OPTIMIZERS[kind](parameters)
        if phases.phase == "joint":
            held = {id(p) for group in made.param_groups for p in group["params"]}
            if {id(w) for w in phases.dense_weights()} <= held and random.random() < 0.5:
                phases.guard(made)  # who forgets it is warned, but forgets nothing else
        self.optimizers = [*self.optimizers[-2:], made]
        return made

    def _step(self, optimizer: torch.optim.Optimizer, seed: int, trouble: str | None) -> None:
        phases, x = self.phases, batch(self.kind, seed, self.dtype)

        def fail(*_: Any) -> None:
            raise Failure

        hooks = []
        if trouble == "forward":
            hooks.append(phases.model.head.register_forward_hook(fail))
        if trouble == "step":
            hooks.append(optimizer.register_step_pre_hook(fail))
        try:
            optimizer.zero_grad()
            out = phases.model(x)
            if trouble == "backward":
                out.register_hook(fail)
            if trouble == "using" and self.finished:
                with phases.using(0) as model:
                    logits(model, self.x())
            at = 2 * (len(self.finished) % 2)
            F.cross_entropy(out[:, at : at + 2], torch.arange(len(x)) % 2).backward()
            optimizer.step()
        finally:
            for hook in hooks:
                hook.remove()

    def stale_step(self, n: int) -> None:
        """A step of any optimizer there was, on gradients that somebody wrote."""
        if not self.optimizers:
            return
        optimizer = self.optimizers[n % len(self.optimizers)]
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
            p.grad = torch.ones_like(p)
        self.written |= self.phases.phase == "idle"
        try:
            optimizer.step()
        except RuntimeError as error:
            self._hear("a step", error, "nference" in str(error))
        own = {id(p) for p in self.model.parameters()} | {id(w) for w in self.phases.dense_weights()}
        for p in (p for group in optimizer.param_groups for p in group["params"] if id(p) not in own):
            p.data.add_(1)  # nobody's but the optimizer's

    def poison(self, n: int) -> None:
        """Infinity among what trains, which no task may be finished with."""
        parameters = [p for p in self.phases.parameters() if p.numel()]
        if self.phases.phase == "idle" or not parameters:
            return
        with torch.no_grad():
            p = parameters[n % len(parameters)]
            kept = p.clone()
            p.view(-1)[0] = torch.inf
            for call in (self.phases.finish_task, self.phases.start_weight_phase):
                assert not self.attempt(call.__name__, call)
            p.copy_(kept)

    def write(self, n: int) -> None:
        """Somebody writes to a norm's statistics, or to a bias."""
        own = self.phases.statistics() + self.phases.task_parameters()
        with torch.no_grad():
            own[n % len(own)].add_(0.5)
        self.written |= self.phases.phase == "idle"

    def flip(self, n: int) -> None:
        self.model.train(bool(n % 2))

    # Looking at another task

    def using(self, n: int) -> None:
        """Blocks within blocks, which end with an exception or not; something is written in them."""
        random, phases = Random(n), self.phases
        if not self.finished:
            return
        tasks = [random.randrange(len(self.finished)) for _ in range(2)]

        def call() -> None:
            with phases.using(tasks[0]) as model:
                if random.random() < 0.3:
                    phases.activate(tasks[1])
                with phases.using(tasks[1]):
                    self._compare(model, self.finished[tasks[1]])
                if random.random() < 0.3:
                    self.write(n)
                if random.random() < 0.3:
                    raise Failure("in a block")

        before, written = picture(phases), self.written
        self.attempt(f"using({tasks[0]}), using({tasks[1]})", call)
        self.written = written
        assert changes(before, picture(phases)) == [], "a block of using changed something"

    def enter(self, n: int) -> None:
        """A block that the next calls are in."""
        if not self.finished or len(self.blocks) > 1:
            return
        block = self.phases.using(n % len(self.finished))
        if self.attempt(f"enter using({n % len(self.finished)})", block.__enter__):
            self.blocks.append((block, self.written))
            self.written = False

    def leave(self, n: int) -> None:
        if self.blocks:
            block, written = self.blocks.pop()
            if self.attempt("leave using", lambda: block.__exit__(None, None, None)):
                self.written = written
