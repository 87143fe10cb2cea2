"""Counts what a training step dispatches, beside the plain network: the host pays for each dispatch, also on a GPU.

A step is forward, loss and backward, without the optimizer; in inference a forward pass. Counted is each operator
below autograd, views included. An operator of exssnet counts once, as where a kernel serves it. What a CPU has no
kernels for runs on device "meta", where layers choose as on a GPU. `PYTHONPATH=tests/helpers python
tests/nn/test_dispatches.py --table` prints the counts as Markdown.
"""

import functools
import os
import sys
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from exssnet import Phases, convert
from exssnet.nn.models import ResNet18

WAYS = {
    "sparse": {"EXSSNET_PRODUCTS": "sparse", "EXSSNET_MASKING": "auto"},
    "fused": {"EXSSNET_PRODUCTS": "dense", "EXSSNET_MASKING": "fused"},
    "written": {"EXSSNET_PRODUCTS": "dense", "EXSSNET_MASKING": "written"},
}
PHASES = ("mask", "weight", "inference")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CASES = [(phase, way, "contiguous") for phase in PHASES for way in WAYS]
CASES += [("weight", "written", "channels_last")]
ON_META = {("mask", "written"), ("weight", "fused"), ("inference", "fused")}


class Dispatches(TorchDispatchMode):
    """Counts operators, and among them the views, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [r.alias_info for r in func._schema.returns]
        self.operators[str(func)] += 1
        self.views += any(alias is not None and not alias.is_write for alias in aliases)
        return func(*args, **(kwargs or {}))


def network(phase: str) -> nn.Module:
    """ResNet-18 of width 4, plain or in a phase."""
    torch.manual_seed(0)
    model: nn.Module = ResNet18(classes=5, width=4)
    if phase != "plain":
        phases = Phases(convert(model, 0.05))
        phases.start_task()
        if phase != "mask":
            phases.start_weight_phase()
        if phase == "inference":
            phases.finish_task()
    return model


@functools.cache
def counted(phase: str, way: str, device: str, layout: str, *, inference: bool) -> Dispatches:
    """The dispatches of a step, after another that chooses kernels and fills caches."""
    model = network(phase).to(device, memory_format=LAYOUTS[layout]).train(not inference)
    images = torch.randn(2, 3, 8, 8).to(device, memory_format=LAYOUTS[layout])
    labels = torch.zeros(2, dtype=torch.int64, device=device)

    def step() -> None:
        model.zero_grad()
        with torch.set_grad_enabled(not inference):
            loss = F.cross_entropy(model(images), labels)
        if not inference:
            loss.backward()

    with mock.patch.dict(os.environ, WAYS[way]):
        step()
        with Dispatches() as found:
            step()
    return found


def beside_plain(phase: str, way: str, layout: str) -> tuple[Dispatches, Dispatches]:
    """The dispatches of a phase, and those of the plain network."""
    where = "meta" if (phase, way) in ON_META else "cpu", layout
    inference = phase == "inference"
    return counted(phase, way, *where, inference=inference), counted("plain", "sparse", *where, inference=inference)


@pytest.mark.parametrize(("phase", "way", "layout"), CASES)
def test_a_step_dispatches_at_most_ten_and_a_tenth_more_than_the_plain_network(
    phase: str, way: str, layout: str
) -> None:
    ours, plain = beside_plain(phase, way, layout)
    assert ours.operators.total() <= 1.1 * plain.operators.total() + 10, ours.operators - plain.operators


def test_written_products_of_the_weight_phase_dispatch_two_operators_more_than_the_plain_network() -> None:
    ours, plain = beside_plain("weight", "written", "contiguous")
    assert ours.operators.total() - ours.views == plain.operators.total() - plain.views + 2


def table() -> None:
    print("| phase | products | layout | dispatches, and of these views | plain network |")
    print("|---|---|---|---|---|")
    for phase, way, layout in CASES:
        counts = (f"{found.operators.total()} ({found.views})" for found in beside_plain(phase, way, layout))
        print("|", " | ".join((phase, way, layout, *counts)), "|")


if __name__ == "__main__":
    if sys.argv[1:] != ["--table"]:
        raise SystemExit("usage: PYTHONPATH=tests/helpers python tests/nn/test_dispatches.py --table")
    table()
