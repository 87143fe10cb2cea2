"""The result of a run: its metrics, and its JSON, which is read back as the same result or refused."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from learning import learner
from networks import stream

from exssnet.continual import metrics
from exssnet.continual.mask_bank import LayerUse
from exssnet.experiments.results import MeasuredResult, RunResult, TaskResult

COST = {"seconds": 2.5, "memory": 7, "kept_bytes": 9}
FIRST = TaskResult("one", 2, {"mask": 1.0}, False, [0.5], body=LayerUse(8, 4, 4, 4), head=LayerUse(2, 1, 1, 1))
SECOND = TaskResult(
    "two", 2, {"mask": 1.5}, True, [0.25, 0.75], [0], (0.75, 0.5), LayerUse(8, 4, 1, 5), LayerUse(2, 1, 0, 1)
)
RESULT = MeasuredResult([[0.75], [0.5, 1.0]], [FIRST, SECOND], **COST, without_task_id={"binary, 1": {"accuracy": 0.5}})
USES = {"weights": 8, "kept": 4, "free": 4, "used": 4}, {"weights": 2, "kept": 1, "free": 1, "used": 1}
JSON: dict[str, Any] = {
    "seconds": 2.5, "memory": 7, "accuracy": [[0.75], [0.5, 1.0]], "average accuracy": 0.75, "forgetting": 0.25,
    "backward transfer": -0.25, "learning accuracy": 0.875, "kept bytes": 9,
    "tasks": [
        {"name": "one", "classes": 2, "seconds": {"mask": 1.0}, "reverted": False, "curve": [0.5], "body": USES[0],
         "head": USES[1]},
        {"name": "two", "classes": 2, "seconds": {"mask": 1.5}, "reverted": True, "curve": [0.25, 0.75],
         "sources": [0], "initial accuracy": [0.75, 0.5], "body": USES[0] | {"free": 1, "used": 5},
         "head": USES[1] | {"free": 0}},
    ],
    "forward transfer": 0.25, "without task id": {"binary, 1": {"accuracy": 0.5}},
}  # fmt: skip


def test_the_json_of_a_result_has_these_bytes() -> None:
    """Of files that stopped experiments have left."""
    assert json.dumps(RESULT.as_json()) == json.dumps(JSON)


def test_a_task_without_sources_says_so() -> None:
    """KKT was asked and found no source: other than a task that is learned without KKT."""
    asked = TaskResult("one", 2, {}, False, [], sources=[])
    assert json.dumps(asked.as_json()).endswith('"curve": [], "sources": [], "initial accuracy": null}')


def test_json_is_read_back_as_the_same_result() -> None:
    learned = learner("exssnet", kkt="best")
    learned.run(stream(3))
    for result in (RESULT, MeasuredResult.of(learned.accuracy, learned.reports, **COST)):
        assert MeasuredResult.from_json(json.loads(json.dumps(result.as_json())), "it") == result


def test_a_result_holds_what_the_learner_has_reached() -> None:
    learned = learner("exssnet", kkt="best")
    accuracy = learned.run(stream(3))
    result = RunResult.of(accuracy, learned.reports)
    starts = [report.initial_accuracy or (0.0, 0.0) for report in learned.reports]
    assert result.metrics == {
        "average accuracy": metrics.average_accuracy(accuracy),
        "forgetting": metrics.forgetting(accuracy),
        "backward transfer": metrics.backward_transfer(accuracy),
        "learning accuracy": metrics.learning_accuracy(accuracy),
        "forward transfer": metrics.forward_transfer(*zip(*starts, strict=True)),
    }
    for task, report in zip(result.tasks, learned.reports, strict=True):
        assert task.total == learned.phases.bank.total(report.task)
        assert task.head == report.use["head"]
    alone = RunResult.of(accuracy[:1, :1], [replace(learned.reports[0], use={})])
    assert list(alone.metrics) == ["average accuracy", "forgetting", "backward transfer", "learning accuracy"]
    assert alone.tasks[0].body is None
    assert RunResult([], []).metrics == {}


def test_a_task_without_test_data_has_no_metrics() -> None:
    with pytest.raises(ValueError, match=r"accuracy\[1, 0\] is NaN: task 0 was not evaluated"):
        print(RunResult([[0.5], [math.nan, 0.5]], [FIRST, SECOND]).metrics)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seconds": None}, "it.seconds must be float, got None"),
        ({"seconds": "1"}, "it.seconds must be float, got '1'"),
        ({"cost": 1}, "it must be an object of accuracy, tasks, seconds, .* got "),
        ({"accuracy": [[0.5], ["x", 1.0]]}, r"it.accuracy\[1\]\[0\] must be float, got 'x'"),
        ({"accuracy": [[0.5, 1.0], [0.5]]}, r"it: expected rows of 1, 2, ... accuracies.*, got \[2, 1\]"),
        ({"tasks": 3}, "it.tasks must be list.*, got 3"),
        ({"tasks": []}, "it: expected rows of 1, 2, ... accuracies and their tasks"),
        ({"tasks": [3]}, r"it.tasks\[0\] must be dict, got 3"),
        ({"tasks": [JSON["tasks"][0] | {"curve": 1}]}, r"it.tasks\[0\].curve must be list.*, got 1"),
        ({"tasks": [JSON["tasks"][0] | {"body": {}}]}, r"it.tasks\[0\].body must be an object of weights, kept, "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_json_is_refused_by_place(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MeasuredResult.from_json(JSON | change, "it")
