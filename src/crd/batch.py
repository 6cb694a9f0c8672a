"""The explicit data that travels between the stages of a training step.

Legend: ``n`` samples (pictures), ``l`` noise levels, ``latent`` the dimensions of one latent, ``p`` prompts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Conditioning:
    """What the backbone is told about its prompts: token states and, in some families, one pooled vector and a mask."""

    states: Float[Tensor, "p tokens width"]
    pooled: Float[Tensor, "p pooled"] | None = None
    mask: Bool[Tensor, "p tokens"] | None = None  # of the tokens that are there; None: all of them

    def select(self, index: Int[Tensor, "n"]) -> "Conditioning":
        pooled = None if self.pooled is None else self.pooled[index]
        return Conditioning(self.states[index], pooled, None if self.mask is None else self.mask[index])

    def trimmed(self) -> "Conditioning":
        """Without padding that no row needs: a prompt then does not depend on those it was encoded with. Waits for the device."""
        if self.mask is None:
            return self
        length = max(1, int(self.mask.any(0).nonzero().max()) + 1)
        return Conditioning(self.states[:, :length], self.pooled, self.mask[:, :length])

    @staticmethod
    def cat(parts: "list[Conditioning]") -> "Conditioning":
        """One below the other; prompts of families with a mask are padded with zeros to the longest."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        masks = [part.mask for part in parts if part.mask is not None]
        if not masks:
            return Conditioning(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)
        length = max(mask.shape[1] for mask in masks)
        states = [pad(part.states, (0, 0, 0, length - part.states.shape[1])) for part in parts]
        return Conditioning(
            torch.cat(states),
            torch.cat(pooled) if pooled else None,
            torch.cat([pad(mask, (0, length - mask.shape[1])) for mask in masks]),
        )


@dataclass(frozen=True)
class PromptGroup:
    """One prompt of an epoch; K samples are drawn for it."""

    index: int  # position in the prompt set: the identity of the prompt
    text: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Path:
    """The stochastic way on which pictures were drawn, noise first; only Flow-GRPO stores it."""

    points: Float[Tensor, "n points *latent"]  # one more than there are steps
    log_density: Float[Tensor, "n steps"]  # of each step under the weights that drew it, mean over the latent's dimensions


@dataclass(frozen=True)
class Samples:
    """Pictures of one process, as latents, with everything that training reads of them.

    Only latents and paths are on the device: tiles and noise are planned from the rest, and must not wait for it.
    """

    x0: Float[Tensor, "n *latent"]
    sample_id: Int[Tensor, "n"]  # global index in the epoch: prompt * K + member
    prompt: Int[Tensor, "n"]  # index of the prompt in the epoch: its row of the epoch's conditioning
    group: Int[Tensor, "n"]  # which samples are centered together, and trained at the same noise levels: by prompt, or by step
    advantage: Float[Tensor, "n"]  # normalised reward in [0, 1]
    path: Path | None = None

    def select(self, index: Int[Tensor, "m"]) -> "Samples":
        there = index.to(self.x0.device, non_blocking=True)
        path = Path(self.path.points[there], self.path.log_density[there]) if self.path else None
        return Samples(self.x0[there], self.sample_id[index], self.prompt[index], self.group[index], self.advantage[index], path)


@dataclass(frozen=True)
class Transitions:
    """Steps of stored paths, one per sample and noise level."""

    next_x: Float[Tensor, "l n *latent"]
    next_sigma: Float[Tensor, "l n"]
    spread: Float[Tensor, "l n"]  # g, the noise of the step per square root of sigma
    log_density: Float[Tensor, "l n"]


@dataclass(frozen=True)
class Tile:
    """Samples x noise levels that go through the backbone together."""

    x: Float[Tensor, "l n *latent"]  # noised latents, or points of stored paths
    target: Float[Tensor, "l n *latent"] | None  # u = eps - x0; stored paths have none
    sigma: Float[Tensor, "l n"]
    group: Int[Tensor, "n"]  # dense: below n
    advantage: Float[Tensor, "n"]
    weight: Float[Tensor, "n"]  # of the sample's reward term
    conditioning: Conditioning  # of the n samples
    transitions: Transitions | None = None

    @property
    def size(self) -> int:
        """Sample-timesteps, i.e. rows of one forward pass."""
        return self.sigma.numel()
