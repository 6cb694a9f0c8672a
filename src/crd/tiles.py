"""Cutting one process's samples of an optimiser step into tiles: samples x noise levels that go through the backbone together."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from crd.batch import Conditioning, Samples, Tile, Transitions
from crd.objectives.terms import noised
from crd.seeding import noise


@dataclass(frozen=True)
class StepMembers:
    """The samples of one step on all processes, in the order of their ids."""

    group: Tensor  # (N,) dense: below N; which samples are centered together
    advantage: Tensor  # (N,)
    mine: Tensor  # (n,) positions of this process's samples


@dataclass(frozen=True)
class Part:
    """Which samples and noise levels of a step a tile holds."""

    levels: slice
    samples: slice


@dataclass(frozen=True)
class TileSource:
    """One process's samples of a step; noise is made per tile, from (seed, step, level, sample id)."""

    samples: Samples
    weight: Tensor  # (n,) of the samples' reward terms
    conditioning: Conditioning
    sigma: Tensor  # (l, n)
    shared_noise: bool
    seed: int
    step: int

    def tile(self, part: Part) -> Tile:
        """Noised pictures of the forward process."""
        samples = self.samples.select(torch.arange(part.samples.start, part.samples.stop))
        sigma = self.sigma[part.levels, part.samples]
        ids = (samples.prompt if self.shared_noise else samples.sample_id).tolist()
        shape = tuple(samples.x0.shape[1:])
        levels = range(part.levels.start, part.levels.stop)
        eps = torch.stack([noise(shape, self.seed, self.step, f"eps-{level}", ids) for level in levels])
        eps = eps.to(samples.x0.device, non_blocking=True)  # or the host would wait for the tile before
        return self._tile(samples, part, noised(samples.x0, eps, sigma), eps - samples.x0, sigma, None)

    def _tile(
        self, samples: Samples, part: Part, x: Tensor, target: Tensor | None, sigma: Tensor, transitions: Transitions | None
    ) -> Tile:
        device = samples.x0.device
        return Tile(
            x=x,
            target=target,
            sigma=sigma,
            group=samples.group.unique(return_inverse=True)[1].to(device, non_blocking=True),
            advantage=samples.advantage.to(device, non_blocking=True),
            weight=self.weight[part.samples].to(device, non_blocking=True),
            conditioning=self.conditioning.select(samples.prompt.to(device, non_blocking=True)),
            transitions=transitions,
        )

    def stored_tile(self, part: Part, grid: Tensor, spread: Tensor) -> Tile:
        """Points of the samples' stored paths: those at this source's noise levels, which are points of ``grid``."""
        samples = self.samples.select(torch.arange(part.samples.start, part.samples.stop))
        assert samples.path is not None, "the rollout has kept no paths"
        sigma = self.sigma[part.levels, part.samples]
        step = (grid[:-1, None, None] == sigma).int().argmax(0)  # (l, n)
        member = torch.arange(sigma.shape[1], device=sigma.device).expand_as(step)
        transitions = Transitions(
            next_x=samples.path.points[member, step + 1],
            next_sigma=grid[step + 1],
            spread=spread[step],
            log_density=samples.path.log_density[member, step],
        )
        return self._tile(samples, part, samples.path.points[member, step], None, sigma, transitions)

    def whole_groups(self, micro_batch: int, all_levels: bool) -> Iterator[Part]:
        """Parts of as many whole groups, then as many noise levels, as fit (at least one group)."""
        levels = len(self.sigma)
        sizes = self.samples.group.unique_consecutive(return_counts=True)[1].tolist()
        budget = micro_batch // levels if all_levels else micro_batch
        start = 0
        while sizes:
            stop = start + sizes.pop(0)
            while sizes and stop + sizes[0] - start <= budget:
                stop += sizes.pop(0)
            step = levels if all_levels else max(1, micro_batch // (stop - start))
            for level in range(0, levels, step):
                yield Part(slice(level, min(level + step, levels)), slice(start, stop))
            start = stop

    def pieces(self, micro_batch: int) -> Iterator[Part]:
        """Parts of at most ``micro_batch`` rows, regardless of groups."""
        levels, count = self.sigma.shape
        step = max(1, micro_batch // max(1, count))
        for first in range(0, count, micro_batch):
            for level in range(0, levels, step):
                yield Part(slice(level, min(level + step, levels)), slice(first, min(first + micro_batch, count)))
