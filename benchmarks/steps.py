"""Whole steps, ours and in plain PyTorch: eager, in a CUDA graph, compiled; and what they cost host and device."""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

from . import memory
from .ceilings import float32_precision
from .networks import NETWORKS, PEERS, Batch, Start, Way
from .timing import Variant, alternate, finish

PRECISIONS = ("bfloat16", "tf32", "float32")
"""Of the products. bfloat16: by autocast, with images in channels_last. float32: matmul precision "highest"."""
MODES = ("eager", "graph", "compile", "counts")


def measure(phase: str, network: str, density: float, precision: str, mode: str, quick: bool) -> dict[str, Any]:
    """Rows of ours and of each baseline: seconds of a step in one of the first `MODES`, or `counts` of an eager step.

    Each baseline has the faster one of two memory layouts. In bfloat16 a dense network's parameters are also stored in
    bfloat16, without autocast, and the faster one counts. "ratios" has for each baseline how many times faster ours is.
    """
    with float32_precision("high" if precision == "tf32" else "highest"):
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        channels_last = dtype == torch.bfloat16 and len(NETWORKS[network].shape) == 3
        if mode == "counts":
            return {"rows": counts(phase, network, density, dtype, channels_last, quick)}
        start = Start(NETWORKS[network], density, dtype)
        ours = start.ours(phase, channels_last)
        start.check(phase, ours)
        ways = {"ours": ours} | start.peers(phase)
        variants = [VARIANTS[mode](way, start.network.batches()) for way in ways.values()]
        timed = dict(zip(ways, alternate(variants, 0.1 if quick else 3.0, turn=0.05), strict=True))
    rows = [
        {"way": how, "channels_last": ways[how].channels_last, "seconds": t.median, "spread": t.spread}
        for how, t in timed.items()
    ]
    seconds = {
        how: min(t.median for name, t in timed.items() if name in (how, f"{how}, stored in {precision}"))
        for how in PEERS[phase]
    }
    return {"rows": rows, "ratios": {how: peer / timed["ours"].median for how, peer in seconds.items()}}


# Ways to run a step


def eager(way: Way, data: Iterator[Batch]) -> Variant:
    return way.steps(data)


def in_graph(way: Way, data: Iterator[Batch]) -> Variant:
    """Replays of a captured step. Each one copies the next batch to the graph's input."""
    batches = [(way.input(x), y) for x, y in itertools.islice(data, 50)]
    x, y = (t.clone() for t in batches[0])
    graph, feed = captured(lambda: way.step(x, y)), itertools.cycle(batches)

    def replay() -> None:
        next_x, next_y = next(feed)
        x.copy_(next_x)
        y.copy_(next_y)
        graph.replay()

    return replay


def compiled(way: Way, data: Iterator[Batch]) -> Variant:
    """Forward and backward by `torch.compile`, the optimizer as it is. All variants are compiled anew."""
    torch._dynamo.reset()
    way.model = torch.compile(way.model)  # type: ignore[assignment]
    return way.steps(data)


VARIANTS: dict[str, Callable[[Way, Iterator[Batch]], Variant]] = {
    "eager": eager, "graph": in_graph, "compile": compiled,
}  # fmt: skip


def captured(call: Variant) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a call, captured after three calls on a side stream."""
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    finally:
        torch.cuda.set_stream(before)  # `graph` leaves its own stream if the capture fails
    return graph


# What a step costs


def counts(
    phase: str, network: str, density: float, dtype: torch.dtype, channels_last: bool, quick: bool
) -> list[dict[str, Any]]:  # fmt: skip
    """Dispatches and peak memory of an eager step; on a GPU also its host time, its GPU time and its launches.

    Memory is that of a variant alone, with its weights and Adam's state. On a CPU it is measured in training phases in
    float32.
    """
    rows = []
    for how in ("ours", *PEERS[phase]):
        gc.collect()
        before = torch.cuda.memory_allocated() if _on_gpu() else 0
        start = Start(NETWORKS[network], density, dtype)
        ours = start.ours(phase, channels_last)
        way = ours if how == "ours" else start.peer(how, channels_last=channels_last)
        del ours
        memory.drop_the_other(start, how)
        step = way.steps(memory.forever(next(start.network.batches())))
        for _ in range(3):
            step()
        row: dict[str, Any] = {"way": how, "dispatches": dispatches(step)}
        if _on_gpu():
            torch.cuda.reset_peak_memory_stats()
            row |= {"host": host_seconds(step)} | by_profiler(step)
            row["memory"] = torch.cuda.max_memory_allocated() - before
        elif dtype == torch.float32 and phase != "inference" and not quick:
            row["memory"] = memory.measure(network, phase, density, how, torch.get_num_threads())["step"]
        rows.append(row)
        del start, way, step
    return rows


def _on_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


class _Counter(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def dispatches(step: Variant) -> int:
    """Operators that a step dispatches to the device, forward, backward and optimizer."""
    with _Counter() as counter:
        step()
    return int(counter.number)


def host_seconds(step: Variant, rounds: int = 20) -> float:
    """Median time until a step's calls return, while the device still works."""
    times = []
    for _ in range(rounds):
        finish()
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    finish()
    return statistics.median(times)


def by_profiler(step: Variant, rounds: int = 3) -> dict[str, float]:
    """GPU seconds and launches of a step: all kernels, copies and fills on the device's timeline."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            step()
        finish()
    work = [e for e in profiler.events() or () if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return {
        "gpu": sum(e.time_range.elapsed_us() for e in work) / 1e6 / rounds,
        "launches": len(work) / rounds,
    }
