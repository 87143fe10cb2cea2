"""The guard sees each kind of bug that it is there for, and computes what a GPU computes."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton_guard
from tiers import WHOLE
from torch import Tensor

pytestmark = pytest.mark.proof

N = 32


def refused(kind: str) -> Any:
    return pytest.raises(triton_guard.InterpreterError, match=kind)


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


# Memory


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0), mask=i < n)


@triton.jit
def copy_loading_past_the_end(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i), mask=i < n)


@triton.jit
def copy_storing_past_the_end(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0))


@triton.jit
def copy_starting_before(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK) - 1
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0), mask=(i >= 0) & (i < n))


@triton.jit
def copy_of_wider_entries(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    wide = (x + 1).to(tl.pointer_type(tl.int64)) + i
    tl.store(y.to(tl.pointer_type(tl.int64)) + i, tl.load(wide))


def test_right_kernel_is_let_through() -> None:
    x, y = torch.arange(N - 3), torch.zeros(N - 3, dtype=torch.int64)
    copy[(4,)](x, y, N - 3, BLOCK=8)
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("kernel", "access"),
    [
        (copy_loading_past_the_end, "load of program 3 in 3 of 8 lanes"),
        (copy_storing_past_the_end, "store of program 3 in 3 of 8 lanes"),
    ],
    ids=["load", "store"],
)
@pytest.mark.parametrize("spare", [0, 100], ids=["own-memory", "view"])
def test_access_past_the_end_is_seen(kernel: Any, access: str, spare: int) -> None:
    x, y = ints(N - 3 + spare)[: N - 3], ints(N - 3 + spare)[: N - 3]
    with refused(f"out of bounds: {access}, 0 bytes"):
        kernel[(4,)](x, y, N - 3, BLOCK=8)


def test_access_before_the_start_is_seen() -> None:
    with refused("out of bounds: load of program 0 in 1 of 8 lanes"):
        copy_starting_before[(1,)](ints(4 + N)[4:], ints(N), N, BLOCK=8)


def test_access_below_all_memory_is_seen() -> None:
    x = ints(N)
    with pytest.raises(triton_guard.GuardError, match="out of bounds: load of program 7 in 1 of 2 lanes, 4 bytes"):
        triton_guard.Memory([x]).access("load", x.data_ptr() + np.array([-4, 0]), 4, 7)


def test_access_to_the_gap_between_two_tensors_is_seen() -> None:
    memory = ints(3 * N)
    with refused("out of bounds: load"):
        copy_loading_past_the_end[(2,)](memory[:12], memory[2 * N :], 12, BLOCK=8)


def test_access_without_any_memory_is_seen() -> None:
    with refused("out of bounds: load of program 0, whose tensors are all empty"):
        copy_loading_past_the_end[(1,)](ints(0), ints(0), 0, BLOCK=8)


def test_misaligned_access_is_seen() -> None:
    with refused("misaligned: load of program 0 of 8 bytes"):
        copy_of_wider_entries[(1,)](ints(N), ints(N), BLOCK=4)


@triton.jit
def sum_without_other(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y, tl.sum(tl.load(x + i, mask=i < n), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64])
def test_what_a_masked_load_leaves_open_is_no_zero(dtype: torch.dtype) -> None:
    x, y = torch.ones(7, dtype=dtype), torch.zeros(1, dtype=dtype)
    sum_without_other[(1,)](x, y, 7, BLOCK=8)
    assert y.isnan().all() if dtype.is_floating_point else y == 6


# Races


@triton.jit
def all_store_to_one(x, BLOCK: tl.constexpr):
    tl.store(x, tl.program_id(0))


@triton.jit
def shift_in_place(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    following = tl.load(x + i + 1, mask=i + 1 < n, other=0)
    tl.store(x + i, following, mask=i < n)


@triton.jit
def lanes_store_to_one(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i // 2, i)


@triton.jit
def exchange_tickets(tickets, places, BLOCK: tl.constexpr):
    """Each program notes when it ran."""
    tl.store(places + tl.program_id(0), tl.atomic_add(tickets, 1))


@triton.jit
def increment_twice(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(2):
        tl.store(x + i, tl.load(x + i, mask=i < n, other=0) + 1, mask=i < n)


def test_race_between_programs_of_a_kernel_is_seen() -> None:
    with refused("race: store of program"):
        all_store_to_one[(4,)](ints(1), BLOCK=8)
    with refused("race: (load|store) of program"):
        shift_in_place[(4,)](ints(N), N, BLOCK=8)


@pytest.mark.parametrize("second", ["load", "store", "atomic"])
@pytest.mark.parametrize("first", ["load", "store", "atomic"])
def test_accesses_of_two_programs_race_but_for_loads_and_for_atomics(first: str, second: str) -> None:
    x = ints(4)
    memory, third = triton_guard.Memory([x]), x.data_ptr() + np.array([8])
    memory.access(first, third, 4, 5)
    memory.access(first, third, 4, 5)
    memory.access(second, third + 4, 4, 6)
    if first == second != "store":
        memory.access(second, third, 4, 6)
    else:
        with pytest.raises(triton_guard.GuardError, match=f"race: {second} of program 6"):
            memory.access(second, third, 4, 6)


@pytest.mark.parametrize("last", [5, 6])
def test_store_races_with_any_of_several_loads(last: int) -> None:
    x = ints(1)
    memory, only = triton_guard.Memory([x]), x.data_ptr() + np.array([0])
    for program in (5, 6, last):
        memory.access("load", only, 4, program)
    with pytest.raises(triton_guard.GuardError, match=f"race: store of program {last}"):
        memory.access("store", only, 4, last)


def test_entries_of_different_widths_race_where_they_overlap() -> None:
    x = ints(8)
    memory = triton_guard.Memory([x, x[2:4].view(torch.int16)])  # views of one storage, noted by 2 bytes
    memory.access("store", x.data_ptr() + np.array([0, 8]), 8, 5)
    memory.access("store", x.data_ptr() + np.array([16]), 2, 5)
    memory.access("store", x.data_ptr() + np.array([18, 20]), 2, 6)
    for offset in (4, 14, 16):
        with pytest.raises(triton_guard.GuardError, match="race: load of program 6"):
            memory.access("load", x.data_ptr() + np.array([offset]), 2, 6)


def test_lanes_that_disagree_are_seen() -> None:
    with refused("lanes disagree: store of program 0"):
        lanes_store_to_one[(1,)](ints(N), BLOCK=8)


def test_program_may_meet_itself() -> None:
    x = ints(N)
    increment_twice[(4,)](x, N, BLOCK=8)
    assert (x == 2).all()


def test_programs_run_out_of_order_and_each_once() -> None:
    tickets, places = ints(1), ints(64)
    exchange_tickets[(64,)](tickets, places, BLOCK=8)
    assert places.tolist() != sorted(places.tolist())
    assert sorted(places.tolist()) == list(range(64))


@triton.jit
def note_place(x, BLOCK: tl.constexpr):
    z, y = tl.program_id(2), tl.program_id(1)
    tl.store(x + (tl.program_id(0) * tl.num_programs(1) + y) * tl.num_programs(2) + z, 100 + z)


def test_programs_of_a_grid_of_three_dimensions_run_each_once() -> None:
    x = ints(3, 2, 4)
    note_place[(3, 2, 4)](x, BLOCK=8)
    assert torch.equal(x, (100 + torch.arange(4, dtype=torch.int32)).expand(3, 2, 4))


# What a kernel says of itself


@triton.jit
def assert_positive(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.device_assert(tl.load(x + i, mask=i < n, other=1) > 0, "not positive")


@triton.jit
def multiply(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i) * tl.load(y + i))


@triton.jit
def add_floats(x, BLOCK: tl.constexpr):
    tl.atomic_add(x, 1.0)


@triton.jit
def count(x, y, n, BINS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + tl.arange(0, BINS), tl.histogram(tl.load(x + i, mask=i < n, other=99), BINS, mask=i < n))


def test_failed_assertion_is_raised() -> None:
    assert_positive[(1,)](ints(7) + 1, 7, BLOCK=8)
    with refused("not positive"):
        assert_positive[(1,)](ints(7), 7, BLOCK=8)


def test_overflow_of_int32_is_raised() -> None:
    big = ints(8) + 2**16
    with refused("int32 overflow"):
        multiply[(1,)](big, big, BLOCK=8)
    wide = big.long()
    multiply[(1,)](wide, wide, BLOCK=8)
    assert (wide == 2**32).all()


def test_floating_point_atomic_is_refused() -> None:
    with refused("floating-point atomic"):
        add_floats[(1,)](torch.zeros(1), BLOCK=8)


def test_entry_without_a_bin_is_refused() -> None:
    x, y = torch.arange(7, dtype=torch.int32), ints(8)
    count[(1,)](x, y, 7, BINS=8, BLOCK=8)
    assert y.tolist() == [1] * 7 + [0]
    with refused("outside of its 4 bins"):
        count[(1,)](x, y, 7, BINS=4, BLOCK=8)


# bfloat16, tf32


@triton.jit
def every_operation(x, y, out, flags, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + BLOCK + i, a * b)
    tl.store(out + 2 * BLOCK + i, a - b)
    tl.store(out + 3 * BLOCK + i, -a)
    tl.store(out + 4 * BLOCK + i, tl.abs(a))
    tl.store(out + 5 * BLOCK + i, tl.where(a < b, a, b))
    tl.store(out + 6 * BLOCK + i, tl.maximum(a, b).to(tl.bfloat16))
    tl.store(out + 7 * BLOCK + i, a * 3.0)
    tl.store(flags + i, (a < b).to(tl.int32) + 2 * (a == b).to(tl.int32) + 4 * (a != a).to(tl.int32))


@triton.jit
def cast(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def sums(x, total, running, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i)
    tl.store(total, tl.sum(a, 0))
    tl.store(total + 1, tl.max(a, 0).to(tl.bfloat16))
    tl.store(running + i, tl.cumsum(a, 0))


@triton.jit
def matmul(x, y, out, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, BLOCK)
    square = i[:, None] * BLOCK + i[None, :]
    tl.store(out + square, tl.dot(tl.load(x + square), tl.load(y + square), input_precision=PRECISION))


def bfloat16_pairs() -> tuple[Tensor, Tensor]:
    special = torch.tensor([0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3e38])
    x = torch.cat([special.repeat_interleave(8), torch.randn(960) * 100]).bfloat16()
    y = torch.cat([special.repeat(8), torch.randn(960) * 100]).bfloat16()
    y[::7] = x[::7]
    return x, y


def test_bfloat16_arithmetic_is_that_of_torch() -> None:
    x, y = bfloat16_pairs()
    out, flags = torch.zeros(8, x.numel(), dtype=torch.bfloat16), ints(x.numel())
    every_operation[(1,)](x, y, out, flags, BLOCK=x.numel())
    greater = torch.fmax(x, y)
    expected = [x + y, x * y, x - y, -x, x.abs(), torch.where(x < y, x, y), greater, x * 3]
    for row, want in zip(out, expected, strict=True):
        assert torch.equal(row.nan_to_num(7.0), want.nan_to_num(7.0))
    assert torch.equal(flags, (x < y).int() + 2 * (x == y).int() + 4 * x.isnan().int())


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32], ids=str)
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32], ids=str)
def test_casts_are_those_of_torch(of: torch.dtype, to: torch.dtype) -> None:
    x = torch.cat([torch.randn(1000) * 1000, 256 + torch.arange(24) / 2]).to(of)
    y = torch.zeros(x.shape, dtype=to)
    cast[(1,)](x, y, BLOCK=x.numel())
    assert torch.equal(y, x.to(to))


def test_bfloat16_is_rounded_to_even_and_keeps_nan() -> None:
    bits = torch.cat(
        [torch.arange(0x3F807F00, 0x3F818100), torch.arange(2**12) * 524_287, torch.tensor([2**31 - 1])]
    ).int()
    x = bits.view(torch.float32)
    y = torch.from_numpy(triton_guard.rounded(x.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(y.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))
    assert torch.equal(y.isnan(), x.isnan())
    assert x.isnan().any()


def test_bfloat16_is_reduced_as_numbers() -> None:
    x = torch.arange(64, dtype=torch.bfloat16) - 20
    total, running = torch.zeros(2, dtype=torch.bfloat16), torch.zeros_like(x)
    sums[(1,)](x, total, running, BLOCK=64)
    assert total.tolist() == [float(sum(x)), 43.0]  # one after the other, each sum rounded
    assert torch.equal(running, x.float().cumsum(0).bfloat16())


def test_dot_of_bfloat16_is_exact_on_integers() -> None:
    x, y = (torch.randint(-8, 9, (16, 16)).bfloat16() for _ in range(2))
    out = torch.zeros(16, 16)
    matmul[(1,)](x, y, out, BLOCK=16, PRECISION="tf32")
    assert torch.equal(out, x.float() @ y.float())


@pytest.mark.parametrize(("precision", "least", "most"), [("tf32", 2e-4, 2e-3), ("tf32x3", 0, 1e-6), ("ieee", 0, 1e-6)])
def test_dot_of_float32_has_the_error_of_its_precision(precision: str, least: float, most: float) -> None:
    x, y = torch.rand(64, 64), torch.rand(64, 64)
    out = torch.zeros(64, 64)
    matmul[(1,)](x, y, out, BLOCK=64, PRECISION=precision)
    exact = x.double() @ y.double()
    error = float(((out - exact) / exact).abs().max())
    assert least <= error <= most


# Autotune


@triton.autotune([triton.Config({"BLOCK": size}) for size in (4, 8, 16)], key=["n"])
@triton.jit
def tuned(x, n, BLOCK: tl.constexpr):
    tl.store(x, BLOCK)


@pytest.mark.parametrize(("index", "block"), list(enumerate([4, 8, 16, 4])))
def test_configuration_is_the_one_asked_for(index: int, block: int) -> None:
    x = ints(1)
    with triton_guard.configuration(index):
        tuned[(1,)](x, 7)
    assert x.tolist() == [block]
    tuned[(1,)](x, 7)
    assert x.tolist() == [4]


# What runs the tests


def test_a_process_has_half_of_the_tests_that_were_asked_for() -> None:
    # One test lies between these two, so halves of all tests would leave both to one process.
    chosen = ("test_access_before_the_start_is_seen", "test_access_to_the_gap_between_two_tensors_is_seen")
    command = [sys.executable, "-m", "pytest", *WHOLE, "-p", "triton_guard", "-p", "no:cacheprovider"]
    found = []
    for half in "01":
        said = subprocess.run(
            [*command, "--collect-only", __file__, "-k", " or ".join(chosen)], cwd=triton_guard.ROOT,
            env=os.environ | {triton_guard.HALF: half}, capture_output=True, text=True,
        ).stdout  # fmt: skip
        found.append([line.rpartition("::")[2] for line in said.splitlines() if "::" in line])
    assert found == [[chosen[0]], [chosen[1]]]


triton_guard.interpret(globals())
