"""Z-Image and Z-Image-Turbo behind the few calls that training needs."""

import torch
from diffusers import ZImagePipeline
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from crd.batch import Conditioning
from crd.config import ModelConfig
from crd.flow import guide
from crd.models.common import even_sigmas, image_shift, no_distilled_guidance, picture_size, unknown_words


class ZImage:
    """Text to conditioning, velocity of the backbone, latents to pictures; all of one pipeline.

    The transformer has time and velocity the other way round: it is told ``1 - sigma`` and predicts ``x0 - eps``.
    """

    text_encoders: tuple[str, ...] = ("text_encoder",)
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    has_unconditional = True

    def __init__(self, pipeline: ZImagePipeline, config: ModelConfig):
        no_distilled_guidance(config, pipeline)
        self.pipeline = pipeline
        self.backbone = pipeline.transformer
        self.height, self.width = picture_size(config, 1024, 2 * pipeline.vae_scale_factor)
        self.max_sequence_length = config.sequence_length(512)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        factor = self.pipeline.vae_scale_factor
        return (self.backbone.in_channels, self.height // factor, self.width // factor)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        features, _ = self.pipeline.encode_prompt(
            list(prompts),  # a copy: the pipeline writes its chat template into the list
            device=self.backbone.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        there = [torch.ones(len(tokens), dtype=torch.bool, device=tokens.device) for tokens in features]
        return Conditioning(pad_sequence(features, batch_first=True), mask=pad_sequence(there, batch_first=True))

    def unknown_words(self, prompt: str) -> list[str]:
        return unknown_words(self.pipeline.tokenizer, prompt)

    def sigmas(self, steps: int, shift: float | None = None) -> Tensor:
        _, rows, columns = self.latent_shape
        scheduler = self.pipeline.scheduler
        return even_sigmas(scheduler, steps, shift, image_shift(scheduler, (rows // 2) * (columns // 2)))

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        return noise

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.mask is not None
        lengths = conditioning.mask.sum(1).tolist()
        features = [states[:length] for states, length in zip(conditioning.states, lengths, strict=True)]
        frames = list(x.unsqueeze(2).unbind())  # a picture is a film of one frame
        predicted = self.backbone(frames, 1 - sigma.float(), features, return_dict=False)[0]
        return -torch.stack(predicted).squeeze(2)

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        return guide(unconditional, conditional, scale)  # the pipeline's guidance_scale is ours minus 1

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        vae = self.pipeline.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        decoded = vae.decode(scaled, return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(decoded, output_type="pil")

    def save_lora(self, folder: str, layers: dict[str, Tensor], metadata: dict) -> None:
        ZImagePipeline.save_lora_weights(folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata)
