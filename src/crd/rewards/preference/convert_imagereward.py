"""Weights of ImageReward.pt to transformers' BlipVisionModel and BlipTextModel."""

import re
from typing import Any

import torch
from transformers import BlipTextConfig, BlipVisionConfig

VISION, TEXT = "blip.visual_encoder.", "blip.text_encoder."
RENAMED = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
RENAMED_IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def vision_config(state: dict[str, torch.Tensor], heads: int) -> BlipVisionConfig:
    """The sizes, which the shapes tell except for the number of heads; eps is 1e-6, which is not transformers' default."""
    width, _, patch, _ = state[f"{VISION}patch_embed.proj.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state[f"{VISION}blocks.0.mlp.fc1.bias"]),
        num_hidden_layers=len({key.split(".")[3] for key in state if key.startswith(f"{VISION}blocks.")}),
        num_attention_heads=heads,
        image_size=patch * round((state[f"{VISION}pos_embed"].shape[1] - 1) ** 0.5),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def text_config(med: dict[str, Any], vision_width: int) -> BlipTextConfig:
    """From the contents of med_config.json. The width of what is attended to is the vision tower's, whatever the file says."""
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "max_position_embeddings hidden_act layer_norm_eps"
    ).split()
    return BlipTextConfig(**{name: med[name] for name in names}, encoder_hidden_size=vision_width)


def vision_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The vision tower under transformers' names."""
    return {_vision_name(key.removeprefix(VISION)): value for key, value in state.items() if key.startswith(VISION)}


def text_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The text tower, whose names transformers has kept; positions' numbers are no weights."""
    tower = {key.removeprefix(TEXT): value for key, value in state.items() if key.startswith(TEXT)}
    return {key: value for key, value in tower.items() if key != "embeddings.position_ids"}


def _vision_name(key: str) -> str:
    if found := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", key):
        return f"encoder.layers.{found[1]}.{RENAMED_IN_BLOCK.get(found[2], found[2])}.{found[3]}"
    if key in RENAMED:
        return RENAMED[key]
    module, _, kind = key.rpartition(".")
    return f"{RENAMED.get(module, module)}.{kind}"
