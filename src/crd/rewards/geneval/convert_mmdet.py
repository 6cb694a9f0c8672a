"""The GenEval benchmark's own detector weights, from mmdetection 2.x's checkpoint to transformers.

Names differ throughout, and three things besides. mmdetection has queries, keys and values in one matrix where
transformers has three. It merges 2x2 patches in the order of ``nn.Unfold`` (channels outside, patches inside,
row by row), transformers with patches outside, column by column. And its files hold index tables that are no weights.
"""

import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from crd.errors import CRDError

CHECKPOINT = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
LEVELS, POINTS = 3, 4  # of the deformable attention

SWIN, PIXELS, QUERIES = "model.pixel_level_module.encoder", "model.pixel_level_module.decoder", "model.transformer_module"
#: beginnings of names there and here; transformers' are those of files on the hub, which its loader translates further
RENAMED = {
    r"backbone\.patch_embed\.projection": rf"{SWIN}.embeddings.patch_embeddings.projection",
    r"backbone\.patch_embed\.norm": rf"{SWIN}.embeddings.norm",
    r"backbone\.norm0": rf"{SWIN}.hidden_states_norms.stage1",
    r"backbone\.norm1": rf"{SWIN}.hidden_states_norms.stage2",
    r"backbone\.norm2": rf"{SWIN}.hidden_states_norms.stage3",
    r"backbone\.norm3": rf"{SWIN}.hidden_states_norms.stage4",
    r"backbone\.stages\.(\d+)\.downsample": rf"{SWIN}.encoder.layers.\1.downsample",
    r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.norm1": rf"{SWIN}.encoder.layers.\1.blocks.\2.layernorm_before",
    r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.norm2": rf"{SWIN}.encoder.layers.\1.blocks.\2.layernorm_after",
    r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.proj": rf"{SWIN}.encoder.layers.\1.blocks.\2.attention.output.dense",
    r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa": rf"{SWIN}.encoder.layers.\1.blocks.\2.attention.self",
    r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.0\.0": rf"{SWIN}.encoder.layers.\1.blocks.\2.intermediate.dense",
    r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.1": rf"{SWIN}.encoder.layers.\1.blocks.\2.output.dense",
    r"panoptic_head\.pixel_decoder\.input_convs\.(\d)\.conv": rf"{PIXELS}.input_projections.\1.0",
    r"panoptic_head\.pixel_decoder\.input_convs\.(\d)\.gn": rf"{PIXELS}.input_projections.\1.1",
    r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv": rf"{PIXELS}.adapter_1.0",
    r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn": rf"{PIXELS}.adapter_1.1",
    r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv": rf"{PIXELS}.layer_1.0",
    r"panoptic_head\.pixel_decoder\.output_convs\.0\.gn": rf"{PIXELS}.layer_1.1",
    r"panoptic_head\.pixel_decoder\.mask_feature": rf"{PIXELS}.mask_projection",
    r"panoptic_head\.pixel_decoder\.level_encoding\.weight": rf"{PIXELS}.level_embed",
    r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.attentions\.0": rf"{PIXELS}.encoder.layers.\1.self_attn",
    r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0": rf"{PIXELS}.encoder.layers.\1.fc1",
    r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.ffns\.0\.layers\.1": rf"{PIXELS}.encoder.layers.\1.fc2",
    r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.0": rf"{PIXELS}.encoder.layers.\1.self_attn_layer_norm",
    r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.1": rf"{PIXELS}.encoder.layers.\1.final_layer_norm",
    r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.0\.attn": rf"{QUERIES}.decoder.layers.\1.cross_attn",
    r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.attentions\.1\.attn": rf"{QUERIES}.decoder.layers.\1.self_attn",
    r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0": rf"{QUERIES}.decoder.layers.\1.fc1",
    r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.ffns\.0\.layers\.1": rf"{QUERIES}.decoder.layers.\1.fc2",
    r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.0": rf"{QUERIES}.decoder.layers.\1.cross_attn_layer_norm",
    r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.1": rf"{QUERIES}.decoder.layers.\1.self_attn_layer_norm",
    r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.norms\.2": rf"{QUERIES}.decoder.layers.\1.final_layer_norm",
    r"panoptic_head\.transformer_decoder\.post_norm": rf"{QUERIES}.decoder.layernorm",
    r"panoptic_head\.query_embed": rf"{QUERIES}.queries_embedder",
    r"panoptic_head\.query_feat": rf"{QUERIES}.queries_features",
    r"panoptic_head\.level_embed": rf"{QUERIES}.level_embed",
    r"panoptic_head\.mask_embed\.0": rf"{QUERIES}.decoder.mask_predictor.mask_embedder.0.0",
    r"panoptic_head\.mask_embed\.2": rf"{QUERIES}.decoder.mask_predictor.mask_embedder.1.0",
    r"panoptic_head\.mask_embed\.4": rf"{QUERIES}.decoder.mask_predictor.mask_embedder.2.0",
    r"panoptic_head\.cls_embed": r"class_predictor",
}


def convert_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Writes a folder that ``geneval`` takes as its ``detector``; raises CRDError for a file of other contents."""
    state = _read(checkpoint)
    try:
        config, converted = detector_config(state), detector_state(state)
        model, info = Mask2FormerForUniversalSegmentation.from_pretrained(
            None, config=config, state_dict=converted, output_loading_info=True
        )
    except (KeyError, RuntimeError, ValueError) as error:
        raise _refused(checkpoint, f"{type(error).__name__}: {error}") from error
    from crd.rewards.geneval.mask2former import UNUSED

    lacking = [key for key in info["missing_keys"] if not key.endswith(UNUSED)]
    if wrong := sorted([*lacking, *info["unexpected_keys"], *map(str, info["mismatched_keys"])]):
        raise _refused(checkpoint, f"{len(wrong)} weights are missing, unknown or of another shape, such as {wrong[0]}")
    model.save_pretrained(folder)


def _read(checkpoint: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(checkpoint, map_location="cpu", weights_only=True)
        return dict(loaded.get("state_dict", loaded))
    except FileNotFoundError:
        raise CRDError(f"there is no checkpoint {checkpoint}.") from None
    except Exception as error:  # a damaged or unsafe file makes torch raise about anything
        raise _refused(checkpoint, f"{type(error).__name__}: {error}") from error


def _refused(checkpoint: Path, reason: str) -> CRDError:
    return CRDError(
        f"{checkpoint} cannot be converted: {reason}. Expected is mmdetection 2.x's {CHECKPOINT}, which GenEval downloads "
        "(that of mmdetection 3.x has other names)."
    )


def detector_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of hub files. Raises KeyError for a weight that it does not know."""
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("relative_position_index"):  # follows from the window's size
            continue
        name = _renamed(key)
        if ".downsample." in name:
            converted[name] = patches_outside(value)
        elif found := re.fullmatch(r"(.*attention\.self)\.qkv\.(weight|bias)", name):
            converted |= _split(value, found[1], ("query", "key", "value"), found[2])
        elif found := re.fullmatch(r"(.*self_attn)\.in_proj_(weight|bias)", name):
            converted |= _split(value, found[1], ("q_proj", "k_proj", "v_proj"), found[2])
        else:
            converted[name] = value
    return converted


def _renamed(key: str) -> str:
    for there, here in RENAMED.items():
        if found := re.match(rf"{there}(?=\.|$)", key):
            return found.expand(here) + key[found.end() :]
    raise KeyError(f"unknown weight {key}")


def _split(value: Tensor, module: str, parts: tuple[str, str, str], kind: str) -> dict[str, Tensor]:
    return {f"{module}.{part}.{kind}": rows.contiguous() for part, rows in zip(parts, value.chunk(3), strict=True)}


def patches_outside(value: Tensor) -> Tensor:
    """Reorders the last dimension, 4 patches times c channels, from Unfold's order to that of transformers' Swin.

    Unfold: channel by channel its patches (row, column) = (0, 0), (0, 1), (1, 0), (1, 1). Swin: patch by patch all
    channels, patches in the order (0, 0), (1, 0), (0, 1), (1, 1).
    """
    by_channel = value.unflatten(-1, (-1, 2, 2))  # ..., channel, row, column
    return by_channel.movedim((-1, -2), (-3, -2)).flatten(-3).contiguous()  # ..., column, row, channel


def detector_config(state: dict[str, Tensor]) -> Mask2FormerConfig:
    """The sizes, as the weights' shapes tell them. Raises KeyError if one that tells is missing."""
    stages = sorted({int(key.split(".")[2]) for key in state if key.startswith("backbone.stages.")})
    tables = [state[f"backbone.stages.{i}.blocks.0.attn.w_msa.relative_position_bias_table"] for i in stages]
    pixels, queries = "panoptic_head.pixel_decoder.encoder.layers", "panoptic_head.transformer_decoder.layers"
    swin = SwinConfig(
        embed_dim=len(state["backbone.patch_embed.projection.bias"]),
        depths=[_count(state, f"backbone.stages.{i}.blocks") for i in stages],
        num_heads=[table.shape[1] for table in tables],
        window_size=(round(len(tables[0]) ** 0.5) + 1) // 2,
        out_features=[f"stage{i + 1}" for i in stages],
    )
    classes, width = state["panoptic_head.cls_embed.weight"].shape
    return Mask2FormerConfig(
        backbone_config=swin,
        feature_size=width,
        mask_feature_size=len(state["panoptic_head.pixel_decoder.mask_feature.bias"]),
        hidden_dim=width,
        encoder_feedforward_dim=len(state[f"{pixels}.0.ffns.0.layers.0.0.bias"]),
        encoder_layers=_count(state, pixels),
        decoder_layers=_count(state, queries) + 1,  # transformers counts the prediction before the first
        num_attention_heads=len(state[f"{pixels}.0.attentions.0.attention_weights.bias"]) // (LEVELS * POINTS),
        dim_feedforward=len(state[f"{queries}.0.ffns.0.layers.0.0.bias"]),
        num_queries=len(state["panoptic_head.query_feat.weight"]),
        num_labels=classes - 1,
        converted_from="mmdetection",
    )


def _count(state: dict[str, Tensor], module: str) -> int:
    return len({key.removeprefix(f"{module}.").split(".")[0] for key in state if key.startswith(f"{module}.")})
