"""Samplers of the probability-flow ODE, with one signature: (velocity, x, sigmas) -> x0."""

import itertools
from collections.abc import Callable

from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x (b, ...), sigma (b,)) -> velocity (b, ...)


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
    """First-order steps along ``sigmas (steps + 1,)``, the update of FlowMatchEulerDiscreteScheduler."""
    for here, there in itertools.pairwise(sigmas):
        x = x + (there - here) * velocity(x, here.expand(len(x)))
    return x
