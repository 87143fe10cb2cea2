"""`exssnet.compat.torchao.SupermaskLinear` against its rules, and against torchao 0.18 where it is installed."""

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from exssnet.compat.torchao import SupermaskLinear

CASES = [(0.0, 1, False, False), (0.5, 1, False, True), (0.9, 3, False, False), (0.75, 4, True, False)]


@pytest.mark.parametrize(("level", "size", "fixed_mask", "fixed_weight"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_gradients_and_state_are_those_of_torchao(
    level: float, size: int, fixed_mask: bool, fixed_weight: bool, dtype: torch.dtype
) -> None:
    pytest.importorskip("torchao")
    try:
        with warnings.catch_warnings(action="ignore"):
            theirs_type = import_module("torchao.sparsity.supermask").SupermaskLinear
    except ImportError:
        pytest.skip("this torchao has no SupermaskLinear")
    layers = []
    for kind in (SupermaskLinear, theirs_type):
        torch.manual_seed(0)
        layers.append(kind(level, size, fixed_mask, fixed_weight, 13, 10).to(dtype))
    ours, theirs = layers
    assert [(n, torch.equal(t, theirs.state_dict()[n])) for n, t in ours.state_dict().items()] == [
        (n, True) for n in theirs.state_dict()
    ]
    theirs.scores.data.add_(0.01)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for layer in layers:
        x = torch.randn(5, 13, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append([y, layer.get_mask(), x.grad, layer.bias.grad, layer.weight.grad, layer.scores.grad])
        results[-1].append(type(layer).to_linear(layer).weight)
    for mine, its in zip(*results, strict=True):
        assert (mine is None) == (its is None)
        assert mine is None or torch.equal(mine, its)


def test_mask_keeps_the_blocks_of_largest_score_and_gradients_pass_straight_through() -> None:
    layer = SupermaskLinear(0.5, 2, False, False, 3, 3, bias=False)
    with torch.no_grad():
        layer.scores.copy_(torch.tensor([[-9.0, 1.0], [2.0, 3.0]]))  # by value: -9 is the smallest
    kept = torch.tensor([[0.0, 0, 0], [0, 0, 0], [1, 1, 1]])
    assert torch.equal(layer.get_mask(), kept)
    x, g = torch.randn(4, 3), torch.randn(4, 3)
    layer(x).backward(g)
    dense = g.T @ x
    assert layer.weight.grad is not None
    assert layer.scores.grad is not None
    torch.testing.assert_close(layer.weight.grad, dense)
    blocks = torch.stack([dense[:2, :2].sum(), dense[:2, 2:].sum(), dense[2:, :2].sum(), dense[2:, 2:].sum()])
    torch.testing.assert_close(layer.scores.grad.flatten(), blocks)


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_and_back(bias: bool) -> None:
    linear = nn.Linear(6, 4, bias, dtype=torch.float64)
    layer = SupermaskLinear.from_linear(linear, sparsity_level=0.5)
    assert torch.equal(SupermaskLinear.from_linear(linear).get_mask(), torch.ones(4, 6))
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(SupermaskLinear.to_linear(layer)(x), layer(x))
    assert layer.weight is not linear.weight
    assert int(layer.get_mask().sum()) == 12


def test_fixed_parts_do_not_train() -> None:
    layer = SupermaskLinear(0.5, 1, True, True, 4, 4)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"]


def test_at_least_one_block_is_kept() -> None:
    with pytest.warns(UserWarning, match=r"1\.0 is reduced to 0\.75, the most for 4 blocks"):
        layer = SupermaskLinear(1.0, 2, False, False, 4, 4)
    assert layer.sparsity_level == 0.75
    assert layer.get_mask().any()


@pytest.mark.parametrize(("level", "size", "message"), [(1.5, 1, r"\[0, 1\], got 1.5"), (0.5, 0, "at least 1, got 0")])
def test_wrong_arguments_are_refused(level: float, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SupermaskLinear(level, size, False, False, 4, 4)


def test_a_file_of_a_state_dict_loads(tmp_path: Path) -> None:
    state: dict[str, Any] = {"weight": torch.randn(4, 6), "bias": torch.randn(4), "scores": torch.randn(2, 3)}
    torch.save(state, tmp_path / "layer.pt")
    layer = SupermaskLinear(0.5, 2, False, False, 6, 4)
    layer.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(layer.scores, state["scores"])
