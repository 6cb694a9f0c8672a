"""The named sets of weights that training keeps, whatever is trained: a LoRA, or the whole backbone."""

from pathlib import Path
from typing import Literal, Protocol

from torch import nn

#: trained; moving reference in R; draws the rollouts; the frozen pretrained model
Weights = Literal["student", "old", "sampler", "pretrained"]
TRAINING_SETS: tuple[Weights, ...] = ("student", "old", "sampler")


class WeightSets(Protocol):
    """Sets of weights over one family's backbone. Choosing one flips flags or a reference, and copies nothing."""

    names: tuple[Weights, ...]  # those kept besides the pretrained ones
    sharded: bool  # whether processes hold pieces of the backbone

    def activate(self, name: Weights) -> None:
        """From now on the family's velocity is that of these weights."""
        ...

    def changed(self, name: Weights) -> None:
        """To be called when a set was written: what processes have put together of it is out of date."""
        ...

    def parameters(self, name: Weights) -> list[tuple[str, nn.Parameter]]:
        """Named parameters of a set, in a fixed order; the names do not contain the set's."""
        ...

    def frozen(self) -> list[nn.Parameter]:
        """The pretrained weights."""
        ...

    def backbones(self) -> list[nn.Module]:
        """All modules that compute a velocity."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the student into a folder, in the form that diffusers loads; all processes call it, the main one writes."""
        ...

    def load(self, path: Path) -> None:
        """Reads what :meth:`save` wrote; raises CRDError if it does not fit."""
        ...
