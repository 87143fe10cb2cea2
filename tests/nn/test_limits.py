"""Layers that the sparse products take badly or not at all: "auto" gives what plain PyTorch gives, in every phase."""

import copy
from collections.abc import Callable

import pytest
import torch
from products import Calls
from torch import Tensor, nn

from exssnet import convert
from exssnet.nn import SupermaskLayer, supermask_layers

PHASES = ("mask", "weight", "fixed")
APART = 1 << 23
TOO_LARGE = nn.Conv2d(1, 2, (1, 2), dilation=APART)  # its patch has more than 2^31 elements
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "patches of 24": (lambda: nn.Conv2d(3, 5, 24, 24), lambda: torch.randn(2, 3, 72, 48)),
    "patches of 32": (lambda: nn.Conv2d(3, 5, 32, 32), lambda: torch.randn(3, 3, 64, 96)),
    "pixels far apart": (lambda: copy.deepcopy(TOO_LARGE), lambda: torch.randn(1, 1, 1, APART + 2)),
    "float16": (lambda: nn.Conv2d(3, 5, 3).half(), lambda: torch.randn(2, 3, 9, 9).half()),
    "float16 linear": (lambda: nn.Linear(70, 33).half(), lambda: torch.randn(40, 70).half()),
    "bfloat16": (lambda: nn.Conv2d(30, 50, 3).bfloat16(), lambda: torch.randn(2, 30, 9, 9).bfloat16()),
    "no images": (lambda: nn.Conv2d(3, 5, 3), lambda: torch.randn(0, 3, 9, 9)),
    "no rows": (lambda: nn.Linear(7, 5), lambda: torch.randn(0, 7)),
    "no tokens": (lambda: nn.Linear(7, 5), lambda: torch.randn(2, 0, 7)),
    "no signals": (lambda: nn.Conv1d(3, 5, 3), lambda: torch.randn(0, 3, 9)),
}


def in_phase(plain: nn.Module, phase: str, products: str = "auto") -> tuple[nn.Module, SupermaskLayer]:
    model = convert(nn.Sequential(copy.deepcopy(plain)), 0.1, products=products)  # type: ignore[arg-type]
    ((_, layer),) = supermask_layers(model)
    if phase != "mask":
        mask = layer.mask()
        layer.use_values(mask, mask & (phase == "weight"))
    return model, layer


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", CASES)
def test_auto_gives_what_plain_pytorch_gives(name: str, phase: str) -> None:
    plain, x = (make() for make in CASES[name])
    model, layer = in_phase(plain, phase)
    with torch.no_grad():
        plain.weight.mul_(layer.mask())  # type: ignore[operator]
    expected = plain(x)
    y = model(x)
    assert y.dtype == expected.dtype
    tolerance = {} if x.dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(y, expected, **tolerance)
    if phase != "fixed":
        y.sum().backward()


@pytest.mark.parametrize("phase", PHASES)
def test_layers_on_device_meta_are_dense(phase: str) -> None:
    model, _ = in_phase(nn.Conv2d(3, 5, 3, padding=1), phase)
    model.to("meta")
    with Calls() as calls:
        assert model(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 5, 8, 8)
    assert not any(name.startswith("sparse") for name, _ in calls.made)


@pytest.mark.usefixtures("native")
def test_a_norm_is_not_folded_into_a_layer_that_sparse_products_refuse() -> None:
    plain = nn.Sequential(copy.deepcopy(TOO_LARGE), nn.BatchNorm2d(2)).eval()
    model = convert(copy.deepcopy(plain), 0.1)
    ((_, layer),) = supermask_layers(model)
    mask = layer.mask()
    layer.use_values(mask, torch.zeros_like(mask))
    x = torch.randn(1, 1, 1, APART + 2)
    with torch.no_grad():
        plain[0].weight.mul_(mask)  # type: ignore[operator]
        torch.testing.assert_close(model.eval()(x), plain(x))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("size", [24, 32])
@pytest.mark.parametrize("phase", PHASES)
def test_sparse_patches_are_exact(phase: str, size: int) -> None:
    plain, x = nn.Conv2d(3, 4, size, size), torch.randint(-2, 3, (3, 3, 2 * size, 3 * size)).float()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    model, layer = in_phase(plain, phase, "sparse")
    with torch.no_grad():
        plain.weight.mul_(layer.mask())
    y, expected = model(x.requires_grad_()), plain(x)
    grad = torch.randint(-2, 3, y.shape).float()
    assert torch.equal(y, expected)
    (got,), (wanted,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad)
    assert torch.equal(got, wanted)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("phase", PHASES)
def test_sparse_products_refuse_a_patch_of_two_billion_elements_in_one_sentence(phase: str) -> None:
    model, _ = in_phase(TOO_LARGE, phase, "sparse")
    operator = "supermask_conv2d" if phase == "mask" else "sparse_conv2d"
    with pytest.raises(
        RuntimeError, match=rf"^{operator}: expected a kernel whose patch has fewer than 2\^31 elements$"
    ):
        model(torch.zeros(1, 1, 1, APART + 2))
