"""From scores of single pictures to means with intervals: over prompts, and over GenEval's tasks as the benchmark has it.

Intervals are t-intervals over the means of prompts, since pictures of one prompt are not independent of each other. Above 30
degrees of freedom they are at most 4 % too wide (see crd.bench.statistics).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crd.batch import PromptGroup
from crd.bench.statistics import Interval, mean_interval, t_quantile
from crd.rewards.geneval.rules import TAGS
from crd.suites import Suite, prompts_digest


@dataclass(frozen=True)
class TaskScores:
    """GenEval's numbers."""

    overall: Interval  # unweighted mean of the tasks: the official score
    tasks: dict[str, Interval]  # by tag, in the order of TAGS, those that there are
    pictures: Interval  # mean over all pictures, as training logs have it
    any_correct: Interval  # share of prompts with at least one correct picture


@dataclass(frozen=True)
class SuiteScores:
    """What a suite has measured."""

    suite: Suite
    prompts: list[PromptGroup]
    pictures: int  # of a prompt
    scores: dict[str, Interval | None]  # of everything that pictures are scored with
    metrics: dict[str, float]  # plain means of the same, and of what only sets of pictures have
    tasks: TaskScores | None  # GenEval's

    def as_json(self) -> dict[str, Any]:
        tasks = self.tasks and {
            "overall": interval_json(self.tasks.overall),
            "tasks": {tag: interval_json(value) for tag, value in self.tasks.tasks.items()},
            "pictures": interval_json(self.tasks.pictures),
            "any_correct": interval_json(self.tasks.any_correct),
        }
        return {
            "prompts": {"source": self.suite.source, "count": len(self.prompts), "sha256": prompts_digest(self.prompts)},
            "pictures_per_prompt": self.pictures,
            "rewards": [reward.model_dump() for reward in self.suite.rewards],
            "metrics": self.metrics,
            "intervals": {name: interval_json(value) for name, value in self.scores.items()},
            "official": tasks,
        }

    def table(self) -> list[str]:
        """Lines for the terminal."""
        total = len(self.suite.prompts)
        lines = [f"{self.suite.name}: {len(self.prompts)} of {total} prompts ({self.suite.source}) x {self.pictures} pictures"]
        if self.tasks:
            lines.append(row("GenEval, mean of the tasks", self.tasks.overall))
            lines += [row(f"  {tag}", value) for tag, value in self.tasks.tasks.items()]
            lines.append(row("  mean of all pictures", self.tasks.pictures))
            lines.append(row("  prompts with a correct picture", self.tasks.any_correct))
        lines += [row(name, value) for name, value in self.scores.items() if name != self.suite.official]
        plain = {name: value for name, value in self.metrics.items() if name not in (*self.scores, "reward", "failed")}
        lines += [f"{name:32}{value:10.3f}" for name, value in plain.items()]
        failed = round(self.metrics["failed"] * len(self.prompts) * self.pictures)
        return [*lines, f"{failed} pictures got no score"] if failed else lines


def prompt_means(values: np.ndarray) -> list[float]:
    """Mean of each prompt over the pictures that have a score; ``values (prompts, k)``. Prompts without any are left out."""
    known = [row[~np.isnan(row)] for row in values]
    return [float(row.mean()) for row in known if len(row)]


def interval(values: np.ndarray) -> Interval | None:
    """Of a score ``(prompts, k)`` with NaN where there is none; None if there is no score at all."""
    means = prompt_means(values)
    return mean_interval(means) if means else None


def task_scores(tags: Sequence[str], correct: np.ndarray) -> TaskScores | None:
    """From the correctness of each picture ``(prompts, k)`` and each prompt's tag; None if no picture was judged."""
    by_task = {tag: prompt_means(correct[[t == tag for t in tags]]) for tag in TAGS}
    by_task = {tag: means for tag, means in by_task.items() if means}
    pictures = interval(correct)
    if pictures is None:
        return None
    judged = correct[~np.isnan(correct).all(axis=1)]
    return TaskScores(
        overall=mean_of_tasks(list(by_task.values())),
        tasks={tag: mean_interval(means) for tag, means in by_task.items()},
        pictures=pictures,
        any_correct=mean_interval([float(np.nanmax(row) > 0) for row in judged]),
    )


def mean_of_tasks(tasks: Sequence[Sequence[float]]) -> Interval:
    """Unweighted mean of the means of independent samples, with Welch and Satterthwaite's degrees of freedom."""
    mean = statistics.fmean(statistics.fmean(means) for means in tasks)
    count = sum(map(len, tasks))
    if any(len(means) < 2 for means in tasks):
        return Interval(mean, math.inf, count)
    parts = [(statistics.variance(means) / len(means), len(means) - 1) for means in tasks]
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return Interval(mean, 0.0, count)
    degrees = total**2 / sum(variance**2 / free for variance, free in parts)
    return Interval(mean, t_quantile(max(1, int(degrees + 1e-9))) * math.sqrt(total) / len(tasks), count)


def interval_json(value: Interval | None) -> dict[str, float | int | None] | None:
    """Mean, half the width of the interval (null if one prompt leaves it open) and the number of prompts."""
    if value is None:
        return None
    half = value.half if math.isfinite(value.half) else None
    return {"mean": value.mean, "half_width_95": half, "prompts": value.count}


def row(name: str, value: Interval | None) -> str:
    """A line of the table."""
    if value is None:
        return f"{name:32}{'no score':>10}"
    half = f"{value.half:.3f}" if math.isfinite(value.half) else "?"
    return f"{name:32}{value.mean:10.3f}  ± {half}"
