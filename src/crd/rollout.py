"""From prompts to latents, pictures and rewards."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crd.batch import Conditioning, Path, PromptGroup
from crd.config import CRDConfig
from crd.models.policy import Policy
from crd.rewards.protocol import RewardSet, Scores
from crd.seeding import noise
from crd.solvers import euler, euler_maruyama


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; all noise is a function of (seed, round, purpose, sample id)."""

    seed: int
    purpose: str  # of the noise, so that rollouts and evaluations never share any
    steps: int  # of the solver
    batch_size: int  # pictures drawn, decoded and scored together
    guidance_scale: float = 1.0
    round: int = 0  # of a series of drawings, such as an epoch
    sde_scale: float = 0.0  # above 0: the sampler adds noise at every step, and paths are kept

    def noise(self, policy: Policy, sample_ids: list[int], part: str = "") -> Tensor:
        shape = policy.model.latent_shape
        return noise(shape, self.seed, self.round, f"{self.purpose}{part}", sample_ids).to(policy.device)


@dataclass(frozen=True)
class Drawn:
    """Pictures of one rank in the order of their sample ids."""

    x0: Tensor  # (n, ...) float32 clean latents on the device
    scores: Scores
    pictures: list[Image.Image]
    reward_seconds: float  # of the time it took
    path: Path | None = None  # of stochastic rollouts


@torch.no_grad()
def draw_latents(policy: Policy, conditioning: Conditioning, start: Tensor, sigmas: Tensor, guidance_scale: float) -> Tensor:
    """Solves the ODE of the weights in use from noise ``start (n, ...)``; equals the pipeline's own sampling."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return policy.velocity(x, sigma, conditioning, guidance_scale)

    return euler(velocity, start, sigmas.to(start.device))


@torch.no_grad()
def draw_paths(policy: Policy, conditioning: Conditioning, sigmas: Tensor, sampling: Sampling, sample_ids: list[int]) -> Path:
    """Takes the stochastic steps of the weights in use; their noise is drawn at the start and at every step."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return policy.velocity(x, sigma, conditioning)

    def draw(step: int) -> Tensor:
        return sampling.noise(policy, sample_ids, f"-sde-{step}")

    start = sampling.noise(policy, sample_ids)
    return euler_maruyama(velocity, start, sigmas.to(start.device), sampling.sde_scale, draw)


def rollout_sampling(config: CRDConfig, epoch: int) -> Sampling:
    """How an epoch's pictures are drawn; only Flow-GRPO trains on the way and so needs a stochastic one."""
    rollout = config.rollout
    scale = config.flow_grpo.noise_scale if config.algorithm == "flow_grpo" else 0.0
    return Sampling(config.seed, "rollout", rollout.steps, rollout.batch_size, rollout.guidance_scale, epoch, scale)


def chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def collect(
    policy: Policy,
    rewards: RewardSet,
    prompts: list[PromptGroup],
    sample_ids: list[int],
    sampling: Sampling,
    progress: Callable[[int], Any] = lambda pictures: None,
) -> Drawn:
    """Draws and scores one picture per entry of ``prompts`` with the weights in use; ``progress`` is told how many were drawn."""
    if not prompts:  # a process may have none
        empty = torch.zeros(0, *policy.model.latent_shape, device=policy.device)
        return Drawn(empty, rewards.score([], [], []), [], 0.0)
    conditioning = policy.encode([prompt.text for prompt in prompts])
    sigmas = policy.model.sigmas(sampling.steps)
    latents, paths, pictures, scores, reward_seconds = [], [], [], [], 0.0
    for part in chunks(len(prompts), sampling.batch_size):
        here = conditioning.select(torch.arange(part.start, part.stop, device=policy.device))
        if sampling.sde_scale > 0:
            paths.append(draw_paths(policy, here, sigmas, sampling, sample_ids[part]))
            x0 = paths[-1].points[:, -1]
        else:
            x0 = draw_latents(policy, here, sampling.noise(policy, sample_ids[part]), sigmas, sampling.guidance_scale)
        images = policy.model.decode(x0)
        members, began = prompts[part], time.perf_counter()
        scores.append(rewards.score(images, [p.text for p in members], [p.metadata for p in members]))
        reward_seconds += time.perf_counter() - began
        latents.append(x0)
        pictures += images
        progress(len(images))
    return Drawn(torch.cat(latents), join_scores(scores), pictures, reward_seconds, _join_paths(paths))


def _join_paths(parts: list[Path]) -> Path | None:
    if not parts:
        return None
    return Path(torch.cat([part.points for part in parts]), torch.cat([part.log_density for part in parts]))


def join_scores(parts: list[Scores]) -> Scores:
    names = parts[0].parts
    return Scores(
        np.concatenate([part.total for part in parts]),
        {name: np.concatenate([part.parts[name] for part in parts]) for name in names},
        {name: sum(part.failures[name] for part in parts) for name in names},
    )
