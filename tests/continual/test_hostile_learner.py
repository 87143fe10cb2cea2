"""Hostile options of the learner and arguments of transfer: all is learned, or told in one sentence."""

import math
import os
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from exssnet import Learner, PhaseOptions, Phases, convert, transfer
from exssnet.tasks import split_by_class

EXAMPLES = int(os.environ.get("EXSSNET_EXAMPLES", 30))
RATES = st.one_of(st.floats(), st.sampled_from([0.0, 1e-2, 1e38, -1.0]))
PHASES = st.fixed_dictionaries(
    {
        "epochs": st.integers(-1, 2), "lr": RATES, "optimizer": st.sampled_from(["adam", "adamw", "sgd", "lion", ""]),
        "momentum": RATES, "weight_decay": RATES, "patience": st.one_of(st.none(), st.integers(-1, 2)),
    }
)  # fmt: skip
LEARNERS = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["supsup", "ssnet", "exssnet", "wsn", "packnet", ""]),
        "kkt": st.sampled_from([None, "best", "always", "all", "worst"]),
        "batch_size": st.integers(-1, 30), "all_outputs": st.booleans(),
        "keep_scores": st.sampled_from([None, torch.float32, torch.float16]),
    }
)  # fmt: skip


@settings(max_examples=2 * EXAMPLES)
@given(mask=PHASES, weight=PHASES, options=LEARNERS)
def test_hostile_options_of_a_learner_learn_or_are_told_in_one_sentence(
    mask: dict[str, Any], weight: dict[str, Any], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 1, 2, 2), torch.arange(24) % 4)
    try:
        tasks = split_by_class(data, data, 2, validation=0.25)
        model = convert(nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)), 0.5)
        learner = Learner(model, mask=PhaseOptions(**mask), weight=PhaseOptions(**weight), **options)
        accuracy = learner.run(tasks)
    except (ValueError, RuntimeError, FloatingPointError) as error:
        told = str(error)
    else:
        told = "learned"
        assert bool(((accuracy >= 0) & (accuracy <= 1)).tril().eq(torch.ones(2, 2).tril().bool()).all())
        assert all(bool(layer.dense_weight.isfinite().all()) for layer in learner.phases.layers.values())
    assert told
    assert "\n" not in told


@settings(max_examples=2 * EXAMPLES)
@given(
    items=st.integers(0, 12), width=st.integers(1, 5), classes=st.integers(-1, 5),
    rule=st.sampled_from(["best", "most"]),
    label=st.integers(-2, 6), batch=st.integers(-1, 4), value=st.sampled_from([0.0, math.nan, math.inf]),
)  # fmt: skip
def test_hostile_arguments_of_transfer_give_scores_or_one_sentence(
    items: int, width: int, classes: int, rule: Any, label: int, batch: int, value: float
) -> None:
    torch.manual_seed(0)
    phases = Phases(convert(nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)), 0.5))
    phases.start_task()
    phases.finish_task()
    x, labels = torch.randn(items, width), torch.arange(items) % 2
    if items:
        x[0, 0], labels[-1] = value, label
    try:
        found = transfer(phases, x, labels, classes, rule, batch_size=batch)
    except (ValueError, RuntimeError) as error:
        told = str(error)
    else:
        told = "transferred"
        assert len(found.accuracies) == 1
        assert 0 <= found.accuracies[0] <= 1
    assert told
    assert "\n" not in told
