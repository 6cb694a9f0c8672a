"""Unit-length embeddings of pictures and prompts by a CLIP model, in batches, and scores from them."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from transformers import CLIPModel
from transformers.utils import ModelOutput

from crd.rewards.preference.placement import Placement

Pixels = Callable[[list[Image.Image]], torch.Tensor]


def projected(output: torch.Tensor | ModelOutput) -> torch.Tensor:
    """The projected embedding: what transformers 4 returned is the ``pooler_output`` of what 5 returns."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@torch.no_grad()
def embed_images(model: CLIPModel, images: list[Image.Image], to_pixels: Pixels, place: Placement) -> torch.Tensor:
    """(n, d) float32 on the CPU, rows of length 1."""
    rows = []
    with torch.autocast(place.device.type, enabled=False):  # the caller's precision is none of ours
        for batch in place.batches(len(images)):
            pixels = to_pixels(images[batch]).to(place.device, place.dtype)
            rows.append(_unit(projected(model.get_image_features(pixel_values=pixels))))
    return torch.cat(rows)


@torch.no_grad()
def embed_texts(model: CLIPModel, tokenizer: Any, prompts: list[str], place: Placement) -> torch.Tensor:
    """(n, d) float32 on the CPU, rows of length 1; identical prompts are encoded once, long ones are cut."""
    different = list(dict.fromkeys(prompts))
    longest = model.config.text_config.max_position_embeddings
    rows = []
    with torch.autocast(place.device.type, enabled=False):
        for batch in place.batches(len(different)):
            tokens = tokenizer(different[batch], padding=True, truncation=True, max_length=longest, return_tensors="pt")
            tokens = {key: tokens[key].to(place.device) for key in ("input_ids", "attention_mask")}
            rows.append(_unit(projected(model.get_text_features(**tokens))))
    embeddings = dict(zip(different, torch.cat(rows), strict=True))
    return torch.stack([embeddings[prompt] for prompt in prompts])


def cosines(pictures: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """(n,) of each picture with its own prompt, from unit-length rows."""
    return (pictures * texts).sum(-1)


def as_scores(values: torch.Tensor) -> list[float | None]:
    """Numbers; None where the model gave none (NaN or infinite)."""
    return [value if finite else None for value, finite in zip(values.tolist(), values.isfinite().tolist(), strict=True)]


def _unit(features: torch.Tensor) -> torch.Tensor:
    features = features.float().cpu()
    return features / features.norm(dim=-1, keepdim=True)
