"""Figures of a suite: differences to the reference, learning curves, judges, the reward-drift frontier, pictures side by side."""

import json
import math
import statistics
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from crd.bench.baselines import baseline_file
from crd.bench.results import Results, Row, run_row
from crd.bench.runner import is_finished
from crd.bench.statistics import Interval, mean_interval, paired_difference
from crd.bench.suite import Run, Suite, suite_runs
from crd.report.figures import before_after
from crd.run_folder import RunFolder

#: Okabe and Ito's colours without their yellow, which is faint on white: told apart with every kind of colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "v")
LINES = ("-", "--", "-.", ":")
DIFFERENCES = 4  # metrics whose differences are drawn, the first ones of the suite
NOT_JUDGED = ("reward", "drift", "diversity", "failed")

#: what the learning curves are drawn against: title -> value of a run's row after an epoch
Budget = Callable[[Row, int], float]
BUDGETS: dict[str, Budget] = {
    "pictures": lambda row, epoch: epoch * row["pictures_per_epoch"],
    "forward passes": lambda row, epoch: epoch * row["forwards_per_epoch"],
    "seconds of training": lambda row, epoch: row["training"]["seconds"][epoch - 1] if epoch else 0.0,
}


def draw_figures(results: Results, folder: Path) -> list[str]:
    """Draws everything that the rows allow; names of the files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    reference = results.suite.compared_with
    compared = [task for task in _tasks(results) if {reference} < set(_variants(results, task))]  # and something beside it
    names = [differences(results, folder / f"differences-{task}.png", task) for task in compared]
    names += [learning_curves(results, folder / "curves.png"), frontier(results, folder / "frontier.png")]
    names += [judges(results, folder / f"judges-{task}.png", task) for task in _tasks(results) if _judged(results, task)]
    return names


def learning_curves(results: Results, path: Path) -> str:
    """Held-out reward against pictures, forward passes and seconds: a row of three panels per task."""
    tasks = _tasks(results)
    figure, axes = plt.subplots(len(tasks), 3, figsize=(13, 3.6 * len(tasks) + 0.4), squeeze=False, sharey="row")
    for row, task in zip(axes, tasks, strict=True):
        for axis, (title, budget) in zip(row, BUDGETS.items(), strict=True):
            for variant in _variants(results, task):
                points = trajectory(results, task, variant, "reward")
                x = [_at(results, task, variant, epoch, budget) for epoch in points]
                style = {"label": results.suite.label(variant), **_style(results.suite, variant)}
                _band(axis, x, list(points.values()), style)
            _baseline_lines(axis, results, task)
            axis.set_xlabel(title)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 40k
        _frame(row)
        row[0].set_ylabel(f"{results.suite.label(task)}\nreward, held-out prompts")
    return _save(figure, axes[0][0], path)


def _frame(row: Any) -> None:
    """Shows all means; intervals of few seeds may be wider than anything that can happen, and are cut."""
    heights = [float(y) for axis in row for line in axis.lines for y in line.get_ydata()]
    margin = 0.25 * (max(heights) - min(heights)) if heights else 0.0
    if margin:
        row[0].set_ylim(min(heights) - margin, max(heights) + margin)


def judges(results: Results, path: Path, task: str) -> str:
    """Each held-out judge against the reward trained on, along training: a judge that turns down tells of reward hacking."""
    names = _judged(results, task)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.3 * columns, 3.6 * rows + 0.4), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for variant in _variants(results, task):
            x = trajectory(results, task, variant, "reward")
            y = trajectory(results, task, variant, name)
            both = [epoch for epoch in x if epoch in y]
            label = results.suite.label(variant)
            axis.plot([x[e].mean for e in both], [y[e].mean for e in both], label=label, **_style(results.suite, variant))
        axis.set_xlabel("reward trained on, held-out prompts")
        axis.set_ylabel(name)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    return _save(figure, axes[0][0], path)


def frontier(results: Results, path: Path) -> str:
    """Final reward against final drift: a point with both intervals per variant, of sweeps alone if there are any, connected."""
    tasks, swept = _tasks(results), {variant for members in results.suite.sweeps.values() for variant in members}
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4.4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        points = {}
        for variant in [name for name in _variants(results, task) if not swept or name in swept]:
            x, y = (mean_interval(list(results.final(task, variant, key).values())) for key in ("drift", "reward"))
            points[variant] = (x.mean, y.mean)
            style = {**_style(results.suite, variant), "linestyle": "none"}
            axis.errorbar(*points[variant], xerr=_bar(x), yerr=_bar(y), label=results.suite.label(variant), capsize=3, **style)
        for members in results.suite.sweeps.values():
            line = [points[variant] for variant in members if variant in points]
            axis.plot([x for x, _ in line], [y for _, y in line], color="grey", linewidth=1, zorder=0)
        for name, marker in zip(_baselines(results, task), cycle("*PXD"), strict=False):
            row = results.baselines[task, name]
            axis.plot(row["drift"], row["reward"], marker, color="grey", markersize=9, label=results.suite.label(name))
        axis.set_title(results.suite.label(task))
        axis.set_xlabel("drift from the guided pretrained model")
    axes[0][0].set_ylabel("reward, held-out prompts")
    return _save(figure, axes[0][0], path)


def differences(results: Results, path: Path, task: str) -> str:
    """Paired difference of every variant to the reference, with its interval; hollow where there is one seed only."""
    suite, metrics = results.suite, results.metrics(task)[:DIFFERENCES]
    others = [variant for variant in _variants(results, task) if variant != suite.compared_with]
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(3.2 * len(metrics) + 1, 0.27 * len(others) + 1.2), squeeze=False, sharey=True
    )
    for axis, metric in zip(axes[0], metrics, strict=True):
        reference = results.final(task, suite.compared_with, metric)
        for place, variant in enumerate(others):
            point = paired_difference(results.final(task, variant, metric), reference)
            if point:
                style = {**_style(suite, variant), "marker": "o", "linestyle": "none"}
                fill = "none" if math.isinf(point.half) else style["color"]
                axis.errorbar(point.mean, place, xerr=_bar(point), capsize=3, markerfacecolor=fill, **style)
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_title(f"{metric} - that of {suite.label(suite.compared_with)}", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(others)), [suite.label(variant) for variant in others])
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path.name


def draw_samples(suite: Suite, folder: Path) -> None:
    """Per task: a column per prompt, a row per baseline and variant, with the same noise down each column."""
    first = suite.seeds[0]
    runs = [run for run in suite_runs(suite) if run.seed == first and is_finished(run)]
    folder.mkdir(parents=True, exist_ok=True)
    for task in suite.tasks:
        here = [run for run in runs if run.task == task]
        if not here:
            continue
        sheets = {suite.label(name): baseline_file(suite, task, name).with_suffix(".png") for name in suite.baselines}
        sheets |= {suite.label(run.variant): _result_sheet(run) for run in here}
        prompts = json.loads((here[0].folder / "evaluation_prompts.json").read_text())
        present = {title: sheet for title, sheet in sheets.items() if sheet.exists()}
        columns = here[0].config.evaluation.pictures_per_prompt
        before_after(folder / f"samples-{task}.png", present, prompts, columns, len(prompts))


def _result_sheet(run: Run) -> Path:
    return RunFolder(run.folder).pictures / f"epoch-{run_row(run)['result_epoch']:04d}.png"


def trajectory(results: Results, task: str, variant: str, metric: str) -> dict[int, Interval]:
    """The metric over seeds by epoch, at the epochs that all seeds have; epoch 0 is the baseline with the same guidance."""
    seeds = results.runs[task, variant]
    tables = [{e["epoch"]: e[metric] for e in row["evaluations"] if metric in e} for row in seeds.values()]
    common = sorted(set.intersection(*(set(table) for table in tables)))
    points = {epoch: mean_interval([table[epoch] for table in tables]) for epoch in common}
    guidance = next(iter(seeds.values()))["evaluations"][-1]["guidance_scale"]
    for name in _baselines(results, task):
        row = results.baselines[task, name]
        if row["guidance_scale"] == guidance and metric in row:
            return {0: Interval(row[metric], 0.0, len(seeds)), **points}
    return points


def _at(results: Results, task: str, variant: str, epoch: int, budget: Budget) -> float:
    """The median: one run on a machine that was busy with other things takes many times the seconds of the others."""
    return statistics.median(budget(row, epoch) for row in results.runs[task, variant].values())


def _band(axis: Axes, x: list[float], points: list[Interval], style: dict[str, Any]) -> None:
    """A line, and its 95 % band where there is more than one seed."""
    axis.plot(x, [point.mean for point in points], **style)
    half = [0.0 if math.isinf(point.half) else point.half for point in points]
    low, high = ([p.mean + sign * h for p, h in zip(points, half, strict=True)] for sign in (-1, 1))
    axis.fill_between(x, low, high, alpha=0.15, linewidth=0, color=style["color"])


def _bar(point: Interval) -> float | None:
    return None if math.isinf(point.half) else point.half


def _baseline_lines(axis: Axes, results: Results, task: str) -> None:
    for name, line in zip(_baselines(results, task), cycle(LINES[1:]), strict=False):
        value = results.baselines[task, name]["reward"]
        axis.axhline(value, color="grey", linestyle=line, linewidth=1, label=results.suite.label(name))


def _style(suite: Suite, variant: str) -> dict[str, Any]:
    """The same look of a variant in every figure: colours first, then markers and lines."""
    turn, index = divmod(list(suite.variants).index(variant), len(COLOURS))
    look = {"color": COLOURS[index], "marker": MARKERS[turn % len(MARKERS)], "linestyle": LINES[turn % len(LINES)]}
    return {**look, "markersize": 4}


def _tasks(results: Results) -> list[str]:
    return [task for task in results.suite.tasks if _variants(results, task)]


def _variants(results: Results, task: str) -> list[str]:
    return [variant for variant in results.suite.variants if (task, variant) in results.runs]


def _baselines(results: Results, task: str) -> list[str]:
    return [name for name in results.suite.baselines if (task, name) in results.baselines]


def _judged(results: Results, task: str) -> list[str]:
    return [name for name in results.metrics(task) if name not in NOT_JUDGED]


def _save(figure: Any, first: Axes, path: Path) -> str:
    """One legend for all panels, below them."""
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(6, len(labels)), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path.name
