"""csrc/cuda/adam on the emulator: torch.optim.Adam's step, and bit for bit the selection from the scores it leaves."""

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from accuracy import Results, assert_accurate
from cases import LAYOUTS
from cuda import harness
from cuda.harness import order as order
from selections import selected
from torch import Tensor

from exssnet.kernels import reference

pytestmark = pytest.mark.proof

PLAIN = harness.MODE == "plain"
orders = pytest.mark.parametrize("order", harness.ORDERS if PLAIN else ["1"], indirect=True)
SIZES = {0: 0, 1: 1, 65: 7, 33 * 65: 0, 5000: 500, 20_000 if PLAIN else 6000: 4000}
"""Number of scores -> number to keep."""
OPTIONS = {
    "default": {},
    "weight-decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "all": {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.01, "maximize": True},
}
LAYERS_OF_A_TABLE = 29


@pytest.fixture
def adam() -> ModuleType:
    return harness.load("adam", harness.HERE)


@dataclass
class Training:
    """Scores of some layers and what Adam keeps of them."""

    scores: list[Tensor]
    k: list[int]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    steps: list[Tensor]
    hint: Tensor | None = None
    masks: list[Tensor] | None = None
    selection: Tensor | None = None
    nan: bool = False
    launches: int = 0
    missed: int = 0

    def step(
        self, adam: ModuleType, grads: list[Tensor], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0, maximize: bool = False, with_masks: bool = True,
        packed: bool = False,
    ) -> None:  # fmt: skip
        self.masks = [torch.empty(s.shape, dtype=torch.bool) for s in self.scores] if with_masks else []
        if packed:
            self.masks = [torch.empty(-(-s.numel() // 8), dtype=torch.uint8) for s in self.scores]
        self.selection = torch.empty(len(self.scores), 2, dtype=torch.int64)
        flag = np.zeros(1, dtype=np.int32)
        lists = [self.scores, grads, self.exp_avg, self.exp_avg_sq, self.steps]
        arrays = [[t.numpy() for t in tensors] for tensors in lists]
        workspace = torch.empty(adam.workspace_bytes(arrays[0]), dtype=torch.uint8).numpy()
        self.launches = adam.adam_topk(
            *arrays, self.k, [m.numpy() for m in self.masks], None if self.hint is None else self.hint.numpy(),
            self.selection.numpy(), lr, *betas, eps, weight_decay, maximize, flag, workspace, 2, packed,
        )  # fmt: skip
        self.nan = bool(flag[0])
        self.missed = int(workspace[:4].view(np.uint32)[0])

    def assert_selected(self) -> None:
        packed = bool(self.masks) and self.masks[0].dtype == torch.uint8
        masks, selection = selected(reference.topk_masks, self.scores, self.k, packed)
        assert torch.equal(self.selection, selection)
        for mask, expected in zip(self.masks, masks, strict=False):
            assert torch.equal(mask.view(torch.uint8), expected.view(torch.uint8))

    def results(self) -> Results:
        states = zip(self.scores, self.exp_avg, self.exp_avg_sq, strict=True)
        names = ("scores", "exp_avg", "exp_avg_sq")
        return {f"{name} {n}": t for n, state in enumerate(states) for name, t in zip(names, state, strict=True)}


def start(sizes: dict[int, int] = SIZES) -> Training:
    scores = [torch.randn(n) for n in sizes]
    zeros = [[torch.zeros(n) for n in sizes] for _ in range(2)]
    return Training(scores, [*sizes.values()], *zeros, [torch.zeros(()) for _ in sizes])


def drawn_gradients(scores: list[Tensor]) -> list[Tensor]:
    return [torch.randn(s.shape) * (torch.rand(s.shape) < 0.9) for s in scores]


def by_torch(scores: list[Tensor], gradients: list[list[Tensor]], options: dict[str, object]) -> Results:
    """Scores and averages after the steps, by torch.optim in the scores' dtype."""
    leaves = [s.clone().requires_grad_() for s in scores]
    optimizer = torch.optim.Adam(leaves, foreach=False, **options)
    for grads in gradients:
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad.to(leaf.dtype)
        optimizer.step()
    states = [optimizer.state[leaf] for leaf in leaves]
    found = {f"scores {n}": leaf.detach() for n, leaf in enumerate(leaves)}
    return found | {f"{key} {n}": s[key] for n, s in enumerate(states) for key in ("exp_avg", "exp_avg_sq")}


def moved(results: Results, scores: list[Tensor]) -> Results:
    """How far the scores have gone, which is little beside what they are."""
    return {"moved": torch.cat([results[f"scores {n}"].double() - s.double() for n, s in enumerate(scores)])}


@pytest.mark.parametrize("options", OPTIONS)
@orders
def test_steps_are_torchs_and_each_selects_from_the_new_scores(adam: ModuleType, options: str, order: str) -> None:
    training = start()
    first = [s.clone() for s in training.scores]
    gradients = [drawn_gradients(first) for _ in range(4)]
    plain = by_torch(first, gradients, OPTIONS[options])
    truth = by_torch([s.double() for s in first], gradients, OPTIONS[options])
    for grads in gradients:
        training.step(adam, grads, **OPTIONS[options])
        training.assert_selected()
        assert not training.nan
    assert_accurate(training.results(), plain, truth)
    assert_accurate(*(moved(results, first) for results in (training.results(), plain, truth)))
    assert [int(s) for s in training.steps] == [len(gradients)] * len(training.steps)


def test_step_goes_on_from_the_number_that_is_given(adam: ModuleType) -> None:
    training, again = start({500: 50}), start({500: 50})
    gradients = [drawn_gradients(training.scores) for _ in range(3)]
    again.scores[0].copy_(training.scores[0])
    for grads in gradients:
        training.step(adam, grads)
    for grads in gradients[:2]:
        again.step(adam, grads)
    assert again.steps[0] == 2
    again.steps[0].fill_(1000)  # nearly no correction is left
    before = again.scores[0].double()
    again.step(adam, gradients[2])
    size = 1e-3 / (1 - 0.9**1001) / (again.exp_avg_sq[0].double() / (1 - 0.999**1001)).sqrt().add(1e-8)
    expected = before - size * again.exp_avg[0].double()
    assert torch.equal(again.exp_avg[0], training.exp_avg[0])
    assert_accurate({"scores": again.scores[0]}, {"scores": expected.float()}, {"scores": expected})


def test_new_scores_are_not_read_again_where_the_bracket_holds(adam: ModuleType) -> None:
    training, right = start(), 0
    training.hint = torch.full((len(training.k), 2), -1)
    for _ in range(8):
        hint = training.hint.clone()
        training.step(adam, drawn_gradients(training.scores))
        training.assert_selected()
        low, high = hint.t()
        threshold = training.selection[:, 0]
        holds = (low <= threshold) & (threshold <= high)
        assert training.missed == int(((low < high) & ~holds).sum())
        right += int(((low < high) & holds).sum())
    assert right > 0, "no bracket was handed on"


@pytest.mark.parametrize("which", ["scores", "exp_avg", "exp_avg_sq", "grad", "all"])
def test_memory_aligned_to_nothing_wider_than_an_element(adam: ModuleType, which: str) -> None:
    training = start({5000: 500})
    grads = drawn_gradients(training.scores)
    plain, truth = (by_torch([s.to(d) for s in training.scores], [grads], {}) for d in (torch.float, torch.double))
    for name in ("scores", "exp_avg", "exp_avg_sq"):
        if which in (name, "all"):
            setattr(training, name, [LAYOUTS["offset"](t) for t in getattr(training, name)])
    training.step(adam, [LAYOUTS["offset"](g) for g in grads] if which in ("grad", "all") else grads)
    training.assert_selected()
    assert_accurate(training.results(), plain, truth)


@pytest.mark.parametrize("count", [LAYERS_OF_A_TABLE, LAYERS_OF_A_TABLE + 1])
def test_more_layers_than_fit_in_one_table(adam: ModuleType, count: int) -> None:
    training = start({n + 1: n // 2 for n in range(count)})
    gradients = [drawn_gradients(training.scores)]
    plain, truth = (by_torch([s.to(d) for s in training.scores], gradients, {}) for d in (torch.float, torch.double))
    training.step(adam, gradients[0])
    training.assert_selected()
    assert_accurate(training.results(), plain, truth)
    assert training.launches == -(-count // LAYERS_OF_A_TABLE) + 2


def test_selection_without_masks(adam: ModuleType) -> None:
    training = start()
    training.step(adam, drawn_gradients(training.scores), with_masks=False)
    training.assert_selected()


def test_packed_masks(adam: ModuleType) -> None:
    training = start()
    for _ in range(2):
        training.step(adam, drawn_gradients(training.scores), packed=True)
        training.assert_selected()


@pytest.mark.parametrize("at", [0, 4999])
def test_gradient_that_is_nan_raises_the_flag(adam: ModuleType, at: int) -> None:
    training = start({65: 7, 5000: 500})
    grads = drawn_gradients(training.scores)
    grads[1][at] = torch.nan
    training.step(adam, grads)
    assert training.nan
    assert training.scores[1].isnan().nonzero().flatten().tolist() == [at]


@harness.other_modes
def test_every_load_and_store_is_right_and_none_races(mode: str) -> None:
    harness.run_again(__file__, mode)
