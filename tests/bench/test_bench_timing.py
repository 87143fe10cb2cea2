"""How variants are timed, and the bounds and ratios that stand beside the times."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exssnet.bench import ceilings, timing
from exssnet.bench.timing import Row, Timing, WrongResult


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Callable[[], None]]:
    """A clock that only variants move. Makes a variant that takes so many seconds and counts its calls."""
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def variant(seconds: float) -> Any:
        def call() -> None:
            now[0] += seconds
            call.count += 1  # type: ignore[attr-defined]

        call.count = 0  # type: ignore[attr-defined]
        return call

    return variant


@pytest.mark.parametrize(
    ("seconds", "calls"),
    [(7.0, 1 + 3), (0.7, 1 + 5), (0.3, 1 + 9), (0.03, 1 + 1 + 2 * 33)],
    ids=["at least 3 rounds", "5 in a third more time", "as many as fit", "repeated in each round"],
)
def test_long_steps_have_few_rounds_and_short_ones_many(clock: Any, seconds: float, calls: int) -> None:
    step, other = clock(seconds), clock(seconds / 2)
    timings = timing.alternate([step, other], 4.0, turn=0.05)
    assert [t.median for t in timings] == pytest.approx([seconds, seconds / 2])
    assert step.count == calls


def test_the_fastest_of_long_variants_is_found_in_one_round(clock: Any) -> None:
    long, short = [clock(3.0), clock(2.0)], [clock(0.01), clock(0.02)]
    assert (timing.fastest(long), timing.fastest(short)) == (1, 0)
    assert [variant.count for variant in long + short] == [1, 1, 3, 3]


def test_ratios_say_how_many_times_faster() -> None:
    row = Row("op", "1", None, 1, Timing(2e-3, 0.0), 1.5, "GB/s", 0.25, {"sort": Timing(6e-3, 0.0)})
    assert row.ratio("sort") == pytest.approx(3)
    assert "1.5 GB/s | 25 %" in timing.timings([row])
    assert "sort 3.0" in timing.timings([row])
    assert "floor" not in timing.timings([row])


def test_floors_are_of_what_takes_longest() -> None:
    peak = ceilings.Ceilings(flops=1e12, bandwidth=1e10, tf32=6e12, shared=1e11)
    assert peak.floor(timing.Work(1e9, 1e10, 1e9)) == pytest.approx(0.1)
    assert peak.floor(timing.Work(1e9, 2e11, 1e9)) == pytest.approx(0.2)
    assert peak.floor(timing.Work(1e9, 2e11, 3e10)) == pytest.approx(0.3)
    assert peak.floor(timing.Work(0, 2e11, tiles=True)) == pytest.approx(0.1)  # three passes of tensor cores
    torch.set_float32_matmul_precision("high")
    try:
        assert peak.floor(timing.Work(0, 3e11, tiles=True)) == pytest.approx(0.05)
        assert peak.floor(timing.Work(0, 3e11)) == pytest.approx(0.3)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_products_in_bfloat16_have_a_ceiling_and_a_budget_of_their_own() -> None:
    peak = ceilings.Ceilings(flops=1e12, bandwidth=1e10, tf32=6e12, bfloat16=2e13)
    assert peak.floor(timing.Work(0, 2e13, tiles=True, dtype=torch.bfloat16)) == pytest.approx(1)
    assert peak.floor(timing.Work(0, 2e13, dtype=torch.bfloat16)) == pytest.approx(20)
    truth = torch.ones(3, dtype=torch.float64)
    timing.check_error("it", 0.06, 0.0, truth, torch.bfloat16)  # 8 ulps are 0.0625
    with pytest.raises(WrongResult):
        timing.check_error("it", 0.06, 0.02, truth)
    timing.check_accurate("it", truth + 0.06, truth, truth.bfloat16())
    with pytest.raises(WrongResult):
        timing.check_accurate("it", truth + 0.07, truth, truth.bfloat16())


def test_floors_on_paper_stand_beside_the_times_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ceilings.floors(timing.Work(1e9), quick=True)[1] == {}
    monkeypatch.setattr(ceilings, "machine_peak", lambda quick=False: ceilings.Ceilings(1e14, 1e12))
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    floor, paper = ceilings.floors(timing.Work(56e6))  # masks of bytes for 11.2 M scores
    assert floor == pytest.approx(56e-6)
    assert {gpu: round(1e6 * seconds) for gpu, seconds in paper.items()} == {"A100": 27, "H100": 17, "RTX 4090": 55}
    said = timing.timings([Row("op", "1", None, 1, Timing(2e-3, 0.0), floor=floor, paper=paper)])
    assert "| floor ms | A100 ms | H100 ms | RTX 4090 ms |" in said
    assert "| 0.056    | 0.0275  | 0.0167  | 0.0554      |" in said
    of_products = ceilings.floors(timing.Work(0, 71e9))[1], ceilings.floors(timing.Work(0, 71e9, tiles=True))[1]
    assert [round(1e6 * seconds) for seconds in of_products[0].values()] == [3641, 1061, 860]
    assert [round(1e6 * seconds) for seconds in of_products[1].values()] == [1365, 430, 860]
    shared = ceilings.floors(timing.Work(0, 1, shared=14.2e9))[1]
    assert [round(1e6 * seconds) for seconds in shared.values()] == [729, 424, 344]


def test_ceilings_are_measured_once() -> None:
    assert ceilings.machine_peak(True) is ceilings.machine_peak(True)
