"""From prompts to latents, pictures and rewards."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from crd.solvers import SOLVERS, Solver, euler, euler_maruyama


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; all noise is a function of (seed, round, purpose, sample id)."""

    seed: int
    purpose: str  # of the noise, so that rollouts and evaluations never share any
    steps: int  # of the solver
    batch_size: int  # pictures drawn, decoded and scored together
    guidance_scale: float = 1.0
    round: int = 0  # of a series of drawings, such as an epoch
    solver: Solver = euler
    shift: float | None = None  # time shift of the noise levels; None: the pipeline's own
    sde_scale: float = 0.0  # above 0: the sampler adds noise at every step, and paths are kept

    def noise(self, policy: Policy, sample_ids: list[int], part: str = "") -> Tensor:
        shape = policy.model.latent_shape
        return noise(shape, self.seed, self.round, f"{self.purpose}{part}", sample_ids).to(policy.device)


@dataclass(frozen=True)
class Drawn:
    """Pictures of one rank in the order of their sample ids."""

    x0: Tensor  # (n, ...) float32 clean latents on the device
    scores: Scores
    pictures: list[Image.Image]  # none, unless they were to be kept: thousands fill the host's memory
    reward_seconds: float  # waited for after the last picture; the rest is hidden behind the drawing
    path: Path | None = None  # of stochastic rollouts


@torch.no_grad()
def draw_latents(
    policy: Policy, conditioning: Conditioning, noise: Tensor, sigmas: Tensor, guidance_scale: float, solver: Solver = euler
) -> Tensor:
    """Solves the ODE of the weights in use from ``noise (n, ...)``; with Euler steps it equals the pipeline's own sampling."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return policy.velocity(x, sigma, conditioning, guidance_scale)

    return solver(velocity, policy.model.start(noise, sigmas), sigmas.to(noise.device))


@torch.no_grad()
def draw_paths(policy: Policy, conditioning: Conditioning, sigmas: Tensor, sampling: Sampling, sample_ids: list[int]) -> Path:
    """Takes the stochastic steps of the weights in use; their noise is drawn at the start and at every step."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return policy.velocity(x, sigma, conditioning)

    def draw(step: int) -> Tensor:
        return sampling.noise(policy, sample_ids, f"-sde-{step}")

    start = policy.model.start(sampling.noise(policy, sample_ids), sigmas)
    return euler_maruyama(velocity, start, sigmas.to(start.device), sampling.sde_scale, draw)


def rollout_sampling(config: CRDConfig, epoch: int) -> Sampling:
    """How an epoch's pictures are drawn; only Flow-GRPO trains on the way and so needs a stochastic one."""
    rollout = config.rollout
    scale = config.flow_grpo.noise_scale if config.algorithm == "flow_grpo" else 0.0
    return Sampling(
        seed=config.seed,
        purpose="rollout",
        steps=rollout.steps,
        batch_size=rollout.batch_size,
        guidance_scale=rollout.guidance_scale,
        round=epoch,
        solver=SOLVERS[rollout.solver],
        shift=rollout.shift,
        sde_scale=scale,
    )


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
    keep_pictures: bool = True,
) -> Drawn:
    """Draws and scores one picture per entry of ``prompts`` with the weights in use; ``progress`` is told how many were drawn."""
    texts = [prompt.text for prompt in prompts]
    sigmas = policy.model.sigmas(sampling.steps, sampling.shift)
    latents, paths, pictures, pending = [], [], [], []
    # a batch is scored while the next one is drawn
    scorer = ThreadPoolExecutor(max_workers=1, initializer=_enter_device, initargs=(policy.device,))
    try:
        for part in policy.in_step(list(chunks(len(prompts), sampling.batch_size))):
            if part is None:  # forward passes that only other processes need
                _draw(policy, policy.encode(texts[:1] or [""]), sigmas, sampling, [0])
                continue
            here = policy.encode(texts[part], ahead=texts[part.stop :])
            x0, path = _draw(policy, here, sigmas, sampling, sample_ids[part])
            images = policy.decode(x0)
            pending.append(scorer.submit(_score, rewards, images, prompts[part]))
            latents.append(x0)
            paths.append(path)
            if keep_pictures:
                pictures += images
            progress(len(images))
        began = time.perf_counter()
        scored = [future.result() for future in pending]
    finally:  # after Ctrl-C or for lack of memory nobody waits for the rest
        scorer.shutdown(wait=False, cancel_futures=True)
    waited = time.perf_counter() - began
    if not prompts:
        empty = torch.zeros(0, *policy.model.latent_shape, device=policy.device)
        return Drawn(empty, rewards.score([], [], []), [], 0.0)
    return Drawn(torch.cat(latents), join_scores(scored), pictures, waited, _join_paths(paths))


def _draw(
    policy: Policy, conditioning: Conditioning, sigmas: Tensor, sampling: Sampling, sample_ids: list[int]
) -> tuple[Tensor, Path | None]:
    """Clean latents ``(n, ...)``, and the way to them if it is stochastic."""
    if sampling.sde_scale > 0:
        path = draw_paths(policy, conditioning, sigmas, sampling, sample_ids)
        return path.points[:, -1], path
    start = sampling.noise(policy, sample_ids)
    return draw_latents(policy, conditioning, start, sigmas, sampling.guidance_scale, sampling.solver), None


def _enter_device(device: torch.device) -> None:
    """A new thread begins on the first GPU; a reward that says "cuda" means that of its process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


@torch.no_grad()  # of the thread that scores
def _score(rewards: RewardSet, images: list[Image.Image], prompts: list[PromptGroup]) -> Scores:
    return rewards.score(images, [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts])


def _join_paths(parts: list[Path | None]) -> Path | None:
    kept = [part for part in parts if part is not None]
    if not kept:
        return None
    return Path(torch.cat([part.points for part in kept]), torch.cat([part.log_density for part in kept]))


def join_scores(parts: list[Scores]) -> Scores:
    names = parts[0].parts
    return Scores(
        np.concatenate([part.total for part in parts]),
        {name: np.concatenate([part.parts[name] for part in parts]) for name in names},
        {name: sum(part.failures[name] for part in parts) for name in names},
    )
