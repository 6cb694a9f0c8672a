"""Stable Diffusion 3 and 3.5 (and the embedded nano model, which is one) behind the few calls that training needs."""

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift, retrieve_timesteps
from PIL import Image
from torch import Tensor

from crd.batch import Conditioning
from crd.errors import CRDError
from crd.flow import TIMESTEPS

#: the attention projections of both streams, as published (theory, section 8)
LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


class SD3:
    """Text to conditioning, velocity of the backbone, latents to pictures; all of one pipeline.

    ``max_sequence_length`` is the pipeline's argument of that name: the length of the T5 part of the
    prompt, which the pipeline fills with zeros where there is no T5.
    """

    lora_targets = LORA_TARGETS

    def __init__(self, pipeline: StableDiffusion3Pipeline, *, height: int | None, width: int | None, max_sequence_length: int):
        self.pipeline = pipeline
        self.backbone = pipeline.transformer
        default = pipeline.default_sample_size * pipeline.vae_scale_factor
        self.height, self.width = height or default, width or default
        multiple = pipeline.vae_scale_factor * pipeline.patch_size
        for name, pixels in (("model.height", self.height), ("model.width", self.width)):
            if pixels % multiple:
                raise CRDError(f"{name} is {pixels}, but this model needs a multiple of {multiple} pixels.")
        self.max_sequence_length = max_sequence_length

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        factor = self.pipeline.vae_scale_factor
        return (self.backbone.config.in_channels, self.height // factor, self.width // factor)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Encodes prompts as the pipeline does; one row each."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Conditioning(states, pooled)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words that the first tokenizer maps to its unknown token (tokenizers with byte fallback have none)."""
        tokenizer = self.pipeline.tokenizer
        if tokenizer.unk_token_id in (None, tokenizer.eos_token_id):
            return []
        words = prompt.replace('"', " ").split()
        return [w for w in words if tokenizer.unk_token_id in tokenizer(w, add_special_tokens=False).input_ids]

    def sigmas(self, steps: int) -> Tensor:
        """The scheduler's own noise levels for that many steps, float32 ``(steps + 1,)``, the last one 0."""
        scheduler = self.pipeline.scheduler
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

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity ``(b, ...)`` of the backbone with whatever weights are active; ``sigma (b,)``."""
        return self.backbone(
            hidden_states=x,
            timestep=sigma.float() * TIMESTEPS,
            encoder_hidden_states=conditioning.states,
            pooled_projections=conditioning.pooled,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents to PIL pictures, exactly as the pipeline does."""
        vae = self.pipeline.vae
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        decoded = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(decoded, output_type="pil")

    def save_lora(self, folder: str, layers: dict[str, Tensor], metadata: dict) -> None:
        """Writes ``pytorch_lora_weights.safetensors`` by the pipeline's own saver."""
        StableDiffusion3Pipeline.save_lora_weights(
            folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
        )
