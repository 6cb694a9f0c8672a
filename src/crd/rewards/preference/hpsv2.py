"""Human Preference Score v2.1 (Wu et al. 2023): an open_clip ViT-H/14 trained on rankings of HPDv2."""

from typing import Any

import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from crd.rewards.preference.convert_open_clip import clip_config, clip_state
from crd.rewards.preference.embeddings import as_scores, cosines, embed_images, embed_texts
from crd.rewards.preference.loading import LOAD_ERRORS, Source, build_model, find_file, load_tokenizer, read_tensors
from crd.rewards.preference.pixels import padded_bicubic
from crd.rewards.preference.placement import make_placement

WEIGHTS = "xswu/HPSv2"
WEIGHTS_FILE = "HPS_v2.1_compressed.pt"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HEADS = 16  # of both towers of ViT-H/14


class HPSv2:
    """The plain cosine, typically 0.2 to 0.35; comparable for one prompt, and not with version 2.0.

    Args:
        path: hub id, folder or file of the weights, in open_clip's format.
        tokenizer: hub id or folder of CLIP's tokenizer, which the weights come without.
        device, dtype, batch_size: see :func:`crd.rewards.preference.placement.make_placement`.
    """

    def __init__(
        self,
        path: str = WEIGHTS,
        tokenizer: str = TOKENIZER,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
    ):
        self.place = make_placement("hpsv2", device, dtype, batch_size)
        source = Source("hpsv2", "path", path, WEIGHTS, WEIGHTS_FILE)
        state = read_tensors(source, find_file(source, WEIGHTS_FILE))
        try:
            self.model = build_model(CLIPModel, clip_config(state, HEADS, HEADS), clip_state(state), self.place)
        except LOAD_ERRORS as error:
            raise source.failure(ValueError(f"it is no open_clip ViT ({error})")) from error
        words = Source("hpsv2", "tokenizer", tokenizer, TOKENIZER)
        self.tokenizer = load_tokenizer(CLIPTokenizer, words, self.model.config.text_config.vocab_size)

    def __call__(self, images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]:
        pictures = embed_images(self.model, images, self._pixels, self.place)
        return as_scores(cosines(pictures, embed_texts(self.model, self.tokenizer, prompts, self.place)))

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        return padded_bicubic(images, self.model.config.vision_config.image_size)
