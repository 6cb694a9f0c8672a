"""The terms that objectives are made of.

Shapes: ``l`` noise levels, ``n`` samples, ``...`` the dimensions of a latent. ``group`` holds for each
sample the index of its prompt; it is an argument of everything that centers, because what cancels the
normaliser Z(c) is a mean over the samples of ONE prompt (theory, section 2).
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crd.flow import expand, widen

ErrorForm = Literal["adaptive", "plain", "likelihood"]
StrengthForm = Literal["adaptive", "constant", "reversed"]

ERROR_FLOOR = 1e-5  # of the mean absolute error that adaptive normalisation divides by
SPREAD_FLOOR = 1e-4  # added to a standard deviation of rewards before dividing by it


def prediction_error(
    velocity: Float[Tensor, "l n *latent"], target: Float[Tensor, "l n *latent"], sigma: Float[Tensor, "l n"], form: ErrorForm
) -> Float[Tensor, "l n"]:
    """One squared prediction error per sample and noise level, so that ``R = error(old) - error(student)`` (theory, section 3).

    * ``plain``: mean over the latent's dimensions.
    * ``adaptive``: plain, divided by the sample's own detached mean absolute error.
    * ``likelihood``: sum over the dimensions times ``(1 - sigma)/sigma``; its integral over sigma in (0, 1)
      is ``-log p`` up to a constant, exactly so for the optimal velocity (Kingma & Gao 2023).
    """
    difference = (widen(velocity) - widen(target)).flatten(2)
    squared = difference.square()
    if form == "plain":
        return squared.mean(-1)
    if form == "adaptive":
        return squared.mean(-1) / difference.detach().abs().mean(-1).clamp_min(ERROR_FLOOR)
    return squared.sum(-1) * (1 - sigma) / sigma


def group_sum(values: Float[Tensor, "*l n"], group: Int[Tensor, "n"]) -> Float[Tensor, "*l n"]:
    """For each sample, the sum of the values over its group."""
    size = int(group.shape[0])  # group indices are below the number of samples: no device sync to count them
    total = values.new_zeros(*values.shape[:-1], size).index_add(-1, group, values)
    return total[..., group]


def group_mean(values: Float[Tensor, "*l n"], group: Int[Tensor, "n"]) -> Float[Tensor, "*l n"]:
    """For each sample, the mean of the values over its group."""
    return group_sum(values, group) / group_sum(torch.ones_like(values), group)


def center(
    values: Float[Tensor, "*l n"],
    group: Int[Tensor, "n"],
    weight: Float[Tensor, "n"] | None = None,
    *,
    baseline_gradient: bool = True,
) -> Float[Tensor, "*l n"]:
    """``v_i - sum_j w_j v_j`` over the group of i; without weights ``w = 1/K`` (theory, section 4).

    For uniform weights the gradient through the mean vanishes identically in the squared loss; for others
    it does not, and ``baseline_gradient=False`` leaves it out.
    """
    baseline = group_mean(values, group) if weight is None else group_sum(values * weight, group)
    return values - (baseline if baseline_gradient else baseline.detach())


def softmax_weight(advantage: Float[Tensor, "n"], group: Int[Tensor, "n"], temperature: float) -> Float[Tensor, "n"]:
    """``softmax(a / tau)`` over each group; a negative temperature prefers the worse samples."""
    logits = advantage / temperature
    size = int(group.shape[0])
    peak = logits.new_full((size,), -torch.inf).scatter_reduce(0, group, logits, "amax")
    raised = (logits - peak[group]).exp()
    return raised / group_sum(raised, group)


def half_weight(advantage: Float[Tensor, "n"], group: Int[Tensor, "n"], sign: int) -> Float[Tensor, "n"]:
    """Uniform over the better (sign 1) or the worse (sign -1) samples of each group, by the *centered* advantage.

    A group without spread has no better half and is weighted uniformly.
    """
    chosen = (sign * center(advantage, group) > 0).to(advantage.dtype)
    count = group_sum(chosen, group)
    uniform = 1 / group_sum(torch.ones_like(chosen), group)
    return torch.where(count > 0, chosen / count.clamp_min(1), uniform)


def anchor_strength(quality: Float[Tensor, "n"], *, strength: float, minimum: float, form: StrengthForm) -> Float[Tensor, "n"]:
    """``lambda_i = lambda_min + q_i (lambda - lambda_min)`` with q in [0, 1] the normalised reward (theory, section 6).

    Poor samples may move freely, good ones are held. ``reversed`` uses ``1 - q``; ``constant`` ignores q.
    """
    if form == "constant":
        return torch.full_like(quality, strength)
    if form == "reversed":
        quality = 1 - quality
    return minimum + quality * (strength - minimum)


def velocity_distance(a: Float[Tensor, "l n *latent"], b: Float[Tensor, "l n *latent"]) -> Float[Tensor, "l n"]:
    """Squared distance of two velocities, mean over the latent's dimensions."""
    return (widen(a) - widen(b)).flatten(2).square().mean(-1)


def noised(
    x0: Float[Tensor, "n *latent"], eps: Float[Tensor, "l n *latent"], sigma: Float[Tensor, "l n"]
) -> Float[Tensor, "l n *latent"]:
    """``(1 - sigma) x0 + sigma eps`` for every noise level of every sample."""
    s = expand(sigma, eps)
    return (1 - s) * x0 + s * eps
