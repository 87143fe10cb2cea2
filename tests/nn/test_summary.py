"""What `convert` takes and passes over: said by `summary`, a warning, or an error."""

import pytest
import torch
from networks import SmallNet, images
from torch import Tensor, nn
from torch.nn.utils import prune

from exssnet import Phases, convert, summary


class Mixed(nn.Module):
    """Layers of every kind that convert passes over."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral = nn.utils.spectral_norm(nn.Linear(8, 8))
        self.pruned = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = self.recurrent(self.attention(x, x, x)[0])[0]
        out: Tensor = self.head(self.frozen(self.pruned(self.spectral(self.normed(x)))).mean(1))
        return out


def _mixed(**options: object) -> nn.Module:
    with pytest.warns(UserWarning, match="masks cover"):
        return convert(Mixed(), 0.3, **options)  # type: ignore[arg-type]


def test_each_layer_without_a_mask_is_told_with_the_reason() -> None:
    model = _mixed(exclude=["normed*"])
    reasons = {row.name: (row.kind, row.why) for row in summary(model).rows}
    assert reasons["head"] == ("per task", "a bias")
    assert reasons["embedding"] == ("per task", "Embedding has no masked form")
    assert reasons["attention"] == ("per task", "MultiheadAttention has no masked form")
    assert reasons["attention.out_proj"] == ("per task", "NonDynamicallyQuantizableLinear is a subclass")
    assert reasons["recurrent"] == ("per task", "LSTM has no masked form")
    assert reasons["normed"] == ("per task", "ParametrizedLinear is a subclass")
    assert reasons["pruned"] == ("per task", "its weight is computed (weight_norm, prune, ...)")
    assert reasons["spectral"] == reasons["pruned"]
    assert reasons["frozen"] == ("frozen", "its weight requires no gradient")


def test_the_numbers_are_those_of_the_tasks_that_are_kept() -> None:
    model = convert(SmallNet(), 0.3)
    told = summary(model)
    assert {r.name: (r.parameters, r.kept) for r in told.rows if r.kind == "masked"} == {
        "conv": (72, 22), "grouped": (288, 87), "head": (128, 39),
    }  # fmt: skip
    phases = Phases(model, keep_scores=None)
    phases.start_task()
    model.train()(images())
    with torch.no_grad():
        for p in phases.task_parameters():
            p.add_(1)
    phases.finish_task()
    masks = sum(phases.bank.packed(0, name).nbytes for name in phases.layers)
    assert told.bytes_per_task == masks + sum(t.nbytes for t in phases.states[0].values())
    own = sum(p.numel() for p in phases.task_parameters())
    assert sum(r.parameters for r in told.rows if r.kind == "per task") == own


def test_a_mask_takes_whole_bytes() -> None:
    (masked,) = (row for row in summary(convert(nn.Linear(3, 3, bias=False), 1.0)).rows if row.kind == "masked")
    assert masked.bytes_per_task == 2


def test_the_table_is_text() -> None:
    lines = str(summary(convert(SmallNet().requires_grad_(True), 0.3))).splitlines()
    assert lines[0].split()[:6] == ["name", "type", "kind", "parameters", "kept", "bytes"]
    assert lines[1].split() == ["conv", "SupermaskConv2d", "masked", "72", "22", "9"]
    assert lines[-2].split() == ["all", "masked", "488", "148", "61"]


def test_a_model_that_was_not_converted_is_refused() -> None:
    with pytest.raises(ValueError, match="summary: the model has no supermask layers"):
        summary(SmallNet())


def test_the_warning_names_the_largest_copies() -> None:
    told = r"masks cover \d+ % of the parameters that train; every task keeps a dense copy of the others, .* MB: LSTM"
    with pytest.warns(UserWarning, match=told):
        convert(Mixed(), 0.3)


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_of_what_was_excluded_or_frozen_or_is_small() -> None:
    convert(SmallNet(), 0.3, include=[nn.Linear])
    convert(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(64)), 0.5)
    convert(nn.Sequential(nn.Embedding(100, 8).requires_grad_(False), nn.Linear(8, 2)), 0.5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"include": ["conv", "haed"]},
            r"include pattern 'haed' matches no layer \(the layers are conv, grouped,",
        ),
        (
            {"exclude": ["head", "norms"]},
            r"exclude pattern 'norms' matches no layer \(the layers are conv, norm,",
        ),
        ({"include": ["norm"]}, r"include pattern 'norm' matches no layer \(norm: a norm\)"),
        ({"exclude": ["*"]}, r"no nn.Linear, nn.Conv1d or nn.Conv2d layer to mask: conv: excluded; norm: a norm;"),
        ({"include": [nn.Embedding]}, r"layer to mask: conv: not included;"),
    ],
)
def test_patterns_that_match_nothing_are_refused_and_change_nothing(options: dict, sentence: str) -> None:
    model = SmallNet()
    with pytest.raises(ValueError, match=sentence):
        convert(model, 0.3, **options)
    assert type(model.conv) is nn.Conv2d


def test_a_layer_whose_weight_requires_no_gradient_stays_as_it_is() -> None:
    model = SmallNet()
    model.conv.weight.requires_grad_(False)
    weight = model.conv.weight
    phases = Phases(convert(model, 0.3))
    assert set(phases.layers) == {"grouped", "head"}
    assert "conv.weight" in phases.frozen_parameters()
    assert model.conv.weight is weight
    with pytest.raises(ValueError, match="layer to mask: conv: its weight requires no gradient"):
        convert(SmallNet().requires_grad_(False), 0.3)
    frozen = SmallNet()
    frozen.conv.requires_grad_(False)
    with pytest.raises(ValueError, match=r"include pattern 'conv' .* \(conv: its weight requires no gradient\)"):
        convert(frozen, 0.3, include=["conv", "head"])


def test_a_tied_layer_is_named_with_what_else_there_is() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are one tensor; 0: Embedding has no masked form"):
        convert(model)


def test_phases_say_where_they_are() -> None:
    phases = Phases(convert(SmallNet(), 0.3))
    assert repr(phases) == "Phases(SmallNet: 3 layers, 0 tasks finished, idle phase)"
    phases.start_task()
    assert repr(phases) == "Phases(SmallNet: 3 layers, 0 tasks finished, mask phase, task 0 open)"
    phases.finish_task()
    assert repr(phases) == (
        "Phases(SmallNet: 3 layers, 1 tasks finished, 30.3 % of 488 weights used, idle phase, task 0 active)"
    )
