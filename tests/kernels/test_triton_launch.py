"""Launches of autotuned kernels: the autotuner is met once for each kind of launch, and never during a capture."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from exssnet.kernels import triton_product


class Kernel:
    """A kernel with two configurations, of which the second is the faster one; notes what was launched how."""

    arg_names = ("source", "size")

    def __init__(self) -> None:
        self.launched: list[Any] = []
        self.fn = SimpleNamespace(run=lambda *_, **how: self.launched.append(("directly", how)))
        self.configs = [SimpleNamespace(all_kwargs=lambda block=block: {"BLOCK": block}) for block in (16, 32)]

    def prune_configs(self, constants: dict[str, Any]) -> list[Any]:
        assert set(self.nargs) == set(self.arg_names)  # what pruning looks at
        return self.configs

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def tune(*_: Any, **__: Any) -> None:
            self.best_config = self.configs[1]
            self.launched.append("tuned")

        return tune


class Source(SimpleNamespace):
    is_cuda = True
    dtype = torch.float32


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(triton_product, "_configurations", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return Kernel()


def launch(kernel: Kernel, source: Any = Source, size: int = 3, constant: bool = True) -> Any:
    triton_product._launch(kernel, (size,), lambda c: (100 // c["BLOCK"],), source, size, CONSTANT=constant)
    return kernel.launched.pop()


def directly(block: int) -> Any:
    return "directly", {"grid": (100 // block,), "warmup": False, "CONSTANT": True, "BLOCK": block}


def test_a_kind_of_launch_is_tuned_once(kernel: Kernel) -> None:
    assert [launch(kernel) for _ in range(3)] == ["tuned", directly(32), directly(32)]
    others = {"source": Source(dtype=torch.bfloat16)}, {"size": 4}, {"constant": False}
    assert [launch(kernel, **other) for other in others] == ["tuned"] * 3
    assert launch(Kernel()) == "tuned"
    assert launch(kernel) == directly(32)


def test_a_graph_that_is_captured_takes_what_is_known_and_tunes_nothing(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel
) -> None:
    launch(kernel, size=4)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert [launch(kernel), launch(kernel, size=4)] == [directly(16), directly(32)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert launch(kernel) == "tuned"
