"""FLUX.2 [klein], base and distilled, behind the few calls that training needs."""

import functools

import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from torch import Tensor

from crd.batch import Conditioning
from crd.config import ModelConfig
from crd.flow import guide
from crd.models.common import LORA_TARGETS, even_sigmas, no_distilled_guidance, picture_size, unknown_words


@functools.lru_cache(maxsize=8)
def position_ids(tokens: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions (time, row, column, token): ``(tokens, 4)`` of the prompt and ``(rows * columns, 4)`` of the picture."""
    text = Flux2KleinPipeline._prepare_text_ids(torch.empty(1, tokens, 0))[0]
    picture = Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 0, rows, columns))[0]
    return text.to(device), picture.to(device)


class Flux2Klein:
    """FLUX.2 [klein]: latents are tokens ``(rows * columns, channels)`` of 2x2 VAE pixels, normalised per channel.

    The step-distilled models have no unconditional branch; the base models do. The single blocks fuse the attention
    projections with those of the feed-forward part, so there LoRA weights cover both.
    """

    text_encoders: tuple[str, ...] = ("text_encoder",)

    def __init__(self, pipeline: Flux2KleinPipeline, config: ModelConfig):
        no_distilled_guidance(config, pipeline)
        self.pipeline = pipeline
        self.backbone = pipeline.transformer
        self.has_unconditional = not pipeline.config.is_distilled
        factor = pipeline.vae_scale_factor
        self.height, self.width = picture_size(config, pipeline.default_sample_size * factor, 2 * factor)
        self.rows, self.columns = self.height // (2 * factor), self.width // (2 * factor)
        self.max_sequence_length = config.sequence_length(512)
        outputs = (f"single_transformer_blocks.{i}.attn.to_out" for i in range(self.backbone.config.num_single_layers))
        self.lora_targets: tuple[str, ...] = (*LORA_TARGETS, "attn.to_qkv_mlp_proj", *outputs)

    @property
    def latent_shape(self) -> tuple[int, int]:
        return (self.rows * self.columns, self.backbone.config.in_channels)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        states, _ = self.pipeline.encode_prompt(
            prompts, device=self.backbone.device, max_sequence_length=self.max_sequence_length
        )
        return Conditioning(states)

    def unknown_words(self, prompt: str) -> list[str]:
        return unknown_words(self.pipeline.tokenizer, prompt)

    def sigmas(self, steps: int, shift: float | None = None) -> Tensor:
        return even_sigmas(self.pipeline.scheduler, steps, shift, compute_empirical_mu(self.rows * self.columns, steps))

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        return noise

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        text_ids, picture_ids = position_ids(conditioning.states.shape[1], self.rows, self.columns, x.device)
        return self.backbone(
            hidden_states=x,
            timestep=sigma.float(),  # the backbone multiplies by 1000
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
        grid = latents.transpose(1, 2).unflatten(2, (self.rows, self.columns))
        deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        scaled = grid * deviation[:, None, None] + vae.bn.running_mean[:, None, None]
        decoded = vae.decode(Flux2KleinPipeline._unpatchify_latents(scaled).to(vae.dtype), return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(decoded, output_type="pil")

    def save_lora(self, folder: str, layers: dict[str, Tensor], metadata: dict) -> None:
        Flux2KleinPipeline.save_lora_weights(folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata)
