"""Stable Diffusion 3 and 3.5 (and the embedded nano model, which is one) behind the few calls that training needs."""

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift, retrieve_timesteps
from PIL import Image
from torch import Tensor

from crd.batch import Conditioning
from crd.config import ModelConfig
from crd.flow import TIMESTEPS, guide
from crd.models.common import LORA_TARGETS, flow_scheduler, no_distilled_guidance, picture_size, unknown_words


class SD3:
    """Text to conditioning, velocity of the backbone, latents to pictures; all of one pipeline.

    ``max_sequence_length`` is the pipeline's argument of that name: the length of the T5 part of the
    prompt, which the pipeline fills with zeros where there is no T5.
    """

    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    lora_targets: tuple[str, ...] = LORA_TARGETS
    has_unconditional = True

    def __init__(self, pipeline: StableDiffusion3Pipeline, config: ModelConfig):
        self.pipeline = pipeline
        self.backbone = pipeline.transformer
        factor = pipeline.vae_scale_factor
        self.height, self.width = picture_size(config, pipeline.default_sample_size * factor, factor * pipeline.patch_size)
        self.max_sequence_length = config.sequence_length(256)
        no_distilled_guidance(config, pipeline)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        factor = self.pipeline.vae_scale_factor
        return (self.backbone.config.in_channels, self.height // factor, self.width // factor)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Conditioning(states, pooled)

    def unknown_words(self, prompt: str) -> list[str]:
        return unknown_words(self.pipeline.tokenizer, prompt)

    def sigmas(self, steps: int, shift: float | None = None) -> Tensor:
        scheduler = flow_scheduler(self.pipeline.scheduler, shift)
        extra = {}
        if scheduler.config.get("use_dynamic_shifting", None):
            _, rows, columns = self.latent_shape
            patch = self.backbone.config.patch_size
            extra["mu"] = calculate_shift(
                (rows // patch) * (columns // patch),
                scheduler.config.get("base_image_seq_len", 256),
                scheduler.config.get("max_image_seq_len", 4096),
                scheduler.config.get("base_shift", 0.5),
                scheduler.config.get("max_shift", 1.16),
            )
        retrieve_timesteps(scheduler, steps, "cpu", **extra)
        return scheduler.sigmas.float()

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        return noise

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self.backbone(
            hidden_states=x,
            timestep=sigma.float() * TIMESTEPS,
            encoder_hidden_states=conditioning.states,
            pooled_projections=conditioning.pooled,
            return_dict=False,
        )[0]

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        return guide(unconditional, conditional, scale)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        vae = self.pipeline.vae
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        decoded = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(decoded, output_type="pil")

    def save_lora(self, folder: str, layers: dict[str, Tensor], metadata: dict) -> None:
        StableDiffusion3Pipeline.save_lora_weights(
            folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
        )
