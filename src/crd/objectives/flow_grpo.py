"""Flow-GRPO (arXiv 2505.05470): the denoising steps of a stochastic sampler as the actions of a policy gradient.

The sampler takes the stochastic differential equation with the marginals of the probability-flow ODE, in Euler-Maruyama
steps from sigma to a lower sigma' (d = sigma - sigma')::

    mean = x - [v + g^2 / (2 sigma) (x + (1 - sigma) v)] d,    deviation = g sqrt(d),    g = scale sqrt(sigma / (1 - sigma))

so every step has a Gaussian density, and the clipped loss of :mod:`crd.objectives.awm` applies to the ratio of densities.
It needs the points of the path, hence their memory.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from crd.flow import expand, widen


def spreads(sigmas: Float[Tensor, "points"], scale: float) -> Float[Tensor, "steps"]:
    """g of every step along ``sigmas``, which fall to 0; at sigma = 1 it takes the value of the next point, being infinite."""
    here = sigmas[:-1]
    return scale * (here / (1 - torch.where(here == 1, sigmas[1], here))).sqrt()


def step_mean(
    x: Float[Tensor, "..."],
    velocity: Float[Tensor, "..."],
    sigma: Float[Tensor, "..."],
    next_sigma: Float[Tensor, "..."],
    spread: Float[Tensor, "..."],
) -> Float[Tensor, "..."]:
    """The mean of a step at ``x (*b, *latent)``; levels ``(*b)``."""
    s, gap, g = (expand(value, x) for value in (sigma, sigma - next_sigma, spread))
    return x - (velocity + g**2 / (2 * s) * (x + (1 - s) * velocity)) * gap


def log_density(
    next_x: Float[Tensor, "..."],
    mean: Float[Tensor, "..."],
    sigma: Float[Tensor, "..."],
    next_sigma: Float[Tensor, "..."],
    spread: Float[Tensor, "..."],
) -> Float[Tensor, "..."]:
    """Gaussian log-density ``(*b)`` of a step to ``next_x (*b, *latent)``, mean over the latent's dimensions (as published)."""
    deviation = spread * (sigma - next_sigma).sqrt()
    squared = (widen(next_x) - widen(mean)).square().flatten(sigma.ndim).mean(-1)
    return -squared / (2 * deviation**2) - deviation.log() - math.log(2 * math.pi) / 2


def divergence_factor(
    sigma: Float[Tensor, "..."], next_sigma: Float[Tensor, "..."], spread: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """What turns a squared distance of velocities into the divergence of two steps, ``(mean - mean')^2 / (2 deviation^2)``."""
    gap = sigma - next_sigma
    return ((1 + spread**2 * (1 - sigma) / (2 * sigma)) * gap) ** 2 / (2 * spread**2 * gap)
