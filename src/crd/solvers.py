"""Samplers with one signature: (velocity, x, sigmas) -> points or picture."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from crd.batch import Path
from crd.objectives.flow_grpo import log_density, spreads, step_mean

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x (b, ...), sigma (b,)) -> velocity (b, ...)


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
    """First-order steps of the ODE along ``sigmas (steps + 1,)``, the update of FlowMatchEulerDiscreteScheduler."""
    for here, there in itertools.pairwise(sigmas):
        x = x + (there - here) * velocity(x, here.expand(len(x)))
    return x


def euler_maruyama(velocity: Velocity, x: Tensor, sigmas: Tensor, scale: float, draw: Callable[[int], Tensor]) -> Path:
    """Steps of the SDE with the same marginals (see objectives/flow_grpo.py); ``draw(step)`` gives noise shaped as ``x``."""
    points, densities = [x], []
    for step, spread in enumerate(spreads(sigmas, scale)):
        levels = [value.expand(len(x)) for value in (sigmas[step], sigmas[step + 1], spread)]
        mean = step_mean(x, velocity(x, levels[0]), *levels)
        x = mean + spread * (sigmas[step] - sigmas[step + 1]).sqrt() * draw(step)
        points.append(x)
        densities.append(log_density(x, mean, *levels))
    return Path(torch.stack(points, 1), torch.stack(densities, 1))
