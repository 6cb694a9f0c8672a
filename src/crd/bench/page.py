"""The report of a suite as Markdown: claims, tables per task, figures."""

import math
from pathlib import Path

from crd.alarm import Alarm
from crd.bench.results import Results
from crd.bench.statistics import Interval, mean_interval, paired_difference, verdict
from crd.bench.suite import suite_runs


def page(results: Results, figures: list[str]) -> str:
    """The whole report; ``figures`` are file names beside it."""
    suite = results.suite
    done, total = sum(len(seeds) for seeds in results.runs.values()), len(suite.tasks) * len(suite.variants) * len(suite.seeds)
    parts = [f"# {suite.name}\n", f"{done} of {total} runs. Means over seeds ± half of the 95 % t-interval.\n"]
    if suite.claims:
        parts.append(claim_table(results))
    for task in suite.tasks:
        if results.metrics(task):
            parts += [f"## {suite.label(task)}\n", final_table(results, task), difference_table(results, task)]
    parts += alarms(results)
    parts += [f"![{Path(name).stem}]({name})\n" for name in figures]
    return "\n".join(parts)


def claim_table(results: Results) -> str:
    """What the suite was to decide: the paired difference and whether its interval leaves 0 out."""
    suite = results.suite
    lines = []
    for claim in suite.claims:
        for task in claim.tasks or suite.tasks:
            more, less = (results.final(task, method, claim.metric) for method in (claim.more, claim.less))
            difference = paired_difference(more, less)
            names = f"{suite.label(claim.more)} - {suite.label(claim.less)}"
            cells = [claim.text, suite.label(task), f"{claim.metric}: {names}", number(difference, "+"), verdict(difference)]
            lines.append(cells)
    return table(["claim", "task", "paired difference", "value", "verdict"], lines)


def final_table(results: Results, task: str) -> str:
    """Baselines and variants with their final metrics and what they cost."""
    suite, metrics = results.suite, results.metrics(task)
    lines = []
    for name in suite.baselines:
        if row := results.baselines.get((task, name)):
            values = [plain_number(row[metric]) if metric in row else "–" for metric in metrics]
            lines.append([suite.label(name), "–", *values, "0", "0", "0", "–"])
    for variant in suite.variants:
        if seeds := results.runs.get((task, variant)):
            finals = [list(results.final(task, variant, metric).values()) for metric in metrics]
            rows = list(seeds.values())
            cost = [
                f"{sum(row['epochs'] for row in rows) / len(rows):g}",
                f"{sum(row['epochs'] * row['forwards_per_epoch'] for row in rows) / len(rows):,.0f}",
                number(mean_interval([row["seconds"] for row in rows])),
                f"{max(row['peak_memory_MiB'] for row in rows)}",
            ]
            values = [number(mean_interval(final)) if final else "–" for final in finals]
            lines.append([suite.label(variant), str(len(rows)), *values, *cost])
    return table(["", "seeds", *metrics, "epochs", "forward passes", "seconds", "peak MiB"], lines)


def difference_table(results: Results, task: str) -> str:
    """Every method minus the reference, seed by seed; bold where the interval leaves 0 out."""
    suite, metrics = results.suite, results.metrics(task)
    reference = suite.compared_with
    lines = []
    for method in (*suite.baselines, *suite.variants):
        differences = [
            paired_difference(results.final(task, method, metric), results.final(task, reference, metric)) for metric in metrics
        ]
        if method != reference and any(differences):
            lines.append([suite.label(method), *(_marked(difference) for difference in differences)])
    if not lines:
        return ""
    heading = f"Paired difference to {suite.label(reference)}, seed by seed; bold: its interval leaves 0 out.\n\n"
    return heading + table(["", *metrics], lines)


def alarms(results: Results) -> list[str]:
    """Which runs the hack alarm would flag, with the baselines as the pretrained model."""
    suite, lines = results.suite, []
    runs = suite_runs(suite)
    for (task, variant), seeds in results.runs.items():
        here = [run for run in runs if (run.task, run.variant) == (task, variant) and run.seed in seeds]
        found = {run.seed: results.alarms(run) for run in here}
        raised = [alarm for alarms_ in found.values() for alarm in alarms_]
        if raised:
            signs = ", ".join(f"{sign} (from epoch {min(a.epoch for a in raised if a.sign == sign)})" for sign in _signs(raised))
            share = f"{sum(map(bool, found.values()))} of {len(seeds)}"
            lines.append([suite.label(task), suite.label(variant), share, signs])
    return ["## Hack alarms\n", table(["task", "", "runs with an alarm", "signs"], lines)] if lines else []


def _signs(raised: list[Alarm]) -> list[str]:
    return sorted({alarm.sign for alarm in raised})


def missing_runs(results: Results) -> list[str]:
    """Names of the suite's runs that the report lacks."""
    return [run.name for run in suite_runs(results.suite) if run.seed not in results.runs.get((run.task, run.variant), {})]


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def plain_number(value: float, sign: str = "") -> str:
    """Three decimals, fewer for large numbers."""
    return f"{value:{sign},.{_decimals(value)}f}"


def number(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return "–"
    mean = plain_number(interval.mean, sign)
    return mean if math.isinf(interval.half) else f"{mean} ± {interval.half:,.{_decimals(interval.mean)}f}"


def _marked(interval: Interval | None) -> str:
    text = number(interval, "+")
    return f"**{text}**" if interval and interval.excludes_zero else text


def _decimals(value: float) -> int:
    return 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
