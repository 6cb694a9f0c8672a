"""DiffusionNFT (arXiv 2509.16117): contrast an implicit better policy with an implicit worse one.

With ``v+ = (1 - beta) v_old + beta v`` and ``v- = (1 + beta) v_old - beta v``, and q in [0, 1] the normalised reward::

    loss_i = (clip / beta) [q_i d(x0(v+), x0) + (1 - q_i) d(x0(v-), x0)]

where ``x0(v) = x - sigma v``, and d is the squared distance divided by its own detached mean absolute distance.
Departure: groups with equal rewards are left out, as for all algorithms here (there, they pull towards the old policy).
"""

from jaxtyping import Float
from torch import Tensor

from crd.flow import expand, widen
from crd.objectives.terms import ERROR_FLOOR


def nft_loss(
    velocity: Float[Tensor, "l n *latent"],
    old: Float[Tensor, "l n *latent"],
    target: Float[Tensor, "l n *latent"],
    sigma: Float[Tensor, "l n"],
    advantage: Float[Tensor, "n"],
    *,
    beta: float,
    clip: float,
) -> Float[Tensor, "l n"]:
    """The loss of every sample at every noise level, unreduced; ``advantage`` in [0, 1], ``target`` is eps - x0."""
    velocity, old, target = widen(velocity), widen(old), widen(target)

    def distance(v: Tensor) -> Tensor:
        error = (expand(sigma, v) * (v - target)).flatten(2)  # x0(v) - x0 = -sigma (v - u)
        return error.square().mean(-1) / error.detach().abs().mean(-1).clamp_min(ERROR_FLOOR)

    better, worse = old + beta * (velocity - old), old - beta * (velocity - old)
    return clip / beta * (advantage * distance(better) + (1 - advantage) * distance(worse))
