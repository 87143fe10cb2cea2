"""Sizes, features and members of the models, and their training under masks."""

import pytest
import torch
from networks import changes, picture
from torch import Tensor, nn
from torch.nn import functional as F

from exssnet import Phases, convert
from exssnet.nn import evaluation
from exssnet.nn.blocks import ResidualBlock
from exssnet.nn.models import MODELS, VDCNN, Bottleneck, LeNet300100, ResNet, ResNet18, SmallResNet, TextCNN

SHAPES = {
    "lenet-300-100": (1, 28, 28), "resnet18": (3, 32, 32), "resnet18-64": (3, 16, 16), "resnet50": (3, 64, 64),
    "resnet-small": (1, 28, 28), "text-cnn": (9, 7), "vdcnn-9": (9, 7), "vdcnn-17": (9, 7), "vdcnn-29": (9, 7),
    "vdcnn-49": (9, 7),
}  # fmt: skip
TEXTS = [name for name, shape in SHAPES.items() if len(shape) == 2]
RELUS = {"lenet-300-100": 2, "resnet18": 17, "resnet18-64": 17, "resnet50": 49, "resnet-small": 7, "text-cnn": 3}
RELUS |= {"vdcnn-9": 10, "vdcnn-17": 18, "vdcnn-29": 30, "vdcnn-49": 50}
SMALL = {
    "bottlenecks": (lambda: ResNet(5, Bottleneck, (1, 2), 8, large=True), "resnet50"),
    "resnet-small": (lambda: SmallResNet(5, 8), "resnet-small"),
    "text-cnn": (lambda: TextCNN(6, 5, 20), "text-cnn"),
    "vdcnn-9": (lambda: VDCNN(6, 5, 9, hidden=32), "vdcnn-9"),
}
"""Models of every kind of block, small, and which model's inputs they take."""


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def texts(lengths: list[int], places: int, features: int = 6) -> Tensor:
    """(N, places, features + 1) of random tokens and zero padding."""
    x = torch.randn(len(lengths), places, features + 1)
    x[..., -1] = (torch.arange(places) < torch.tensor(lengths)[:, None]).float()
    return x * x[..., -1:]


def batch(name: str, items: int) -> Tensor:
    shape = SHAPES[name]
    return (
        texts([(5 * i) % shape[0] + 1 for i in range(items)], *shape[:1])
        if name in TEXTS
        else torch.rand(items, *shape)
    )


@pytest.fixture(params=SHAPES, scope="module")
def model_and_input(request):
    torch.manual_seed(0)
    return MODELS[request.param](SHAPES[request.param], 5).eval(), batch(request.param, 3), request.param


def test_every_model_is_tested():
    assert SHAPES.keys() == RELUS.keys() == MODELS.keys()


def test_lenet_has_the_weights_of_its_name():
    assert count(LeNet300100(784, 10)) == 784 * 300 + 300 * 100 + 100 * 10 == 266_200


@pytest.mark.parametrize(("classes", "weights"), [(5, 1_090_940), (100, 1_106_140)])
def test_resnet18_of_width_20_has_the_weights_of_gem(classes, weights):
    # Per stage: its 3x3 convolutions, and the 1x1 shortcut where the width doubles.
    stages = 9 * 4 * 20**2
    stages += sum(9 * (n * n // 2 + 3 * n * n) + n * n // 2 for n in (40, 80, 160))
    assert count(ResNet18(classes)) == 9 * 3 * 20 + stages + 160 * classes == weights


def test_resnet18_of_width_64_has_the_weights_of_torchvisions_behind_a_smaller_stem():
    with torch.device("meta"):
        theirs = pytest.importorskip("torchvision").models.resnet18(num_classes=5)
        weights = sum(p.numel() for p in theirs.parameters() if p.dim() > 1)
        assert count(MODELS["resnet18-64"]((3, 32, 32), 5)) == weights - 3 * 64 * (7 * 7 - 3 * 3)


def test_resnet50_has_the_weights_of_torchvisions():
    with torch.device("meta"):
        theirs = pytest.importorskip("torchvision").models.resnet50(num_classes=200)
        ours = MODELS["resnet50"]((3, 64, 64), 200)
        assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters() if p.dim() > 1]
        assert count(ours) == 23_454_912 + 2048 * 200


def test_the_small_resnet_has_as_many_weights_as_it_says():
    stages = 2 * 32**2 * 9 + sum(9 * (n * n // 2 + n * n) + n * n // 2 for n in (64, 128))
    assert count(MODELS["resnet-small"]((1, 28, 28), 16)) == 9 * 32 + stages + 128 * 16 == 305_440 + 128 * 16


def test_the_text_cnn_has_the_weights_of_the_paper():
    assert count(TextCNN(768, 14)) == 768 * 200 * (3 + 4 + 5) + 600 * 14 == 1_851_600


@pytest.mark.parametrize("depth", [9, 17, 29, 49])
def test_vdcnn_has_as_many_convolutions_as_its_name_says(depth):
    with torch.device("meta"):
        model = VDCNN(6, 5, depth)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv1d)]
    assert [m.kernel_size for m in convolutions].count((3,)) == depth
    assert [m.kernel_size for m in convolutions].count((1,)) == 3  # shortcuts where the channels double
    linear = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)]
    assert linear == [(2048, 8 * 512), (2048, 2048), (5, 2048)]


def test_vdcnn_of_another_depth_is_refused():
    with pytest.raises(ValueError, match="depth must be one of 9, 17, 29, 49, got 10"):
        VDCNN(6, 5, 10)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("resnet18", (64, 385), r"resnet18 is for images \(C, H, W\), got items of shape \(64, 385\)"),
        ("vdcnn-17", (3, 32, 32), r"vdcnn-17 is for texts \(L, E \+ 1\), got items of shape \(3, 32, 32\)"),
        ("text-cnn", (64, 1), r"text-cnn is for texts \(L, E \+ 1\), got items of shape \(64, 1\)"),
    ],
)
def test_items_of_another_kind_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        MODELS[name](shape, 5)


def test_logits_have_one_column_per_class(model_and_input):
    model, x, _ = model_and_input
    assert model(x).shape == (3, 5)


def test_no_parameter_but_weights_of_masked_layers(model_and_input):
    model, _, _ = model_and_input
    masked = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    assert {id(p) for p in model.parameters()} == {id(w) for w in masked}


def test_lenet_features_come_before_the_relu():
    model, x = LeNet300100(16, 3), torch.rand(9, 1, 4, 4)
    features = model.penultimate(x)
    assert features.shape == (9, 100)
    assert bool((features < 0).any())
    assert torch.equal(model.head(features.relu()), model(x))


def test_the_head_reads_the_features(model_and_input):
    model, x, name = model_and_input
    features = model.penultimate(x)
    assert features.shape == (3, model.head.in_features)
    assert torch.equal(model.head(features.relu()), model(x))
    assert name == "lenet-300-100" or bool((features >= 0).all())


def test_resnet_features_are_the_pooled_last_stage():
    model, x = ResNet18(4, width=6, in_channels=1).eval(), torch.rand(2, 1, 33, 28)
    features = model.penultimate(x)
    assert features.shape == (2, 48)
    assert torch.equal(features, model.blocks(model.stem(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("resnet18", [(20, 32)] * 2 + [(40, 16)] * 2 + [(80, 8)] * 2 + [(160, 4)] * 2),
        ("resnet-small", [(32, 28), (64, 14), (128, 7)]),
        ("resnet50", [(256, 16)] * 3 + [(512, 8)] * 4 + [(1024, 4)] * 6 + [(2048, 2)] * 3),
    ],
)
def test_resnets_halve_the_image_between_their_stages(name, sizes):
    model, seen = MODELS[name](SHAPES[name], 4).eval(), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[1:])))
    model(batch(name, 1))
    assert seen == [(channels, side, side) for channels, side in sizes]


def test_every_relu_is_a_member_of_its_own(model_and_input):
    model, x, name = model_and_input
    calls = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, args, out: calls.append(module))
    model(x)
    assert len(calls) == len(set(calls)) == RELUS[name]


@pytest.mark.parametrize("name", [n for n in SHAPES if n not in ("vdcnn-17", "vdcnn-29", "vdcnn-49", "resnet18-64")])
def test_every_weight_gets_a_gradient(name):
    torch.manual_seed(0)
    model = MODELS[name](SHAPES[name], 5).train()
    model(batch(name, 5)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# Texts


@pytest.mark.parametrize("content", [1e6, float("inf"), float("nan")])
@pytest.mark.parametrize("name", TEXTS)
def test_what_stands_in_padding_changes_no_logit(name, content):
    model = MODELS[name]((9, 7), 5).eval()
    x = texts([9, 4, 1, 0], 9)
    filled = x.clone()
    filled[..., :-1] = x[..., :-1].where(x[..., -1:] > 0, content)
    assert torch.equal(model(filled), model(x))


@pytest.mark.parametrize("name", TEXTS)
def test_more_padding_changes_no_feature(name):
    model = MODELS[name]((9, 7), 5).double().eval()
    x = texts([9, 8, 3, 1, 0], 9).double()
    torch.testing.assert_close(model.penultimate(F.pad(x, (0, 0, 0, 70))), model.penultimate(x), rtol=1e-12, atol=1e-12)


def test_the_text_cnn_takes_the_maximum_over_the_windows_of_tokens_alone():
    model, x = TextCNN(6, 5, filters=4), texts([7, 2], 9)
    expected = []
    for text, length in zip(x, (7, 2), strict=True):
        row = []
        for conv in model.convs:
            size = conv.weight.shape[2]
            alone = F.pad(text[:length, :-1].T, (size // 2, size))  # (E, L + padding)
            windows = torch.stack([alone[:, i : i + size] for i in range(length)])  # (L, E, size)
            row.append(torch.einsum("les,fes->lf", windows, conv.weight).amax(0).relu())
        expected.append(torch.cat(row))
    torch.testing.assert_close(model.penultimate(x), torch.stack(expected))


@pytest.mark.parametrize("name", TEXTS)
def test_an_empty_text_has_no_features(name):
    assert not MODELS[name]((9, 7), 5).eval().penultimate(texts([0, 9], 9))[0].any()


def test_vdcnn_keeps_the_largest_values_in_their_order():
    model, caught = VDCNN(6, 5).eval(), []
    model.stages[-1][-1].register_forward_hook(lambda module, args, out: caught.append(out))
    model.hidden1.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    model(texts([90, 70], 90))
    maps, kept = caught[0], caught[1].view(2, 512, 8)
    assert maps.shape == (2, 512, 12)
    for item, channel in ((0, 3), (1, 100)):
        values = maps[item, channel].tolist()
        chosen = sorted(sorted(range(12), key=lambda place: (-values[place], place))[:8])
        assert kept[item, channel].tolist() == [values[place] for place in chosen]


# Under masks


@pytest.mark.parametrize(("make", "name"), SMALL.values(), ids=SMALL)
def test_both_phases_train_what_they_own_and_nothing_else(make, name):
    torch.manual_seed(0)
    model = convert(make(), 0.2, weights="signed_constant")
    phases = Phases(model)
    x, y = batch(name, 6), torch.arange(6) % 5
    for _ in range(2):
        phases.start_task()
        for start in (None, phases.start_weight_phase):
            if start is not None:
                start()
            before = {n: layer.dense_weight.clone() for n, layer in phases.layers.items()}
            optimizer = torch.optim.SGD(phases.parameters(), 0.1)
            kept = [p.detach().clone() for p in phases.parameters()]
            loss = F.cross_entropy(model.train()(x), y)
            loss.backward()
            optimizer.step()
            assert bool(loss.isfinite())
            assert all(not torch.equal(p, k) for p, k in zip(phases.parameters(), kept, strict=True))
            assert all(torch.equal(layer.dense_weight, before[n]) for n, layer in phases.layers.items())
        phases.finish_task()


@pytest.mark.parametrize(("make", "name"), SMALL.values(), ids=SMALL)
def test_the_first_task_keeps_its_logits_and_its_norms_when_a_second_is_learned(make, name):
    torch.manual_seed(0)
    model = convert(make(), 0.2, weights="signed_constant")
    phases, logits, x = Phases(model), [], batch(name, 6)
    for shift in (0.0, 1.0):
        phases.start_task()
        phases.start_weight_phase()
        optimizer = torch.optim.Adam(phases.parameters(), 0.1)
        F.cross_entropy(model.train()(x + shift * (x != 0)), torch.arange(6) % 5).backward()
        optimizer.step()
        phases.finish_task()
        with phases.using(0), evaluation(model):
            logits.append(model(x))
    assert torch.equal(*logits)
    norms = [n for n in phases.states[0] if n.endswith("running_mean")]
    assert len(norms) == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert all(not torch.equal(phases.states[0][n], phases.states[1][n]) for n in norms)


@pytest.mark.parametrize(("make", "name"), SMALL.values(), ids=SMALL)
def test_a_converted_model_computes_what_its_dense_copy_does(make, name):
    torch.manual_seed(0)
    phases = Phases(convert(make(), 0.2))
    phases.start_task()
    phases.model.train()(batch(name, 6))
    phases.finish_task()
    plain, x = phases.fold(0).double().eval(), batch(name, 6)
    truth = plain(x.double())
    budget = 2 * (plain.float()(x) - truth).abs().max() + 1e-7
    before = picture(phases)
    with phases.using(0), evaluation(phases.model):
        assert (phases.model(x) - truth).abs().max() <= budget
    assert changes(before, picture(phases)) == []


def test_every_residual_block_fuses_its_norms():
    model = convert(MODELS["resnet50"]((3, 64, 64), 5))
    assert all(isinstance(block, ResidualBlock) for block in model.blocks)
