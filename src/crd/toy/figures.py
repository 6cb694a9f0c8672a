"""One figure per experiment, in colours that colour-blind readers can tell apart (Okabe and Ito)."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"

Results = dict[str, Any]


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(4.6 * count, 3.7), squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, list(axes[0])


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _points(axis: Axes, x: list[float], numbers: list[dict[str, float]], index: int, label: str, line: str = "-") -> None:
    means, errors = [n["mean"] for n in numbers], [n["half_width"] for n in numbers]
    style: Results = {"color": COLOURS[index], "marker": MARKERS[index], "linestyle": line, "markersize": 4, "capsize": 3}
    axis.errorbar(x, means, errors, label=label, **style)


def _target(axis: Axes) -> None:
    axis.axhline(1, color="black", linewidth=1, linestyle="--", label="p*")
    axis.set_ylabel("fitted tilt of the samples / eta")


def fixed_reference(path: Path, results: Results) -> None:
    figure, (left, middle, right) = _panels(3)
    for index, estimate in enumerate(("halves", "average")):
        row = results[f"mixture, {estimate}"]
        steps = sorted(int(key.split("@")[1]) for key in row if key.startswith("energy@"))
        _points(left, [float(s) for s in steps], [row[f"energy@{s}"] for s in steps], index, f"mixture student, {estimate}")
        _points(middle, [float(s) for s in steps], [row[f"tilt@{s}"] for s in steps], index, f"mixture student, {estimate}")
        strengths = sorted(float(k.rsplit(" ", 1)[1]) for k in results if k.startswith(f"network, {estimate}, anchor"))
        rows = [results[f"network, {estimate}, anchor {s:g}"]["tilt"] for s in strengths]
        _points(right, strengths, rows, index, f"network, {estimate}")
    floor = results["floor"]["energy"]
    low, high = floor["mean"] - floor["half_width"], floor["mean"] + floor["half_width"]
    left.axhspan(low, high, color="grey", alpha=0.4, label="exact against exact")
    left.set(xlabel="optimiser steps", ylabel="energy distance to p*", yscale="symlog", ylim=(-2e-3, 1))
    left.set_yscale("symlog", linthresh=2e-3)
    middle.set_xlabel("optimiser steps")
    exact = results["network, exact normaliser"]["tilt"]
    _points(right, [0.0], [exact], 2, "network, exact log Z, no centering")
    right.set_xlabel("strength of the likelihood-weighted anchor")
    for axis in (middle, right):
        _target(axis)
    for axis in (left, middle, right):
        axis.legend(fontsize=7)
    _save(figure, path)


def moving_reference(path: Path, results: Results) -> None:
    figure, axes = _panels(2)
    for axis, kind in zip(axes, ("mixture", "network"), strict=True):
        rows = {name.split(", ", 1)[1]: row for name, row in results["measured"].items() if name.startswith(kind)}
        for index, (name, row) in enumerate(sorted(rows.items())):
            count = [float(k) for k in range(len(row))]
            _points(axis, count, [row[f"tilt@{int(k)}"] for k in count], index, name, "none")
            predicted = results["predicted"][f"mixture, {name}"]
            if "rounds" in predicted:
                axis.plot(count, predicted["rounds"], color=COLOURS[index], linewidth=1)
            if "fixed_point" in predicted:
                axis.axhline(predicted["fixed_point"], color=COLOURS[index], linewidth=1, linestyle=":")
        axis.set(xlabel="rounds", ylabel="tilt of the samples", ylim=(0, 8.5))
        axis.set_title(f"{kind} student (lines: predicted; dotted: fixed points)", fontsize=8)
        axis.legend(fontsize=7)
    _save(figure, path)


def _bars(axis: Axes, results: Results, key: str, prompts: int = 3) -> None:
    """Groups of bars: one group per prompt, one colour per variant."""
    width = 0.8 / len(results)
    for index, (name, row) in enumerate(sorted(results.items())):
        numbers = [row[f"{key}_{c}"] for c in range(prompts)]
        places = [c + (index - (len(results) - 1) / 2) * width for c in range(prompts)]
        means, errors = [n["mean"] for n in numbers], [n["half_width"] for n in numbers]
        axis.bar(places, means, width, yerr=errors, color=COLOURS[index], label=name, capsize=2)
    axis.set_xticks(range(prompts))


def _by_prompt(path: Path, results: Results, labels: list[str]) -> None:
    figure, (left, right) = _panels(2)
    _bars(left, results, "tilt")
    _bars(right, results, "energy")
    _target(left)
    right.set_ylabel("energy distance to p*")
    right.set_yscale("symlog", linthresh=1e-3)
    for axis in (left, right):
        axis.set_xticklabels(labels)
        axis.legend(fontsize=7)
    _save(figure, path)


def centering(path: Path, results: Results) -> None:
    _by_prompt(path, results, ["mean reward +3", "mean reward 0", "mean reward -3"])


def samplers(path: Path, results: Results) -> None:
    _by_prompt(path, results, ["prompt 0", "prompt 1", "prompt 2"])


def level_estimates(path: Path, results: Results) -> None:
    figure, (left, right) = _panels(2)
    for index, kind in enumerate(("per_level", "average", "average, antithetic", "halves")):
        levels = sorted(int(name.rsplit(", ", 1)[1]) for name in results if name.rsplit(", ", 1)[0] == kind)
        for axis, key in ((left, "tilt"), (right, "energy")):
            _points(axis, [float(n) for n in levels], [results[f"{kind}, {n}"][key] for n in levels], index, kind)
    _target(left)
    right.set_ylabel("energy distance to p*")
    right.set_yscale("symlog", linthresh=1e-3)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("noise levels (network evaluations) per sample and step")
        axis.legend(fontsize=7)
    _save(figure, path)


FIGURES = {
    "fixed_reference": fixed_reference,
    "moving_reference": moving_reference,
    "centering": centering,
    "level_estimates": level_estimates,
    "samplers": samplers,
}
