"""Sizes, features and members of the models."""

import pytest
import torch
from torch import nn

from exssnet.models import MODELS, LeNet300100, ResNet18


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(params=[("lenet-300-100", (1, 28, 28)), ("resnet18", (3, 32, 32))], ids=lambda p: p[0])
def model_and_input(request):
    name, shape = request.param
    torch.manual_seed(0)
    return MODELS[name](shape, 5).eval(), torch.rand(7, *shape)


def test_lenet_has_the_weights_of_its_name():
    assert count(LeNet300100(784, 10)) == 784 * 300 + 300 * 100 + 100 * 10 == 266_200


@pytest.mark.parametrize(("classes", "weights"), [(5, 1_090_940), (100, 1_106_140)])
def test_resnet18_of_width_20_has_the_weights_of_gem(classes, weights):
    # Per stage: its 3x3 convolutions, and the 1x1 shortcut where the width doubles.
    stages = 9 * 4 * 20**2
    stages += sum(9 * (n * n // 2 + 3 * n * n) + n * n // 2 for n in (40, 80, 160))
    assert count(ResNet18(classes)) == 9 * 3 * 20 + stages + 160 * classes == weights


def test_logits_have_one_column_per_class(model_and_input):
    model, x = model_and_input
    assert model(x).shape == (7, 5)


def test_no_parameter_but_weights_of_masked_layers(model_and_input):
    model, _ = model_and_input
    assert all(p.dim() in (2, 4) for p in model.parameters())


def test_lenet_features_come_before_the_relu():
    model, x = LeNet300100(16, 3), torch.rand(9, 1, 4, 4)
    features = model.penultimate(x)
    assert features.shape == (9, 100)
    assert bool((features < 0).any())
    assert torch.equal(model.head(features.relu()), model(x))


def test_resnet_features_are_the_pooled_last_stage():
    model, x = ResNet18(4, width=6, in_channels=1).eval(), torch.rand(2, 1, 33, 28)
    features = model.penultimate(x)
    assert features.shape == (2, 48)
    assert torch.equal(model.head(features), model(x))


def test_resnet_halves_the_image_in_three_stages():
    model, shapes = ResNet18(4, width=2), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[1:])))
    model(torch.rand(2, 3, 32, 32))
    assert shapes == [s for s in [(2, 32, 32), (4, 16, 16), (8, 8, 8), (16, 4, 4)] for _ in range(2)]


def test_every_relu_is_a_member_of_its_own(model_and_input):
    model, x = model_and_input
    calls = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, args, out: calls.append(module))
    model(x)
    assert len(calls) == len(set(calls)) == (2 if isinstance(model, LeNet300100) else 17)


def test_every_weight_gets_a_gradient(model_and_input):
    model, x = model_and_input
    model.train()(x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
