"""The conventions of this library, in one place.

========  =======================================  ==========================================================
symbol    meaning                                  shape
========  =======================================  ==========================================================
``x0``    clean latent                             ``(B, ...)``
``eps``   standard Gaussian noise                  as ``x0``
``sigma`` noise level in [0, 1]                    ``(B,)`` (or any shape that broadcasts to it)
``x``     noised latent ``(1-sigma) x0 + sigma eps``  as ``x0``
``u``     velocity ``dx/dsigma = eps - x0``        as ``x0``
``t``     the timestep a model is given, ``1000 sigma``  ``(B,)``, float32 always
========  =======================================  ==========================================================

Noise-prediction models live in other coordinates, ``x_vp = a x0 + s eps`` with ``a^2 + s^2 = 1`` ("variance preserving").
They are converted where the model is called, and nowhere else: ``sigma = s / (a + s)`` and ``x = x_vp / (a + s)``, so
``a = (1 - sigma) / n``, ``s = sigma / n`` and ``x = n x_vp`` with the norm ``n = sqrt((1 - sigma)^2 + sigma^2)``. DDIM and
Euler-discrete steps are Euler steps in these coordinates.

Latents, noise, targets and noise levels are float32: near 1000, bfloat16 has a spacing of 4.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Latent = Float[Tensor, "b *rest"]
Sigma = Float[Tensor, "b"]

TIMESTEPS = 1000  # a model's timestep is this times sigma


def widen(x: Tensor) -> Tensor:
    """At least float32: what errors, losses and latents are computed in (float64 stays)."""
    return x if x.dtype == torch.float64 else x.float()


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """``(B,)`` to ``(B, 1, ..., 1)``, so that it multiplies a tensor shaped as ``like``."""
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim))


def interpolate(x0: Latent, eps: Latent, sigma: Sigma) -> Latent:
    """The noised latent ``(1 - sigma) x0 + sigma eps``."""
    s = expand(sigma, x0)
    return (1 - s) * x0 + s * eps


def velocity_target(x0: Latent, eps: Latent) -> Latent:
    """The velocity of the straight path, ``eps - x0``."""
    return eps - x0


def clean_from_velocity(x: Latent, v: Latent, sigma: Sigma) -> Latent:
    """``x0 = x - sigma v``."""
    return x - expand(sigma, x) * v


def noise_from_velocity(x: Latent, v: Latent, sigma: Sigma) -> Latent:
    """``eps = x + (1 - sigma) v``."""
    return x + (1 - expand(sigma, x)) * v


def velocity_from_clean(x: Latent, x0: Latent, sigma: Sigma) -> Latent:
    """``v = (x - x0) / sigma``; sigma must be above 0."""
    return (x - x0) / expand(sigma, x)


def velocity_from_noise(x: Latent, eps: Latent, sigma: Sigma) -> Latent:
    """``v = (eps - x) / (1 - sigma)``; sigma must be below 1."""
    return (eps - x) / (1 - expand(sigma, x))


def vp_norm(sigma: Tensor) -> Tensor:
    """``n = sqrt((1 - sigma)^2 + sigma^2)``, from 1 at both ends to 0.707 in the middle; ``x = n x_vp``."""
    return torch.hypot(1 - sigma, sigma)


def velocity_from_v(x: Latent, v: Latent, sigma: Sigma) -> Latent:
    """Velocity from a v-prediction ``a eps - s x0``: ``(v + (2 sigma - 1) x / n) / n``, finite for every sigma."""
    s = expand(sigma, x)
    norm = vp_norm(s)
    return (v + (2 * s - 1) * x / norm) / norm


def sigma_from_ratio(ratio: Tensor) -> Tensor:
    """Noise level of the ratio ``s / a`` of noise to signal (0 to infinity), which diffusers' k-samplers call sigma."""
    return (1 / (1 + 1 / ratio.double())).to(ratio.dtype)


def timestep_from_sigma(sigma: Sigma, table: Float[Tensor, "timesteps"]) -> Sigma:
    """Timestep of a noise level in the ascending ``table`` of the levels of timesteps 0, 1, ...

    Exact on the table, in between linear in the noise-to-signal ratio as Euler-discrete schedulers have it; levels
    beyond its ends get the first or the last timestep.
    """
    sigma = sigma.clamp(table[0], table[-1])
    low = (torch.searchsorted(table, sigma, right=True) - 1).clamp(max=len(table) - 2)
    here, there = table[low], table[low + 1]
    part = (sigma - here) / (there - here) * (1 - there) / (1 - sigma)  # of the way, in sigma / (1 - sigma)
    return torch.where(sigma == there, low + 1, low + part)  # there may be 1, where the ratio is infinite


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, ``v(empty) + w (v(c) - v(empty))``; w = 1 is the conditional model itself."""
    return unconditional + scale * (conditional - unconditional)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """The time shift of resolution-dependent schedules, ``s sigma / (1 + (s - 1) sigma)``."""
    return shift * sigma / (1 + (shift - 1) * sigma)
