"""Reward-weighted regression, the floor of the comparison: flow matching on the model's own pictures, good ones weighted up."""

from jaxtyping import Float, Int
from torch import Tensor

from crd.objectives.terms import group_sum, softmax_weight


def rwr_weight(advantage: Float[Tensor, "n"], group: Int[Tensor, "n"], temperature: float) -> Float[Tensor, "n"]:
    """``K softmax(A / temperature)`` over each group: weights with mean 1; ``advantage`` is signed."""
    return softmax_weight(advantage, group, temperature) * group_sum(advantage.new_ones(advantage.shape), group)
