"""Step time of the weight phase by density, with a fitted line and the fixed cost of a step.

The line is fitted to our medians by least squares of the relative error. Its value at density 0 is the fixed cost:
norms, activations, Python. The time of the baselines does not depend on the density. All variants alternate round by
round. Each network is checked before it is timed. With --dtype bfloat16 all of them run under autocast. --plot draws a
plot with logarithmic axes.
"""

import argparse
import itertools
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from exssnet.experiments.plotting import pyplot, save
from exssnet.io.console import secondary

from .networks import NETWORKS, PEERS, Start
from .timing import Timing, alternate, milliseconds, percent, table


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", choices=NETWORKS, help="default: resnet18-20")
    parser.add_argument(
        "--densities", type=float, nargs="+", default=[0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2], help="2 or more"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw step time against density (needs matplotlib)")


def fit(densities: list[float], seconds: list[float]) -> tuple[float, float]:
    """Fit seconds = fixed + slope * density by least squares of the relative error; returns (fixed, slope)."""
    t = torch.tensor(seconds, dtype=torch.float64)
    a = torch.stack([torch.ones_like(t), torch.tensor(densities, dtype=torch.float64)], 1) / t[:, None]
    fixed, slope = torch.linalg.lstsq(a, torch.ones_like(t)[:, None]).solution.flatten().tolist()
    return fixed, slope


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.plot and find_spec("matplotlib") is None:
        raise ModuleNotFoundError("--plot needs matplotlib, which is not installed (pip install 'exssnet[plots]')")
    if len(set(options.densities)) < 2:
        raise ValueError(f"a line needs two densities, got {options.densities}")
    network = options.network or ("resnet18-4" if options.quick else "resnet18-20")
    densities, settings = sorted(set(options.densities)), itertools.product(options.threads, options.dtype)
    runs: list[dict[str, Any]] = []
    with suppress(KeyboardInterrupt):  # then the finished runs are written
        for threads, dtype in settings:
            runs.append(measure(network, densities, dtype, threads, options.quick))
    if options.plot and runs:
        with secondary(f"{options.plot} was not written"):
            plot(network, runs, options.plot)
    return {"network": network, "runs": runs}


def measure(network: str, densities: list[float], dtype: str, threads: int, quick: bool) -> dict[str, Any]:
    torch.set_num_threads(threads)
    starts = [Start(NETWORKS[network], density, getattr(torch, dtype)) for density in densities]
    ways = []
    for start in starts:
        ways.append(start.ours("weight"))
        start.check("weight", ways[-1])
    others = [starts[0].fastest_peer(how) for how in PEERS["weight"]]
    timed = alternate([way.steps(starts[0].network.batches()) for way in ways + others], 0.1 if quick else 20.0)
    ours = timed[: len(ways)]
    peers = {way.name: t for way, t in zip(others, timed[len(ways) :], strict=True)}
    fixed, slope = fit(densities, [t.median for t in ours])
    layers = len(starts[0].masks)
    show(f"{network}, {_setting(dtype, threads)}", densities, ours, peers, fixed, slope, layers)
    return {
        "threads": threads,
        "dtype": dtype,
        "layers": layers,
        "densities": densities,
        "seconds": [t.median for t in ours],
        "spread": [t.spread for t in ours],
        "peers": {name: t.median for name, t in peers.items()},
        "fixed": fixed,
        "fixed_per_layer": fixed / layers,
        "slope": slope,
    }


def _setting(dtype: str, threads: int) -> str:
    return f"{dtype}, {threads} thread{'s' * (threads > 1)}"


def show(
    what: str, densities: list[float], ours: list[Timing], peers: dict[str, Timing], fixed: float, slope: float,
    layers: int,
) -> None:  # fmt: skip
    lines = [
        [
            f"{d:g}", milliseconds(t.median), milliseconds(t.spread), milliseconds(fixed + slope * d),
            percent(fixed / t.median), ", ".join(f"{name} {p.median / t.median:.1f}" for name, p in peers.items()),
        ]
        for d, t in zip(densities, ours, strict=True)
    ]  # fmt: skip
    print(f"\nweight phase of {what}, {layers} masked layers")
    print(table(["density", "median ms", "spread ms", "line ms", "fixed share", "times faster than"], lines))
    print(
        f"fixed cost {milliseconds(fixed)} ms a step, {fixed / layers * 1e6:.0f} us a masked layer; "
        f"{milliseconds(slope / 100)} ms for each percent of density",
        flush=True,
    )


def plot(network: str, runs: list[dict[str, Any]], file: Path) -> None:
    plt = pyplot()
    from matplotlib import ticker

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for number, run in enumerate(runs):
        setting = _setting(run["dtype"], run["threads"])
        color, d = f"C{number}", torch.tensor(run["densities"], dtype=torch.float64)
        line = torch.logspace(float(d.min().log10()), float(d.max().log10()), 50, dtype=torch.float64)
        axes.plot(100 * d, [1e3 * t for t in run["seconds"]], "o", color=color, label=f"ours, {setting}")
        axes.plot(
            100 * line, 1e3 * (run["fixed"] + run["slope"] * line), color=color, lw=1,
            label=f"{1e3 * run['fixed']:.3g} ms + {10 * run['slope']:.3g} ms per percent",
        )  # fmt: skip
        for (name, seconds), style in zip(run["peers"].items(), ("--", ":"), strict=True):
            axes.axhline(1e3 * seconds, color=str(0.3 + 0.3 * number), ls=style, label=f"{name}, {setting}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="density, %",
        ylabel="step, ms",
        title=f"Weight phase of {network}, batch {NETWORKS[network].batch}",
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks([100 * d for d in runs[0]["densities"]], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, file, dpi=150)
