"""One optimiser step: tiles, forward passes, the gradient, and the moving weights.

Forward passes per sample and noise level: 1 with gradient (student); without, 1 of old (CRD, NFT, AWM), and for the
anchor 1, or 2 if it is guided. Under CRD a group that does not fit into a micro-batch, or whose samples live on several
processes, costs one more without gradient (theory, section 4, last point): its implicit rewards are
computed first, the loss of the whole group is differentiated with respect to them, and each tile then
backpropagates ``sum_i dL/dR_i R_i``. The gradient is the same, whatever the tiles.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from crd.batch import Conditioning, Samples, Tile, Transitions
from crd.config import CRDConfig
from crd.models.policy import Policy
from crd.models.weights import Weights
from crd.noise_levels import group_levels, in_halves, levels_per_picture
from crd.objectives.awm import clipped_policy_loss
from crd.objectives.crd import has_spread, policy_loss
from crd.objectives.flow_grpo import divergence_factor, log_density, spreads, step_mean
from crd.objectives.nft import nft_loss
from crd.objectives.rwr import rwr_weight
from crd.objectives.terms import anchor_strength, center, prediction_error, velocity_distance
from crd.tiles import Part, StepMembers, TileSource
from crd.update import make_update

#: what the sums of a step are of, over samples and noise levels; they add up over tiles and processes
SUMS = ("policy", "anchor", "distance", "implicit_square", "advantage_square", "product")


class TrainStep:
    """Computes the gradient of the algorithm's loss over one step's samples and applies it."""

    def __init__(self, policy: Policy, config: CRDConfig, accelerator: Accelerator):
        self.policy, self.config, self.accelerator = policy, config, accelerator
        self.parameters = [p for _, p in policy.parameters("student")]
        self.update = make_update(self.parameters, config.train, accelerator)
        sigmas = policy.model.sigmas(config.rollout.steps, config.rollout.shift)
        self.grid = sigmas[:-1]  # where the rollout evaluates the velocity
        self.points = sigmas.to(policy.device)
        self.spread = spreads(self.points, config.flow_grpo.noise_scale)
        self.centered = config.algorithm == "crd"
        self.levels = levels_per_picture(config, self.grid)
        self.rows = 1 if self.centered and config.objective.levels != "each" else self.levels  # loss terms per sample
        self.forwards = 0  # rows of all forward passes so far on this process, counted not estimated

    @property
    def two_pass(self) -> bool:
        """Whether what is centered together is larger than a micro-batch or spread over processes: the same on every process."""
        if not self.centered or self.config.objective.policy_weight == 0:
            return False
        prompts = self.config.rollout.prompts_per_epoch // self.config.train.steps_per_epoch
        groups = prompts if self.config.objective.centering == "prompt" else 1
        rows = self.config.rollout.group_size * (prompts // groups)
        if self.config.objective.levels != "each":
            rows *= self.levels
        return rows > self.config.train.micro_batch or groups % self.accelerator.num_processes != 0

    def __call__(self, samples: Samples, conditioning: Conditioning, everyone: StepMembers, step: int) -> dict[str, float]:
        """One optimiser step over this process's ``samples`` of a step whose samples of all processes are ``everyone``."""
        self.update.clear()
        config = self.config
        source = TileSource(
            samples=samples,
            weight=self._weights(everyone)[everyone.mine],
            conditioning=conditioning,
            sigma=self._sigmas(samples.group, step),
            shared_noise=config.noise.shared,
            seed=config.seed,
            step=step,
        )
        scale = 1.0 / max(1, len(everyone.group))
        if self.two_pass:
            sums = self._backward_two_pass(source, everyone, scale)
        elif self.centered:
            sums = self._backward_whole_groups(source, scale)
        else:
            sums = self._backward_samples(source, scale)
        statistics = self._statistics(sums, self.update.gradient_norm(), len(everyone.group))
        if math.isfinite(statistics["gradient_norm"]):
            statistics["gradient_norm"] = self.update.apply(statistics["gradient_norm"])
            self.policy.sets.changed("student")
        return statistics

    def _zero(self) -> Tensor:
        return torch.zeros(len(SUMS), device=self.policy.device)

    # ------------------------------------------------------------------------------------- forward

    def _weights(self, everyone: StepMembers) -> Tensor:
        """Weight ``(N,)`` of every sample's reward term: 0 in groups whose rewards are all equal."""
        advantage, group = everyone.advantage, everyone.group
        informative = has_spread(center(advantage, group).abs(), group)
        if self.config.algorithm != "rwr":
            return informative
        return informative * rwr_weight(self._signed(advantage), group, self.config.rwr.temperature)

    def _signed(self, advantage: Tensor) -> Tensor:
        """The advantage in units of the rewards' deviation, 0 the mean of the prompt."""
        return (2 * advantage - 1) * self.config.advantage.clip

    def _sigmas(self, group: Tensor, step: int) -> Tensor:
        """Noise levels ``(l, n)``: one set per group and step."""
        config = self.config
        table = {
            g: group_levels(config.noise, self.grid, seed=config.seed, step=step, group=g, halves=in_halves(config))
            for g in dict.fromkeys(group.tolist())
        }
        if not table:
            return torch.zeros(self.levels, 0, device=self.policy.device)
        return torch.stack([table[g] for g in group.tolist()], 1).to(self.policy.device)

    def _velocity(self, tile: Tile, guidance_scale: float = 1.0) -> Tensor:
        """Velocities ``(l, n, ...)`` of the weights in use."""
        levels, count = tile.sigma.shape
        rows = torch.arange(count, device=tile.x.device).repeat(levels)
        self.forwards += tile.size * (1 if guidance_scale == 1 else 2)
        flat = self.policy.velocity(tile.x.flatten(0, 1), tile.sigma.flatten(), tile.conditioning.select(rows), guidance_scale)
        return flat.unflatten(0, (levels, -1))

    @torch.no_grad()
    def _frozen(self, name: Weights, tile: Tile, guidance_scale: float = 1.0) -> Tensor:
        with self.policy.using(name):
            return self._velocity(tile, guidance_scale)

    def _error(self, velocity: Tensor, tile: Tile) -> Tensor:
        assert tile.target is not None
        return prediction_error(velocity, tile.target, tile.sigma, self.config.objective.error)

    def _centered_terms(self, implicit: Tensor, advantage: Tensor, group: Tensor) -> Tensor:
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
            levels=objective.levels,
            baseline_gradient=objective.baseline_gradient,
        )

    def _sample_terms(self, student: Tensor, tile: Tile) -> Tensor:
        """Reward terms ``(l, n)`` of the algorithms that look at each sample by itself."""
        config, signed = self.config, self._signed(tile.advantage)
        if config.algorithm == "rwr":
            return self._error(student, tile)
        if tile.transitions is not None:
            steps = (tile.sigma, tile.transitions.next_sigma, tile.transitions.spread)
            density = log_density(tile.transitions.next_x, step_mean(tile.x, student, *steps), *steps)
            ratio = density - tile.transitions.log_density
            return clipped_policy_loss(ratio, signed, ratio_clip=config.flow_grpo.ratio_clip)
        old = self._frozen("old", tile)
        if config.algorithm == "nft":
            assert tile.target is not None
            beta, clip = config.nft.beta, config.advantage.clip
            return nft_loss(student, old, tile.target, tile.sigma, tile.advantage, beta=beta, clip=clip)
        ratio = self._error(old, tile) - self._error(student, tile)
        terms = clipped_policy_loss(ratio, signed, ratio_clip=config.awm.ratio_clip)
        return terms + config.awm.reference_weight * velocity_distance(student, old)

    def _anchor_terms(self, student: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """Weighted and plain distances ``(l, n)`` to the guided pretrained model."""
        anchor = self.config.anchor
        distance = velocity_distance(student, self._frozen("pretrained", tile, anchor.guidance_scale))
        strength = anchor_strength(tile.advantage, strength=anchor.strength, minimum=anchor.minimum, form=anchor.adaptation)
        if tile.transitions is not None:  # the divergence of the steps, as published
            strength = strength * divergence_factor(tile.sigma, tile.transitions.next_sigma, tile.transitions.spread)
        return strength * distance, distance.detach()

    # --------------------------------------------------------------------------------------- tiles

    def _tiles(self, source: TileSource, parts: Iterable[Part]) -> Iterator[tuple[Part, Tile, float]]:
        """Tiles of the parts, and what they count for: 1; or 0, of one that only other processes need (see Policy.in_step)."""
        stored = self.config.algorithm == "flow_grpo"
        for part in self.policy.in_step(list(parts)):
            if part is None:
                yield Part(slice(0, 0), slice(0, 0)), self._idle_tile(source), 0.0
            else:
                yield part, source.stored_tile(part, self.points, self.spread) if stored else source.tile(part), 1.0

    def _idle_tile(self, source: TileSource) -> Tile:
        """Of no sample, at an inner point of the grid: it keeps the forward passes going and counts for nothing."""
        middle, levels = len(self.grid) // 2, min(2, self.levels)  # two can be halved
        x = torch.zeros(levels, 1, *self.policy.model.latent_shape, device=self.policy.device)
        level, following, spread = (v[middle].expand(levels, 1) for v in (self.points, self.points[1:], self.spread))
        one = torch.ones(1, device=x.device)
        stored = self.config.algorithm == "flow_grpo"
        return Tile(
            x=x,
            target=None if stored else torch.ones_like(x),
            sigma=level,
            group=torch.zeros(1, dtype=torch.long, device=x.device),
            advantage=0.5 * one,
            weight=0 * one,
            conditioning=source.conditioning.select(torch.zeros(1, dtype=torch.long, device=x.device)),
            transitions=Transitions(x, following, spread, 0 * level) if stored else None,
        )

    # ------------------------------------------------------------------------------------ backward

    def _backward_samples(self, source: TileSource, scale: float) -> Tensor:
        """One pass over tiles of any samples: for losses that are sums over samples."""
        sums = self._zero()
        weight = self.config.objective.policy_weight
        for _, tile, counts in self._tiles(source, source.pieces(self.config.train.micro_batch)):
            student = self._velocity(tile)
            loss, parts = student.new_zeros(()), self._zero()
            if weight > 0:
                terms = self._sample_terms(student, tile) * tile.weight
                loss = weight * terms.sum() * (scale / self.rows)
                parts[0] = terms.detach().sum()
            loss, parts = self._with_anchor(loss, parts, student, tile, scale)
            (counts * loss).backward()
            sums = sums + counts * parts
        return sums

    def _backward_whole_groups(self, source: TileSource, scale: float) -> Tensor:
        """One pass: every tile holds whole groups, and all noise levels if they are averaged."""
        sums = self._zero()
        weight = self.config.objective.policy_weight
        parts_of_groups = source.whole_groups(self.config.train.micro_batch, self.config.objective.levels != "each")
        for _, tile, counts in self._tiles(source, parts_of_groups):
            old_error = self._error(self._frozen("old", tile), tile) if weight else None
            student = self._velocity(tile)
            parts = self._zero()
            loss = student.new_zeros(())
            if old_error is not None:
                implicit = old_error - self._error(student, tile)
                terms = self._centered_terms(implicit, tile.advantage, tile.group)
                loss = loss + weight * terms.sum() * (scale / self.rows)
                parts = _matching_sums(terms, implicit, tile.advantage, tile.group)
            loss, parts = self._with_anchor(loss, parts, student, tile, scale)
            (counts * loss).backward()
            sums = sums + counts * parts
        return sums

    def _backward_two_pass(self, source: TileSource, everyone: StepMembers, scale: float) -> Tensor:
        """Two passes: implicit rewards of all processes first, then the gradient tile by tile."""
        coefficients, sums = self._coefficients(source, everyone, scale)
        for part, tile, counts in self._tiles(source, source.pieces(self.config.train.micro_batch)):
            student = self._velocity(tile)
            # R = error(old) - error(student), and error(old) has no gradient
            factor = coefficients[part.levels, part.samples] if counts else torch.zeros_like(tile.sigma)
            loss = -(factor * self._error(student, tile)).sum()
            loss, parts = self._with_anchor(loss, self._zero(), student, tile, scale)
            (counts * loss).backward()
            sums = sums + counts * parts
        return sums

    def _coefficients(self, source: TileSource, everyone: StepMembers, scale: float) -> tuple[Tensor, Tensor]:
        """``dL/dR`` of this process's samples ``(l, n)``, from the implicit rewards of all processes."""
        everywhere = torch.zeros(self.levels, len(everyone.group), device=self.policy.device, dtype=source.samples.x0.dtype)
        mine = everyone.mine.to(self.policy.device)
        with torch.no_grad():
            for part, tile, counts in self._tiles(source, source.pieces(self.config.train.micro_batch)):
                implicit = self._error(self._frozen("old", tile), tile) - self._error(self._velocity(tile), tile)
                if counts:
                    everywhere[part.levels, mine[part.samples]] = implicit
        everywhere = self.accelerator.reduce(everywhere, "sum")
        everywhere.requires_grad_(True)
        advantage, group = everyone.advantage.to(self.policy.device), everyone.group.to(self.policy.device)
        terms = self._centered_terms(everywhere, advantage, group)
        loss = self.config.objective.policy_weight * terms.sum() * (scale / self.rows)
        (gradient,) = torch.autograd.grad(loss, everywhere)
        sums = _matching_sums(terms.detach(), everywhere.detach(), advantage, group)
        if not self.accelerator.is_main_process:  # every process has the same sums: count them once
            sums = self._zero()
        return gradient[:, mine], sums

    def _with_anchor(self, loss: Tensor, parts: Tensor, student: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        if self.config.anchor.strength == 0:
            return loss, parts
        weighted, plain = self._anchor_terms(student, tile)
        zero = plain.new_zeros(())
        extra = torch.stack([zero, weighted.detach().sum(), plain.sum(), zero, zero, zero])
        return loss + weighted.sum() * (scale / self.levels), parts + extra

    def _statistics(self, sums: Tensor, norm: Tensor, count: int) -> dict[str, float]:
        """Means over the step's samples and levels, of all processes; the only place where a step waits for its own results."""
        total = self.accelerator.reduce(sums, "sum") / max(1, count)
        policy, anchor, distance, r2, a2, ra, norm_value = torch.cat([total, norm.reshape(1).float()]).tolist()
        rows = self.rows
        statistics = {
            "policy_loss": policy / rows,
            "anchor_loss": anchor / self.levels,
            "anchor_distance": distance / self.levels,
            "gradient_norm": norm_value,
        }
        if self.centered:
            statistics["implicit_reward_spread"] = (r2 / rows) ** 0.5
            statistics["matching_correlation"] = ra / (r2 * a2) ** 0.5 if r2 * a2 > 0 else 0.0
        return statistics


def _matching_sums(terms: Tensor, implicit: Tensor, advantage: Tensor, group: Tensor) -> Tensor:
    with torch.no_grad():
        r = center(implicit.mean(0, keepdim=True) if terms.shape[0] < implicit.shape[0] else implicit, group)
        a = center(advantage, group).expand_as(r)
        zero = r.new_zeros(())
        return torch.stack([terms.sum(), zero, zero, r.square().sum(), a.square().sum(), (r * a).sum()])
