"""FLUX.1 (dev, which is told a guidance, and schnell, which is not) behind the few calls that training needs."""

import functools

import torch
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor

from crd.batch import Conditioning
from crd.config import ModelConfig
from crd.flow import guide
from crd.models.common import LORA_TARGETS, even_sigmas, image_shift, no_distilled_guidance, picture_size, unknown_words

DEFAULT_GUIDANCE = 3.5  # the pipeline's


@functools.lru_cache(maxsize=8)
def position_ids(tokens: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions ``(tokens, 3)`` of the prompt's tokens, all zero, and ``(rows * columns, 3)`` of the picture's."""
    picture = FluxPipeline._prepare_latent_image_ids(1, rows, columns, device, torch.float32)
    return torch.zeros(tokens, 3, device=device), picture


class Flux:
    """FLUX.1: latents are tokens ``(rows * columns, channels)`` of 2x2 VAE pixels.

    ``model.distilled_guidance`` is what a backbone with a guidance embedding is told, in rollouts and as the anchor alike.
    Guidance above 1 is the pipeline's ``true_cfg_scale`` with the empty negative prompt, two passes per step.
    The attention projections of the single blocks have the names of those in the double blocks, so both get LoRA weights.
    """

    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    lora_targets: tuple[str, ...] = LORA_TARGETS
    has_unconditional = True

    def __init__(self, pipeline: FluxPipeline, config: ModelConfig):
        self.pipeline = pipeline
        self.backbone = pipeline.transformer
        factor = pipeline.vae_scale_factor
        self.height, self.width = picture_size(config, pipeline.default_sample_size * factor, 2 * factor)
        self.rows, self.columns = self.height // (2 * factor), self.width // (2 * factor)
        self.max_sequence_length = config.sequence_length(512)
        self.guidance: float | None = None
        if self.backbone.config.guidance_embeds:
            self.guidance = DEFAULT_GUIDANCE if config.distilled_guidance is None else config.distilled_guidance
        else:
            no_distilled_guidance(config, pipeline)

    @property
    def latent_shape(self) -> tuple[int, int]:
        return (self.rows * self.columns, self.backbone.config.in_channels)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        states, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.backbone.device, max_sequence_length=self.max_sequence_length
        )
        return Conditioning(states, pooled)

    def unknown_words(self, prompt: str) -> list[str]:
        return unknown_words(self.pipeline.tokenizer_2, prompt)

    def sigmas(self, steps: int, shift: float | None = None) -> Tensor:
        scheduler = self.pipeline.scheduler
        return even_sigmas(scheduler, steps, shift, image_shift(scheduler, self.rows * self.columns))

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        return noise

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        text_ids, picture_ids = position_ids(conditioning.states.shape[1], self.rows, self.columns, x.device)
        guidance = None if self.guidance is None else torch.full((len(x),), self.guidance, device=x.device)
        return self.backbone(
            hidden_states=x,
            timestep=sigma.float(),  # the backbone multiplies by 1000
            guidance=guidance,
            pooled_projections=conditioning.pooled,
            encoder_hidden_states=conditioning.states,
            txt_ids=text_ids,
            img_ids=picture_ids,
            return_dict=False,
        )[0]

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        return guide(unconditional, conditional, scale)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        vae = self.pipeline.vae
        grid = FluxPipeline._unpack_latents(latents, self.height, self.width, self.pipeline.vae_scale_factor)
        scaled = grid / vae.config.scaling_factor + vae.config.shift_factor
        decoded = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(decoded, output_type="pil")

    def save_lora(self, folder: str, layers: dict[str, Tensor], metadata: dict) -> None:
        FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata)
