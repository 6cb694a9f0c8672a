"""Qwen-Image behind the few calls that training needs."""

import torch
from diffusers import QwenImagePipeline
from PIL import Image
from torch import Tensor

from crd.batch import Conditioning
from crd.config import ModelConfig
from crd.flow import guide
from crd.models.common import LORA_TARGETS, even_sigmas, image_shift, no_distilled_guidance, picture_size, unknown_words


class QwenImage:
    """Qwen-Image: latents are tokens ``(rows * columns, channels)`` of 2x2 VAE pixels; prompts have as many tokens as they need.

    Guidance above 1 is the pipeline's ``true_cfg_scale`` with the empty negative prompt: the guided velocity of every token
    is scaled to the length of the conditional one.
    """

    text_encoders: tuple[str, ...] = ("text_encoder",)
    lora_targets: tuple[str, ...] = LORA_TARGETS
    has_unconditional = True

    def __init__(self, pipeline: QwenImagePipeline, config: ModelConfig):
        no_distilled_guidance(config, pipeline)
        self.pipeline = pipeline
        self.backbone = pipeline.transformer
        factor = pipeline.vae_scale_factor
        self.height, self.width = picture_size(config, pipeline.default_sample_size * factor, 2 * factor)
        self.rows, self.columns = self.height // (2 * factor), self.width // (2 * factor)
        self.max_sequence_length = config.sequence_length(512)

    @property
    def latent_shape(self) -> tuple[int, int]:
        return (self.rows * self.columns, self.backbone.config.in_channels)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Works where the text encoder is: this pipeline moves its tokens to the device it is given."""
        device = self.backbone.device
        states, mask = self.pipeline.encode_prompt(
            prompts, device=self.pipeline.text_encoder.device, max_sequence_length=self.max_sequence_length
        )
        mask = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        return Conditioning(states.to(device), mask=mask.to(device))

    def unknown_words(self, prompt: str) -> list[str]:
        return unknown_words(self.pipeline.tokenizer, prompt)

    def sigmas(self, steps: int, shift: float | None = None) -> Tensor:
        scheduler = self.pipeline.scheduler
        return even_sigmas(scheduler, steps, shift, image_shift(scheduler, self.rows * self.columns))

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        return noise

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self.backbone(
            hidden_states=x,
            timestep=sigma.float(),  # the backbone multiplies by 1000
            encoder_hidden_states=conditioning.states,
            encoder_hidden_states_mask=conditioning.mask,
            img_shapes=[[(1, self.rows, self.columns)]] * len(x),  # one frame; the backbone keeps the positions
            return_dict=False,
        )[0]

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        guided = guide(unconditional, conditional, scale)
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        vae = self.pipeline.vae
        mean, deviation = (
            latents.new_tensor(values).reshape(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        video = QwenImagePipeline._unpack_latents(latents, self.height, self.width, self.pipeline.vae_scale_factor)
        frames = vae.decode((video * deviation + mean).to(vae.dtype), return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(frames[:, :, 0], output_type="pil")

    def save_lora(self, folder: str, layers: dict[str, Tensor], metadata: dict) -> None:
        QwenImagePipeline.save_lora_weights(folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata)
