"""adam_topk: torch.optim.Adam's step in place, and the selection from the scores that it leaves."""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from accuracy import Results, assert_accurate, assert_exact
from selections import selected
from torch import Tensor

from exssnet import ops
from exssnet.kernels import reference
from exssnet.ops.selection import new_masks

SHAPES = ((33, 65), (7,), (0,), (4, 3, 3, 3))
K = (200, 3, 0, 108)
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "weight-decay": {"weight_decay": 0.1},
    "all": {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.01, "maximize": True},
}
STEPS = 3
options = pytest.mark.parametrize("options", OPTIONS)


def gradients(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(s, generator=generator).to(device, dtype) for s in SHAPES] for _ in range(STEPS)]


def starts(device: str = "cpu") -> list[Tensor]:
    return [torch.randn(s).to(device) for s in SHAPES]


def named(**states: Sequence[Tensor]) -> Results:
    return {f"{name} {n}": t for name, tensors in states.items() for n, t in enumerate(tensors)}


def by_torch(scores: list[Tensor], grads: list[list[Tensor]], options: dict[str, Any]) -> Results:
    leaves = [s.clone().requires_grad_() for s in scores]
    optimizer = torch.optim.Adam(leaves, foreach=False, **options)
    for of_step in grads:
        for leaf, grad in zip(leaves, of_step, strict=True):
            leaf.grad = grad
        optimizer.step()
    kept = {name: [optimizer.state[leaf][name] for leaf in leaves] for name in ("exp_avg", "exp_avg_sq")}
    return named(scores=[leaf.detach() for leaf in leaves], **kept)


class Training:
    """Scores, and what Adam keeps of them."""

    def __init__(self, scores: list[Tensor]) -> None:
        self.scores = [s.clone() for s in scores]
        self.exp_avg, self.exp_avg_sq = ([torch.zeros_like(s) for s in scores] for _ in range(2))
        self.steps = [torch.zeros((), device=s.device) for s in scores]

    def step(self, grads: list[Tensor], **options: Any) -> ops.TopK:
        return ops.adam_topk(self.scores, grads, self.exp_avg, self.exp_avg_sq, self.steps, K, **options)

    def results(self) -> Results:
        return named(scores=self.scores, exp_avg=self.exp_avg, exp_avg_sq=self.exp_avg_sq)


@options
def test_errs_at_most_twice_as_much_as_torchs_adam(options: str, device: str) -> None:
    first, grads = starts(device), gradients(device=device)
    training = Training(first)
    for of_step in grads:
        training.step(of_step, **OPTIONS[options])
    truth = by_torch([s.double() for s in first], gradients(torch.float64, device), OPTIONS[options])
    assert_accurate(training.results(), by_torch(first, grads, OPTIONS[options]), truth)
    assert [int(t) for t in training.steps] == [STEPS] * len(SHAPES)


@options
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference_is_torchs_adam_bit_for_bit(options: str, dtype: torch.dtype) -> None:
    first, grads = [s.to(dtype) for s in starts()], gradients(dtype)
    training = Training(first)
    for of_step in grads:
        training.step(of_step, **OPTIONS[options])
    assert_exact(training.results(), by_torch(first, grads, OPTIONS[options]))


@pytest.mark.parametrize("packed", [False, True])
def test_selects_from_the_new_scores(packed: bool, device: str) -> None:
    training, hint = Training(starts(device)), None
    for of_step in gradients(device=device):
        masks, selection, hint = training.step(of_step, hint=hint, lr=0.1, packed=packed)
        expected_masks, expected = selected(reference.topk_masks, training.scores, list(K), packed)
        assert torch.equal(selection, expected)
        assert all(map(torch.equal, masks, expected_masks))


def test_autograd_learns_that_the_scores_have_changed() -> None:
    training = Training(starts())
    before = training.scores[0]._version
    leaf = torch.ones(33, 65, requires_grad=True)
    loss = (leaf * training.scores[0]).sum()
    training.step(gradients()[0])
    assert training.scores[0]._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_kernel_need_not_tell_autograd() -> None:
    training = Training(starts())
    versions = [[t._version for t in (s, m)] for s, m in zip(training.scores, training.exp_avg, strict=True)]
    rows = torch.zeros(len(SHAPES), 2, dtype=torch.int64)
    with mock.patch.object(torch.ops.exssnet, "adam_topk", return_value=rows):
        training.step(gradients()[0])
    for before, s, m in zip(versions, training.scores, training.exp_avg, strict=True):
        assert s._version > before[0]
        assert m._version > before[1]


def test_score_that_becomes_nan_is_refused() -> None:
    grads = gradients()[0]
    grads[1][2] = torch.nan
    with pytest.raises(RuntimeError, match=r"scores\[1\] holds NaN, first at flat index 2$"):
        Training(starts()).step(grads)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"grads": [torch.zeros(3)]}, "expected one of grads per score tensor, got 1 and 4"),
        (
            {"steps": [torch.zeros(1)] * 4},
            r"steps must be torch.float32 of \(\) on cpu, got torch.float32 of \(1,\)",
        ),
        (
            {"exp_avg": [torch.zeros(2)] * 4},
            r"exp_avg must be torch.float32 of \(33, 65\) on cpu, got",
        ),
        (
            {"steps": [torch.zeros((), dtype=torch.float64)] * 4},
            r"steps must be torch.float32 of \(\) on cpu, got torch.float64 of \(\)",
        ),
        ({"k": [1]}, "expected one k per score tensor, got 4 scores and 1 k"),
    ],
)
def test_wrong_arguments_are_told_before_anything_changes(change: dict[str, Any], sentence: str) -> None:
    training = Training(starts())
    before = [s.clone() for s in training.scores]
    arguments = {"scores": training.scores, "grads": gradients()[0], "exp_avg": training.exp_avg,
                 "exp_avg_sq": training.exp_avg_sq, "steps": training.steps, "k": K}  # fmt: skip
    with pytest.raises(ValueError, match=f"^adam_topk: {sentence}"):
        ops.adam_topk(**arguments | change)
    assert all(map(torch.equal, training.scores, before))


NUMBERS = 1e-3, 0.9, 0.999, 1e-8, 0.0, False


@pytest.mark.parametrize("masks", ["bool", "packed", "none"])
def test_opcheck(masks: str) -> None:
    training = Training(starts())
    written = [] if masks == "none" else new_masks(training.scores, masks == "packed")
    state = training.scores, gradients()[0], training.exp_avg, training.exp_avg_sq, training.steps
    torch.library.opcheck(torch.ops.exssnet.adam_topk.default, (*state, written, list(K), None, *NUMBERS))


def test_derivative_is_refused() -> None:
    training = Training(starts())
    state = [s.requires_grad_() for s in training.scores], gradients()[0], training.exp_avg, training.exp_avg_sq
    with pytest.raises(RuntimeError, match=r"^exssnet::adam_topk has no derivative: it is a step of an optimizer"):
        torch.ops.exssnet.adam_topk(*state, training.steps, [], list(K), None, *NUMBERS)


def test_compiles_in_one_graph_with_the_same_results() -> None:
    torch._dynamo.reset()
    plain, compiled, grads = Training(starts()), Training(starts()), gradients()[0]
    compiled.scores = [s.clone() for s in plain.scores]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(t: list[list[Tensor]], of_step: list[Tensor]) -> list[Tensor]:
        return ops.adam_topk(t[0], of_step, *t[1:], K).masks

    masks = step([compiled.scores, compiled.exp_avg, compiled.exp_avg_sq, compiled.steps], grads)
    assert all(map(torch.equal, masks, plain.step(grads).masks))
    assert_exact(compiled.results(), plain.results())
