"""One optimiser step: tiles, forward passes, the gradient, and the moving weights.

Forward passes per sample and noise level: 1 with gradient (student), 1 without (old), and for the anchor
1, or 2 if it is guided. A group that does not fit into a micro-batch, or whose samples live on several
processes, costs one more without gradient (theory, section 4, last point): its implicit rewards are
computed first, the loss of the whole group is differentiated with respect to them, and each tile then
backpropagates ``sum_i dL/dR_i R_i``. The gradient is the same, whatever the tiles.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from crd.batch import Conditioning, Samples, Tile
from crd.config import CRDConfig
from crd.models.policy import Policy
from crd.noise_levels import group_levels, level_count
from crd.objectives.crd import policy_loss
from crd.objectives.terms import anchor_strength, center, noised, prediction_error, velocity_distance
from crd.seeding import noise

#: what the sums of a step are of, over samples and noise levels; they add up over tiles and processes
SUMS = ("policy", "anchor", "distance", "implicit_square", "advantage_square", "product")


class TrainStep:
    """Computes the gradient of the CRD loss over one step's samples and applies it."""

    def __init__(self, policy: Policy, config: CRDConfig, accelerator: Accelerator):
        self.policy, self.config, self.accelerator = policy, config, accelerator
        self.parameters = [p for _, p in policy.parameters("student")]
        train = config.train
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay
        )
        self.grid = policy.model.sigmas(config.rollout.steps)[:-1]  # where the rollout evaluates the velocity
        self.levels = level_count(config.noise, self.grid)
        self.rows = 1 if config.objective.average_levels else self.levels  # loss terms per sample
        self.forwards = 0  # rows of all forward passes so far on this process, counted not estimated

    @property
    def two_pass(self) -> bool:
        """Whether some group is larger than a micro-batch or spread over processes: the same on every process."""
        groups = self.config.rollout.prompts_per_epoch // self.config.train.steps_per_epoch
        rows = self.config.rollout.group_size * (self.levels if self.config.objective.average_levels else 1)
        return rows > self.config.train.micro_batch or groups % self.accelerator.num_processes != 0

    def __call__(self, samples: Samples, conditioning: Conditioning, everyone: "StepMembers", step: int) -> dict[str, float]:
        """One optimiser step over this process's ``samples`` of a step whose samples of all processes are ``everyone``."""
        self.optimizer.zero_grad(set_to_none=True)
        sigma = self._sigmas(samples.group, step)
        source = _Source(samples, conditioning, sigma, self.config.noise.shared, self.config.seed, step)
        scale = 1.0 / max(1, len(everyone.group))
        if self.config.objective.policy_weight > 0 and self.two_pass:
            sums = self._backward_two_pass(source, everyone, scale)
        else:
            sums = self._backward_whole_groups(source, scale)
        norm = self._sum_gradients()
        statistics = self._statistics(sums, norm, len(everyone.group))
        if math.isfinite(statistics["gradient_norm"]):
            self.optimizer.step()
        return statistics

    def _zero(self) -> Tensor:
        return torch.zeros(len(SUMS), device=self.policy.device)

    # ------------------------------------------------------------------------------------- forward

    def _sigmas(self, group: Tensor, step: int) -> Tensor:
        """Noise levels ``(l, n)``: one set per group and step."""
        table = {
            g: group_levels(self.config.noise, self.grid, seed=self.config.seed, step=step, group=g)
            for g in dict.fromkeys(group.tolist())
        }
        if not table:
            return torch.zeros(self.levels, 0, device=self.policy.device)
        return torch.stack([table[g] for g in group.tolist()], 1).to(self.policy.device)

    def _velocity(self, tile: Tile, x: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Velocities ``(l, n, ...)`` of the weights in use."""
        levels = tile.sigma.shape[0]
        rows = torch.arange(tile.x0.shape[0], device=x.device).repeat(levels)
        self.forwards += tile.size * (1 if guidance_scale == 1 else 2)
        flat = self.policy.velocity(x.flatten(0, 1), tile.sigma.flatten(), tile.conditioning.select(rows), guidance_scale)
        return flat.unflatten(0, (levels, -1))

    @torch.no_grad()
    def _frozen(self, name: str, tile: Tile, x: Tensor, guidance_scale: float = 1.0) -> Tensor:
        with self.policy.using(name):  # type: ignore[arg-type]
            return self._velocity(tile, x, guidance_scale)

    def _error(self, velocity: Tensor, tile: Tile) -> Tensor:
        return prediction_error(velocity, tile.eps - tile.x0, tile.sigma, self.config.objective.error)

    def _policy_terms(self, implicit: Tensor, advantage: Tensor, group: Tensor) -> Tensor:
        objective = self.config.objective
        return policy_loss(
            implicit,
            advantage,
            group,
            beta=objective.beta,
            clip=self.config.advantage.clip,
            form=objective.loss,
            weighting=objective.weighting,
            temperature=objective.temperature,
            average_levels=objective.average_levels,
            baseline_gradient=objective.baseline_gradient,
        )

    def _anchor_terms(self, student: Tensor, tile: Tile, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted and plain distances ``(l, n)`` to the guided pretrained model."""
        anchor = self.config.anchor
        target = self._frozen("pretrained", tile, x, anchor.guidance_scale)
        distance = velocity_distance(student, target)
        strength = anchor_strength(tile.advantage, strength=anchor.strength, minimum=anchor.minimum, form=anchor.adaptation)
        return strength * distance, distance.detach()

    # ------------------------------------------------------------------------------------ backward

    def _backward_whole_groups(self, source: "_Source", scale: float) -> Tensor:
        """One pass: every tile holds whole groups, and all noise levels if they are averaged."""
        sums = self._zero()
        weight = self.config.objective.policy_weight
        for tile in source.whole_groups(self.config.train.micro_batch, self.config.objective.average_levels):
            x = noised(tile.x0, tile.eps, tile.sigma)
            old_error = self._error(self._frozen("old", tile, x), tile) if weight else None
            student = self._velocity(tile, x)
            parts = self._zero()
            loss = student.new_zeros(())
            if old_error is not None:
                implicit = old_error - self._error(student, tile)
                terms = self._policy_terms(implicit, tile.advantage, tile.group)
                loss = loss + weight * terms.sum() * (scale / self.rows)
                parts = _matching_sums(terms, implicit, tile.advantage, tile.group)
            loss, parts = self._with_anchor(loss, parts, student, tile, x, scale)
            loss.backward()
            sums = sums + parts
        return sums

    def _backward_two_pass(self, source: "_Source", everyone: "StepMembers", scale: float) -> Tensor:
        """Two passes: implicit rewards of all processes first, then the gradient tile by tile."""
        coefficients, sums = self._coefficients(source, everyone, scale)
        for tile, part in source.pieces(self.config.train.micro_batch):
            x = noised(tile.x0, tile.eps, tile.sigma)
            student = self._velocity(tile, x)
            # R = error(old) - error(student), and error(old) has no gradient
            loss = -(coefficients[part.levels, part.samples] * self._error(student, tile)).sum()
            loss, parts = self._with_anchor(loss, self._zero(), student, tile, x, scale)
            loss.backward()
            sums = sums + parts
        return sums

    def _coefficients(self, source: "_Source", everyone: "StepMembers", scale: float) -> tuple[Tensor, Tensor]:
        """``dL/dR`` of this process's samples ``(l, n)``, from the implicit rewards of all processes."""
        everywhere = torch.zeros(self.levels, len(everyone.group), device=self.policy.device, dtype=source.samples.x0.dtype)
        mine = everyone.mine.to(self.policy.device)
        with torch.no_grad():
            for tile, part in source.pieces(self.config.train.micro_batch):
                x = noised(tile.x0, tile.eps, tile.sigma)
                old_error = self._error(self._frozen("old", tile, x), tile)
                implicit = old_error - self._error(self._velocity(tile, x), tile)
                everywhere[part.levels, mine[part.samples]] = implicit
        everywhere = self.accelerator.reduce(everywhere, "sum")
        everywhere.requires_grad_(True)
        advantage, group = everyone.advantage.to(self.policy.device), everyone.group.to(self.policy.device)
        terms = self._policy_terms(everywhere, advantage, group)
        loss = self.config.objective.policy_weight * terms.sum() * (scale / self.rows)
        (gradient,) = torch.autograd.grad(loss, everywhere)
        sums = _matching_sums(terms.detach(), everywhere.detach(), advantage, group)
        if not self.accelerator.is_main_process:  # every process has the same sums: count them once
            sums = self._zero()
        return gradient[:, mine], sums

    def _with_anchor(
        self, loss: Tensor, parts: Tensor, student: Tensor, tile: Tile, x: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        if self.config.anchor.strength == 0:
            return loss, parts
        weighted, plain = self._anchor_terms(student, tile, x)
        zero = plain.new_zeros(())
        extra = torch.stack([zero, weighted.detach().sum(), plain.sum(), zero, zero, zero])
        return loss + weighted.sum() * (scale / self.levels), parts + extra

    def _sum_gradients(self) -> Tensor:
        """Adds up the gradients of all processes (one message) and clips them; returns the norm before clipping."""
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        if self.accelerator.num_processes > 1:
            flat = self.accelerator.reduce(torch.cat([g.flatten() for g in grads]), "sum")
            grads = [
                part.view_as(p) for part, p in zip(flat.split([p.numel() for p in self.parameters]), self.parameters, strict=True)
            ]
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.clip_norm)

    def _statistics(self, sums: Tensor, norm: Tensor, count: int) -> dict[str, float]:
        """Means over the step's samples and levels, of all processes; the only host-device sync of a step."""
        total = self.accelerator.reduce(sums, "sum") / max(1, count)
        policy, anchor, distance, r2, a2, ra, norm_value = torch.cat([total, norm.reshape(1).float()]).tolist()
        rows = self.rows
        return {
            "policy_loss": policy / rows,
            "anchor_loss": anchor / self.levels,
            "anchor_distance": distance / self.levels,
            "implicit_reward_spread": (r2 / rows) ** 0.5,
            "matching_correlation": ra / (r2 * a2) ** 0.5 if r2 * a2 > 0 else 0.0,
            "gradient_norm": norm_value,
        }


def _matching_sums(terms: Tensor, implicit: Tensor, advantage: Tensor, group: Tensor) -> Tensor:
    with torch.no_grad():
        r = center(implicit.mean(0, keepdim=True) if terms.shape[0] < implicit.shape[0] else implicit, group)
        a = center(advantage, group).expand_as(r)
        zero = r.new_zeros(())
        return torch.stack([terms.sum(), zero, zero, r.square().sum(), a.square().sum(), (r * a).sum()])


@dataclass(frozen=True)
class StepMembers:
    """The samples of one step on all processes, in the order of their ids."""

    group: Tensor  # (N,) dense: below N
    advantage: Tensor  # (N,)
    mine: Tensor  # (n,) positions of this process's samples


@dataclass(frozen=True)
class Part:
    """Which samples and noise levels of a step a tile holds."""

    levels: slice
    samples: slice


@dataclass(frozen=True)
class _Source:
    """Cuts one process's samples of a step into tiles; noise is made per tile, from (seed, step, level, sample id)."""

    samples: Samples
    conditioning: Conditioning
    sigma: Tensor  # (l, n)
    shared_noise: bool
    seed: int
    step: int

    def tile(self, part: Part) -> Tile:
        samples = self.samples.select(torch.arange(part.samples.start, part.samples.stop))
        device = samples.x0.device
        sigma = self.sigma[part.levels, part.samples]
        ids = (samples.group if self.shared_noise else samples.sample_id).tolist()
        shape = tuple(samples.x0.shape[1:])
        levels = range(part.levels.start, part.levels.stop)
        eps = torch.stack([noise(shape, self.seed, self.step, f"eps-{level}", ids) for level in levels]).to(device)
        dense = samples.group.unique(return_inverse=True)[1].to(device)
        conditioning = self.conditioning.select(samples.group.to(device))
        return Tile(samples.x0, eps, sigma, dense, samples.advantage.to(device), conditioning)

    def whole_groups(self, micro_batch: int, all_levels: bool) -> Iterator[Tile]:
        """Tiles of as many whole groups, then as many noise levels, as fit (at least one group)."""
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
                yield self.tile(Part(slice(level, min(level + step, levels)), slice(start, stop)))
            start = stop

    def pieces(self, micro_batch: int) -> Iterator[tuple[Tile, Part]]:
        """Tiles of at most ``micro_batch`` rows, regardless of groups."""
        levels, count = self.sigma.shape
        step = max(1, micro_batch // max(1, count))
        for first in range(0, count, micro_batch):
            for level in range(0, levels, step):
                part = Part(slice(level, min(level + step, levels)), slice(first, min(first + micro_batch, count)))
                yield self.tile(part), part
