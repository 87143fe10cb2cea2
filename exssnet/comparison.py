"""The report of an experiment: tables in Markdown, all numbers in JSON, and plots."""

import json
import math
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from .metrics import epochs_to_reach
from .recipes import KKT

Runs = list[dict[str, Any]]

_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""
BASE = "supsup"
"""The method that others are compared with."""


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean difference of paired values and half the width of its 95 % interval by Student's t; NaN for one pair."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, std = mean_std(differences)
    if len(differences) < 2:
        return mean, math.nan
    t = _T95[len(differences) - 2] if len(differences) - 2 < len(_T95) else 1.96
    return mean, t * std / math.sqrt(len(differences))


def _group(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["method"], run["init_scale"], run["density"]


def groups_of(report: dict[str, Any]) -> dict[tuple[Any, ...], Runs]:
    """Runs of all seeds by (method, init_scale, density), in the order of the recipe; diverged runs are left out."""
    found: dict[tuple[Any, ...], Runs] = {}
    for run in report["runs"]:
        if "diverged" not in run:
            found.setdefault(_group(run), []).append(run)
    return found


def write_report(report: dict[str, Any], out: Path) -> None:
    """Write report.json, report.md and, where matplotlib is installed, the plots it shows."""
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    plots = _plots(report, out)
    (out / "report.md").write_text(
        "\n\n".join([*_text(report), *(f"![{name}]({file})" for name, file in plots)]) + "\n"
    )


def _text(report: dict[str, Any]) -> list[str]:
    made, groups = report["recipe"], groups_of(report)
    scaled = f", scaled to {made['scale']:g}: a smoke test" if made["scale"] < 1 else ""
    machine = report["machine"]
    epochs = max(1, round(made["epochs"] * made["scale"]))
    parts = [
        f"# {made['title']}{scaled}",
        f"{made['model']}, {epochs} + {epochs} epochs (methods with one phase: {2 * epochs}), batch "
        f"{made['batch_size']}, {made['seeds']} seeds; mean ± standard deviation, accuracies in %. "
        + (
            f"{100 * made['validation']:g} % of the training data picks the best epoch. "
            if made["validation"]
            else "There is no validation split: the last epoch counts. "
        )
        + f"torch {machine['torch']}, {machine['cpu']}, {machine['processes']} processes of one thread on "
        f"{machine['cores']} cores, {report['seconds'] / 60:.0f} minutes in this go.",
        _table(
            ["method", "density", "weights", "average accuracy", "forgetting", "learning accuracy", "forward transfer",
             "s / run", "memory, MB", "kept, MB", "learning rates"],
            [_row(group, runs) for group, runs in groups.items()],
        ),
    ]  # fmt: skip
    for title, table in (
        (
            f"Difference to {BASE} with the same number of epochs, paired by seed, with 95 % intervals",
            _differences(groups),
        ),
        ("Knowledge transfer (KKT): with and without", _transfer(groups)),
        ("Weights of the masks: kept, and free when the task came", _capacity(groups)),
        (
            "Without a task id: share of test items whose task was found, and that were classified right",
            _inferred(groups),
        ),
    ):
        if table:
            parts += [f"## {title}", table]
    if lost := [run for run in report["runs"] if "diverged" in run]:
        parts.append("Diverged: " + ", ".join(f"{r['method']} {r['density'] or ''} seed {r['seed']}" for r in lost))
    return parts


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) if rows else ""


def _percent(values: Sequence[float]) -> str:
    mean, std = mean_std([100 * v for v in values])
    return f"{mean:.2f} ± {std:.2f}" if len(values) > 1 else f"{mean:.2f}"


def _name(group: tuple[Any, ...]) -> list[str]:
    method, scale, density = group
    return [method, "" if density is None else f"{density:g}", scale]


def _row(group: tuple[Any, ...], runs: Runs) -> list[str]:
    def every(key: str) -> list[float]:
        return [run[key] for run in runs]

    return [
        *_name(group), _percent(every("average accuracy")), _percent(every("forgetting")),
        _percent(every("learning accuracy")),
        _percent(every("forward transfer")) if "forward transfer" in runs[0] else "",
        f"{statistics.median(every('seconds')):.0f}", f"{max(every('memory')) / 1e6:.0f}",
        f"{max(every('kept bytes')) / 1e6:.2f}", runs[0]["shown rates"],
    ]  # fmt: skip


def paired(groups: dict[tuple[Any, ...], Runs], group: tuple[Any, ...], base: str) -> tuple[list[float], list[float]]:
    """Average accuracies in % of a group and of `base` at the same density, by seeds that both have."""
    ours = {run["seed"]: run for run in groups.get(group, [])}
    theirs = {run["seed"]: run for run in groups.get((base, *group[1:]), [])}
    seeds = sorted(ours.keys() & theirs.keys())
    return tuple([100 * part[seed]["average accuracy"] for seed in seeds] for part in (ours, theirs))  # type: ignore[return-value]


def _differences(groups: dict[tuple[Any, ...], Runs]) -> str:
    rows = []
    wanted = [g for g in groups if g[0] != BASE and g[2] is not None]
    for (method, scale), members in groupby(sorted(wanted, key=lambda g: (g[0], g[1])), key=lambda g: (g[0], g[1])):
        means = []
        for group in members:
            ours, theirs = paired(groups, group, BASE)
            if ours:
                mean, half = paired_difference(ours, theirs)
                means.append(mean)
                rows.append(
                    [method, f"{group[2]:g}", scale, f"{mean:+.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")]
                )
        if len(means) > 1:
            rows.append([method, "mean of all densities", scale, f"{statistics.mean(means):+.2f}"])
    return _table(["method", "density", "weights", "points"], rows)


def _transfer(groups: dict[tuple[Any, ...], Runs]) -> str:
    rows = []
    for group, runs in groups.items():
        plain = {run["seed"]: run for run in groups.get((group[0].removesuffix(KKT), *group[1:]), [])}
        pairs = [(run, plain[run["seed"]]) for run in runs if run["seed"] in plain]
        if not group[0].endswith(KKT) or not pairs:
            continue
        ours, theirs = zip(*[(100 * a["average accuracy"], 100 * b["average accuracy"]) for a, b in pairs], strict=True)
        mean, half = paired_difference(ours, theirs)
        counts = [
            (epochs_to_reach(fast["curve"], target), epochs_to_reach(slow["curve"], target), len(slow["curve"]))
            for a, b in pairs
            for fast, slow in list(zip(a["tasks"], b["tasks"], strict=True))[1:]
            if fast.get("sources")
            for target in [max(slow["curve"])]
        ]
        fast_mean = statistics.mean(all_ if fast is None else fast for fast, _, all_ in counts) if counts else 0
        slow_mean = statistics.mean(slow or 0 for _, slow, _ in counts) if counts else 0
        rows.append([
            *_name(group), f"{mean:+.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}"),
            f"{sum(fast is not None for fast, *_ in counts)} of {len(counts)}",
            f"{fast_mean:.1f} against {slow_mean:.1f}",
        ])  # fmt: skip
    head = ["method", "density", "weights", "points of average accuracy", "tasks that reach the best without KKT",
            "epochs until then (never: all)"]  # fmt: skip
    return _table(head, rows)


def _capacity(groups: dict[tuple[Any, ...], Runs]) -> str:
    rows = []
    for group, runs in groups.items():
        tasks = [t for t in runs[0]["tasks"] if "body" in t]
        if not tasks or group[2] is None:
            continue
        for part in ("body", "head"):
            first, last = tasks[0][part], tasks[-1][part]
            if not last["weights"]:
                continue
            rows.append([
                *_name(group), part, f"{first['kept']:,} of {first['weights']:,}",
                f"{tasks[min(1, len(tasks) - 1)][part]['free']:,}", f"{last['free']:,}",
                f"{100 * last['used'] / last['weights']:.1f}",
            ])  # fmt: skip
    head = ["method", "density", "weights", "layers", "kept", "free in the second task", "free in the last", "used, %"]
    return _table(head, rows)


def _inferred(groups: dict[tuple[Any, ...], Runs]) -> str:
    rows = [
        [
            *_name(group), rule, _percent([run["without task id"][rule]["task_accuracy"] for run in runs]),
            _percent([run["without task id"][rule]["accuracy"] for run in runs]),
            _percent([run["average accuracy"] for run in runs]),
        ]
        for group, runs in groups.items()
        if "without task id" in runs[0]
        for rule in runs[0]["without task id"]
    ]  # fmt: skip
    return _table(["method", "density", "weights", "rule, samples", "task accuracy", "accuracy", "with task id"], rows)


def _plots(report: dict[str, Any], out: Path) -> list[tuple[str, str]]:
    """(title, file) of each plot that was drawn."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups, drawn = groups_of(report), []

    def save(figure: Any, title: str, file: str) -> None:
        figure.savefig(out / file, dpi=120)
        plt.close(figure)
        drawn.append((title, file))

    def accuracies(group: tuple[Any, ...]) -> tuple[float, float]:
        return mean_std([100 * run["average accuracy"] for run in groups[group]])

    def label(group: tuple[Any, ...]) -> str:
        return " ".join(filter(None, [group[0], "" if group[2] is None else f"{group[2]:g}", _scale(group)]))

    several = len({g[1] for g in groups if g[1]}) > 1

    def _scale(group: tuple[Any, ...]) -> str:
        return group[1] if several else ""

    order = sorted(groups, key=lambda g: accuracies(g)[0])
    figure, axes = plt.subplots(figsize=(8, 1 + 0.28 * len(order)), layout="constrained")
    axes.barh(range(len(order)), [accuracies(g)[0] for g in order], xerr=[accuracies(g)[1] for g in order], capsize=3,
              color=["C0" if g[2] is None else "C1" for g in order])  # fmt: skip
    axes.set_xlim(max(0, min(accuracies(g)[0] - accuracies(g)[1] for g in order) - 5))
    axes.set(yticks=range(len(order)), yticklabels=[label(g) for g in order], xlabel="average accuracy, %",
             title="Average accuracy by method, standard deviation over seeds (blue: dense)")  # fmt: skip
    save(figure, "Accuracy by method", "methods.png")

    lines: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
    for group in groups:
        if group[2] is not None:
            lines.setdefault(group[:2], []).append(group)
    if any(len(members) > 1 for members in lines.values()):
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        for members in lines.values():
            members.sort(key=lambda g: g[2])
            values = [accuracies(g) for g in members]
            axes.errorbar([100 * g[2] for g in members], [m for m, _ in values], [s for _, s in values], capsize=3,
                          marker="o", label=" ".join(filter(None, [members[0][0], _scale(members[0])])))  # fmt: skip
        axes.set(xlabel="density, %", ylabel="average accuracy, %", title="Accuracy against density")
        axes.legend(fontsize="small")
        save(figure, "Accuracy against density", "density.png")

    if masked := [g for g in groups if g[2] is not None and "body" in groups[g][0]["tasks"][0]]:
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        for group in masked:
            tasks = groups[group][0]["tasks"]
            axes.plot([100 * t["body"]["used"] / t["body"]["weights"] for t in tasks], marker=".", label=label(group))
        axes.set(xlabel="task", ylabel="weights used so far, head apart, %", title="Capacity used by task, seed 0")
        axes.legend(fontsize="x-small", ncols=2)
        save(figure, "Capacity used", "capacity.png")

    best = max((g for g in groups), key=lambda g: (g[0] == "exssnet", accuracies(g)[0]))
    matrix = groups[best][0]["accuracy"]
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    shown = [[100 * a for a in row] + [math.nan] * (len(matrix) - len(row)) for row in matrix]
    image = axes.imshow(shown, cmap="viridis", vmax=100)
    axes.set(xlabel="test data of task", ylabel="after learning task", title=f"Accuracy (%), {label(best)}, seed 0")
    figure.colorbar(image)
    save(figure, "Accuracy matrix", "matrix.png")

    pairs = [g for g in groups if g[0].endswith(KKT) and (g[0].removesuffix(KKT), *g[1:]) in groups]
    if pairs:
        figure, all_axes = plt.subplots(
            1, len(pairs), figsize=(1 + 4 * len(pairs), 4), layout="constrained", squeeze=False
        )
        for axes, group in zip(all_axes[0], pairs, strict=True):
            for g, style in ((group, "-"), ((group[0].removesuffix(KKT), *group[1:]), "--")):
                curves = [[100 * a for a in t["curve"]] for run in groups[g] for t in run["tasks"][1:] if t["curve"]]
                length = min(map(len, curves), default=0)
                axes.plot(range(1, length + 1), [statistics.mean(c[i] for c in curves) for i in range(length)], style,
                          marker=".", label=g[0])  # fmt: skip
            axes.set(xlabel="epoch, over both phases", ylabel="accuracy on held-out data, %", title=label(group))
            axes.legend(fontsize="small")
        save(figure, "Learning curves with and without KKT, mean over all tasks but the first", "kkt.png")

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1 + 0.28 * len(groups)), layout="constrained", sharey=True)
    names = list(groups)[::-1]
    left.barh(range(len(names)), [statistics.median(r["seconds"] for r in groups[g]) for g in names])
    right.barh(range(len(names)), [max(r["memory"] for r in groups[g]) / 1e6 for g in names])
    left.set(yticks=range(len(names)), yticklabels=[label(g) for g in names], xlabel="seconds a run, one thread")
    right.set(xlabel="peak memory of the run, MB")
    save(figure, "Time and memory", "cost.png")
    return drawn
