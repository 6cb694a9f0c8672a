"""The smallest training loop around the library's own objective code."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from crd.objectives.crd import matching_loss, policy_loss
from crd.objectives.terms import anchor_strength, noised, prediction_error, velocity_distance
from crd.seeding import generator
from crd.toy.problem import Problem, log_normaliser
from crd.toy.students import Student

Draw = Callable[[int], Tensor]  # step -> clean samples (p, group_size, d)
Estimate = Literal["average", "per_level", "halves"]


@dataclass(frozen=True)
class Settings:
    """One training run. ``beta`` and ``clip`` of the objective are 1, so the target is ``eta r`` itself."""

    steps: int = 1000
    learning_rate: float = 5e-3  # falls linearly to 0
    group_size: int = 64
    levels: int = 16  # noise levels per sample and step: network evaluations
    estimate: Estimate = "average"
    antithetic: bool = True  # levels come in pairs with eps and -eps
    centering: Literal["prompt", "batch", "exact"] = "prompt"  # exact: no centering, the true log Z(c) is subtracted
    anchor: float = 0.0
    anchor_weight: Literal["likelihood", "plain"] = "likelihood"


def draw_noise(settings: Settings, prompts: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise levels ``(l, n)``, the same for all members of a group, and noise ``(l, n, 2)``.

    Levels are stratified over (0, 1); for ``halves`` each half has strata of its own, so that both are unbiased.
    """
    halves, signs = (2 if settings.estimate == "halves" else 1), ((1, -1) if settings.antithetic else (1,))
    strata = settings.levels // (halves * len(signs))
    sigma = (torch.arange(strata)[:, None] + torch.rand(halves, strata, prompts, generator=rng)) / strata
    eps = torch.randn(halves, strata, prompts * settings.group_size, 2, generator=rng)
    sigma = torch.cat([sigma for _ in signs], 1)
    eps = torch.cat([sign * eps for sign in signs], 1)
    sigma = sigma.flatten(0, 1).clamp(1e-3, 1 - 1e-3)  # float32 differences of errors times 1/sigma
    return sigma.repeat_interleave(settings.group_size, 1), eps.flatten(0, 1)


def policy(implicit: Tensor, target: Tensor, group: Tensor, estimate: Estimate) -> Tensor:
    """The policy term, a scalar.

    ``halves`` is the product of the residuals of two independent halves, ``e1 e2 = ((e1 + e2)/2)^2 - ((e1 - e2)/2)^2``:
    an estimate of the squared residual that the noise of R does not bias.
    """
    averaged = estimate != "per_level"
    loss = policy_loss(
        implicit,
        target,
        group,
        beta=1.0,
        clip=1.0,
        form="squared",
        weighting="uniform",
        temperature=1.0,
        levels="average" if averaged else "each",
        baseline_gradient=True,
    ).mean()
    if estimate != "halves":
        return loss
    first, second = implicit.chunk(2)
    gap = (first.mean(0, keepdim=True) - second.mean(0, keepdim=True)) / 2
    return loss - matching_loss(gap, torch.zeros_like(target), group, beta=1.0, clip=1.0, form="squared").mean()


def step_loss(
    fields: tuple[Student, Student, Student], x0: Tensor, problem: Problem, settings: Settings, rng: torch.Generator
) -> Tensor:
    """Policy term plus anchor for (student, old, pretrained) at clean samples ``(p, group_size, d)``."""
    student, old, pretrained = fields
    prompt = torch.arange(problem.prompts).repeat_interleave(settings.group_size)
    group = torch.zeros_like(prompt) if settings.centering == "batch" else prompt
    clean = x0.flatten(0, 1)
    sigma, eps = draw_noise(settings, problem.prompts, rng)
    x, target = noised(clean, eps, sigma), eps - clean
    v = student(x, sigma, prompt)
    with torch.no_grad():
        before = prediction_error(old(x, sigma, prompt), target, sigma, "likelihood")
    implicit = before - prediction_error(v, target, sigma, "likelihood")
    reward = problem.eta * problem.reward(clean, prompt)
    if settings.centering == "exact":
        residual = implicit - (reward - log_normaliser(problem)[prompt])
        loss = torch.stack([half.mean(0) for half in residual.chunk(2)]).prod(0).mean()
    else:
        loss = policy(implicit, reward, group, settings.estimate)
    if settings.anchor == 0:
        return loss
    with torch.no_grad():
        distance_to = pretrained(x, sigma, prompt)
    distance = velocity_distance(v, distance_to)
    if settings.anchor_weight == "likelihood":
        distance = distance * x.shape[-1] * (1 - sigma) / sigma
    strength = anchor_strength(reward, strength=settings.anchor, minimum=0.0, form="constant")
    return loss + (strength * distance).mean()


def train(
    fields: tuple[Student, Student, Student],
    problem: Problem,
    settings: Settings,
    draw_x0: Draw,
    *,
    seed: int,
    part: int = 0,
    watch: Callable[[int], None] | None = None,
) -> None:
    """Trains ``fields[0]``; ``part`` numbers the rounds of a moving reference; ``watch(step)`` is called after every step."""
    optimizer = torch.optim.Adam(fields[0].parameters(), lr=settings.learning_rate, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, settings.steps)
    for step in range(settings.steps):
        optimizer.zero_grad(set_to_none=True)
        step_loss(fields, draw_x0(step), problem, settings, generator(seed, part, step, "noise")).backward()
        optimizer.step()
        rate.step()
        if watch is not None:
            watch(step + 1)
