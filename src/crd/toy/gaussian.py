"""What a moving reference and an anchor do to a Gaussian under a linear reward, worked out without a network.

For ``N(m, s2 I)`` and ``r = b . x`` the field of the tilt t differs from the reference's by ``-t s2 b k(sigma)``,
``k = sigma / D``, ``D = (1 - sigma)^2 s2 + sigma^2``. Its R is ``t r`` up to a constant, and the anchor's distance is
quadratic in t, so the optimum of one round (old stands still) is one division.

A free field may also take another t at every noise level, a *profile* tau(sigma). Its R is still linear in x0, with
slope ``2 s2 int sigma (1 - sigma)/D^2 tau``, and its samples are Gaussian with tilt ``s int sigma D^(-3/2) tau``. Both are t
for a constant profile, and two different numbers for others: this is why R alone does not fix a free field.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Profile = NDArray[np.float64]
Weight = Literal["likelihood", "plain"]

DIMENSIONS = 2
COUNT = 20_000
SIGMA: Profile = (np.arange(COUNT) + 0.5) / COUNT  # midpoints: every integral below is a mean over them


@dataclass(frozen=True)
class GaussianCase:
    """``N(., variance I)`` in two dimensions, ``|b|^2 = slope_square``, groups of ``group_size``."""

    variance: float
    slope_square: float
    eta: float
    group_size: int


def _spread(variance: float) -> Profile:
    return (1 - SIGMA) ** 2 * variance + SIGMA**2


def slope(profile: Profile, variance: float) -> float:
    """G: how much of the direction b the implicit reward has."""
    return float(np.mean(2 * variance * SIGMA * (1 - SIGMA) / _spread(variance) ** 2 * profile))


def sampled_tilt(profile: Profile, variance: float) -> float:
    """The tilt of the samples of the field's ordinary differential equation (linear, so solved by an integral)."""
    return float(variance**0.5 * np.mean(SIGMA * _spread(variance) ** -1.5 * profile))


def anchor_curvature(case: GaussianCase, weight: Weight) -> float:
    """The anchor of the tilt t is this times ``lambda t^2``; with the likelihood weight that is KL's ``Var(r) / 2``."""
    if weight == "likelihood":
        return case.variance * case.slope_square / 2
    k_square = float(np.mean((SIGMA / _spread(case.variance)) ** 2))
    return case.variance**2 * case.slope_square * k_square / DIMENSIONS


def predicted_tilts(case: GaussianCase, strength: float, weight: Weight, rounds: int) -> list[float]:
    """The tilt after every round: each minimises ``(1 - 1/K) Var(r) (t - t_old - eta)^2 + lambda curvature t^2``."""
    policy = (1 - 1 / case.group_size) * case.variance * case.slope_square
    tilts = [0.0]
    for _ in range(rounds):
        tilts.append(policy * (tilts[-1] + case.eta) / (policy + strength * anchor_curvature(case, weight)))
    return tilts


def fixed_point(case: GaussianCase, strength: float, weight: Weight) -> float:
    """The tilt at which rounds stop; ``2 eta (1 - 1/K) / lambda`` with the likelihood weight."""
    policy = (1 - 1 / case.group_size) * case.variance * case.slope_square
    return policy * case.eta / (strength * anchor_curvature(case, weight))
