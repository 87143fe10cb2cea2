"""MaskBank: unions, overlaps and capacity on masks worked out by hand."""

import pytest
import torch
from torch import Tensor

from exssnet.continual.mask_bank import MaskBank


def _mask(text: str) -> Tensor:
    return torch.tensor([c == "x" for c in text]).reshape(2, -1)


@pytest.fixture
def bank() -> MaskBank:
    bank = MaskBank({"a": torch.Size([2, 6])})
    for text in ("xxx.........", ".xxx........", "xxxx....x..."):
        bank.add({"a": _mask(text)})
    return bank


def test_masks_come_back(bank: MaskBank) -> None:
    assert torch.equal(bank.mask(1, "a"), _mask(".xxx........"))


def test_overlap_and_capacity(bank: MaskBank) -> None:
    use = [bank.use[t]["a"] for t in range(3)]
    assert [(u.kept, u.free, u.used) for u in use] == [(3, 3, 3), (3, 1, 4), (5, 1, 5)]
    assert use[1].sparse_overlap == pytest.approx(2 / 3)
    assert use[1].total_overlap == pytest.approx(2 / 12)
    assert use[2].capacity == pytest.approx(5 / 12)


def test_free_excludes_all_earlier_masks(bank: MaskBank) -> None:
    assert torch.equal(bank.free("a", _mask("xx..xx......")), _mask("....xx......"))


def test_totals_add_layers_up() -> None:
    bank = MaskBank({"a": torch.Size([2, 6]), "b": torch.Size([2, 2])})
    bank.add({"a": _mask("xxx........."), "b": _mask("x..x")})
    total = bank.total(0)
    assert (total.weights, total.kept, total.free, total.used) == (16, 5, 5, 5)
    assert bank.total(0, ["b"]).kept == 2


def test_a_mask_takes_one_bit_a_weight() -> None:
    bank = MaskBank({"a": torch.Size([1000, 80])})
    for _ in range(3):
        bank.add({"a": torch.rand(1000, 80) < 0.1})
    assert bank.nbytes == (3 + 1) * 10_000


@pytest.mark.parametrize(
    ("masks", "sentence"),
    [
        ({"b": torch.zeros(2, 6, dtype=torch.bool)}, r"expected masks of the layers \['a'\], got those of \['b'\]"),
        ({"a": torch.zeros(5, 5, dtype=torch.bool)}, "layer a has 12 weights, got a mask of 25 entries"),
    ],
)
def test_wrong_masks_are_refused_and_change_nothing(bank: MaskBank, masks: dict[str, Tensor], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        bank.add(masks)
    assert len(bank) == 3
    assert bank.use[2]["a"].used == 5


def test_a_mask_refused_in_a_later_layer_leaves_the_union_of_earlier_layers() -> None:
    bank = MaskBank({"a": torch.Size([2, 6]), "b": torch.Size([2, 2])})
    bank.add({"a": _mask("xxx........."), "b": _mask("x..x")})
    with pytest.raises(ValueError, match="layer b has 4 weights"):
        bank.add({"a": _mask("...xxx......"), "b": torch.zeros(50, dtype=torch.bool)})
    assert torch.equal(bank.free("a", _mask("...xxx......")), _mask("...xxx......"))
    assert len(bank) == 1
