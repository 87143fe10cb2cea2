"""Triton's interpreter, made trustworthy: what it gets wrong is corrected, what a GPU would not forgive is raised.

Triton is interpreted or compiled for a whole process, by TRITON_INTERPRET=1. A test file of Triton kernels imports this
module and ends with `triton_guard.interpret(globals())`: in an ordinary run its tests give way to a single one that
runs the file in an interpreting process. `TRITON_INTERPRET=1 python -m pytest FILE` runs them directly. Any other test
file is interpreted by `triton_guard.run(FILE, ...)`.

Corrected: bfloat16, computed in float32 and rounded to even; float32 `tl.dot` at tf32 and tf32x3; `@autotune`, which
takes the configuration that `configuration(index)` names.
Raised: accesses outside the tensors of the launch, misaligned ones, plain accesses that meet another program's, lanes
of one store that disagree, floating-point atomics, histogram entries without a bin, failed `tl.device_assert`, integer
overflow. A masked load without `other=` gives poison. Programs run in a random order, the same in every run.
Not modelled: warps, layouts, pipelining, barriers, approximate functions, the order of sums within a `tl.dot`.

It replaces parts of the interpreter, so it is bound to the versions of Triton in `KNOWN`.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiers import WHOLE

KNOWN = ("3.8.",)

try:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.errors import InterpreterError as InterpreterError  # what an error in a kernel comes out as
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
except ImportError as error:
    pytest.skip(f"Triton is not installed, or has no interpreter: {error}", allow_module_level=True)
if not triton.__version__.startswith(KNOWN):
    pytest.skip(f"the guard knows Triton {', '.join(KNOWN)}x, not {triton.__version__}", allow_module_level=True)

ROOT = Path(__file__).parents[2]
HALF = "EXSSNET_HALF_OF_THE_TESTS"
interpreting: bool = triton.knobs.runtime.interpret

_configuration = 0


def run(*arguments: str, **environment: str) -> None:
    """Run pytest with the arguments in two interpreting processes under this guard, each with half of the tests."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", *WHOLE, "-p", "triton_guard", "-p", "no:cacheprovider", *arguments]
    variables = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path} | environment
    with tempfile.TemporaryFile("w+") as output:
        halves = [
            subprocess.Popen(command, cwd=ROOT, env=variables | {HALF: half}, stdout=output, stderr=subprocess.STDOUT)
            for half in "01"
        ]
        codes = sorted(half.wait() for half in halves)
        if codes not in ([0, 0], [0, pytest.ExitCode.NO_TESTS_COLLECTED]):  # a single test is all of its half
            output.seek(0)
            pytest.fail(f"{' '.join(command)}\n{output.read()[-12_000:]}", pytrace=False)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the tests that were asked for, what a process of `run` leaves to the other."""
    if half := os.environ.get(HALF):
        del items[1 - int(half) :: 2]


def interpret(tests: dict[str, Any]) -> None:
    """Outside the interpreter, put one test that runs the file in it in place of the tests of a module's globals."""
    if interpreting:
        return
    for name in [name for name in tests if name.startswith(("test_", "Test"))]:
        del tests[name]

    def test_in_the_interpreter() -> None:
        run(tests["__file__"])

    tests["test_in_the_interpreter"] = test_in_the_interpreter


@contextmanager
def configuration(index: int) -> Iterator[None]:
    """Autotuned kernels take the configuration of this index, modulo the number that their pruning leaves."""
    global _configuration
    before, _configuration = _configuration, index
    tuned: Any = getattr(sys.modules.get("exssnet.kernels.triton_product"), "_configurations", {})
    tuned.clear()
    try:
        yield
    finally:
        tuned.clear()
        _configuration = before


class GuardError(AssertionError):
    """What a kernel did and no GPU would forgive."""


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 from the bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """The bits of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def truncated(values: np.ndarray) -> np.ndarray:
    """tf32 as the tensor cores see a float32: Triton converts nothing, and they ignore the last 13 bits."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bfloat16(handle: object) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _in_float32(handle: Any) -> Any:
    return TensorHandle(widened(handle.data), tl.float32) if _is_bfloat16(handle) else handle


class Memory:
    """The tensors of a launch, and which programs accessed which of their elements.

    A program is its number plus one, 0 is none, and SEVERAL more than one.
    """

    SEVERAL = -1

    def __init__(self, tensors: list[Any]) -> None:
        stretches: list[list[int]] = []  # start, stop, size of an element: views of one storage are joined
        for start, stop, size in sorted(self.extent(t) for t in tensors if t.numel()):
            if stretches and start < stretches[-1][1]:
                last = stretches[-1]
                last[1:] = max(last[1], stop), min(last[2], size)
            else:
                stretches.append([start, stop, size])
        self.start, self.stop, self.size = np.array(stretches, np.int64).reshape(-1, 3).T
        count = (self.stop - self.start) // self.size
        self.first = np.cumsum(count) - count
        self.loaded, self.stored, self.updated = (np.zeros(int(count.sum()), np.int32) for _ in range(3))

    @staticmethod
    def extent(t: Any) -> tuple[int, int, int]:
        """Addresses from the first element of a view to past the last one."""
        length = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + length * t.element_size(), t.element_size()

    def access(self, kind: str, addresses: np.ndarray, size: int, program: int) -> None:
        """Check and note an access of `size` bytes at each of the addresses."""
        if addresses.size == 0:
            return
        if self.start.size == 0:
            raise GuardError(f"out of bounds: {kind} of program {program}, whose tensors are all empty")
        which = np.searchsorted(self.start, addresses, "right") - 1
        outside = (which < 0) | (addresses + size > self.stop[which])
        if outside.any():
            distance = np.abs(addresses[outside, None] - np.concatenate([self.start, self.stop])).min()
            raise GuardError(
                f"out of bounds: {kind} of program {program} in {outside.sum()} of {outside.size} lanes, "
                f"{distance} bytes from the nearest end of a tensor"
            )
        if (addresses % size).any():
            raise GuardError(f"misaligned: {kind} of program {program} of {size} bytes")
        for part in range(0, size, int(self.size[which].min())):
            element = self.first[which] + (addresses + part - self.start[which]) // self.size[which]
            self._meet(kind, element, program)

    def _meet(self, kind: str, element: np.ndarray, program: int) -> None:
        me = program + 1
        others = {
            "load": (self.stored, self.updated),
            "store": (self.stored, self.updated, self.loaded),
            "atomic": (self.stored, self.loaded),
        }[kind]
        if any(((who[element] != 0) & (who[element] != me)).any() for who in others):
            raise GuardError(f"race: {kind} of program {program} meets an access of another program")
        mine = {"load": self.loaded, "store": self.stored, "atomic": self.updated}[kind]
        before = mine[element]
        mine[element] = np.where((before == 0) | (before == me), me, self.SEVERAL)


class Builder(InterpreterBuilder):
    """The operations of a kernel."""

    memory: Memory
    program: int
    order: np.ndarray

    # Programs

    def set_grid_dim(self, x: int, y: int, z: int) -> None:
        super().set_grid_dim(x, y, z)
        self.order = np.random.default_rng(0).permutation(x * y * z)

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        self.program = int(self.order[np.ravel_multi_index((x, y, z), self.grid_dim)])
        super().set_grid_idx(*(int(i) for i in np.unravel_index(self.program, self.grid_dim)))

    # Memory

    def access(self, kind: str, pointers: TensorHandle, mask: Any) -> None:
        lanes = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
        size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        self.memory.access(kind, pointers.data[lanes].astype(np.int64), size, self.program)

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> TensorHandle:
        self.access("load", ptrs, mask)
        if other is None:
            dtype = ptrs.get_element_ty()
            other = TensorHandle(np.empty(ptrs.data.shape, interpreter._get_np_dtype(dtype)), dtype)
            other.data.view(np.uint8).fill(0xFF)  # poison: NaN, or -1
        return super().create_masked_load(ptrs, mask, other, *rest, **options)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> None:
        self.access("store", ptrs, mask)
        lanes = np.broadcast_to(np.asarray(mask.data, bool), ptrs.data.shape)
        addresses, first, lane = np.unique(ptrs.data[lanes], return_index=True, return_inverse=True)
        if addresses.size < lane.size:
            stored = np.ascontiguousarray(np.broadcast_to(value.data, ptrs.data.shape)[lanes])
            bits = stored.view(f"V{stored.itemsize}")
            if (bits[first][lane] != bits).any():
                raise GuardError(f"lanes disagree: store of program {self.program} has two values for one address")
        return super().create_masked_store(ptrs, value, mask, *rest, **options)

    def create_atomic_rmw(self, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> TensorHandle:
        if op == interpreter._ir.ATOMIC_OP.FADD:
            raise GuardError("floating-point atomic: the order of its sum, and so the sum, differs from run to run")
        self.access("atomic", ptr, mask)
        return super().create_atomic_rmw(op, ptr, val, mask, *rest)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, *rest: Any) -> TensorHandle:
        self.access("atomic", ptr, TensorHandle(np.ones(ptr.data.shape, bool), tl.int1))
        return super().create_atomic_cas(ptr, cmp, val, *rest)

    # Arithmetic

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if dst_type.scalar != tl.bfloat16:
            src = _in_float32(src)
            return TensorHandle(src.data.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)
        if _is_bfloat16(src):
            return src
        return TensorHandle(rounded(src.data.astype(np.float32)), tl.bfloat16)

    def get_all_ones_value(self, type: Any) -> TensorHandle:
        return TensorHandle(~np.zeros(1, interpreter._get_np_dtype(type)), type.scalar)

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(rounded(np.array([value], np.float32)), tl.bfloat16)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> TensorHandle:
        precision = interpreter._ir.INPUT_PRECISION

        def product(x: np.ndarray, y: np.ndarray, acc: np.ndarray) -> np.ndarray:
            return np.matmul(x, y, dtype=acc.dtype) + acc

        if _is_bfloat16(a):
            return TensorHandle(product(widened(a.data), widened(b.data), d.data), d.dtype.scalar)
        if a.dtype.scalar != tl.float32 or input_precision not in (precision.TF32, precision.TF32x3):
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        x, y, acc = truncated(a.data), truncated(b.data), d.data
        if input_precision == precision.TF32x3:  # the two products of a rest with a whole first, as Triton does
            acc = product(truncated(a.data - x), y, product(x, truncated(b.data - y), acc))
        return TensorHandle(product(x, y, acc), d.dtype.scalar)

    def create_histogram(self, data: Any, bins: int, mask: Any) -> TensorHandle:
        counted = data.data if mask is None else data.data[mask.data]
        if ((counted < 0) | (counted >= bins)).any():
            raise GuardError(f"tl.histogram of program {self.program}: an entry is outside of its {bins} bins")
        return super().create_histogram(data, bins, mask)


_FLOATING = (
    *(f"create_f{name}" for name in ("add", "sub", "mul", "div", "rem", "neg", "ma")),
    *(f"create_fcmp{order}{name}" for order in "OU" for name in ("LT", "GT", "LE", "GE", "EQ", "NE")),
    *(f"create_{name}f" for name in ("minimum", "minnum", "maximum", "maxnum", "clamp", "precise_div")),
    *(f"create_{name}" for name in ("exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "precise_sqrt", "rsqrt")),
    *(f"create_{name}" for name in ("floor", "ceil", "erf")),
)


def _through_float32(name: str) -> Any:
    original = getattr(InterpreterBuilder, name)

    def operation(self: Builder, *args: Any) -> TensorHandle:
        if not any(map(_is_bfloat16, args)):
            return original(self, *args)
        result = original(self, *map(_in_float32, args)).data
        if result.dtype == bool:
            return TensorHandle(result, tl.int1)
        return TensorHandle(rounded(result), tl.bfloat16)

    return operation


for _name in _FLOATING:
    setattr(Builder, _name, _through_float32(_name))


class ReduceOps(interpreter.ReduceOps):
    def apply_impl(self, input: Any) -> Any:
        """The quick ways would reduce the bits of bfloat16; the general one applies the kernel's own function."""
        if any(_is_bfloat16(t.handle) for t in input):
            return self.generic_reduce(input)
        return super().apply_impl(input)


class GridExecutor(interpreter.GridExecutor):
    """A launch."""

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        args, options = super()._init_args_hst(args_dev, kwargs)

        def tensors(arg: Any) -> list[Any]:
            if isinstance(arg, tuple):
                return [t for each in arg for t in tensors(each)]
            if hasattr(arg, "base"):  # a tensor descriptor
                return tensors(arg.base)
            return [arg] if hasattr(arg, "data_ptr") else []

        interpreter.interpreter_builder.memory = Memory(tensors((*args, *options.values())))
        return args, options

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        _patched.clear()
        with np.errstate(all="ignore"):
            super().__call__(*args, **kwargs)


def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched from now on, in order."""
    names, launch = [], GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        names.append(self.fn.__name__)
        launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return names


_patched: set[int] = set()
_patch_language = interpreter._patch_lang


def _patch_once(fn: Any) -> Any:
    """Patch the language once a launch and module: the interpreter's own way, at every call, takes half the time."""
    if id(fn.__globals__) in _patched:
        return interpreter._LangPatchScope()
    _patched.add(id(fn.__globals__))
    return _patch_language(fn)


def _run_configuration(self: Autotuner, *args: Any, **kwargs: Any) -> Any:
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    choices = self.prune_configs(kwargs)
    self.best_config = choices[_configuration % len(choices)]
    chosen = self.best_config.all_kwargs()
    if self.best_config.pre_hook is not None:
        self.best_config.pre_hook({**self.nargs, **kwargs, **chosen})
    return self.fn.run(*args, **kwargs, **chosen)


if interpreting:
    interpreter.interpreter_builder.__class__ = Builder
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)  # asserts, integer overflow
    interpreter.ReduceOps, interpreter.GridExecutor = ReduceOps, GridExecutor
    interpreter._patch_lang = _patch_once
    Autotuner.run = _run_configuration
