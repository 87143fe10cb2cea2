"""A layer's mode: its tensors are registered on the layer while it is there, and the mode's own otherwise."""

import copy

import pytest
import torch
from torch import nn

from exssnet import Phases, SupermaskConv2d, SupermaskLinear, convert
from exssnet.nn.modes import Fixed, Mode, NoMask, Scores, Values

REGISTERED = {
    "scores": {"scores"},
    "values": {"free_values", "packed_mask", "packed_free_mask"},
    "fixed": {"packed_mask", "packed_free_mask"},
    "none": set(),
}


def mode_of(layer: SupermaskLinear, kind: str) -> Mode:
    mask = torch.arange(layer.dense_weight.numel()).reshape(layer.dense_weight.shape) % 3 == 0
    if kind == "scores":
        return Scores(layer, torch.randn(layer.dense_weight.shape))
    if kind == "none":
        return NoMask()
    return Values(layer, mask, mask) if kind == "values" else Fixed(layer, mask, torch.zeros_like(mask))


@pytest.mark.parametrize("kind", REGISTERED)
def test_a_layer_has_the_tensors_of_its_mode_alone(kind: str) -> None:
    layer = SupermaskLinear(7, 5, density=0.3)
    layer.mode = mode_of(layer, kind)
    assert set(layer.state_dict()) == {"dense_weight", "kept", *REGISTERED[kind]}


@pytest.mark.parametrize("other", REGISTERED)
@pytest.mark.parametrize("kind", REGISTERED)
def test_a_mode_comes_back_with_the_same_tensors(kind: str, other: str) -> None:
    layer = SupermaskLinear(7, 5, density=0.3)
    layer.mode = mode = mode_of(layer, kind)
    before = {**layer._parameters, **layer._buffers}
    layer.mode = mode_of(layer, other)
    layer.mode = mode
    after = {**layer._parameters, **layer._buffers}
    assert all(after[name] is tensor for name, tensor in before.items())
    assert layer.mode is mode


def test_a_mode_serves_one_layer() -> None:
    layer, other = SupermaskLinear(7, 5), SupermaskLinear(7, 5)
    before = layer.scores
    with pytest.raises(ValueError, match="this Scores is the mode of another layer"):
        layer.mode = other.mode
    assert layer.scores is before
    layer.mode = layer.mode
    assert layer.scores is before


@pytest.mark.parametrize("kind", ["scores", "values", "fixed"])
def test_a_mode_that_was_made_for_another_layer_is_refused(kind: str) -> None:
    layer, other = SupermaskLinear(7, 5, density=0.3), SupermaskLinear(7, 5, density=0.3)
    before = layer.mode
    with pytest.raises(ValueError, match="is the mode of another layer; a mode serves one layer"):
        layer.mode = mode_of(other, kind)
    assert layer.mode is before


def test_a_mode_of_a_copy_comes_back_to_the_copy_alone() -> None:
    layer = SupermaskLinear(7, 5, density=0.3)
    twin = copy.deepcopy(layer)
    left, twin.mode = twin.mode, NoMask()
    with pytest.raises(ValueError, match="of another layer"):
        layer.mode = left
    twin.mode = left
    assert twin.scores is not None


@pytest.mark.parametrize("wrong", [None, "scores", Scores])
def test_what_is_no_mode_is_refused(wrong: object) -> None:
    layer = SupermaskLinear(7, 5)
    before = layer.mode
    with pytest.raises(ValueError, match=r"^mode: must be one of exssnet\.nn\.modes, got "):
        layer.mode = wrong  # type: ignore[assignment]
    assert layer.mode is before


@pytest.mark.parametrize("kind", ["scores", "values", "fixed"])
def test_a_copy_has_a_mode_of_its_own(kind: str) -> None:
    layer, x = SupermaskConv2d(2, 3, 3, density=0.3), torch.randn(2, 2, 6, 6)
    layer.mode = mode_of(layer, kind)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    twin.mode = NoMask()
    assert torch.equal(layer(x), expected)
    with pytest.raises(RuntimeError, match="neither scores nor a mask"):
        twin(x)


def test_a_replica_takes_no_selection_of_the_original() -> None:
    """A replica of `nn.DataParallel` may be on another device."""
    layer = SupermaskLinear(7, 5)
    replica = layer._replicate_for_data_parallel()
    assert isinstance(layer.mode, Scores)
    layer.mode.selection = torch.zeros(5)
    assert replica.mode.selection is None


def test_a_block_of_using_swaps_the_modes_and_leaves_them_alone() -> None:
    phases = Phases(convert(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), 0.4))
    phases.start_task()
    phases.finish_task()
    phases.start_task()
    modes = {name: layer.mode for name, layer in phases.layers.items()}
    with phases.using(0):
        assert all(isinstance(layer.mode, Fixed) for layer in phases.layers.values())
        assert all(mode.tensors is not None for mode in modes.values())
    assert all(layer.mode is modes[name] for name, layer in phases.layers.items())


def test_a_layer_shows_its_mode() -> None:
    layer = SupermaskLinear(4, 3, density=0.5)
    mask, nothing, shown = layer.mask(), torch.zeros(3, 4, dtype=torch.bool), [repr(layer)]
    for free in (mask, nothing):
        layer.use_values(mask, free)
        shown.append(repr(layer))
    layer.mode = NoMask()
    shown.append(repr(layer))
    endings = "scores", "values", "fixed mask", "no mask"
    assert [text.partition("k=")[2] for text in shown] == [f"6 of 12, {ending})" for ending in endings]
