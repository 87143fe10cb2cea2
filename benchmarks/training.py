"""Speed of whole training steps and of inference against plain PyTorch, and a breakdown of their time.

A step is forward, cross-entropy, backward and Adam on a batch of 64. In the inference phase it is the forward of a
finished task, in evaluation mode without gradients. The baselines are:

"cached mask": multiplies the dense weights with a mask of floats, and trains all weights.
"sort": trains scores; every forward sorts all of them, as in the official code.
"no mask": the plain network.
"dense": the network of the finished task, with its zeros stored.
"dense, folded": the same, with its norms folded into the convolutions.

Each baseline uses the faster one of two memory layouts (NCHW, channels_last). With --dtype bfloat16 all of them, ours
too, run under autocast. Gradients and logits are checked before
anything is timed. Short steps are repeated for 50 ms before the next variant runs, so that the caches are in the same
state as in a training loop. "floor" is the time of our products at the machine's peak.
"""

import argparse
import itertools
from contextlib import suppress
from typing import Any

import torch

from . import budget
from .ceilings import floors
from .networks import NETWORKS, PEERS, Start
from .timing import Row, Work, alternate, tick, timings

CASES = (
    "weight/resnet18-64", "weight/resnet18-20", "weight/lenet-300-100",
    "mask/resnet18-64", "mask/lenet-300-100", "inference/resnet18-64",
)  # fmt: skip
QUICK = ("weight/resnet18-4", "mask/resnet18-4", "inference/resnet18-4")


def case(text: str) -> str:
    """Parse a phase and a network, for example weight/resnet18-20."""
    phase, _, network = text.partition("/")
    if phase not in PEERS or network not in NETWORKS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no PHASE/NETWORK: phases are {', '.join(PEERS)}; networks are {', '.join(NETWORKS)}"
        )
    return text


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cases", type=case, nargs="+", metavar="PHASE/NETWORK", help=f"default: {' '.join(CASES)}; "
        f"phases: {', '.join(PEERS)}; networks: {', '.join(NETWORKS)}",
    )  # fmt: skip
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.05, 0.02])
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"],
        help="of the products, by autocast (default: float32)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    rows: list[Row] = []
    budgets: list[budget.Budget] = []
    names = options.cases or (QUICK if options.quick else CASES)
    densities = options.densities[: 1 if options.quick else None]
    with suppress(KeyboardInterrupt):  # then the finished rows are shown
        for threads, name, density, dtype in itertools.product(options.threads, names, densities, options.dtype):
            measure(name, density, dtype, threads, options.quick, rows, budgets)
            tick()
    print("\n" + timings(rows))
    if budgets:
        print("\n" + budget.show(budgets, options.quick))
    return {"rows": [row.as_dict() for row in rows], "budgets": [b.as_dict() for b in budgets]}


def measure(
    name: str, density: float, dtype: str, threads: int, quick: bool, rows: list[Row], budgets: list[budget.Budget]
) -> None:
    torch.set_num_threads(threads)
    phase, _, network = name.partition("/")
    start = Start(NETWORKS[network], density, getattr(torch, dtype))
    ours = start.ours(phase)
    start.check(phase, ours)
    ways = [ours, *(start.fastest_peer(how) for how in PEERS[phase])]
    timed = alternate([way.steps(start.network.batches()) for way in ways], 0.1 if quick else 5.0, turn=0.05)
    baselines = {way.name: timing for way, timing in zip(ways[1:], timed[1:], strict=True)}
    shape = f"{network}, batch {start.network.batch}"
    floor, paper = floors(Work(0, start.flops(phase, dense=False), tiles=True, dtype=start.dtype), quick)
    rows.append(
        Row(f"{phase} phase", shape, density, threads, timed[0], baselines=baselines, floor=floor, paper=paper,
            dtype=dtype)
    )  # fmt: skip
    if torch.get_default_device().type == "cpu" and dtype == "float32":
        budgets += [budget.budget(name, phase, start, way, threads, quick) for way in ways[:2]]
