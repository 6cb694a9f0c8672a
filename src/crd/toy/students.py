"""Two students. Both start as the exact reference.

``MixtureStudent`` can only be the exact field of some mixture, so its errors always are a log likelihood.
``NetworkStudent`` is a free vector field, as real models are: nothing ties its noise levels to each other.
"""

import itertools
import math

import torch
from torch import Tensor, nn

from crd.seeding import derive_seed, generator
from crd.solvers import Velocity
from crd.toy.problem import Mixture, velocity

WIDTH = 64
STEPS = 24  # of the sampler, two evaluations each


class MixtureStudent(nn.Module):
    """A mixture with trained weights, means and variances, read as a velocity field."""

    def __init__(self, reference: Mixture):
        super().__init__()
        self.log_weight = nn.Parameter(reference.log_weight.clone())
        self.mean = nn.Parameter(reference.mean.clone())
        self.log_variance = nn.Parameter(reference.variance.log())

    def forward(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        return velocity(Mixture(self.log_weight, self.mean, self.log_variance.exp()), x, sigma, prompt)


class NetworkStudent(nn.Module):
    """The exact reference field plus ``sigma`` times a small network whose last layer starts at zero.

    The factor sigma is no loss of generality: at sigma = 0 the field of every distribution is ``-x``.
    """

    def __init__(self, reference: Mixture, seed: int):
        super().__init__()
        self.reference = reference
        prompts, _, dimensions = reference.mean.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "network"))
            self.layers = nn.Sequential(
                nn.Linear(dimensions + 3 + prompts, WIDTH),
                nn.SiLU(),
                nn.Linear(WIDTH, WIDTH),
                nn.SiLU(),
                nn.Linear(WIDTH, dimensions),
            )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        s = sigma[..., None]
        one_hot = nn.functional.one_hot(prompt, len(self.reference.mean)).to(x.dtype).expand(*x.shape[:-1], -1)
        features = torch.cat([x, s, (math.pi * s).cos(), (2 * math.pi * s).cos(), one_hot], -1)
        return velocity(self.reference, x, sigma, prompt) + s * self.layers(features)


Student = MixtureStudent | NetworkStudent


@torch.no_grad()
def draw(student: Student | Mixture, count: int, prompts: int, seed: int, *path: int | str) -> Tensor:
    """Samples ``(p, count, 2)`` of a field, by Heun steps from noise that is a function of seed and path."""
    prompt = torch.arange(prompts).repeat_interleave(count)
    noise = torch.randn(prompts * count, 2, generator=generator(seed, *path, "ode"))

    def field(x: Tensor, sigma: Tensor) -> Tensor:
        return velocity(student, x, sigma, prompt) if isinstance(student, Mixture) else student(x, sigma, prompt)

    return heun(field, noise, torch.linspace(1, 0, STEPS + 1)).unflatten(0, (prompts, count))


def heun(velocity_of: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
    """Second-order steps: Euler's shrink the variance of the samples by percents, which a moving reference piles up."""
    for here, there in itertools.pairwise(sigmas):
        before = velocity_of(x, here.expand(len(x)))
        after = velocity_of(x + (there - here) * before, there.expand(len(x)))
        x = x + (there - here) * (before + after) / 2
    return x
