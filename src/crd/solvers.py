"""Samplers with one signature, (velocity, x, sigmas) -> x; and the stochastic one, which keeps its path."""

import itertools
from collections.abc import Callable

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from crd.batch import Path
from crd.flow import TIMESTEPS
from crd.objectives.flow_grpo import log_density, spreads, step_mean

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x (b, ...), sigma (b,)) -> velocity (b, ...)
Solver = Callable[[Velocity, Tensor, Tensor], Tensor]  # (velocity, x (b, ...), sigmas (steps + 1,)) -> x at the last of them


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
    """First-order steps of the ODE along ``sigmas (steps + 1,)``, the update of FlowMatchEulerDiscreteScheduler."""
    for here, there in itertools.pairwise(sigmas):
        x = x + (there - here) * velocity(x, here.expand(len(x)))
    return x


def dpmsolver(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++ of second order along ``sigmas``, by diffusers."""
    return _multistep(DPMSolverMultistepScheduler, velocity, x, sigmas)


def unipc(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
    """UniPC of second order along ``sigmas``, by diffusers."""
    return _multistep(UniPCMultistepScheduler, velocity, x, sigmas)


SOLVERS: dict[str, Solver] = {"euler": euler, "dpmsolver++": dpmsolver, "unipc": unipc}


def _multistep(kind: type, velocity: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
    """Steps of a diffusers scheduler along our noise levels: a second solver on the grid that training takes its levels from.

    Log signal-to-noise ratios are all that these solvers know of a schedule, so they serve noise-prediction models in
    flow coordinates as well.
    """
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(len(sigmas) - 1, device=x.device)
    scheduler.sigmas = sigmas.cpu()  # where diffusers keeps them, lest every step waits for the device
    scheduler.timesteps = sigmas[:-1] * TIMESTEPS
    scheduler.set_begin_index(0)
    for here in sigmas[:-1]:
        x = scheduler.step(velocity(x, here.expand(len(x))), here * TIMESTEPS, x, return_dict=False)[0]
    return x


def euler_maruyama(velocity: Velocity, x: Tensor, sigmas: Tensor, scale: float, draw: Callable[[int], Tensor]) -> Path:
    """Steps of the SDE with the same marginals (see objectives/flow_grpo.py); ``draw(step)`` gives noise shaped as ``x``."""
    points, densities = [x], []
    for step, spread in enumerate(spreads(sigmas, scale)):
        levels = [value.expand(len(x)) for value in (sigmas[step], sigmas[step + 1], spread)]
        mean = step_mean(x, velocity(x, levels[0]), *levels)
        x = mean + spread * (sigmas[step] - sigmas[step + 1]).sqrt() * draw(step)
        points.append(x)
        densities.append(log_density(x, mean, *levels))
    return Path(torch.stack(points, 1), torch.stack(densities, 1))
