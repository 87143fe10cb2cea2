"""What stands for a large grid in the default tier misses no value and, of three parameters or more, no pair."""

import itertools

import pytest
from tiers import representatives


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
