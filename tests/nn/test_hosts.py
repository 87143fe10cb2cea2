"""Tensors of any module with a mask: what the zoo does not show."""

import copy
import pickle

import pytest
import torch
from learning import learn
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from zoo import Kinds

from exssnet import Phases, convert, summary
from exssnet.continual.task_inference import TaskInference
from exssnet.nn import SupermaskLinear, evaluation, plain_state_dict, supermask_layers, unconvert

TOKENS = torch.arange(35).view(5, 7) % 19 + 1


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 20, bias=False))
    model[3].weight = model[0].weight
    return model


def answer(phases: Phases, task: int) -> Tensor:
    with phases.using(task) as model, evaluation(model):
        out: Tensor = model(TOKENS)
    return out


class Checkpointed(nn.Module):
    """Attention and a recurrent layer, which a checkpoint may compute again in the backward pass."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.again, self.table, self.head = again, nn.Embedding(20, 8), nn.Linear(6, 3)
        self.layers = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.GRU(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        x = checkpoint(self.layers, x, use_reentrant=False)[0] if self.again else self.layers(x)[0]
        out: Tensor = self.head(x)
        return out


def test_a_checkpoint_recomputes_the_masked_tensors() -> None:
    models = [convert(Checkpointed(again), 0.4) for again in (False, True)]
    phases = [Phases(model, seed=1) for model in models]
    for phase in ("mask", "weight"):
        for each in phases:
            each.start_task() if phase == "mask" else each.start_weight_phase()
            each.model(TOKENS).square().mean().backward()
        plain, recomputed = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in models)
        assert len(plain) > 10
        assert plain.keys() == recomputed.keys()
        assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_tied_tensors_have_one_mask_and_stay_tied() -> None:
    phases = Phases(convert(tied(), 0.5))
    assert set(phases.layers) == {"0.weight", "1", "2"}
    learn(phases, TOKENS)
    before = answer(phases, 0)
    learn(phases, TOKENS)
    assert torch.equal(answer(phases, 0), before)
    plain = phases.fold(0)
    assert plain[3].weight is plain[0].weight
    assert torch.equal(plain[0].weight, phases.layers["0.weight"].dense_weight * phases.bank.mask(0, "0.weight"))
    other = tied()
    phases.activate(0)
    other.load_state_dict(plain_state_dict(phases.model))
    torch.testing.assert_close(other.eval()(TOKENS), before)


def test_tied_tensors_can_be_excluded_but_only_together() -> None:
    assert [name for name, _ in supermask_layers(convert(tied(), exclude="tied"))] == ["1", "2"]
    model = tied()
    with pytest.raises(ValueError, match=r"convert: 0\.weight and 3\.weight are one tensor, and 3\.weight is not"):
        convert(model, exclude="3")
    assert type(model[0]) is nn.Embedding


def test_task_inference_mixes_tied_tensors_as_one() -> None:
    phases = Phases(convert(tied(), 0.5))
    tasks = [learn(phases, TOKENS), learn(phases, TOKENS)]
    inference = TaskInference(phases)
    assert [len(places) for places in inference._places.values()] == [2, 1, 1]
    assert inference.infer(TOKENS) in tasks


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_nothing_is_forgotten_in_another_dtype(dtype: torch.dtype) -> None:
    phases = Phases(convert(Kinds().to(dtype), 0.5))
    learn(phases, TOKENS)
    before = answer(phases, 0)
    learn(phases, TOKENS)
    assert torch.equal(answer(phases, 0), before)
    assert before.dtype == dtype
    assert not torch.equal(answer(phases, 1), before)


def test_copies_and_pickles_are_independent_and_answer_alike() -> None:
    phases = Phases(convert(Kinds(), 0.5))
    learn(phases, TOKENS)
    for other in (copy.deepcopy(phases.model), pickle.loads(pickle.dumps(phases.model))):
        with evaluation(other):
            assert torch.equal(other(TOKENS), answer(phases, 0))
        assert other.rnn._modules["weight_ih_l0"] is not phases.model.rnn._modules["weight_ih_l0"]
        unconvert(other)
        assert [type(m) for m in other.modules()] == [type(m) for m in Kinds().modules()]


@pytest.mark.parametrize("root", [nn.LSTM(4, 3), nn.MultiheadAttention(4, 2), nn.Embedding(20, 3)])
def test_a_module_can_be_converted_by_itself(root: nn.Module) -> None:
    kind, names = type(root), [n for n, _ in root.named_parameters()]
    model = copy.deepcopy(convert(copy.deepcopy(root), 0.5))
    assert isinstance(model, kind)
    unconvert(model)
    assert type(model) is kind
    assert [n for n, _ in model.named_parameters()] == names


def test_a_host_takes_plain_weights_before_the_first_task_alone() -> None:
    phases, plain = Phases(convert(Kinds(), 0.5)), Kinds()
    phases.model.load_state_dict(plain.state_dict())
    assert torch.equal(phases.layers["rnn.weight_hh_l1"].dense_weight, plain.rnn.weight_hh_l1)
    learn(phases, TOKENS)
    before = answer(phases, 0)
    for module, state in (
        (phases.model, phases.model.state_dict() | {"rnn.weight_hh_l1": plain.rnn.weight_hh_l1}),
        (phases.model.rnn, plain.rnn.state_dict()),
        (phases.model.tied, {"weight": plain.tied.weight}),
    ):
        with pytest.raises(RuntimeError, match="plain weights does not fit a model whose Phases has 1 tasks finished"):
            module.load_state_dict(state, strict=False)
    assert torch.equal(answer(phases, 0), before)


def test_a_parametrized_weight_keeps_its_value_and_its_kernels() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4)), parametrizations.orthogonal(nn.Linear(4, 4)))
    weights = [layer.weight.detach().clone() for layer in model]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, 0.5)
    for layer, weight in zip(model, weights, strict=True):
        assert type(layer) is SupermaskLinear
        assert torch.equal(layer.dense_weight, weight)
    model(torch.ones(2, 6)).sum().backward()
    with pytest.raises(RuntimeError, match="weights of a model from before convert"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"include": "attention.*_proj_weight"}, ["attention." + k + "_proj_weight" for k in "qkv"]),
        ({"include": ["attention"]}, ["attention." + k + "_proj_weight" for k in "qkv"]),
        ({"include": ["*.bias_k", "head"]}, ["attention.bias_k", "head"]),
        ({"include": [nn.Conv2d], "exclude": "*.none_of_these"}, None),
        ({"include": [nn.Conv2d]}, ["scaled.weight"]),
        ({"include": nn.RNNBase.__name__, "exclude": ["tied"]}, None),
    ],
)
def test_tensors_are_chosen_by_name_and_by_type(options: dict, names: list[str] | None) -> None:
    model = Kinds()
    if names is None:
        with pytest.raises(ValueError, match=r"pattern .* matches no layer"):
            convert(model, 0.5, **options)
    else:
        convert(model, 0.5, **options)
        assert [name for name, _ in supermask_layers(model)] == names


def test_a_host_reads_one_tensor_in_all_accesses_of_a_forward_pass() -> None:
    seen = []

    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.weight, self.weight))
            return super().forward(x)

    model = convert(nn.Sequential(Twice(6, 4)), 0.5)
    for _ in range(2):
        model(torch.ones(2, 6))
    assert seen[1][0] is seen[1][1]  # the first pass learns that a tensor is wanted


def test_signed_constants_count_the_inputs_and_spare_embeddings() -> None:
    model = convert(nn.Sequential(nn.Embedding(20, 5), nn.ConvTranspose1d(5, 3, 2)), 0.5, weights="signed_constant")
    assert model[0]._modules["weight"].dense_weight.unique().numel() == 100
    constant = model[1]._modules["weight"].dense_weight.abs().unique()
    assert torch.allclose(constant, torch.tensor([(2 / (5 * 2)) ** 0.5]))


def test_the_summary_tells_a_host_from_its_tensors() -> None:
    rows = {row.name: (row.type, row.kind) for row in summary(convert(nn.Sequential(nn.LSTM(4, 3)))).rows}
    assert rows["0"] == ("LSTM", "per task")
    assert rows["0.weight_ih_l0"] == ("SupermaskWeight", "masked")
