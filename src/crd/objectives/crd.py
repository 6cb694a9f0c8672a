"""Centered reward distillation: regress the centered implicit reward on the centered reward (theory, section 4).

For the samples i of one prompt, with weights w that sum to one (uniform: 1/K)::

    e_i  = beta (R_i - sum_j w_j R_j) - (a_i - sum_j w_j a_j)
    loss = (clip / beta) e_i^2          or  (clip / beta) BCE(logit beta R_c, probability sigmoid(a_c))

Choices of ours where the paper is silent:

* a group whose rewards are all equal is left out (it asks for nothing but R = 0, i.e. to stay);
* softmax and hard weightings average the loss of their two directions (towards the best, away from the worst).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from crd.objectives.terms import center, half_weight, softmax_weight

Levels = Literal["each", "average", "halves"]
LossForm = Literal["squared", "cross_entropy"]
Weighting = Literal["uniform", "softmax", "hard"]


def matching_loss(
    implicit: Float[Tensor, "l n"],
    advantage: Float[Tensor, "n"],
    group: Int[Tensor, "n"],
    weight: Float[Tensor, "n"] | None = None,
    *,
    beta: float,
    clip: float,
    form: LossForm,
    baseline_gradient: bool = True,
) -> Float[Tensor, "l n"]:
    """The loss of every sample at every noise level, for one set of centering weights; unreduced."""
    r = beta * center(implicit, group, weight, baseline_gradient=baseline_gradient)
    a = center(advantage, group, weight).expand_as(r)
    if form == "squared":
        return clip / beta * (r - a).square()
    return clip / beta * F.binary_cross_entropy_with_logits(r, a.sigmoid(), reduction="none")


def policy_loss(
    implicit: Float[Tensor, "l n"],
    advantage: Float[Tensor, "n"],
    group: Int[Tensor, "n"],
    *,
    beta: float,
    clip: float,
    form: LossForm,
    weighting: Weighting,
    temperature: float,
    levels: Levels,
    baseline_gradient: bool,
) -> Float[Tensor, "_ n"]:
    """The policy term, unreduced: ``(l, n)``, or ``(1, n)`` if R is averaged over noise levels first.

    The square of an estimate of R is biased by its variance. ``average`` makes that smaller with every level;
    ``halves`` multiplies the residuals of the even and of the odd levels, which have independent noise, so that
    nothing of it is left (and a term can be negative); its loss form is squared.

    Args:
        implicit: R of every sample at every noise level; whole groups.
        advantage: normalised reward in [0, 1].
        group: index of each sample's prompt, below n.
    """

    def matching(r: Tensor, a: Tensor, weight: Tensor | None) -> Tensor:
        return matching_loss(r, a, group, weight, beta=beta, clip=clip, form=form, baseline_gradient=baseline_gradient)

    def loss(weight: Tensor | None) -> Tensor:
        if levels == "each":
            return matching(implicit, advantage, weight)
        if levels == "average":
            return matching(implicit.mean(0, keepdim=True), advantage, weight)
        even, odd = implicit[::2].mean(0, keepdim=True), implicit[1::2].mean(0, keepdim=True)
        # (r - a) (s - a) = ((r + s)/2 - a)^2 - ((r - s)/2)^2
        return matching((even + odd) / 2, advantage, weight) - matching((even - odd) / 2, torch.zeros_like(advantage), weight)

    if weighting == "uniform":
        total = loss(None)
    elif weighting == "softmax":
        weights = [softmax_weight(advantage, group, tau) for tau in (temperature, -temperature)]
        total = (loss(weights[0]) + loss(weights[1])) / 2
    else:
        weights = [half_weight(advantage, group, sign) for sign in (1, -1)]
        total = (loss(weights[0]) + loss(weights[1])) / 2
    spread = center(advantage, group).abs()
    return total * has_spread(spread, group)


def has_spread(deviation: Float[Tensor, "n"], group: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """1 for samples of groups in which some sample deviates from the group's mean, else 0."""
    size = int(group.shape[0])
    largest = deviation.new_zeros(size).scatter_reduce(0, group, deviation, "amax")
    return (largest[group] > 1e-6).to(deviation.dtype)
