"""Arguments from which the operators' tests make wrong ones, and the tests that they are refused."""

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


def refused(sentences: Calls) -> Callable[[str], None]:
    """A test that each call raises ValueError with its sentence."""

    @pytest.mark.parametrize("sentence", sentences, ids=lambda sentence: sentence[:60])
    def test(sentence: str) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            sentences[sentence]()

    return test


def guarded(calls: Calls) -> Callable[[str], None]:
    """A test that native kernels raise RuntimeError instead of touching memory that is not theirs."""

    @pytest.mark.usefixtures("native")
    @pytest.mark.parametrize("what", calls)
    def test(what: str) -> None:
        with pytest.raises(RuntimeError):
            calls[what]()

    return test
