"""Arguments from which the operators' tests make wrong ones, and the check of the sentence that refuses them."""

import re
from collections.abc import Callable

import pytest
import torch

X = torch.zeros(3, 5)
W = torch.zeros(4, 5)
M = torch.ones(4, 5, dtype=torch.bool)
IMAGES = torch.zeros(2, 4, 6, 6)
KERNELS = torch.zeros(8, 4, 3, 3)
LINES = torch.zeros(2, 4, 9)
TAPS = torch.zeros(8, 4, 3)
ROW = torch.tensor([0, 0])
VALUES, NONE = torch.zeros(20), torch.zeros(0)
FAR = torch.zeros(4, 5, device="meta")
RAW = torch.ops.exssnet
STEPS = [1, 1], [0, 0], [1, 1]
Calls = dict[str, Callable[[], object]]


def short(sentence: str) -> str:
    return sentence[:60]


def check_refusal(sentence: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        call()
