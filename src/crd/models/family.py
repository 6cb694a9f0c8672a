"""What training needs of a family of models: the few calls that differ between pipelines."""

from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from crd.batch import Conditioning
from crd.config import CRDConfig
from crd.errors import CRDError


class Family(Protocol):
    """Text to conditioning, velocity of the backbone, latents to pictures; all of one diffusers pipeline.

    Latents have the shape in which the backbone takes them (packed to tokens, where it does), and live in the
    coordinates of flow.py: a noise-prediction model converts at this boundary and nowhere else.
    """

    pipeline: Any  # the loaded DiffusionPipeline
    backbone: torch.nn.Module  # its transformer or UNet, the only part that is trained
    text_encoders: tuple[str, ...]  # names of the pipeline's components that only encode() needs
    lora_targets: tuple[str, ...]  # endings of the names of the modules that get LoRA weights
    height: int  # of the pictures, pixels
    width: int
    max_sequence_length: int  # tokens of a prompt's long part, the pipeline's argument of that name
    has_unconditional: bool  # whether guidance above 1 can be asked for

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent."""
        ...

    def encode(self, prompts: list[str]) -> Conditioning:
        """Conditioning of the prompts, one row each; of the empty prompt, what the pipeline's unconditional branch takes."""
        ...

    def unknown_words(self, prompt: str) -> list[str]:
        """Words that the tokenizer maps to its unknown token."""
        ...

    def sigmas(self, steps: int, shift: float | None = None) -> Tensor:
        """The scheduler's own noise levels, float32 ``(steps + 1,)``, the last one 0; ``shift`` replaces its time shift."""
        ...

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Where a rollout along ``sigmas`` begins, from standard noise ``(n, ...)``."""
        ...

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity ``(b, ...)`` of the backbone with whatever weights are active at ``x (b, ...)``, ``sigma (b,)``."""
        ...

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as the pipeline does it; 1 is the conditional model itself."""
        ...

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents ``(n, ...)`` to PIL pictures, as the pipeline does."""
        ...

    def save_lora(self, folder: str, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Writes ``pytorch_lora_weights.safetensors`` by the pipeline's own saver."""
        ...


def check_guidance(family: Family, config: CRDConfig) -> None:
    """Raises CRDError if the run asks for classifier-free guidance that the family's pipeline does not have."""
    if family.has_unconditional:
        return
    asked = {
        "rollout.guidance_scale": config.rollout.guidance_scale,
        "anchor.guidance_scale": config.anchor.guidance_scale,
        "evaluation.guidance_scale": config.evaluation.guidance_scale,
        "evaluation.reference_guidance_scale": config.reference_guidance,
    }
    for setting, scale in asked.items():
        if scale != 1:
            raise CRDError(
                f"{setting} is {scale:g}, but {type(family.pipeline).__name__} of {config.model.path} has no "
                "unconditional branch (its guidance was distilled into it, or there is none). Set it to 1."
            )
