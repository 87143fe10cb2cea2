"""Training and switching tasks over and over takes no more memory; any number of threads gives the same bits."""

import gc
import os
import platform
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from exssnet import Phases, convert
from exssnet.nn.models import LeNet300100, ResNet18


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensors() -> int:
    """Bytes of all tensors that are alive, each storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and not thing.is_sparse:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def steps(phases: Phases, count: int) -> None:
    optimizer = torch.optim.Adam(phases.parameters(), 1e-3)
    for step in range(count):
        x, y = torch.randn(16, 784), torch.arange(16) % 10
        optimizer.zero_grad()
        F.cross_entropy(phases.model(x), y).backward()
        optimizer.step()
        if step % 10 == 0 and len(phases.bank):
            with phases.using(0) as model, torch.no_grad():
                model(x)


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_300_steps_in_both_phases_and_changes_of_task_take_no_more_memory() -> None:
    phases = Phases(convert(LeNet300100(784, 10), 0.1), keep_scores=None)
    phases.start_task()
    phases.finish_task()

    def turn() -> None:
        phases.start_task()
        steps(phases, 30)
        phases.start_weight_phase()
        steps(phases, 30)
        phases.abandon_task()
        phases.activate(0)

    turn()
    turn()
    before = tensors(), resident()
    for _ in range(5):
        turn()
    after = tensors(), resident()
    assert after[0] == before[0]
    assert after[1] - before[1] < 8 << 20  # 300 steps that each lost their 1 MB of scores would lose 300 MB


NETWORKS = {
    "lenet-300-100": (lambda: LeNet300100(784, 10), (32, 784)),
    "resnet18": (lambda: ResNet18(10, 8), (20, 3, 16, 16)),
}


def trained(name: str, threads: int) -> dict[str, torch.Tensor]:
    """Masks, and logits and gradients of the weight phase and of evaluation."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    phases, x = Phases(convert(build(), 0.1, products="sparse")), torch.randn(shape)
    phases.start_task()
    found = {f"mask of {name}": layer.mask() for name, layer in phases.layers.items()}
    phases.start_weight_phase()
    logits = phases.model(x)
    logits.square().sum().backward()
    found |= {f"gradient {i}": p.grad for i, p in enumerate(phases.parameters()) if p.grad is not None}
    phases.finish_task()
    phases.model.eval()
    with torch.no_grad():
        return found | {"logits": logits, "logits in evaluation": phases.model(x)}


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", ["lenet-300-100", "resnet18"])
@pytest.mark.usefixtures("native")
def test_masks_and_sparse_products_are_the_same_bits_with(name: str, threads: int) -> None:
    one, more = trained(name, 1), trained(name, threads)
    assert [key for key in one if not torch.equal(one[key], more[key])] == []
