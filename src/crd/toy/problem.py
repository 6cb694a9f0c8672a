"""Gaussian mixtures whose density, velocity field and reward tilt are all known in closed form.

Shapes: ``p`` prompts, ``k`` components, ``d`` dimensions, ``n`` samples, ``...`` anything that broadcasts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from crd.seeding import generator


@dataclass(frozen=True)
class Mixture:
    """For every prompt a mixture of isotropic Gaussians."""

    log_weight: Tensor  # (p, k), up to a constant per prompt
    mean: Tensor  # (p, k, d)
    variance: Tensor  # (p, k)


@dataclass(frozen=True)
class Reward:
    """``r(x, c) = linear_c . x - curvature_c |x|^2 / 2 + offset_c``."""

    linear: Tensor  # (p, d)
    curvature: Tensor  # (p,)
    offset: Tensor  # (p,)

    def __call__(self, x: Tensor, prompt: Tensor) -> Tensor:
        """Rewards ``(n,)`` of samples ``(n, d)``."""
        quadratic = self.curvature[prompt] * x.square().sum(-1) / 2
        return (self.linear[prompt] * x).sum(-1) - quadratic + self.offset[prompt]


@dataclass(frozen=True)
class Problem:
    """What is asked for: the reference tilted by ``exp(eta r)``."""

    reference: Mixture
    reward: Reward
    eta: float

    @property
    def prompts(self) -> int:
        return len(self.reference.mean)

    @property
    def solution(self) -> Mixture:
        return tilt(self.reference, self.reward, self.eta)


def mixture_problem(offsets: tuple[float, float, float] = (0.0, 0.0, 0.0), eta: float = 1.0) -> Problem:
    """Three prompts in the plane, three components each; rewards with standard deviations of about 1 under the reference."""
    reference = Mixture(
        log_weight=torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.6, 0.2, 0.2]]).log(),
        mean=torch.tensor(
            [
                [[-1.2, 0.0], [0.8, 1.0], [1.0, -1.0]],
                [[0.0, 1.4], [-1.2, -0.7], [1.2, -0.7]],
                [[0.0, 0.0], [1.5, 0.5], [-1.0, 1.2]],
            ]
        ),
        variance=torch.tensor([[0.30, 0.20, 0.25], [0.20, 0.30, 0.20], [0.40, 0.15, 0.25]]),
    )
    reward = Reward(
        linear=torch.tensor([[0.9, 0.3], [0.2, -0.9], [0.6, 0.7]]),
        curvature=torch.tensor([0.0, 0.0, 0.5]),
        offset=torch.tensor(offsets),
    )
    return Problem(reference, reward, eta)


def gaussian_problem(variance: float = 0.36, eta: float = 0.5) -> Problem:
    """One prompt, one Gaussian, a linear reward of standard deviation 1: a tilt t moves the mean by ``t variance linear``."""
    reference = Mixture(torch.zeros(1, 1), torch.zeros(1, 1, 2), torch.full((1, 1), variance))
    reward = Reward(torch.tensor([[1 / math.sqrt(variance), 0.0]]), torch.zeros(1), torch.zeros(1))
    return Problem(reference, reward, eta)


def velocity(mixture: Mixture, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
    """The exact field ``E[eps - x0 | x_sigma = x]``: x ``(..., n, d)``, sigma ``(..., n)``, prompt ``(n,)``."""
    s = sigma[..., None]
    variance = mixture.variance[prompt]
    marginal = (1 - s).square() * variance + s.square()  # variance of x_sigma in each component
    deviation = x[..., None, :] - (1 - s)[..., None] * mixture.mean[prompt]
    dimensions = x.shape[-1]
    logit = mixture.log_weight[prompt] - deviation.square().sum(-1) / (2 * marginal) - dimensions / 2 * marginal.log()
    slope = (s - (1 - s) * variance) / marginal
    of_component = slope[..., None] * deviation - mixture.mean[prompt]
    return (logit.softmax(-1)[..., None] * of_component).sum(-2)


def log_density(mixture: Mixture, x: Tensor, prompt: Tensor) -> Tensor:
    """``log p(x | c)`` ``(n,)`` of samples ``(n, d)``."""
    variance = mixture.variance[prompt]
    squared = (x[:, None, :] - mixture.mean[prompt]).square().sum(-1)
    normal = -squared / (2 * variance) - x.shape[-1] / 2 * (2 * math.pi * variance).log()
    return (mixture.log_weight.log_softmax(-1)[prompt] + normal).logsumexp(-1)


def sample(mixture: Mixture, count: int, seed: int, *path: int | str) -> Tensor:
    """Exact samples ``(p, count, d)``, a function of the seed and the path of the draw."""
    rng = generator(seed, *path)
    prompts, _, dimensions = mixture.mean.shape
    component = torch.multinomial(mixture.log_weight.softmax(-1), count, replacement=True, generator=rng)
    mean = mixture.mean.gather(1, component[..., None].expand(-1, -1, dimensions))
    noise = torch.randn(prompts, count, dimensions, generator=rng, dtype=mean.dtype)
    return mean + mixture.variance.gather(1, component).sqrt()[..., None] * noise


def tilt(mixture: Mixture, reward: Reward, strength: float) -> Mixture:
    """``p exp(strength r) / Z``: again a mixture, by completing the square in every component.

    ``log_weight`` keeps log Z: its logsumexp over components grows by log Z(c).
    """
    precision = 1 / mixture.variance + strength * reward.curvature[:, None]
    if not bool((precision > 0).all()):
        raise ValueError("the reward curves upwards faster than the reference falls off: p exp(t r) has no integral")
    pull = mixture.mean / mixture.variance[..., None] + strength * reward.linear[:, None]
    exponent = pull.square().sum(-1) / (2 * precision) - mixture.mean.square().sum(-1) / (2 * mixture.variance)
    shrinkage = mixture.mean.shape[-1] / 2 * (precision * mixture.variance).log()
    log_weight = mixture.log_weight + exponent - shrinkage + strength * reward.offset[:, None]
    return Mixture(log_weight, pull / precision[..., None], 1 / precision)


def log_normaliser(problem: Problem) -> Tensor:
    """``log Z(c)`` ``(p,)``."""
    return problem.solution.log_weight.logsumexp(-1) - problem.reference.log_weight.logsumexp(-1)


def expected_reward(mixture: Mixture, reward: Reward) -> Tensor:
    """``E[r]`` under every prompt's mixture, ``(p,)``."""
    linear = (mixture.mean * reward.linear[:, None]).sum(-1)
    square = mixture.mean.square().sum(-1) + mixture.mean.shape[-1] * mixture.variance
    of_component = linear - reward.curvature[:, None] * square / 2 + reward.offset[:, None]
    return (mixture.log_weight.softmax(-1) * of_component).sum(-1)


def fitted_tilt(problem: Problem, mean_reward: Tensor, bound: float = 20.0) -> Tensor:
    """For every prompt the t in (-1, bound) at which ``p_ref exp(t r)`` has the given mean reward, by bisection."""
    low, high = torch.full_like(mean_reward, -1.0), torch.full_like(mean_reward, bound)
    for _ in range(50):
        middle = (low + high) / 2
        reached = torch.stack(
            [expected_reward(tilt(problem.reference, problem.reward, float(t)), problem.reward)[c] for c, t in enumerate(middle)]
        )
        low, high = torch.where(reached < mean_reward, middle, low), torch.where(reached < mean_reward, high, middle)
    return (low + high) / 2
