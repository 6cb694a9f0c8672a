"""Stable Diffusion XL (the base model, without refiner) behind the few calls that training needs."""

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from crd.batch import Conditioning
from crd.config import ModelConfig
from crd.flow import expand, guide, vp_norm, widen
from crd.models.common import check_unet, picture_size, unknown_words
from crd.models.noise_schedule import NoiseSchedule


class SDXL:
    """Text to conditioning, velocity of the UNet, latents to pictures; no watermark is put into the pictures.

    The UNet is told that pictures have the size of the run and are not cropped, as the pipeline does by default.
    """

    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    has_unconditional = True

    def __init__(self, pipeline: StableDiffusionXLPipeline, config: ModelConfig):
        check_unet(pipeline, config)
        self.pipeline = pipeline
        self.backbone = pipeline.unet
        factor = pipeline.vae_scale_factor
        self.height, self.width = picture_size(config, pipeline.default_sample_size * factor, factor)
        self.max_sequence_length = pipeline.tokenizer.model_max_length
        self.schedule = NoiseSchedule.of(pipeline.scheduler)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        factor = self.pipeline.vae_scale_factor
        return (self.backbone.config.in_channels, self.height // factor, self.width // factor)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        device = self.backbone.device
        states, _, pooled, _ = self.pipeline.encode_prompt(prompt=prompts, device=device, do_classifier_free_guidance=False)
        pooled = pooled.to(device)
        if self.pipeline.config.force_zeros_for_empty_prompt:  # what its unconditional branch takes
            there = torch.tensor([prompt != "" for prompt in prompts], device=device)
            states, pooled = states * there[:, None, None], pooled * there[:, None]
        return Conditioning(states, pooled)

    def unknown_words(self, prompt: str) -> list[str]:
        return unknown_words(self.pipeline.tokenizer, prompt)

    def sigmas(self, steps: int, shift: float | None = None) -> Tensor:
        return self.schedule.sigmas(steps, shift)

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        return self.schedule.start(noise, sigmas)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        size = (self.height, self.width)  # original size, crop, target size; filled on the device, a copy would wait for it
        time_ids = torch.stack([x.new_full((len(x),), pixels) for pixels in (*size, 0, 0, *size)], 1)
        prediction = self.backbone(
            x / expand(vp_norm(sigma), x),
            self.schedule.timesteps(sigma),
            encoder_hidden_states=conditioning.states,
            added_cond_kwargs={"text_embeds": conditioning.pooled, "time_ids": time_ids},
            return_dict=False,
        )[0]
        return self.schedule.velocity(x, widen(prediction), sigma)

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        return guide(unconditional, conditional, scale)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        vae = self.pipeline.vae
        dtype = vae.dtype
        if dtype == torch.float16 and vae.config.force_upcast:  # the VAE of SDXL overflows in half precision
            vae.to(torch.float32)
        decoded = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        vae.to(dtype)
        return self.pipeline.image_processor.postprocess(decoded, output_type="pil")

    def save_lora(self, folder: str, layers: dict[str, Tensor], metadata: dict) -> None:
        StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
