"""What stands for a large grid misses no value and, of three parameters or more, no pair; tests on a GPU are chosen."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import representatives

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("sizes", [(40,), (4, 33), (4, 12, 6), (1, 9, 2, 2)], ids=str)
def test_each_value_and_each_pair_of_three_parameters_occurs(sizes: tuple[int, ...]) -> None:
    rows = list(itertools.product(*map(range, sizes)))
    chosen = [rows[i] for i in representatives(rows, "seed")]
    varying = [i for i, size in enumerate(sizes) if size > 1]
    together = 2 if len(varying) > 2 else 1
    for columns in itertools.combinations(varying, together):
        assert {tuple(row[i] for i in columns) for row in chosen} == {tuple(row[i] for i in columns) for row in rows}
    fewest = sorted(sizes[i] for i in varying)[-together:]
    assert len(chosen) <= 1.5 * (fewest[0] if together == 1 else fewest[0] * fewest[1])


@pytest.mark.parametrize(("seconds", "status"), [(0.05, 1), (60, 0)])
def test_a_test_that_hangs_ends_its_process_and_says_where(seconds: float, status: int) -> None:
    code = f"import time; from tiers import time_limit\nwith time_limit({seconds}, 2): time.sleep(2 - {status})"
    helpers = {"PYTHONPATH": str(ROOT / "tests/helpers")}
    done = subprocess.run([sys.executable, "-c", code], env=helpers, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert ("Timeout" in done.stderr) == bool(status)
