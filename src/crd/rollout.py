"""From prompts to latents, pictures and rewards."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crd.batch import Conditioning, PromptGroup
from crd.models.policy import Policy
from crd.rewards.protocol import RewardSet, Scores
from crd.seeding import noise
from crd.solvers import euler


@dataclass(frozen=True)
class Drawn:
    """Pictures of one rank in the order of their sample ids."""

    x0: Tensor  # (n, ...) float32 clean latents on the device
    scores: Scores
    pictures: list[Image.Image]
    reward_seconds: float  # of the time it took


@torch.no_grad()
def draw_latents(policy: Policy, conditioning: Conditioning, start: Tensor, sigmas: Tensor, guidance_scale: float) -> Tensor:
    """Solves the ODE of the weights in use from noise ``start (n, ...)``; equals the pipeline's own sampling."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return policy.velocity(x, sigma, conditioning, guidance_scale)

    return euler(velocity, start, sigmas.to(start.device))


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
    progress: Callable[[int], Any] = lambda pictures: None,
) -> Drawn:
    """Draws and scores one picture per entry of ``prompts``, whose noise is a function of (seed, step, purpose, sample id)."""
    conditioning = policy.encode([prompt.text for prompt in prompts])
    sigmas = policy.model.sigmas(steps)
    latents, pictures, scores, reward_seconds = [], [], [], 0.0
    for part in chunks(len(prompts), batch_size):
        start = noise(policy.model.latent_shape, seed, step, purpose, sample_ids[part]).to(policy.device)
        row = torch.arange(part.start, part.stop, device=policy.device)
        x0 = draw_latents(policy, conditioning.select(row), start, sigmas, guidance_scale)
        images = policy.model.decode(x0)
        members, began = prompts[part], time.perf_counter()
        scores.append(rewards.score(images, [p.text for p in members], [p.metadata for p in members]))
        reward_seconds += time.perf_counter() - began
        latents.append(x0)
        pictures += images
        progress(len(images))
    if not latents:
        empty = torch.zeros(0, *policy.model.latent_shape, device=policy.device)
        return Drawn(empty, rewards.score([], [], []), [], 0.0)
    return Drawn(torch.cat(latents), join_scores(scores), pictures, reward_seconds)


def join_scores(parts: list[Scores]) -> Scores:
    names = parts[0].parts
    return Scores(
        np.concatenate([part.total for part in parts]),
        {name: np.concatenate([part.parts[name] for part in parts]) for name in names},
        {name: sum(part.failures[name] for part in parts) for name in names},
    )
