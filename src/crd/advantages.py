"""From raw rewards to the normalised ones that objectives use (theory, section 7)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crd.objectives.terms import SPREAD_FLOOR, group_mean

SpreadOf = Literal["rollout", "prompt"]


@dataclass(frozen=True)
class Advantages:
    """Normalised rewards of the samples of one rollout."""

    value: Float[Tensor, "n"]  # in [0, 1], 0.5 is the mean of the prompt; 0.5 where not valid
    valid: Bool[Tensor, "n"]  # the sample has a reward, and so has at least one other of its group
    zero_spread: float  # share of groups in which all rewards are equal


def normalise(rewards: Float[Tensor, "n"], group: Int[Tensor, "n"], *, clip: float, spread_of: SpreadOf) -> Advantages:
    """``A = (r - mean of the prompt) / (std + 1e-4)``, clipped to ``±clip``, mapped to ``a = A / (2 clip) + 1/2``.

    The deviation is that of the whole rollout, or of the prompt. A NaN reward means "failed": it takes the
    sample out of its group's statistics and never counts as 0.
    """
    known = ~rewards.isnan()
    members = torch.zeros(int(group.max()) + 1, dtype=torch.long).index_add(0, group, known.long())
    valid = known & (members[group] >= 2)
    value = torch.full_like(rewards, 0.5)
    if not valid.any():
        return Advantages(value, valid, zero_spread=1.0)
    _, dense = group[valid].unique(return_inverse=True)
    r = rewards[valid].double()
    deviation = r - group_mean(r, dense)
    scaled = (deviation / _spread(r, deviation, dense, spread_of)).clamp(-clip, clip)
    value[valid] = (scaled / (2 * clip) + 0.5).to(value.dtype)
    largest = torch.zeros(int(dense.max()) + 1, dtype=r.dtype).scatter_reduce(0, dense, deviation.abs(), "amax")
    return Advantages(value, valid, zero_spread=float((largest <= 1e-9).double().mean()))


def combine(
    parts: Float[Tensor, "rewards n"],
    weights: Float[Tensor, "rewards"],
    total: Float[Tensor, "n"],
    group: Int[Tensor, "n"],
    *,
    spread_of: SpreadOf,
) -> Float[Tensor, "n"]:
    """Weighted sum of each reward's own advantage (GDPO), so that no reward drowns another by its scale; NaN where ``total`` is.

    A reward that does not apply to a picture (NaN in its part, but not in ``total``) adds nothing there.
    """
    valid = ~total.isnan()
    whole = torch.zeros_like(total, dtype=torch.float64)
    for part, weight in zip(parts, weights, strict=True):
        known = valid & ~part.isnan()
        if known.any():
            _, dense = group[known].unique(return_inverse=True)
            r = part[known].double()
            deviation = r - group_mean(r, dense)
            whole[known] += weight * deviation / _spread(r, deviation, dense, spread_of)
    return torch.where(valid, whole, math.nan).to(total.dtype)


def _spread(r: Tensor, deviation: Tensor, group: Tensor, spread_of: SpreadOf) -> Tensor:
    spread = r.std(correction=0) if spread_of == "rollout" else group_mean(deviation.square(), group).sqrt()
    return spread + SPREAD_FLOOR
