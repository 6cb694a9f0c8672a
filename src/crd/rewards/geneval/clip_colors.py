"""GenEval's colours: CLIP compares what lies inside of an object's mask with sentences about each colour."""

import functools

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from crd.rewards.geneval.prompts import COLORS
from crd.rewards.geneval.rules import Box
from crd.rewards.preference.embeddings import embed_images, embed_texts
from crd.rewards.preference.loading import Source, load_model, load_tokenizer
from crd.rewards.preference.pixels import cropped_bicubic
from crd.rewards.preference.placement import Placement

CLIP = "openai/clip-vit-large-patch14"
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = (153, 153, 153)  # what the classifier sees outside of the mask


class ClipColors:
    """Names the colour of an object, one of GenEval's ten.

    The published script computes in float16, so that near ties may fall otherwise than here in float32.

    Args:
        path: hub id or local folder of a CLIP model with its tokenizer; the benchmark's is ViT-L/14 of OpenAI.
        place: device and precision.
    """

    def __init__(self, path: str, place: Placement):
        source = Source("geneval", "clip", path, CLIP)
        self.place, self.model = place, load_model(CLIPModel, source, place)
        self.tokenizer = load_tokenizer(CLIPTokenizer, source, self.model.config.text_config.vocab_size)
        self.vectors = functools.cache(self._vectors)

    def __call__(self, image: Image.Image, mask: np.ndarray, box: Box, name: str) -> str:
        """The colour of the ``name`` at ``box`` (pixels) where ``mask`` (height, width; bool) is true in an RGB picture."""
        seen = embed_images(self.model, [object_alone(image, mask, box)], self._pixels, self.place)[0]
        return COLORS[int((self.vectors(name) @ seen).argmax())]

    def _vectors(self, name: str) -> torch.Tensor:
        """One unit vector for each colour ``(10, d)``: the mean of the unit vectors of its sentences."""
        sentences = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        embedded = embed_texts(self.model, self.tokenizer, sentences, self.place)
        means = embedded.unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1)
        return means / means.norm(dim=-1, keepdim=True)

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        return cropped_bicubic(images, self.model.config.vision_config.image_size)


def object_alone(image: Image.Image, mask: np.ndarray, box: Box) -> Image.Image:
    """The picture cut to the box, grey where the mask is false; bounds of the box are rounded, halves to even."""
    alone = Image.composite(image, Image.new("RGB", image.size, GREY), Image.fromarray(mask))
    left, top, right, bottom = (round(bound) for bound in box)
    return alone.crop((left, top, right, bottom))
