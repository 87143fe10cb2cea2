"""Breakdown of the time of a step: each variant is profiled once, and its operators are grouped."""

import os
import re
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.autograd.profiler import profile

from .ceilings import machine_peak
from .networks import Start, Way
from .timing import milliseconds, percent, table

try:
    import resource
except ImportError:  # Windows counts no page faults
    resource = None  # type: ignore[assignment]

GROUPS = {
    "optimizer": r"Optimizer\.",
    "products": r"exssnet::\w*(linear|conv\dd)|aten::(linear|matmul|t?mm|addmm|conv\w*|mkldnn_conv\w*|thnn_conv\w*)$",
    "weights": r"exssnet::(topk|pack|unpack)|aten::(mul|abs|sort|index_put_|_index_put_impl_)$",
    "passes": r"exssnet::|aten::(\w*batch_norm\w*|relu\w*|threshold\w*|clamp_min\w*|add_?|sum|mean|div|where|expand|"
    r"copy_|clone|contiguous|_to_copy|\w*pool\w*)$",
}
"""Group of an operator: the first pattern that matches its name. Operators inside another one count as part of it.

weights: computing the effective weight (in plain PyTorch also its gradient). passes: norms, activations, sums, copies.
"""


def group(name: str) -> str | None:
    return next((g for g, pattern in GROUPS.items() if re.match(pattern, name)), None)


@dataclass
class Budget:
    """Seconds of one step, by group.

    The shares of the groups come from a profiled step. The time of the step comes from one without the profiler.
    `rest` is Python, autograd, the loss, and operators without a group.
    """

    case: str
    density: float
    threads: int
    way: str
    step: float
    seconds: dict[str, float]
    flops: float  # of the products
    passed: float  # bytes of the passes: every operand and result is counted once
    faults: float  # minor page faults

    @property
    def rest(self) -> float:
        return self.step - sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"rest": self.rest}


def budget(case: str, phase: str, start: Start, way: Way, threads: int, quick: bool) -> Budget:
    """Profile a variant. It must be checked before, and has had its warm-up."""
    step = way.steps(start.network.batches())
    began = time.perf_counter()
    step()
    rounds = 2 if quick else max(1, min(100, int(0.5 / (time.perf_counter() - began))))
    before, began = _faults(), time.perf_counter()
    for _ in range(rounds):
        step()
    plain = (time.perf_counter() - began) / rounds
    faults = (_faults() - before) / rounds
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # without it, the profiler logs to the terminal
    with profile(record_shapes=True) as profiler:
        began = time.perf_counter()
        for _ in range(rounds):
            step()
        slowdown = (time.perf_counter() - began) / rounds / plain
    seconds, passed = dict.fromkeys(GROUPS, 0.0), 0.0
    for event in profiler.function_events or ():
        kind, parent = group(event.name), event.cpu_parent
        while parent is not None and group(parent.name) is None:
            parent = parent.cpu_parent
        if kind is None or parent is not None:
            continue
        seconds[kind] += event.cpu_time_total / 1e6 / rounds / slowdown
        if kind == "passes":
            passed += _moved(event.input_shapes) / rounds
    flops = start.flops(phase, dense=way.name != "ours")
    return Budget(case, start.density, threads, way.name, plain, seconds, flops, passed, faults)


def _moved(shapes: list[list[int]]) -> float:
    """Bytes of float32 operands, and of a result of the size of the largest operand."""
    sizes = [torch.Size(s).numel() for s in shapes if s and all(isinstance(n, int) for n in s)]
    return 4.0 * (sum(sizes) + max(sizes, default=0))


def _faults() -> float:
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_minflt) if resource else float("nan")


def show(budgets: list[Budget], quick: bool) -> str:
    """One line per variant: milliseconds by group, and the rates of products and passes as shares of the peak."""
    lines = []
    for b in budgets:
        torch.set_num_threads(b.threads)
        peak = machine_peak(quick)
        products, passes = b.seconds["products"], b.seconds["passes"]
        lines.append([
            b.case, f"{b.density:g}", str(b.threads), b.way, milliseconds(b.step),
            *_rated(products, b.flops, peak.flops, "GFLOP/s"), milliseconds(b.seconds["weights"]),
            *_rated(passes, b.passed, peak.bandwidth, "GB/s"), milliseconds(b.seconds["optimizer"]),
            milliseconds(b.rest), f"{b.faults:.0f}",
        ])  # fmt: skip
    head = ["where a step's ms go", "density", "threads", "way", "step", "products", "rate", "weights",
            "norms, activations", "rate", "optimizer", "rest", "page faults"]  # fmt: skip
    return table(head, lines)


def _rated(seconds: float, work: float, peak: float, unit: str) -> tuple[str, str]:
    if not seconds:
        return "0", ""
    return milliseconds(seconds), f"{work / seconds / 1e9:.3g} {unit}, {percent(work / seconds / peak)}"
