"""Dense products of the weight phase: the masked weight stays in memory, its free values are written before each use.

The truth is the masked weight computed anew in each forward pass, as `Fixed.weight` does.
"""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from networks import SmallNet, images, small_net
from products import Calls
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from exssnet import Phases, SupermaskConv2d, SupermaskLinear, convert
from exssnet.nn import SupermaskLayer
from exssnet.nn.modes import Fixed

RULES = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Colours(nn.Module):
    """Convolutions of which only channels_last has another order of memory, and a head that may stay unused."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, groups=2)
        self.head, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))
        return y


def in_weight_phase(model: Callable[[], nn.Module] = Colours) -> Phases:
    """The second task's weight phase, with frozen and with free values in each layer."""
    torch.manual_seed(0)
    phases = Phases(convert(model(), 0.4, products="dense"))
    phases.start_task()
    phases.finish_task()
    phases.start_task()
    phases.start_weight_phase()
    return phases


def colours(layout: str = "contiguous") -> Tensor:
    return torch.randn(5, 3, 7, 6, generator=torch.Generator().manual_seed(1)).to(memory_format=RULES[layout])


@contextmanager
def anew() -> Iterator[None]:
    """Within the block, nothing stays in memory: each forward pass computes its masked weights anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fixed, "in_memory", lambda *_: None)
        yield


def trained(phases: Phases, step: Callable[[], Tensor], steps: int = 3) -> list[Tensor]:
    """The losses and gradients of some steps of SGD."""
    optimizer = torch.optim.SGD(phases.parameters(), 0.1, momentum=0.9)
    found: list[Tensor] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = step()
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in phases.parameters() if p.grad is not None)]
        optimizer.step()
    return found


def same_as_anew(step_of: Callable[[Phases], Callable[[], Tensor]], model: Callable[[], nn.Module] = Colours) -> None:
    phases = in_weight_phase(model)
    got = trained(phases, step_of(phases))
    with anew():
        phases = in_weight_phase(model)
        expected = trained(phases, step_of(phases))
    assert len(got) == len(expected) > 3
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=0)


def kept(phases: Phases) -> dict[str, Tensor]:
    """The weights in memory, by layer."""
    modes = {name: layer.mode for name, layer in phases.layers.items()}
    return {name: mode._memory[1].weight for name, mode in modes.items() if mode._memory is not None}


@pytest.mark.parametrize("layout", RULES)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_steps_are_bit_for_bit_those_with_weights_made_anew(layout: str, autocast: bool) -> None:
    def step_of(phases: Phases) -> Callable[[], Tensor]:
        def step() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return F.cross_entropy(phases.model(colours(layout)), torch.arange(5) % 4)

        return step

    same_as_anew(step_of)


def test_a_step_writes_and_gathers_the_values_of_all_layers_in_one_call_each() -> None:
    phases = in_weight_phase()
    trained(phases, lambda: phases.model(colours()).sum(), steps=1)
    with Calls() as calls:
        trained(phases, lambda: phases.model(colours()).sum(), steps=2)
    called = [(name, len(arguments[0])) for name, arguments in calls.made]
    assert called == [("write_values", 3), ("write_values_backward", 3)] * 2
    assert all(layer.mode.masked is None for layer in phases.layers.values())
    assert phases.layers["unused"].free_values.grad is None


@pytest.mark.parametrize("layout", RULES)
def test_weights_and_outputs_have_the_layout_of_the_input(layout: str) -> None:
    phases = in_weight_phase()
    for now in (layout, "contiguous", layout):
        x = phases.layers["first"](colours(now)), phases.model(colours(now))
        assert x[0].is_contiguous(memory_format=RULES[now])
        weights = kept(phases)
        assert weights["first"].is_contiguous(memory_format=RULES[now])
        assert weights["head"].is_contiguous()


@pytest.mark.parametrize("layout", RULES)
def test_weights_of_the_mask_phase_have_the_layout_of_the_input_too(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the masked weights of all layers may be written before a forward pass."""
    monkeypatch.setattr(SupermaskLayer, "_fused", lambda *_: False)
    model = convert(Colours(), 0.4, products="dense")
    given: dict[str, Tensor] = {}

    def product(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        given["w"] = weight
        return F.conv2d(x, weight, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(SupermaskConv2d, "dense_product", staticmethod(product))
    expected = model(colours())
    for _ in range(2):
        y = model(colours(layout))
        assert given["w"].is_contiguous(memory_format=RULES[layout])
        torch.testing.assert_close(y, expected)
    with Calls() as calls:
        model(colours(layout)).sum().backward()
    assert [len(a[0]) for name, a in calls.made if "weights" in name] == [3, 3]


def test_a_model_that_is_made_channels_last_keeps_scores_and_weights_contiguous() -> None:
    model = convert(Colours(), 0.4).to(memory_format=torch.channels_last)
    assert all(t.is_contiguous() for t in (model.first.dense_weight, model.first.scores))
    phases = Phases(model)
    phases.start_task()
    trained(phases, lambda: phases.model(colours("channels_last")).sum(), steps=1)


def test_several_forwards_and_an_evaluation_may_come_before_a_backward() -> None:
    def step_of(phases: Phases) -> Callable[[], Tensor]:
        def step() -> Tensor:
            first = phases.model(colours()).square().mean()
            with torch.no_grad():
                phases.model(colours("channels_last")[:2])
            with phases.using(0) as other:
                other(colours())
            alone = phases.layers["second"](torch.ones(1, 8, 4, 4)).mean()
            return first + phases.model(2 * colours()).sum() / 100 + alone  # type: ignore[no-any-return]

        return step

    same_as_anew(step_of)


def test_accumulated_gradients_are_those_of_one_batch() -> None:
    def step_of(phases: Phases) -> Callable[[], Tensor]:
        def step() -> Tensor:
            for _ in range(2):
                phases.model(colours()).square().mean().backward()
            return phases.model(colours()).mean()

        return step

    same_as_anew(step_of)


@pytest.mark.parametrize("whole", [False, True], ids=["inside", "whole-model"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activations_may_be_recomputed(whole: bool, reentrant: bool) -> None:
    class Checkpointed(Colours):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if whole else checkpoint(super().forward, x, use_reentrant=reentrant)

    def step_of(phases: Phases) -> Callable[[], Tensor]:
        def step() -> Tensor:
            x = colours().requires_grad_()
            y: Tensor = checkpoint(phases.model, x, use_reentrant=reentrant) if whole else phases.model(x)
            return y.square().mean()

        return step

    same_as_anew(step_of, Checkpointed)


def test_a_step_between_forward_and_backward_is_an_error_as_in_plain_pytorch() -> None:
    phases = in_weight_phase()
    trained(phases, lambda: phases.model(colours()).sum(), steps=1)
    loss = phases.model(colours()).sum()
    with torch.no_grad():
        for values in phases.masked_parameters():
            values.add_(1)
    phases.model(colours())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("training", [False, True])
def test_a_write_through_data_is_seen_by_the_next_forward(training: bool) -> None:
    phases = in_weight_phase()
    with torch.set_grad_enabled(training):
        phases.model(colours())
        for values in phases.masked_parameters():
            values.data.mul_(-2)
        got = phases.model(colours())
        with anew():
            assert torch.equal(got, phases.model(colours()))


def test_frozen_values_that_change_are_written_too() -> None:
    phases = in_weight_phase()
    phases.model(colours())
    for layer in phases.layers.values():
        assert layer.frozen_values is not None
        layer.frozen_values.add_(1)
    got = phases.model(colours())
    with anew():
        assert torch.equal(got, phases.model(colours()))


def test_functional_calls_have_the_gradients_of_their_own_tensors() -> None:
    phases = in_weight_phase()
    phases.model(colours())
    others = [{n: (k * p.detach()).requires_grad_() for n, p in phases.model.named_parameters()} for k in (1, 2)]

    def gradients() -> tuple[Tensor, ...]:
        ys = [torch.func.functional_call(phases.model, each, (colours(),)) for each in others]
        loss = sum(y.square().sum() for y in ys)
        leaves = [t for each in others for n, t in each.items() if "unused" not in n]
        return torch.autograd.grad(loss, leaves)  # type: ignore[arg-type]

    got = gradients()
    first = phases.layers["first"]
    assert first.mode._memory[1].values is first.free_values  # no tensor of a call stays, nor its graph
    with anew():
        assert all(map(torch.equal, got, gradients()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_and_second_derivatives_are_right() -> None:
    phases = in_weight_phase()
    names = [n for n, _ in phases.model.named_parameters() if "unused" not in n]

    def of(*values: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(phases.model, dict(zip(names, values, strict=True)), (colours(),))
        return y.square().sum()

    def found() -> list[Tensor]:
        values = [phases.model.get_parameter(n) for n in names]
        loss = phases.model(colours()).square().sum()
        gradients = torch.autograd.grad(loss, values, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), values)  # type: ignore[arg-type]
        tangents = tuple(torch.ones_like(v) for v in values)
        _, along = torch.func.jvp(of, tuple(v.detach() for v in values), tangents)
        each = torch.func.vmap(lambda x: phases.model(x.unsqueeze(0)))(colours())
        of_each = torch.autograd.grad(each.square().sum(), values)
        with forward_ad.dual_level():  # forward over reverse
            loss = phases.model(forward_ad.make_dual(colours(), colours())).square().sum()
            dual = torch.autograd.grad(loss, values)
            tangent = [forward_ad.unpack_dual(g).tangent for g in dual]
        return [*gradients, *second, along, *torch.func.grad(of, argnums=(0, 1))(*values), *of_each, *tangent]

    got = found()
    with anew():
        for ours, truth in zip(got, found(), strict=True):
            torch.testing.assert_close(ours, truth)


def test_parts_with_settings_of_their_own_have_their_gradients_and_keep_their_weights() -> None:
    """A part that enables gradients, and a head in float32 under autocast."""

    class Mixed(Colours):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                y = self.second(self.first(x).relu()).relu().mean((2, 3))
                with torch.autocast("cpu", enabled=False):
                    return self.head(y.float())  # type: ignore[no-any-return]

    phases = in_weight_phase(Mixed)
    found = []
    for _ in range(3):
        phases.model.zero_grad()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = phases.model(colours())
        y.sum().backward()
        assert phases.layers["first"].free_values.grad is not None
        found.append({name: id(w) for name, w in kept(phases).items()})
    assert {w.dtype for w in kept(phases).values()} == {torch.float32, torch.bfloat16}
    assert found[1] == found[2]


def test_a_mask_of_every_weight_takes_several_forwards_after_a_step() -> None:
    """The dense weight is then as large as the free values, and still another tensor."""
    layer = SupermaskLinear(6, 4, density=1.0)
    every, x = torch.ones(4, 6, dtype=torch.bool), torch.randn(3, 6)
    layer.products = "dense"
    layer.use_values(every, every)
    layer(x)
    with torch.no_grad():
        layer.free_values.mul_(2)
    first, second = layer(x), layer(x)
    (first + second).sum().backward()
    assert torch.equal(layer.free_values.grad.view(4, 6), 2 * x.sum(0).expand(4, 6))


def test_the_weight_read_from_a_layer_is_not_the_one_in_memory() -> None:
    phases = in_weight_phase()
    before = phases.model(colours())
    with torch.no_grad():
        weight = phases.layers["first"].weight
        phases.layers["first"]._read = None
        weight.zero_()
    assert torch.equal(phases.model(colours()), before)


def test_copies_and_files_hold_no_weight_and_state_dicts_neither() -> None:
    phases = in_weight_phase()
    expected, names = phases.model(colours()), set(phases.model.state_dict())
    for twin in (copy.deepcopy(phases.model), pickle.loads(pickle.dumps(phases.model))):
        assert twin.first.mode._memory is None
        assert set(twin.state_dict()) == names
        assert torch.equal(twin(colours()), expected)
        with torch.no_grad():
            twin.first.free_values.zero_()
        twin(colours())
        assert torch.equal(phases.model(colours()), expected)


def test_the_memory_is_freed_when_the_layer_moves_and_when_its_task_ends() -> None:
    phases = in_weight_phase()
    phases.model(colours())
    addresses = {name: w.data_ptr() for name, w in kept(phases).items()}
    phases.model.float()  # nothing moves: a CUDA graph may hold the addresses
    assert {name: w.data_ptr() for name, w in kept(phases).items()} == addresses
    phases.model.double()
    assert kept(phases) == {}
    phases.model(colours().double()).sum().backward()
    assert {w.dtype for w in kept(phases).values()} == {torch.float64}
    phases.model.float()
    phases.model(colours())
    dying = [weakref.ref(w) for w in kept(phases).values()]
    phases.finish_task()
    gc.collect()
    assert [ref() for ref in dying] == [None] * 3


def test_evaluation_makes_each_weight_once_and_keeps_those_of_the_active_task_alone() -> None:
    phases = in_weight_phase()
    phases.finish_task()
    phases.model(colours())
    weights = {name: id(w) for name, w in kept(phases).items()}
    phases.model.eval()
    with Calls() as calls, torch.no_grad():
        for _ in range(2):
            phases.model(colours())
    assert calls.made == []
    assert {name: id(w) for name, w in kept(phases).items()} == weights
    with phases.using(0):
        phases.model(colours())
        dying = [weakref.ref(w) for w in kept(phases).values()]
    gc.collect()
    assert [ref() for ref in dying] == [None] * 3
    assert {name: id(w) for name, w in kept(phases).items()} == weights


def test_a_replica_multiplies_by_its_own_values() -> None:
    """A replica of `nn.DataParallel` has copies of the parameters as attributes, which are no parameters."""
    phases = in_weight_phase()
    layer = phases.layers["head"]
    x = torch.randn(4, 6)
    layer(x)
    replica = layer._replicate_for_data_parallel()
    values = layer.free_values.detach().clone().requires_grad_()
    replica._parameters.update(scores=None, bias=layer.bias)
    replica.free_values = 2 * values  # type: ignore[assignment]
    replica(x).sum().backward()
    assert values.grad is not None
    with torch.no_grad():
        layer.free_values.mul_(2)
        assert torch.equal(layer(x), replica(x))


@pytest.mark.parametrize("products", ["dense", "sparse"])
def test_a_layer_in_inference_mode_first_can_train_afterwards(products: str) -> None:
    model = small_net(products=products)
    phases = Phases(model)
    phases.start_task()
    phases.start_weight_phase()
    with torch.inference_mode():
        expected = model(images())
    got = model(images())
    got.sum().backward()
    assert isinstance(model, SmallNet)
    assert torch.equal(got, expected)
