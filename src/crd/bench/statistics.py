"""Means over seeds with 95 % intervals, and the paired difference of two methods that verdicts rest on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: 97.5 % quantile of Student's t for 1 to 30 degrees of freedom
T_975 = (
    *(12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814),
    *(2.20099, 2.17881, 2.16037, 2.14479, 2.13145, 2.11991, 2.10982, 2.10092, 2.09302, 2.08596),
    *(2.07961, 2.07387, 2.06866, 2.06390, 2.05954, 2.05553, 2.05183, 2.04841, 2.04523, 2.04227),
)


@dataclass(frozen=True)
class Interval:
    """A mean, and half the width of its 95 % interval: infinite if there is one value only."""

    mean: float
    half: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t; above 30 degrees of freedom that of 30, which is at most 4 % too large."""
    return T_975[min(degrees, len(T_975)) - 1]


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of at least one value, with its t-interval."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return Interval(mean, math.inf, 1)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return Interval(mean, t_quantile(count - 1) * math.sqrt(variance / count), count)


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> Interval | None:
    """``a - b`` over the seeds that both have; none if there is no such seed.

    A seed gives both the same prompts and noise, so what they share cancels: the interval is narrower than
    that of two independent means.
    """
    common = sorted(a.keys() & b.keys())
    return mean_interval([a[seed] - b[seed] for seed in common]) if common else None


def verdict(difference: Interval | None) -> str:
    """Whether the claim "this difference is positive" holds: decided only by an interval that leaves 0 out."""
    if difference is None or not difference.excludes_zero:
        return "not decided"
    return "holds" if difference.mean > 0 else "does not"
