"""ImageReward (Xu et al. 2023): a BLIP that reads the prompt while it looks at the picture, trained on experts' rankings."""

import json
from typing import Any

import torch
from PIL import Image
from transformers import BertTokenizer, BlipTextModel, BlipVisionModel

from crd.rewards.preference.affine import fold
from crd.rewards.preference.convert_imagereward import text_config, text_state, vision_config, vision_state
from crd.rewards.preference.embeddings import as_scores
from crd.rewards.preference.loading import LOAD_ERRORS, Source, build_model, find_file, load_tokenizer, read_tensors
from crd.rewards.preference.pixels import cropped_bicubic
from crd.rewards.preference.placement import make_placement

WEIGHTS = "THUDM/ImageReward"
WEIGHTS_FILE = "ImageReward.pt"
TEXT_CONFIG_FILE = "med_config.json"
TOKENIZER = "google-bert/bert-base-uncased"
VISION_HEADS = 16  # of ViT-L/16
TOKENS = 35  # prompts are cut or padded to this
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the raw score over the authors' data


class ImageReward:
    """The standardised score, typically -2.3 to 2.

    Every layer of the text tower looks at the picture, so that no text is encoded once for several pictures.

    Args:
        path: hub id or folder of ImageReward.pt and med_config.json, or the first of them.
        tokenizer: hub id or folder of BERT's tokenizer.
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
        self.place = make_placement("imagereward", device, dtype, batch_size)
        source = Source("imagereward", "path", path, WEIGHTS, WEIGHTS_FILE)
        state = read_tensors(source, find_file(source, WEIGHTS_FILE))
        file = find_file(source, TEXT_CONFIG_FILE)
        try:
            vision, text = vision_config(state, VISION_HEADS), json.loads(file.read_text())
            words = text_config(text, vision.hidden_size)
            self.vision = build_model(BlipVisionModel, vision, vision_state(state), self.place)
            self.text = build_model(BlipTextModel, words, text_state(state), self.place, add_pooling_layer=False)
            self.head = fold(state, "mlp.layers", MEAN, DEVIATION)
        except LOAD_ERRORS as error:
            raise source.failure(ValueError(f"it is no ImageReward ({error})")) from error
        self.tokenizer = load_tokenizer(BertTokenizer, Source("imagereward", "tokenizer", tokenizer, TOKENIZER), words.vocab_size)

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]:
        with torch.autocast(self.place.device.type, enabled=False):
            batches = self.place.batches(len(images))
            return as_scores(torch.cat([self._score(images[batch], prompts[batch]) for batch in batches]))

    def _score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """(n,) of pictures with their prompts."""
        pixels = cropped_bicubic(images, self.vision.config.image_size).to(self.place.device, self.place.dtype)
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        output = self.text(
            input_ids=tokens["input_ids"].to(self.place.device),
            attention_mask=tokens["attention_mask"].to(self.place.device),
            encoder_hidden_states=self.vision(pixel_values=pixels).last_hidden_state,
        )
        return self.head(output.last_hidden_state[:, 0])  # [CLS]
