"""LAION's aesthetic predictor v2: an affine head on CLIP ViT-L/14 that imitates people's ratings from 1 to 10."""

from typing import Any

import torch
from PIL import Image
from transformers import CLIPModel

from crd.rewards.preference.affine import fold
from crd.rewards.preference.embeddings import as_scores, embed_images
from crd.rewards.preference.loading import Source, find_file, load_image_processor, load_model, read_tensors
from crd.rewards.preference.placement import make_placement

MODEL = "openai/clip-vit-large-patch14"
HEAD = "trl-lib/ddpo-aesthetic-predictor"
HEAD_FILE = "aesthetic-model.pth"  # sac+logos+ava1-l14-linearMSE.pth under another name


class Aesthetic:
    """The rating as it is, typically 4 to 7. Looks at the picture alone.

    Args:
        path: hub id or folder of CLIP and its image processor.
        head: hub id, folder or file of the head's weights.
        device, dtype, batch_size: see :func:`crd.rewards.preference.placement.make_placement`.
    """

    def __init__(
        self,
        path: str = MODEL,
        head: str = HEAD,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
    ):
        self.place = make_placement("aesthetic", device, dtype, batch_size)
        source = Source("aesthetic", "path", path, MODEL)
        self.model, self.processor = load_model(CLIPModel, source, self.place), load_image_processor(source)
        weights = Source("aesthetic", "head", head, HEAD, HEAD_FILE)
        state = read_tensors(weights, find_file(weights, HEAD_FILE))
        try:
            self.head = fold(state, "layers")
            if len(self.head.weight) != self.model.config.projection_dim:
                raise ValueError(f"it takes {len(self.head.weight)} numbers, CLIP gives {self.model.config.projection_dim}")
        except (ValueError, KeyError) as error:
            raise weights.failure(error) from error

    def __call__(self, images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]:
        return as_scores(self.head(embed_images(self.model, images, self._pixels, self.place)))

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        return self.processor(images, return_tensors="pt")["pixel_values"]
