"""Weights of an open_clip vision transformer to transformers' CLIPModel."""

import re

import torch
from transformers import CLIPConfig

RENAMED = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # spelled so in transformers
    "visual.ln_post": "vision_model.post_layernorm",
}
RENAMED_IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def clip_config(state: dict[str, torch.Tensor], vision_heads: int, text_heads: int) -> CLIPConfig:
    """The sizes, which the shapes tell except for the numbers of heads; GELU and eps 1e-5 are open_clip's.

    Raises KeyError if a weight that tells a size is missing.
    """
    _, _, patch, _ = state["visual.conv1.weight"].shape
    tokens, vision_width = state["visual.positional_embedding"].shape
    longest, text_width = state["positional_embedding"].shape
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": _layers(state, "visual.transformer"),
        "num_attention_heads": vision_heads,
        "image_size": patch * round((tokens - 1) ** 0.5),
        "patch_size": patch,
        "hidden_act": "gelu",
    }
    text = {
        "hidden_size": text_width,
        "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": _layers(state, "transformer"),
        "num_attention_heads": text_heads,
        "vocab_size": len(state["token_embedding.weight"]),
        "max_position_embeddings": longest,
        "hidden_act": "gelu",
        "bos_token_id": None,
        "eos_token_id": 2,  # means to transformers: pool where the id is highest, which is open_clip's rule
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=state["text_projection"].shape[1])


def clip_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under transformers' names: queries, keys and values apart, both projections transposed."""
    converted = {
        "text_projection.weight": state["text_projection"].T.contiguous(),
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
    }
    for key, value in state.items():
        if found := LAYER.fullmatch(key):
            tower = "vision_model" if found[1] else "text_model"
            converted |= _layer(f"{tower}.encoder.layers.{found[2]}", found[3], value)
        elif key not in ("text_projection", "visual.proj", "attn_mask"):  # the causal mask is no weight
            converted[_renamed(key, RENAMED)] = value
    return converted


def _layer(name: str, key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    if key.startswith("attn.in_proj_"):
        kind = key.removeprefix("attn.in_proj_")
        parts = value.chunk(3)
        return {f"{name}.self_attn.{part}_proj.{kind}": x.contiguous() for part, x in zip("qkv", parts, strict=True)}
    return {f"{name}.{_renamed(key, RENAMED_IN_LAYER)}": value}


def _renamed(key: str, names: dict[str, str]) -> str:
    """By its whole name, or by the part before ``.weight`` or ``.bias``; unknown ones stay, for the loading to complain about."""
    if key in names:
        return names[key]
    module, _, kind = key.rpartition(".")
    return f"{names[module]}.{kind}" if module in names else key


def _layers(state: dict[str, torch.Tensor], tower: str) -> int:
    return len({key.split(".resblocks.")[1].split(".")[0] for key in state if key.startswith(f"{tower}.resblocks.")})
