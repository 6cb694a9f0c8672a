"""From prompts to latents, pictures and rewards."""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crd.batch import Conditioning, Path, PromptGroup
from crd.models.policy import Policy
from crd.rewards.protocol import RewardSet, Scores
from crd.seeding import noise
from crd.solvers import euler, euler_maruyama


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
def draw_paths(
    policy: Policy, conditioning: Conditioning, sigmas: Tensor, scale: float, purpose: str, draw: Callable[[str], Tensor]
) -> Path:
    """Takes the stochastic steps of the weights in use; ``draw(purpose)`` is their noise, at the start and at every step."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return policy.velocity(x, sigma, conditioning)

    start = draw(purpose)
    return euler_maruyama(velocity, start, sigmas.to(start.device), scale, lambda step: draw(f"{purpose}-sde-{step}"))


def _noise(policy: Policy, seed: int, step: int, sample_ids: list[int], purpose: str) -> Tensor:
    return noise(policy.model.latent_shape, seed, step, purpose, sample_ids).to(policy.device)


def chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def collect(
    policy: Policy,
    rewards: RewardSet,
    prompts: list[PromptGroup],
    *,
    sample_ids: list[int],
    step: int,
    seed: int,
    purpose: str,
    steps: int,
    guidance_scale: float,
    batch_size: int,
    sde_scale: float = 0.0,
    progress: Callable[[int], Any] = lambda pictures: None,
) -> Drawn:
    """Draws and scores one picture per entry of ``prompts``, whose noise is a function of (seed, step, purpose, sample id).

    With ``sde_scale`` above 0 the sampler adds noise at every step, and the paths are kept.
    """
    if not prompts:  # a process may have none
        empty = torch.zeros(0, *policy.model.latent_shape, device=policy.device)
        return Drawn(empty, rewards.score([], [], []), [], 0.0)
    conditioning = policy.encode([prompt.text for prompt in prompts])
    sigmas = policy.model.sigmas(steps)
    latents, paths, pictures, scores, reward_seconds = [], [], [], [], 0.0
    for part in chunks(len(prompts), batch_size):
        draw = functools.partial(_noise, policy, seed, step, sample_ids[part])
        here = conditioning.select(torch.arange(part.start, part.stop, device=policy.device))
        if sde_scale > 0:
            paths.append(draw_paths(policy, here, sigmas, sde_scale, purpose, draw))
            x0 = paths[-1].points[:, -1]
        else:
            x0 = draw_latents(policy, here, draw(purpose), sigmas, guidance_scale)
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
