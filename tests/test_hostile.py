"""Hostile arguments: every operator gives a right result or one sentence, changes no input, and never crashes."""

import gzip
import math
import os
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from exssnet import (
    MaskBank,
    Phases,
    ScoreAdam,
    Served,
    SupermaskConv1d,
    SupermaskConv2d,
    SupermaskLinear,
    TaskBatchNorm2d,
    convert,
    freeze_weights,
    ops,
)
from exssnet.cli import train
from exssnet.cli.commands import main
from exssnet.cli.train import TrainOptions
from exssnet.continual import metrics
from exssnet.continual.task_inference import TaskInference
from exssnet.kernels import reference
from exssnet.tasks import load, split_by_class

Call = Callable[[Callable[[str, Any], Any]], Any]
MASK = torch.arange(24).reshape(4, 6) % 3 == 0
FILTERS = torch.arange(72).reshape(4, 2, 3, 3) % 3 == 0


def whole(*shape: int) -> Tensor:
    """Small whole numbers, so that sums are exact in any order."""
    return torch.randint(-4, 5, shape).float()


def geometry(a: Callable[[str, Any], Any]) -> dict[str, Any]:
    return {name: a(name, usual) for name, usual in (("stride", 1), ("padding", 1), ("dilation", 1))}


SHAPES = {"linear": ((5, 6), (4, 6)), "conv1d": ((3, 6, 7), (4, 6, 1)), "conv2d": ((3, 2, 5, 4), (4, 2, 3, 3))}
"""Of the input and of the weight."""


def product(family: str, kind: str) -> Call:
    """A product whose mask keeps a third of the weights."""
    shape_of_x, shape = SHAPES[kind]
    third = torch.arange(math.prod(shape)).reshape(shape) % 3 == 0
    function = getattr(ops, f"{family}_{kind}")

    def call(a: Callable[[str, Any], Any]) -> Any:
        options = {"bias": a("bias", whole(4))} | ({} if kind == "linear" else geometry(a))
        groups = {} if kind == "linear" else {"groups": a("groups", 1)}
        x = a("x", whole(*shape_of_x))
        if family == "supermask":
            options |= {"sparse": a("sparse", True)} | groups
            return function(x, a("weight", whole(*shape)), a("scores", whole(*shape)), a("k", 7), **options)
        mask = a("mask", third)
        if family == "masked":
            return function(x, a("weight", whole(*shape)), mask, a("free_mask", None), **options, **groups)
        values = a("free_values", whole(int(third.sum()))), a("frozen_values", whole(0))
        if family == "bitmap":
            return function(x, *values, ops.bitmap_pattern(mask), **options, **groups)
        kernel_size = () if kind == "linear" else (a("kernel_size", shape[-1]),)
        return function(x, *values, ops.sparse_pattern(mask, **groups), *kernel_size, **options)

    return call


def frozen_step(mask: Tensor) -> None:
    weight = nn.Parameter(whole(4, 6))
    optimizer = torch.optim.SGD([weight], 0.1)
    freeze_weights(optimizer, {weight: mask})
    weight.sum().backward()
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight[mask], before[mask])


def banked(mask: Tensor) -> None:
    bank = MaskBank({"layer": MASK.shape})
    bank.add({"layer": mask})
    assert torch.equal(bank.mask(0, "layer") if mask.dtype == torch.bool else bank.packed(0, "layer"), mask)


def idle() -> Phases:
    return Phases(convert(nn.Sequential(nn.Linear(6, 4)), 0.5))


def learned() -> Phases:
    phases = idle()
    for _ in range(2):
        phases.start_task()
        phases.finish_task()
    return phases


def stepped(lr: float, weight_decay: float, grad: Tensor) -> None:
    phases = idle()
    phases.start_task()
    (scores,) = phases.masked_parameters()
    scores.grad = grad
    ScoreAdam([scores], phases.model, lr, weight_decay=weight_decay).step()


CALLS: dict[str, Call] = {
    **{
        f"{family}_{kind}": product(family, kind)
        for family in ("supermask", "masked", "bitmap", "sparse") for kind in SHAPES
    },
    "topk_mask": lambda a: ops.topk_mask(a("scores", whole(4, 6)), a("k", 5)),
    "topk_masks": lambda a: ops.topk_masks([a("scores", whole(4, 6)), whole(3)], [a("k", 5), 1], a("hint", None)),
    "topk_select": lambda a: ops.topk_select([a("scores", whole(4, 6))], [a("k", 5)]),
    "density_to_k": lambda a: ops.density_to_k(a("n", 30), a("density", 0.1)),
    "pack_mask": lambda a: ops.pack_mask(a("mask", MASK)),
    "unpack_mask": lambda a: ops.unpack_mask(a("packed", ops.pack_mask(MASK)), (a("rows", 4), 6)),
    "free_mask": lambda a: ops.free_mask(a("mask", MASK), a("used_mask", ~MASK)),
    "sparse_pattern": lambda a: ops.sparse_pattern(a("mask", MASK), a("free_mask", MASK), a("groups", 1)),
    "bitmap_pattern": lambda a: ops.bitmap_pattern(a("mask", MASK), a("free_mask", MASK)),
    "masked_weight": lambda a: ops.masked_weight(
        a("free_values", whole(8)), a("frozen_values", whole(0)), ops.sparse_pattern(MASK), (a("rows", 4), 6)
    ),
    "sparse_conv2d_folded": lambda a: ops.sparse_conv2d_folded(
        a("x", whole(3, 2, 5, 4)), whole(0), a("frozen_values", whole(24)), ops.sparse_pattern(FILTERS),
        a("kernel_size", 3), a("scale", whole(4)), a("bias", whole(4)), a("residual", whole(3, 4, 5, 4)), True,
        **geometry(a),
    ),
    "batch_norm_act": lambda a: ops.batch_norm_act(
        a("x", whole(5, 3, 2)), a("residual", whole(5, 3, 2)), a("weight", whole(3)), a("bias", whole(3)),
        a("mean", whole(3)), a("var", torch.ones(3)), a("eps", 1e-5), True,
    ),
    "knn_classify": lambda a: ops.knn_classify(
        a("features", whole(9, 3)), a("labels", torch.arange(9) % 4), a("queries", whole(4, 3)), a("k", 3),
        a("classes", 4),
    ),
    "convert": lambda a: convert(nn.Sequential(nn.Linear(6, 4)), a("density", 0.5))(a("x", whole(2, 6))),
    "MaskBank": lambda a: banked(a("mask", MASK)),
    "freeze_weights": lambda a: frozen_step(a("mask", MASK)),
    "Served": lambda a: Served(learned())(a("x", whole(3, 6)), a("task_ids", torch.tensor([1, 0, 1]))),
    "average_accuracy": lambda a: metrics.average_accuracy(a("accuracy", torch.rand(3, 3))),
    "forgetting": lambda a: metrics.forgetting(a("accuracy", torch.rand(3, 3))),
    "adam_topk": lambda a: ops.adam_topk(
        [a("scores", whole(4, 6)).clone()], [a("grads", whole(4, 6))], [a("exp_avg", whole(4, 6)).clone()],
        [a("exp_avg_sq", whole(4, 6).abs()).clone()], [a("steps", torch.zeros(())).clone()], [a("k", 5)],
        a("hint", None), lr=a("lr", 0.1), packed=a("packed", True),
    ),
    "supermask_weights": lambda a: ops.supermask_weights(
        [a("weight", whole(4, 6))], [a("scores", whole(4, 6))], [a("mask", ops.pack_mask(MASK))]
    ),
    "SupermaskLinear": lambda a: SupermaskLinear(6, 4, density=a("density", 0.5))(a("x", whole(2, 6))),
    "SupermaskConv1d": lambda a: SupermaskConv1d(2, 4, 3, density=a("density", 0.5))(a("x", whole(3, 2, 7))),
    "SupermaskConv2d": lambda a: SupermaskConv2d(2, 4, 3, density=a("density", 0.5))(a("x", whole(3, 2, 5, 4))),
    "TaskBatchNorm2d": lambda a: TaskBatchNorm2d(3, a("eps", 1e-5), a("momentum", 0.1))(a("x", whole(5, 3, 2, 2))),
    "ScoreAdam": lambda a: stepped(a("lr", 0.1), a("weight_decay", 0.0), a("grad", whole(4, 6))),
    "Phases.start_task": lambda a: idle().start_task({"0": a("scores", whole(4, 6))}),
    "Phases.adopt": lambda a: idle().adopt({"0": a("mask", MASK)}, {}, {"0": a("scores", whole(4, 6))}),
    "TaskInference": lambda a: TaskInference(learned(), samples=a("samples", 1)).infer(a("x", whole(3, 6))),
    "backward_transfer": lambda a: metrics.backward_transfer(a("accuracy", torch.rand(3, 3))),
    "learning_accuracy": lambda a: metrics.learning_accuracy(a("accuracy", torch.rand(3, 3))),
    "learning_gain": lambda a: metrics.learning_gain(a("accuracy", torch.rand(3, 3)), a("individual", torch.rand(3))),
    "forward_transfer": lambda a: metrics.forward_transfer(a("transferred", torch.rand(3)), a("random", torch.rand(3))),
    "kept_weights": lambda a: ops.kept_weights(ops.sparse_pattern(a("mask", MASK)), (a("rows", 4), 6)),
}  # fmt: skip


# What is done to a tensor


def read_only(t: Tensor) -> Tensor:
    array = np.array(t.numpy() if t.dtype != torch.bfloat16 else t.float().numpy())
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of memory that may not be written
        return torch.from_numpy(array)


def strided(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape) if t.dim() and t.shape[0] else t


def special(t: Tensor, value: float) -> Tensor:
    t = t.clone(memory_format=torch.contiguous_format)
    if t.is_floating_point() and t.numel():
        t.view(-1)[t.numel() // 2] = value
    return t


HOSTILE: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "int64": lambda t: t.long(),
    "int32": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "uint8": lambda t: t.to(torch.uint8),
    "complex64": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "no elements": lambda t: t.new_empty(0),
    "no rows": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "a scalar": lambda t: t.reshape(-1)[:1].sum().to(t.dtype),
    "one more dimension": lambda t: t[None],
    "one dimension less": lambda t: t[0] if t.shape[:1] and t.shape[0] else t,
    "one row more": lambda t: torch.cat([t, t[:1]]),
    "one row less": lambda t: t[:-1],
    "one column less": lambda t: t[..., :-1],
    "transposed": lambda t: t.transpose(0, -1) if t.dim() else t,
    "another order": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t,
    "strided": strided,
    "expanded": expanded,
    "read-only": read_only,
    "NaN": lambda t: special(t, math.nan),
    "inf": lambda t: special(t, math.inf),
    "-0": lambda t: special(t, -0.0),
    "negative": lambda t: -t.int().to(t.dtype) - 1 if t.dtype != torch.bool else t,
    "2^40 elements": lambda t: t.reshape(-1)[:1].sum().to(t.dtype).to("meta").expand(1 << 40),
    "2^32 rows": lambda t: t[:1].to("meta").expand(1 << 32, *t.shape[1:]) if t.dim() else t,
}
NUMBERS = (-(1 << 40), -1, 0, 1, 2, 3, 7, 1 << 31, 1 << 40, 1 << 62)
SEQUENCES = ((3, 1), (1, 2, 3), (), [2, 1 << 40])
GEOMETRY = ("kernel_size", "stride", "padding", "dilation")
DENSITIES = (-0.1, 0.0, 0.5, 1.0, 1.5, math.nan, math.inf)


def tensors(things: Any) -> list[Tensor]:
    """All tensors in what an operator takes or gives."""
    if isinstance(things, list | tuple):
        return [t for thing in things for t in tensors(thing)]
    return [things] if isinstance(things, Tensor) else []


class Compared(TorchDispatchMode):
    """Compares what our operators give with their reference, on the arguments that reach them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given_ = tree_map_only(Tensor, Tensor.clone, args) if func._schema.is_mutable else args
        result = func(*args, **(kwargs or {}))
        if func.namespace == "exssnet" and not any(t.is_meta for t in tensors(args)):
            expected = getattr(reference, func._opname)(*given_)
            got, want = tensors(result), tensors(expected)
            for argument, of_ours, of_reference in zip(func._schema.arguments, args, given_, strict=False):
                if argument.alias_info is not None and argument.name != "hint":  # which has no right value
                    got, want = got + tensors(of_ours), want + tensors(of_reference)
            for g, w in zip(got, want, strict=True):
                assert g.shape == w.shape
                assert g.dtype == w.dtype
                # What is not finite meets the zeros of padding and of masks in the one and not in the other.
                finite = g.isfinite() & w.isfinite() | all(bool(t.isfinite().all()) for t in tensors(args))
                torch.testing.assert_close(g.where(finite, 0), w.where(finite, 0), equal_nan=True)
        return result


def tried(call: Call, changed: dict[str, Callable[[Any], Any]]) -> Exception | None:
    """Makes a call with some arguments changed; returns what it raised."""
    given_: list[tuple[Tensor, Tensor]] = []

    def argument(name: str, usual: Any) -> Any:
        value = changed[name](usual) if name in changed else usual
        if isinstance(value, Tensor) and not value.is_meta and not value.is_sparse:
            given_.append((value, value.clone()))
        return value

    try:
        with Compared():
            call(argument)
    except Exception as error:
        return error
    finally:
        for value, before in given_:
            torch.testing.assert_close(value, before, rtol=0, atol=0, equal_nan=True, msg="an argument was changed")
    return None


def arguments(call: Call) -> dict[str, Any]:
    """The names of a call's arguments and what they usually are."""
    found: dict[str, Any] = {}

    def note(name: str, usual: Any) -> Any:
        found[name] = usual
        return usual

    call(note)
    return found


def changes(name: str, usual: Any, draw: Callable[[Any], Any]) -> tuple[str, Callable[[Any], Any]]:
    if isinstance(usual, Tensor):
        kinds = draw(st.lists(st.sampled_from(sorted(HOSTILE)), min_size=1, max_size=2))

        def change(t: Any) -> Any:
            for kind in kinds:
                with suppress(Exception):  # what the change before made of it cannot be changed so
                    t = HOSTILE[kind](t)
            return t

        return ", ".join(kinds), change
    if usual is None:
        return "a tensor", lambda _: whole(4, 6)
    numbers = DENSITIES if isinstance(usual, float) else NUMBERS + SEQUENCES * (name in GEOMETRY)
    if name == "padding":  # of 2^31 pixels a large machine might have the memory
        numbers = tuple(n for n in numbers if n != 1 << 31)
    value = draw(st.sampled_from(numbers))
    return repr(value), lambda _: value


def is_sentence(error: Exception) -> bool:
    """One line of words, of a kind that a user may expect."""
    text = str(error)
    return isinstance(error, ValueError | TypeError | RuntimeError) and "\n" not in text and 10 < len(text) < 500


EXAMPLES = int(os.environ.get("EXSSNET_EXAMPLES", 30))


@pytest.mark.parametrize("operator", CALLS)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_hostile_arguments_give_a_right_result_or_one_sentence(operator: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    call = CALLS[operator]
    usual = arguments(call)
    chosen = data.draw(st.lists(st.sampled_from(sorted(usual)), min_size=1, max_size=2, unique=True))
    told, changed = {}, {}
    for name in chosen:
        told[name], changed[name] = changes(name, usual[name], data.draw)
    error = tried(call, changed)
    assert error is None or is_sentence(error), f"{told}: {type(error).__name__}: {error}"


# Files and the command line

IDX = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]

ARRAYS = {
    "x_train": np.arange(8 * 4 * 4, dtype=np.uint8).reshape(8, 4, 4),
    "y_train": np.arange(8) % 2,
    "x_test": np.arange(4 * 4 * 4, dtype=np.uint8).reshape(4, 4, 4),
    "y_test": np.arange(4) % 2,
}
OTHER_ARRAYS = (
    np.zeros((8, 4, 4), np.complex64), np.zeros(0), np.zeros((8, 0, 4), np.uint8), np.zeros((8, 2, 2, 2, 2), np.uint8),
    np.array(["a"] * 8), np.full(8, np.nan), np.array(3), np.arange(8) - 2, np.arange(8) / 2,
    np.full((8, 4, 4), np.nan), np.array([None] * 8, dtype=object), np.full(8, 2**62),
    np.arange(7), np.zeros((8, 4, 4), np.bool_),
    np.zeros((8, 4, 4), np.float16), np.zeros((8, 4, 4), ">f4"), np.full(8, 2**64 - 1, np.uint64),
)  # fmt: skip
damage = st.tuples(st.integers(0, 2000), st.integers(0, 255), st.booleans())


def damaged(content: bytes, where: int, byte: int, cut: bool) -> bytes:
    """A file cut off, or with another byte, at a place."""
    where %= len(content)
    return content[:where] if cut else content[:where] + bytes([byte]) + content[where + 1 :]


def read_or_told(load: Callable[[], Any]) -> Any:
    """What is loaded, or None where a sentence of one line was raised."""
    try:
        return load()
    except (ValueError, OSError) as error:
        told = error
    assert is_sentence(told) or (isinstance(told, OSError) and "\n" not in str(told)), told
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@settings(max_examples=3 * EXAMPLES)
@given(damage=damage)
def test_a_damaged_npz_file_is_read_right_or_told_in_one_sentence(folder: Path, damage: tuple[int, int, bool]) -> None:
    file = folder / "data.npz"
    np.savez(file, **ARRAYS)
    file.write_bytes(damaged(file.read_bytes(), *damage))
    found = read_or_told(lambda: load(file))
    if found is not None:  # the checksums of the archive hold what arrays hold
        assert torch.equal(found[0].images[:, 0], torch.from_numpy(ARRAYS["x_train"]))


@settings(max_examples=2 * EXAMPLES)
@given(key=st.sampled_from(sorted(ARRAYS)), other=st.sampled_from(range(len(OTHER_ARRAYS))))
def test_arrays_of_other_kinds_are_learned_from_or_told_in_one_sentence(folder: Path, key: str, other: int) -> None:
    file = folder / "other.npz"
    np.savez(file, **ARRAYS | {key: OTHER_ARRAYS[other]})
    read_or_told(lambda: split_by_class(*load(file), tasks=1, validation=0))


@settings(max_examples=3 * EXAMPLES)
@given(damage=damage, which=st.integers(0, 3), zipped=st.booleans())
def test_a_damaged_idx_file_is_read_right_or_told_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, damage: tuple[int, int, bool], which: int, zipped: bool
) -> None:
    root = tmp_path_factory.mktemp("idx")
    for number, (name, array) in enumerate(zip(IDX, ARRAYS.values(), strict=True)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        content = header + array.astype(np.uint8).tobytes()
        content = gzip.compress(content) if zipped else content
        (root / (name + ".gz" * zipped)).write_bytes(damaged(content, *damage) if number == which else content)
    read_or_told(lambda: load("mnist", root))


values = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2),
    st.sampled_from([2**70, "1e-2", "nan", "../x", "\0", [1], {"a": 1}]),
)  # fmt: skip
keys = st.one_of(st.sampled_from([f.name for f in fields(TrainOptions)]), st.text(max_size=8), st.integers())


@settings(max_examples=3 * EXAMPLES)
@given(options=st.dictionaries(keys, values, max_size=3), damage=damage, hurt=st.booleans())
def test_a_hostile_configuration_trains_or_is_told_in_one_sentence(
    folder: Path, options: dict[Any, Any], damage: tuple[int, int, bool], hurt: bool
) -> None:
    file, data = folder / "options.yaml", folder / "config.npz"
    if not data.exists():
        np.savez(data, **ARRAYS)
    small = {"data": str(data), "model": "lenet-300-100", "tasks": 1, "epochs": 1, "weight_epochs": 1, "threads": 1}
    content = yaml.safe_dump(small | {"out": str(folder / "out")} | options, allow_unicode=True).encode()
    file.write_bytes(damaged(content, *damage) if hurt else content)
    with redirect_stderr(StringIO()) as said, pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", lambda options: 0)  # what trains is tested elsewhere
        status = main(["train", "--config", str(file)])
    assert (status, said.getvalue().count("\n")) in ((0, 0), (2, 1))
