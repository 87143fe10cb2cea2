"""Zero forgetting, whatever is called in whatever order: random sequences of calls against a plain record.

EXSSNET_SEQUENCES sets their number in the default tier; the proofs are twice as many.
"""

import os
from pathlib import Path

import pytest
import torch
from forgetting import NETWORKS
from forgetting_moves import CALLS, AnyUser
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st

SEQUENCES = int(os.environ.get("EXSSNET_SEQUENCES", "200"))

calls = st.tuples(st.sampled_from(CALLS), st.integers(0, 255))


@pytest.fixture(scope="module", autouse=True)
def _files_need_not_reach_the_disk(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.mark.filterwarnings(
    "ignore:convert. masks cover", "ignore:no optimizer has trained", "ignore:.* had changed in the joint phase"
)
@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.proof) for i in range(1, 3))])
@pytest.mark.parametrize("kind", NETWORKS)
def test_no_sequence_of_calls_changes_a_finished_task(kind: str, part: int, folder: Path) -> None:
    @seed(part)
    @settings(
        max_examples=max(1, SEQUENCES // len(NETWORKS)),
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )
    @given(
        tasks=st.lists(st.tuples(st.just("learn"), st.integers(0, 255)), max_size=2),
        more=st.lists(calls, max_size=14),
    )
    def sequence(tasks: list[tuple[str, int]], more: list[tuple[str, int]]) -> None:
        torch.manual_seed(0)
        user = AnyUser(kind, folder, note)
        try:
            for name, number in (*tasks, *more):
                user.do(name, number)
            user.end()
        finally:
            user.leave_autocast(0)

    sequence()
