"""The calls that copy, save, load, move, average and replace: what a user of `Phases` does beside training."""

import copy
from contextlib import ExitStack, nullcontext
from random import Random
from typing import Any

import torch
from forgetting import WIDTH, fresh_phases, logits
from forgetting_calls import Failing, User
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from exssnet import Phases, Served, checkpoint
from exssnet.ops import pack_mask, topk_mask


class AnyUser(User):
    """Makes every kind of call."""

    # Copies for later

    def fold(self, n: int) -> None:
        if not self.finished:
            return
        task, folded = n % len(self.finished), []
        if not self.attempt(f"fold({task})", lambda: folded.append(self.phases.fold(task))):
            return
        finished, model = self.finished[task], folded[0]
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, expected in (
            finished.state | finished.weights | {f"{m}.weight": w for m, w in finished.weights.items()}
        ).items():
            if name in own:
                assert torch.equal(own[name], expected.to(own[name].dtype)), f"{name} of the folded copy"
        with torch.autocast("cpu", enabled=False):
            self.folded = [*self.folded[-1:], (model, logits(model, self.x()))]

    def serve(self, n: int) -> None:
        cache = (0, 3000, 1 << 20)[n % 3]
        self.attempt("Served", lambda: self.served.append(Served(self.phases, cache=cache)))
        self.served = self.served[-2:]

    def ask(self, n: int) -> None:
        """Every sample by the network of its task."""
        if not self.served or not self.finished:
            return
        served, x = self.served[n % len(self.served)], self.x()
        self.attempt("a call of Served", lambda: served(x, [i % len(self.finished) for i in range(len(x))]))
        for task in served.tasks:
            self._compare(lambda x: served(x, [task] * len(x)), self.finished[task])  # noqa: B023

    def copy_model(self, n: int) -> None:
        """A copy of the model alone; and one that somebody trains, which is nobody's business."""
        phases = self.phases
        whole = phases.phase == "idle" and phases.active is not None and not (self.written or self.altered)
        if whole:
            self.copies = [(copy.deepcopy(phases.model), self.finished[phases.active])]
        other = copy.deepcopy(phases.model)
        with torch.no_grad():
            for t in (*other.parameters(), *other.buffers()):
                t.zero_()

    def copy_phases(self, n: int) -> None:
        """Go on with the copy, or with the original; both are looked at in the end."""
        if self.blocks:
            return
        twin: AnyUser = AnyUser.__new__(AnyUser)
        twin.__dict__.update(self.__dict__)
        twin.phases, twin.nothing = copy.deepcopy((self.phases, self.nothing))
        twin.finished = [f.copy() for f in self.finished]
        twin.optimizers, twin.served, twin.replaced, twin.others = [], [], [], []
        self._set_aside(twin, n)

    def _set_aside(self, twin: "AnyUser", n: int) -> None:
        if n % 2:
            self.__dict__, twin.__dict__ = twin.__dict__, self.__dict__
            self.others = twin.others
        self.others = [twin]

    def swap(self, n: int) -> None:
        """Go on with what was set aside."""
        if self.others and not self.blocks and not self.others[-1].blocks:
            other = self.others.pop()
            self.__dict__, other.__dict__ = other.__dict__, self.__dict__
            self.others, other.others = [*other.others, other], []
            self.autocast, other.autocast = other.autocast, None

    def second(self, n: int) -> None:
        """A second `Phases` of the same model, which starts without tasks."""
        if self.blocks or self.altered:
            return
        old = self.phases
        if self.attempt("a second Phases", lambda: self._replace(Phases(self.model, seed=n))):
            self.replaced = [*self.replaced[-1:], old]
            self._check_refuses(old)

    def _replace(self, phases: Phases) -> None:
        self.phases = phases
        self.finished, self.saved, self.snapshots, self.served = [], [], [], []
        self.written = False

    # Adoption

    def adopt(self, n: int) -> None:
        """A task, or two, from elsewhere: some fit, some do not; who gives them uses the tensors for other things."""
        random, phases = Random(n), self.phases
        fault = random.choice([*[""] * 4, "layer", "shape", "name", "state", "dtype", "scores"])
        tasks = [self._from_elsewhere(random) for _ in range(random.randint(1, 2))]
        masks, state, scores = tasks[-1]
        first = next(name for name in state if name not in phases.own.transient)  # those may have any shape
        layer = next(iter(masks))
        if fault == "layer":
            del masks[layer]
        elif fault == "shape":
            masks[layer] = masks[layer].new_zeros(3)
        elif fault == "name":
            state["elsewhere"] = torch.zeros(1)
        elif fault == "state":
            state[first] = torch.zeros(7, 7, 7)
        elif fault == "dtype":
            masks[layer] = masks[layer].long()
        elif fault == "scores":
            scores[layer] = torch.zeros(3, 1)
        if self.attempt(f"adopt_all({len(tasks)} tasks, wrong {fault or 'nothing'})", lambda: phases.adopt_all(tasks)):
            assert not fault, f"a task with a wrong {fault} was adopted"
            self.written = False
            for _ in tasks:
                phases.activate(len(self.finished))
                self._note_finished()
            for part in (t for task in tasks for t in task):
                for t in part.values():
                    t.zero_()

    def _from_elsewhere(self, random: Random) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        phases = self.phases
        scores = phases.random_scores(random.randrange(99))
        form = random.choice([pack_mask, lambda mask: mask])
        masks = {name: form(topk_mask(scores[name], layer.k)) for name, layer in phases.layers.items()}
        state = {name: t.detach().clone() for name, t in phases.initial.items()}
        for t in state.values():
            if t.is_floating_point():
                t.add_(random.random())
        return masks, state, scores

    # Saves and loads

    def save_file(self, n: int) -> None:
        """Write the tasks to a file, which comes back in another model."""
        path = self.folder / "tasks.safetensors"
        if not self.attempt("checkpoint.save", lambda: checkpoint.save(self.phases, path)):
            return
        phases = fresh_phases(self.kind, seed=n + 1)
        phases.model.to(self.dtype)
        context, self.context = self.context, nullcontext
        twin: AnyUser = AnyUser(self.kind, self.folder, self.say)
        twin.phases, twin.nothing, twin.dtype = phases, phases.model.late, self.dtype
        twin.finished = [f.copy() for f in self.finished]
        if self.attempt("checkpoint.load", lambda: checkpoint.load(phases, path)):
            self._set_aside(twin, 0 if self.blocks else n)
        self.context = context
        if self.finished:
            assert not self.attempt("checkpoint.load over tasks", lambda: checkpoint.load(self.phases, path))

    def save_state(self, n: int) -> None:
        state: list[Any] = []
        if self.attempt("state_dict", lambda: state.append(self.phases.state_dict())):
            self.saved = [*self.saved[-2:], (copy.deepcopy(state[0]), [f.copy() for f in self.finished])]

    def load_state(self, n: int) -> None:
        """Return to an earlier moment, of this `Phases` or of another; the state's tensors are then used again."""
        if not self.saved:
            return
        state, finished = self.saved[n % len(self.saved)]
        given = copy.deepcopy(state)
        if n % 5 == 0:
            given["tensors"]["elsewhere"] = torch.zeros(1)
        if self.attempt("load_state_dict", lambda: self.phases.load_state_dict(given)):
            assert n % 5 or "elsewhere" not in given["tensors"]
            self.finished = [f.copy() for f in finished]
            for f in self.finished:
                f.move(self.dtype)
            self.written = False
            with torch.no_grad():
                for t in given["tensors"].values():
                    t.zero_()

    def save_model(self, n: int) -> None:
        self.model_states = [*self.model_states[-2:], copy.deepcopy(self.model.state_dict())]

    def load_model(self, n: int) -> None:
        """The state of an earlier moment, or of this one; of the whole model, or of one layer."""
        states = [copy.deepcopy(self.model.state_dict()), *self.model_states]
        state, module, own = states[n % len(states)], self.model, "model"
        if n % 3 == 0:
            state = {key.removeprefix("head."): t for key, t in state.items() if key.startswith("head.")}
            module, own = self.model.head, "head"

        def load() -> None:
            try:
                module.load_state_dict(state)
            except RuntimeError as error:
                if not str(error).startswith("Error(s) in loading state_dict"):
                    raise
                self.say(f"    {error}")  # torch loads what fits, and then says what does not

        self.attempt(f"{own}.load_state_dict", load)
        self.written |= self.phases.phase == "idle" and n % len(states) != 0

    def snapshot(self, n: int) -> None:
        self.attempt("snapshot", lambda: self.snapshots.append(self.phases.snapshot()))

    def restore(self, n: int) -> None:
        if self.snapshots:
            snapshot = self.snapshots[n % len(self.snapshots)]
            self.attempt("restore", lambda: self.phases.restore(snapshot))

    # The model as a torch module

    def enter_autocast(self, n: int) -> None:
        if self.autocast is None:
            self.autocast = ExitStack()
            self.autocast.enter_context(torch.autocast("cpu", torch.bfloat16))

    def leave_autocast(self, n: int) -> None:
        if self.autocast is not None:
            self.autocast.close()
            self.autocast = None

    def move(self, n: int) -> None:
        """To another dtype and, more often, back; the device stays, but is asked for."""
        if self.blocks:
            return
        self.model.to("cpu")
        dtype = (torch.float32, torch.float32, torch.float64, torch.float16)[n % 4]
        if dtype == self.dtype:
            return
        self.model.to(dtype)
        self.written |= self.phases.phase == "idle"  # what the live tensors were rounded to, only `activate` undoes
        for finished in self.finished:
            finished.move(dtype)
        self.dtype, self.optimizers, self.served, self.copies, self.saved = dtype, [], [], [], []

    def average(self, n: int) -> None:
        """Averaged weights, kept beside the model or written into it."""
        if not self.averages:
            self.averages.append(AveragedModel(self.model, use_buffers=bool(n % 2)))
        average = self.averages[0]
        known, own = average.module.state_dict(), self.model.state_dict()
        tensors = [name for name, t in own.items() if isinstance(t, Tensor)]
        fits = known.keys() == own.keys() and all(own[n].shape == known[n].shape for n in tensors)
        if not fits or n % 3 == 0:
            self.averages.clear()
            return
        pairs = list(zip(average.module.parameters(), self.model.parameters(), strict=True))
        if n % 3 == 1:
            average.update_parameters(self.model)
        else:
            for a, p in pairs:
                p.data.copy_(a)
            self.written |= self.phases.phase == "idle"
            self.averages.clear()

    def put_norm(self, n: int) -> None:
        """A norm where there was none, which does nothing until it is trained; or away with it."""
        if self.altered:
            self.model.late = self.nothing
        elif self.finished:
            self.model.late = (
                nn.BatchNorm1d(WIDTH, eps=1e-30, affine=bool(n % 2)).to(self.dtype).train(self.model.training)
            )

    # Circumstances of another call

    def fail(self, n: int) -> None:
        """A call in which an operator fails."""
        random = Random(n)
        number = random.choice([*range(1, 12), random.randrange(12, 200)])
        self._within(lambda: Failing(number), random)

    def inside(self, n: int) -> None:
        """Calls in a block of `using`."""
        random, depth = Random(n), len(self.blocks)
        self.enter(n)
        if len(self.blocks) == depth:
            return
        for _ in range(2):
            name = random.choice(
                ["learn", "start", "finish", "abandon", "activate", "adopt", "load_state", "load_model", "save_file",
                 "save_state", "fold", "second", "train", "average", "restore"]
            )  # fmt: skip
            self.say(f"  inside: {name}")
            getattr(self, name)(random.randrange(1000))
        while len(self.blocks) > depth:
            self.leave(0)

    def without_gradients(self, n: int) -> None:
        random = Random(n)
        self._within(random.choice([torch.no_grad, torch.inference_mode]), random)

    def _within(self, context: Any, random: Random) -> None:
        name = random.choice(
            ["start", "weight", "prune", "finish", "abandon", "activate", "fold", "adopt", "save_state",
             "load_state", "save_file", "enter", "restore", "serve", "load_model", "using"]
        )  # fmt: skip
        self.context = context
        self.say(f"  within {context}: {name}")
        try:
            getattr(self, name)(random.randrange(1000))
        finally:
            self.context = nullcontext


CALLS = (
    "learn", "learn", "learn", "start", "start", "train", "train", "train", "weight", "weight", "prune", "finish",
    "finish", "abandon", "activate", "activate", "using", "enter", "leave", "adopt", "fold", "serve", "ask",
    "copy_model", "copy_phases", "swap", "second", "save_file", "save_state", "load_state", "load_state", "save_model",
    "load_model", "snapshot", "restore", "enter_autocast", "leave_autocast", "move", "average", "put_norm", "fail",
    "fail", "without_gradients", "stale_step", "poison", "write", "flip",
)  # fmt: skip
"""Names of the calls, as often as they are worth; the first ones are what an example shrinks to."""
