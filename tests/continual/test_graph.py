"""The learner with replayed steps: the same bits as without, and eager steps where a replay would be wrong."""

from functools import partial
from typing import Any

import pytest
import torch
from networks import small_net, stream
from recorded_graph import RecordedGraph
from torch import Tensor, nn

from exssnet import Learner, PhaseOptions, Strategy
from exssnet.continual import graph as graph_module
from exssnet.nn import graphs


class Regularized(Strategy):
    """A method with a loss of its own."""

    def loss(self, learner: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits = super().loss(learner, x, y)
        return 2 * loss, logits


def learned(optimizer: str = "adam", method: Any = "exssnet", model: nn.Module | None = None, **options: Any) -> Any:
    """The state and the accuracies of a learner after two tasks; 36 items in batches of 16 end with a smaller one."""
    phase = PhaseOptions(3, lr=0.01, optimizer=optimizer)  # type: ignore[arg-type]
    learner = Learner(
        model or small_net(products="dense"), method, mask=phase, weight=phase, batch_size=16, keep_scores=None,
        **options,
    )  # fmt: skip
    accuracy = learner.run(stream(2, per_class=24)).tril()
    history = [(e.loss, e.accuracy, e.validation) for r in learner.reports for e in r.history]
    return learner.state()[0], accuracy, history


def equal(a: Any, b: Any) -> bool:
    return a[2] == b[2] and torch.equal(a[1], b[1]) and all(torch.equal(a[0][n], b[0][n]) for n in a[0] | b[0])


@pytest.mark.parametrize(("optimizer", "method"), [("adam", "exssnet"), ("sgd", "exssnet"), ("adam", "wsn")])
def test_replays_learn_the_same_bits(
    optimizer: str, method: str, recorded: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = learned(optimizer, method)
    phases, epochs = (4, 3) if method == "exssnet" else (2, 6)
    assert recorded.captures == phases
    assert recorded.replays == phases * (2 * epochs - 3)  # of each epoch two batches, without the first three steps
    monkeypatch.setattr(graph_module, "graphed", partial(graphs.graphed, warmup=10**6))  # the same rates, no replay
    assert equal(replayed, learned(optimizer, method))
    assert recorded.captures == phases


def test_without_a_gpu_nothing_changes() -> None:
    assert equal(learned(graph="auto"), learned(graph=False))


def test_steps_of_a_method_with_a_loss_of_its_own_are_eager(recorded: type[RecordedGraph]) -> None:
    learned(method=Regularized())
    assert recorded.captures == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": Regularized()}, "graph=True: Regularized has its own loss, which a replay does not call"),
        ({"graph": "on"}, "graph must be True, False or \"auto\", got 'on'"),
    ],
)
def test_what_no_graph_can_hold_is_refused(
    options: dict[str, Any], message: str, recorded: type[RecordedGraph]
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        learned(**{"graph": True} | options)
    assert recorded.captures == 0


def test_without_a_gpu_a_graph_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^graph=True: a CUDA graph needs a GPU, and the model is on cpu"):
        learned(graph=True)


def test_a_network_that_cannot_be_captured_is_trained_without_a_graph(recorded: type[RecordedGraph]) -> None:
    def asking(model: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = type(model).forward(model, x)
        return y if bool(y.isfinite().all()) else y + 1

    model = small_net(products="dense")
    model.forward = partial(asking, model)  # type: ignore[method-assign]
    with pytest.warns(
        UserWarning, match="cannot be captured in a CUDA graph: a captured step asks for a value"
    ) as told:
        _, accuracy, history = learned(model=model)
    assert recorded.captures == 0
    assert len(told) == 4  # one for each phase
    assert len(history) == 4 * 3
    assert bool((accuracy.diagonal() > 0.8).all())
    model = small_net(products="dense")
    model.forward = partial(asking, model)  # type: ignore[method-assign]
    with pytest.raises(graphs.GraphError, match="a captured step asks for a value"):
        learned(model=model, graph=True)
