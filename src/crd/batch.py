"""The explicit data that travels between the stages of a training step.

Legend: ``n`` samples (pictures), ``l`` noise levels, ``latent`` the dimensions of one latent, ``p`` prompts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the backbone is told about its prompts: token states and one pooled vector each."""

    states: Float[Tensor, "p tokens width"]
    pooled: Float[Tensor, "p pooled"]

    def select(self, index: Int[Tensor, "n"]) -> "Conditioning":
        return Conditioning(self.states[index], self.pooled[index])

    @staticmethod
    def cat(parts: "list[Conditioning]") -> "Conditioning":
        return Conditioning(torch.cat([part.states for part in parts]), torch.cat([part.pooled for part in parts]))


@dataclass(frozen=True)
class PromptGroup:
    """One prompt of an epoch; K samples are drawn for it."""

    index: int  # position in the prompt set: the identity of the prompt
    text: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Samples:
    """Pictures of one process, as latents, with everything that training reads of them.

    Only the latents are on the device: tiles and noise are planned from the rest, and must not wait for it.
    """

    x0: Float[Tensor, "n *latent"]
    sample_id: Int[Tensor, "n"]  # global index in the epoch: group * K + member
    group: Int[Tensor, "n"]  # global index of the group in the epoch: its row of the epoch's conditioning
    advantage: Float[Tensor, "n"]  # normalised reward in [0, 1]

    def select(self, index: Int[Tensor, "m"]) -> "Samples":
        return Samples(self.x0[index.to(self.x0.device)], self.sample_id[index], self.group[index], self.advantage[index])


@dataclass(frozen=True)
class Tile:
    """Samples x noise levels that go through the backbone together."""

    x0: Float[Tensor, "n *latent"]
    eps: Float[Tensor, "l n *latent"]
    sigma: Float[Tensor, "l n"]
    group: Int[Tensor, "n"]  # dense: below n
    advantage: Float[Tensor, "n"]
    conditioning: Conditioning  # of the n samples

    @property
    def size(self) -> int:
        """Sample-timesteps, i.e. rows of one forward pass."""
        return self.sigma.numel()
