"""Random Stable Diffusion and SDXL pipelines of the real classes, as small as they get."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from crd.nano.base import MAX_TOKENS, make_tokenizer

#: the noise schedule that these models were trained with
TRAINED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
WIDTH = 16  # of the text encoders


def ddim(**options: Any) -> DDIMScheduler:
    return DDIMScheduler(**{**TRAINED, "clip_sample": False, **options})


def euler(**options: Any) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**{**TRAINED, "timestep_spacing": "leading", **options})


def _vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        **options,
    ).eval()


def _clip(kind: type, tokenizer: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=WIDTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return kind(config).eval()


def _unet(text_width: int, **options: Any) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=text_width,
        **options,
    )
    for name, parameter in unet.named_parameters():
        if "attn2.to_v" in name:  # so that prompts matter
            torch.nn.init.normal_(parameter)
    return unet.eval()


def tiny_sd(scheduler: Any = None, seed: int = 0) -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(scaling_factor=0.18215),
        text_encoder=_clip(CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        unet=_unet(WIDTH),
        scheduler=scheduler or ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl(scheduler: Any = None, seed: int = 0) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    unet = _unet(
        2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=_clip(CLIPTextModel, tokenizer),
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler or euler(),
        add_watermarker=False,
    )
