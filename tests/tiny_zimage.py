"""A random Z-Image pipeline of the real classes, as small as it gets."""

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tiny_qwen import make_qwen_tokenizer
from transformers import Qwen3Config, Qwen3Model


def tiny_zimage(seed: int = 0, **scheduler: Any) -> ZImagePipeline:
    """With the scheduler of Z-Image-Turbo unless options say otherwise."""
    torch.manual_seed(seed)
    tokenizer = make_qwen_tokenizer()
    encoder = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 16, 16],
    )
    for parameter in (transformer.x_pad_token, transformer.cap_pad_token):  # made without values
        torch.nn.init.normal_(parameter)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.36,
        shift_factor=0.12,
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae.eval(),
        text_encoder=Qwen3Model(encoder).eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )
