"""Which noise levels a group is trained at, in one optimiser step: one set per group, so that members compare like with like."""

import torch
from torch import Tensor

from crd.config import NoiseConfig
from crd.seeding import generator

MAXIMUM = 0.999  # of continuous levels: at 1 the input says nothing of the picture


def group_levels(config: NoiseConfig, grid: Tensor, *, seed: int, step: int, group: int) -> Tensor:
    """Noise levels ``(levels,)`` of one group at one optimiser step, a function of (seed, step, group).

    ``rollout``: of the rollout's grid, without those below ``minimum``, drawn without replacement (all of
    them, if there are no more than asked). ``continuous``: one uniform draw in each of ``levels`` equal
    strata of (minimum, 0.999), or up to the grid's highest level if a model knows none above it.
    """
    rng = generator(seed, step, "sigma", group)
    if config.source == "rollout":
        usable = grid[grid >= config.minimum]
        return usable[torch.randperm(len(usable), generator=rng)[: config.levels].sort().values]
    strata = (torch.arange(config.levels) + torch.rand(config.levels, generator=rng)) / config.levels
    maximum = min(MAXIMUM, float(grid.max()))
    return config.minimum + (maximum - config.minimum) * strata


def level_count(config: NoiseConfig, grid: Tensor) -> int:
    """How many levels :func:`group_levels` gives."""
    return min(config.levels, int((grid >= config.minimum).sum())) if config.source == "rollout" else config.levels
