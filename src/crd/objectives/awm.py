"""Advantage weighted matching (arXiv 2509.25050): a clipped policy gradient with the flow-matching error as log-likelihood.

With R the implicit reward (log-likelihood ratio of student and moving reference, theory section 3) and A the advantage::

    loss_i = -min(rho_i A_i, clip(rho_i, 1 - c, 1 + c) A_i),    rho_i = exp(R_i)
"""

from jaxtyping import Float
from torch import Tensor


def clipped_policy_loss(
    log_ratio: Float[Tensor, "l n"], advantage: Float[Tensor, "n"], *, ratio_clip: float
) -> Float[Tensor, "l n"]:
    """The loss of every sample at every noise level, unreduced; ``advantage`` is signed, 0 the mean of the prompt."""
    ratio = log_ratio.exp()
    return -(ratio * advantage).minimum(ratio.clamp(1 - ratio_clip, 1 + ratio_clip) * advantage)
