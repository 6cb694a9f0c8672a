"""Which noise levels a group is trained at in one optimiser step: the same for all members, so that like compares with like."""

import torch
from torch import Tensor

from crd.config import CRDConfig, NoiseConfig
from crd.errors import CRDError
from crd.seeding import generator

MAXIMUM = 0.999  # of continuous levels: at 1 the input says nothing of the picture
PURPOSES = ("sigma", "sigma-odd")


def group_levels(config: NoiseConfig, grid: Tensor, *, seed: int, step: int, group: int, halves: bool = False) -> Tensor:
    """Noise levels of one group at one optimiser step, a function of (seed, step, group).

    ``rollout``: of the rollout's grid, without those below ``minimum``, drawn without replacement (all of
    them, if there are no more than asked). ``continuous``: one uniform draw in each of as many equal
    strata of (minimum, 0.999), or up to the grid's highest level if a model knows none above it.

    ``halves``: the even and the odd ones are drawn independently of each other, as the product of two residuals
    is unbiased only if both estimate the same R.
    """
    sets = [
        _draw(config, grid, generator(seed, step, purpose, group), count)
        for purpose, count in zip(PURPOSES, _counts(config, grid, halves), strict=False)
    ]
    levels = torch.empty(sum(map(len, sets)))
    for first, values in enumerate(sets):
        levels[first :: len(sets)] = values
    return levels


def in_halves(config: CRDConfig) -> bool:
    """Whether the levels of a picture are two independent draws."""
    return config.algorithm == "crd" and config.objective.levels == "halves"


def levels_per_picture(config: CRDConfig, grid: Tensor | None = None) -> int:
    """How many levels :func:`group_levels` gives; without the rollout's ``grid`` as if none of it lay below the minimum.

    Raises CRDError if there are none.
    """
    grid = torch.ones(config.rollout.steps) if grid is None else grid
    if levels := sum(_counts(config.noise, grid, in_halves(config))):
        return levels
    raise CRDError(
        f"noise.minimum is {config.noise.minimum}, but the highest noise level of this rollout is {float(grid.max()):.3f}: "
        "nothing is left to train at. Lower it."
    )


def _counts(config: NoiseConfig, grid: Tensor, halves: bool) -> list[int]:
    asked = [(config.levels + 1) // 2, config.levels // 2] if halves else [config.levels]
    usable = int((grid >= config.minimum).sum())
    return [min(count, usable) for count in asked] if config.source == "rollout" else asked


def _draw(config: NoiseConfig, grid: Tensor, rng: torch.Generator, count: int) -> Tensor:
    if config.source == "rollout":
        usable = grid[grid >= config.minimum]
        return usable[torch.randperm(len(usable), generator=rng)[:count].sort().values]
    strata = (torch.arange(count) + torch.rand(count, generator=rng)) / count
    maximum = min(MAXIMUM, float(grid.max()))
    return config.minimum + (maximum - config.minimum) * strata
