"""PickScore (Kirstain et al. 2023): a CLIP ViT-H/14 trained on choices of Pick-a-Pic users."""

from typing import Any

import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from crd.rewards.preference.embeddings import as_scores, cosines, embed_images, embed_texts
from crd.rewards.preference.loading import Source, load_image_processor, load_model, load_tokenizer
from crd.rewards.preference.placement import make_placement

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
SCALE = 26  # Flow-GRPO's and DiffusionNFT's, so that good pictures lie near 1


class PickScore:
    """``exp(logit_scale) * cosine / 26``, typically 0.8 to 0.92 (the raw score of the paper is 26 times that).

    Args:
        path: hub id or folder of the model.
        processor: hub id or folder of its tokenizer and image processor, which the model comes without.
        device, dtype, batch_size: see :func:`crd.rewards.preference.placement.make_placement`.
    """

    def __init__(
        self,
        path: str = MODEL,
        processor: str = PROCESSOR,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
    ):
        self.place = make_placement("pickscore", device, dtype, batch_size)
        self.model = load_model(CLIPModel, Source("pickscore", "path", path, MODEL), self.place)
        source = Source("pickscore", "processor", processor, PROCESSOR)
        self.tokenizer = load_tokenizer(CLIPTokenizer, source, self.model.config.text_config.vocab_size)
        self.processor = load_image_processor(source)
        self.scale = self.model.logit_scale.float().exp().item() / SCALE

    def __call__(self, images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]:
        pictures = embed_images(self.model, images, self._pixels, self.place)
        texts = embed_texts(self.model, self.tokenizer, prompts, self.place)
        return as_scores(self.scale * cosines(pictures, texts))

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        return self.processor(images, return_tensors="pt")["pixel_values"]
