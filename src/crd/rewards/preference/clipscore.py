"""CLIPScore: how well OpenAI's CLIP ViT-L/14 thinks that a picture fits its prompt, as DiffusionNFT computes it."""

from typing import Any

import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from crd.rewards.preference.embeddings import as_scores, cosines, embed_images, embed_texts
from crd.rewards.preference.loading import Source, load_model, load_tokenizer
from crd.rewards.preference.pixels import cropped_bilinear
from crd.rewards.preference.placement import make_placement

MODEL = "openai/clip-vit-large-patch14"


class CLIPScore:
    """The cosine of picture and prompt, typically 0.2 to 0.35; resized bilinearly, not bicubically as CLIP's own processor does.

    Args:
        path: hub id or folder of model and tokenizer.
        device, dtype, batch_size: see :func:`crd.rewards.preference.placement.make_placement`.
    """

    def __init__(self, path: str = MODEL, device: str | None = None, dtype: str = "float32", batch_size: int = 32):
        self.place = make_placement("clipscore", device, dtype, batch_size)
        source = Source("clipscore", "path", path, MODEL)
        self.model = load_model(CLIPModel, source, self.place)
        self.tokenizer = load_tokenizer(CLIPTokenizer, source, self.model.config.text_config.vocab_size)

    def __call__(self, images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]:
        pictures = embed_images(self.model, images, self._pixels, self.place)
        return as_scores(cosines(pictures, embed_texts(self.model, self.tokenizer, prompts, self.place)))

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        return cropped_bilinear(images, self.model.config.vision_config.image_size)
