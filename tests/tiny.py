"""A random Stable Diffusion 3 pipeline, far smaller than the nano model, and settings to go with it."""

import torch
from diffusers import StableDiffusion3Pipeline

from crd.config import CRDConfig
from crd.nano.base import NanoParts, make_text_encoder, make_tokenizer, make_transformer
from crd.nano.vae import make_vae
from crd.recipe import build_config


def tiny_pipeline(seed: int = 0) -> StableDiffusion3Pipeline:
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    encoders = [make_text_encoder(tokenizer, width=16) for _ in range(2)]
    transformer = make_transformer(width=32, layers=2, text_width=32)
    for block in transformer.transformer_blocks:  # random instead of zero, so that prompts matter
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.2)
    vae = make_vae(channels=(8, 8, 8, 8), groups=4)
    return NanoParts(tokenizer, encoders[0], encoders[1], transformer).pipeline(vae)


def redness(images, prompts, **metadata):
    """A dense reward that every model can raise: the mean of the red channel, 0 to 1."""
    return [sum(image.getchannel("R").resize((8, 8)).tobytes()) / (64 * 255) for image in images]


def tiny_settings(output_dir, **sections) -> dict:
    """What a recipe of a run of seconds holds; sections override."""
    data = {
        "output_dir": str(output_dir),
        "model": {"max_sequence_length": 1, "lora_rank": 4, "lora_alpha": 8},
        "rewards": [{"name": "blue"}],
        "rollout": {"prompts_per_epoch": 2, "group_size": 4, "steps": 3, "batch_size": 8},
        "noise": {"levels": 2},
        "train": {"epochs": 2, "steps_per_epoch": 1, "learning_rate": 1e-3, "micro_batch": 16},
        "evaluation": {"every": 1, "prompts": 2, "pictures_per_prompt": 2, "steps": 3, "held_out_judges": False},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section} if isinstance(section, dict) else section
    return data


def tiny_config(output_dir, **sections) -> CRDConfig:
    """:func:`tiny_settings`, checked."""
    return build_config(tiny_settings(output_dir, **sections))
