"""`layer.weight` is the weight in effect, for whoever reads it; what is written into it is not lost without a word."""

import copy

import pytest
import torch
from learning import learn
from networks import SmallNet, images, small_net
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import SwinTransformer

from exssnet import Phases, Served, SupermaskLinear, convert
from exssnet.nn import supermask_layers
from exssnet.ops import topk_mask


class Reader(nn.Module):
    """An owner that multiplies by its layer's weight, and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.linear(x, self.inner.weight, self.inner.bias).relu())
        return out


def _trained(model: nn.Module, inputs: Tensor, tasks: int = 2) -> Phases:
    phases = Phases(model)
    for _ in range(tasks):
        learn(phases, inputs)
    return phases


def _swin() -> nn.Module:
    return SwinTransformer([2, 2], 24, [2, 2], [2, 4], [2, 2], num_classes=5, stochastic_depth_prob=0.0)


@pytest.mark.parametrize(
    ("build", "inputs"),
    [(Reader, torch.randn(4, 6)), (_swin, torch.randn(2, 3, 32, 32))],
    ids=["a module that reads the weight", "swin"],
)
def test_a_layer_that_is_read_instead_of_called_is_masked_and_trained(build: type[nn.Module], inputs: Tensor) -> None:
    model = convert(build(), 0.2)
    phases = Phases(model)
    phases.start_task()
    model(inputs).square().sum().backward()
    assert all(bool(layer.scores.grad.abs().sum() > 0) for layer in phases.layers.values())  # type: ignore[union-attr]
    phases.abandon_task()
    phases = _trained(model, inputs)
    for task in range(2):
        with phases.using(task), torch.no_grad():
            logits = model.eval()(inputs)
        scale = logits.abs().max().item()
        assert torch.allclose(phases.fold(task).eval()(inputs), logits, rtol=1e-5, atol=1e-5 * scale)
        assert torch.equal(Served(phases)(inputs, [task] * len(inputs)), logits)


@pytest.mark.parametrize("phase", ["scores", "values", "fixed"])
def test_the_weight_is_the_masked_one_with_its_gradient(phase: str) -> None:
    layer = SupermaskLinear(7, 5, density=0.3)
    assert layer.scores is not None
    scores, mask = layer.scores.detach().clone(), topk_mask(layer.scores, layer.k)
    if phase != "scores":
        layer.use_values(mask, mask if phase == "values" else torch.zeros_like(mask))
    weight, factor = layer.weight, torch.randn(5, 7)
    assert torch.equal(weight.detach(), layer.dense_weight.where(mask, 0))
    if phase == "fixed":
        assert not weight.requires_grad
        return
    (weight * factor).sum().backward()
    if phase == "scores":
        assert torch.equal(layer.scores.grad, factor * layer.dense_weight * scores.sign())  # type: ignore[union-attr]
    else:
        assert torch.equal(layer.free_values.grad, factor[mask])  # type: ignore[union-attr]


@pytest.mark.parametrize("phase", ["scores", "values"])
@pytest.mark.parametrize("write", [nn.init.zeros_, lambda w: w.data.zero_()], ids=["in place", "by .data"])
def test_what_is_written_into_the_weight_is_refused_at_the_next_forward(phase: str, write: object) -> None:
    layer = SupermaskLinear(7, 5, density=0.3)
    if phase == "values":
        mask = layer.mask()
        layer.use_values(mask, mask)
    write(layer.weight)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=r"weight of SupermaskLinear \(5, 7\) was written to, without effect"):
        layer(torch.randn(2, 7))
    layer(torch.randn(2, 7))


def test_a_penalty_on_the_weight_is_no_write() -> None:
    layer = SupermaskLinear(7, 5, density=0.3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(2):
        (layer(torch.randn(2, 7)).sum() + layer.weight.square().sum()).backward()
        optimizer.step()


def test_a_plain_weight_cannot_be_put_in_the_place_of_the_masked_one() -> None:
    layer = SupermaskLinear(7, 5, density=0.3)
    with pytest.raises(KeyError, match="weight"):
        layer.weight = nn.Parameter(torch.zeros(5, 7))  # type: ignore[misc]
    with pytest.raises(AttributeError, match="weight"):
        layer.weight = torch.zeros(5, 7)  # type: ignore[misc]


def test_one_layer_under_two_names_is_one_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = self.a
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.b(self.a(x).relu()))
            return out

    x = torch.randn(4, 6)
    model = convert(Twice(), 0.3)
    opened = Phases(model)
    opened.start_task()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.a.scores.add_(1)  # type: ignore[union-attr, operator]
    model.load_state_dict(state)
    assert torch.equal(model.a.scores, state["a.scores"])  # type: ignore[union-attr, arg-type]
    phases = _trained(model, x, tasks=1)
    before = model(x).detach()
    other = convert(Twice(), 0.3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), before)
    assert torch.allclose(phases.fold(0)(x), before, atol=1e-5)


def test_a_head_that_the_task_never_calls_keeps_nothing_and_uses_nothing_up() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.heads, self.task = nn.Linear(6, 8), nn.ModuleList(nn.Linear(8, 2) for _ in range(3)), 0

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.heads[self.task](self.body(x).relu())
            return out

    model, x = convert(Heads(), 0.3), torch.randn(4, 6)
    phases = Phases(model)
    for task in range(3):
        model.task = task  # type: ignore[assignment]
        phases.start_task()
        if task > 0:
            with phases.using(0):
                model(x)  # a glance at another task calls nothing of this one
        model(x).square().sum().backward()
        phases.start_weight_phase()
        model(x).square().sum().backward()
        phases.finish_task()
        kept = {name: use.kept for name, use in phases.bank.use[task].items()}
        assert {name for name, count in kept.items() if count} == {"body", f"heads.{task}"}
        assert phases.bank.use[task][f"heads.{task}"].free == phases.layers[f"heads.{task}"].k


def test_a_task_that_calls_nothing_keeps_what_its_scores_say() -> None:
    phases = Phases(small_net())
    phases.start_task()
    phases.finish_task()
    assert {name: use.kept for name, use in phases.bank.use[0].items()} == {n: m.k for n, m in phases.layers.items()}


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("phase", ["mask", "weight"])
@pytest.mark.parametrize(
    ("written", "missing"),
    [(False, ""), (True, ""), (False, "_graph_task"), (False, "_top_hooks"), (True, "_top_hooks")],
    ids=["", "written", "no-graph-task", "no-top-hooks", "written-no-top-hooks"],
)
def test_checkpointed_activations_give_the_same_gradients(
    phase: str, reentrant: bool, written: bool, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing:  # as in a torch that lacks the private name
        monkeypatch.setattr(f"exssnet.nn.selector.{missing}", None)

    class Checkpointed(SmallNet):
        recompute = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.recompute:
                return super().forward(x)
            y: Tensor = torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=reentrant)
            return y

    torch.manual_seed(0)
    model = convert(Checkpointed(), 0.3)
    phases = Phases(model)
    phases.start_task()
    if phase == "weight":
        phases.start_weight_phase()
    if written:  # as on a GPU, where a masked weight may be written for all layers before the forward
        monkeypatch.setattr("exssnet.nn.layers.SupermaskLayer._fused", lambda *_: False)
        model(images())
    found = []
    for recompute in (False, True):
        model.recompute = recompute  # type: ignore[assignment]
        model.zero_grad()
        x = images().requires_grad_()
        model(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in phases.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


def test_a_layer_called_alone_after_a_forward_selects_from_its_scores_as_they_are() -> None:
    model = small_net()
    model(images())
    layer = dict(supermask_layers(model))["head"]
    assert layer.scores is not None
    layer.scores.data.copy_(torch.randn(layer.scores.shape))  # the version does not tell
    x = torch.randn(3, 32)
    assert torch.allclose(layer(x), F.linear(x, layer.dense_weight.where(layer.mask(), 0), layer.bias), atol=1e-5)


def test_averaged_weights_of_the_scores_can_be_evaluated() -> None:
    model, x = small_net(), images()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for seed in range(2):
        model(x).square().sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        averaged.update_parameters(model)
    twin = copy.deepcopy(model)
    for ours, mean in zip(twin.parameters(), averaged.module.parameters(), strict=True):
        ours.data.copy_(mean)
    assert torch.equal(averaged.eval()(x), twin.eval()(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_takes_a_padding_mask_in_evaluation() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    encoder = convert(nn.TransformerEncoder(layer, 2), 0.3).eval()
    x, padding = torch.randn(3, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 2 + [True] * 3])
    phases = Phases(encoder)
    phases.start_task()
    phases.finish_task()
    with torch.no_grad():
        ours, plain = encoder(x, src_key_padding_mask=padding), phases.fold(0)(x, src_key_padding_mask=padding)
    assert torch.allclose(ours[~padding], plain[~padding], atol=1e-5)
