"""What a report tells of each task."""

import torch
from networks import stream
from torch import Tensor

from exssnet import Learner, PhaseOptions, convert
from exssnet.experiments.report import _entry
from exssnet.experiments.results import RunResult


class Ahead(torch.nn.Module):
    """Layers of which only the first two take part."""

    def __init__(self, layers: dict[str, torch.nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        first, second, *_ = self.children()
        out: Tensor = second(first(x))
        return out


def test_the_head_is_left_out_by_name_not_by_its_place() -> None:
    torch.manual_seed(0)
    layers = {"flat": torch.nn.Flatten(), "head": torch.nn.Linear(64, 4), "aside": torch.nn.Linear(1, 9)}
    learner = Learner(convert(Ahead(layers), 0.5), "supsup", mask=PhaseOptions(0), weight=PhaseOptions(0))
    learner.run(stream(1))
    for head, left in ((None, "aside"), ("aside", "head")):
        learner.head = head
        entry = _entry(learner.reports[0], RunResult.of(learner.accuracy, learner.reports, learner.head).tasks[0])
        assert entry["free_without_head"] == entry["layers"][left]["free"]
