"""Distances of two sets of samples, and the mean over seeds with its interval."""

import statistics

import torch
from torch import Tensor

STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile by number of seeds


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """``2 E|a - b| - E|a - a'| - E|b - b'|`` of samples ``(..., n, d)``, unbiased: around 0 (or below) if they are equal."""

    def within(x: Tensor) -> Tensor:
        count = x.shape[-2]
        return torch.cdist(x, x).sum((-1, -2)) / (count * (count - 1))

    return 2 * torch.cdist(a, b).mean((-1, -2)) - within(a) - within(b)


def mean_interval(values: list[float]) -> dict[str, float]:
    """The mean and the half-width of its 95 % interval (Student's t), over 2 to 5 seeds; to five decimals."""
    half_width = STUDENT_T[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": round(statistics.fmean(values), 5), "half_width": round(half_width, 5)}
