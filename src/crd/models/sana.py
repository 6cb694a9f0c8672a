"""Sana behind the few calls that training needs."""

import inspect
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from PIL import Image
from torch import Tensor

from crd.batch import Conditioning
from crd.config import ModelConfig
from crd.errors import CRDError
from crd.flow import TIMESTEPS, guide
from crd.models.common import flow_scheduler, no_distilled_guidance, picture_size, unknown_words

#: what the pipeline asks its language model to do with a prompt
_INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class Sana:
    """Text to conditioning, velocity of the backbone, latents to pictures; all of one pipeline.

    Pictures have the size that was asked for; the pipeline's binning of resolutions is left out.
    """

    text_encoders: tuple[str, ...] = ("text_encoder",)
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v")
    has_unconditional = True

    def __init__(self, pipeline: SanaPipeline, config: ModelConfig):
        no_distilled_guidance(config, pipeline)
        scheduler = pipeline.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not scheduler.config.get("use_flow_sigmas"):
            raise CRDError(
                f"model.path: {type(scheduler).__name__} of this Sana pipeline is no flow scheduler; supported are "
                "FlowMatchEulerDiscreteScheduler, and DPM-Solver with use_flow_sigmas."
            )
        self.pipeline = pipeline
        self.backbone = pipeline.transformer
        factor = pipeline.vae_scale_factor
        self.height, self.width = picture_size(config, pipeline.transformer.config.sample_size * factor, factor)
        self.max_sequence_length = config.sequence_length(300)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        factor = self.pipeline.vae_scale_factor
        return (self.backbone.config.in_channels, self.height // factor, self.width // factor)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        return Conditioning.cat([self._encode(prompt, _INSTRUCTION if prompt else None) for prompt in prompts])

    def _encode(self, prompt: str, instruction: list[str] | None) -> Conditioning:
        states, mask, _, _ = self.pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            device=self.backbone.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=instruction,
        )
        return Conditioning(states, mask=mask.bool())

    def unknown_words(self, prompt: str) -> list[str]:
        return unknown_words(self.pipeline.tokenizer, prompt)

    def sigmas(self, steps: int, shift: float | None = None) -> Tensor:
        scheduler = self._scheduler(shift)
        scheduler.set_timesteps(steps)
        return scheduler.sigmas.float()

    def _scheduler(self, shift: float | None) -> Any:
        own = self.pipeline.scheduler
        if isinstance(own, FlowMatchEulerDiscreteScheduler):
            return flow_scheduler(own, shift)
        return own if shift is None else type(own).from_config(own.config, flow_shift=shift)

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        return noise

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self.backbone(
            x,
            encoder_hidden_states=conditioning.states,
            encoder_attention_mask=conditioning.mask,
            timestep=sigma.float() * TIMESTEPS * self.backbone.config.timestep_scale,
            return_dict=False,
        )[0]

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        return guide(unconditional, conditional, scale)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        vae = self.pipeline.vae
        decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(decoded, output_type="pil")

    def save_lora(self, folder: str, layers: dict[str, Tensor], metadata: dict) -> None:
        SanaPipeline.save_lora_weights(folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata)
