"""GenEval's detector on transformers: Mask2Former, with the benchmark's way from pictures to tensors and from those to objects.

The library's processor is left aside: its published settings squash pictures to 384x384, and it reads instances
at that size, without regard to padding. Here happens what mmdetection 2.x does with its configuration
mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco, which GenEval runs.
"""

import functools
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import AutoConfig, Mask2FormerForUniversalSegmentation

from crd.log import logger
from crd.rewards.geneval.clip_colors import CLIP, ClipColors
from crd.rewards.geneval.detector import Detection
from crd.rewards.geneval.prompts import COCO_CLASSES
from crd.rewards.geneval.rules import THRESHOLD, Box
from crd.rewards.preference.loading import LOAD_ERRORS, Source
from crd.rewards.preference.placement import Placement, make_placement

META = "facebook/mask2former-swin-small-coco-instance"
SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels: the short side becomes 800, unless the long one would pass 1333
DIVISOR = 32  # sides are padded to multiples of this, right and bottom
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, RGB from 0 to 255
PADDING = 128.0  # grey value of the padding
TOP = 100  # pairs of query and class that are looked at
#: weights of the class that have no part in the answer; the published file lacks them
UNUSED = ("encoder.swin.layernorm.weight", "encoder.swin.layernorm.bias", "criterion.empty_weight")


@dataclass(frozen=True)
class Instance:
    """One (query, class) pair."""

    label: int  # in the order of COCO's 80 classes
    score: float  # class probability times mask quality, in [0, 1]
    box: Box  # around the mask, right and bottom exclusive; all 0 if the mask is empty
    mask: np.ndarray  # (height, width) bool


class SeenObject:
    """What the rules read of a :class:`Detection`; the colour is classified when they ask for it."""

    def __init__(self, picture: Image.Image, instance: Instance, colors: ClipColors):
        self.name, self.score, self.box = COCO_CLASSES[instance.label], instance.score, instance.box
        self._picture, self._mask, self._colors = picture, instance.mask, colors

    @functools.cached_property
    def color(self) -> str:
        return self._colors(self._picture, self._mask, self.box, self.name)


def load_detector(
    path: str, clip: str = CLIP, device: str | None = None, dtype: str = "float32", batch_size: int = 8
) -> "Mask2FormerDetector":
    """The detector that a recipe's options name.

    Args:
        path: hub id or local folder of a ``Mask2FormerForUniversalSegmentation`` for COCO's 80 classes in safetensors.
        clip: the same of a CLIP model, for colours.
        device: of torch, such as "cuda:1"; None: this process's GPU if there is one, else the CPU.
        dtype: "float32", "bfloat16" or "float16".
        batch_size: pictures of one size in one forward pass.
    """
    return _load_detector(path, clip, device, dtype, batch_size)  # by position: the cache tells spellings of a call apart


@functools.cache  # geneval and geneval_correct of one run share the networks
def _load_detector(path: str, clip: str, device: str | None, dtype: str, batch_size: int) -> "Mask2FormerDetector":
    place = make_placement("geneval", device, dtype, batch_size)
    detector = Mask2FormerDetector(load_model(path, place), ClipColors(clip, place), place)
    if not detector.is_the_benchmarks:
        logger.warning(
            "reward geneval: %s are not the weights of the GenEval benchmark. Call the result 'GenEval (HF detector)' and "
            "do not compare it with published figures; `crd convert-geneval-detector` converts the benchmark's weights.",
            path,
        )
    return detector


def load_model(path: str, place: Placement) -> Mask2FormerForUniversalSegmentation:
    """The network; raises CRDError if it is none for 80 classes, or not all there."""
    source = Source("geneval", "detector", path, META)
    try:
        config = AutoConfig.from_pretrained(source.local)
        if config.model_type != "mask2former" or config.num_labels != len(COCO_CLASSES):
            raise ValueError(f"it is a {config.model_type} for {config.num_labels} classes, not a mask2former for COCO's 80")
        model, info = Mask2FormerForUniversalSegmentation.from_pretrained(
            source.local, config=config, dtype=place.dtype, use_safetensors=True, output_loading_info=True
        )
        if lacking := sorted(key for key in info["missing_keys"] if not key.endswith(UNUSED)):
            raise ValueError(f"it lacks {len(lacking)} weights, {lacking[0]} among them")
    except LOAD_ERRORS as error:
        raise source.failure(error) from error
    return model.to(place.device).eval().requires_grad_(False)


class Mask2FormerDetector:
    """Objects of COCO's 80 classes, under GenEval's names, that are confident enough to pass GenEval's lowest threshold."""

    def __init__(self, model: Mask2FormerForUniversalSegmentation, colors: ClipColors, place: Placement):
        self.model, self.colors, self.place = model, colors, place

    @property
    def is_the_benchmarks(self) -> bool:
        """Whether the weights are mmdetection's, converted (see convert_mmdet.py), and not another training's."""
        return self.model.config.to_dict().get("converted_from") == "mmdetection"

    def __call__(self, images: list[Image.Image]) -> list[list[Detection]]:
        pictures = [ImageOps.exif_transpose(image).convert("RGB") for image in images]
        found: dict[int, list[SeenObject]] = {}
        for size in dict.fromkeys(picture.size for picture in pictures):  # padding to the largest would change the others
            same = [i for i, picture in enumerate(pictures) if picture.size == size]
            for part in self.place.batches(len(same)):
                for i, seen in zip(same[part], self._see([pictures[i] for i in same[part]]), strict=True):
                    found[i] = [SeenObject(pictures[i], instance, self.colors) for instance in seen]
        return [cast(list[Detection], found[i]) for i in range(len(pictures))]  # see Detection on objects like these

    @torch.no_grad()
    def _see(self, pictures: list[Image.Image]) -> list[list[Instance]]:
        pixels, resized = prepare(pictures, self.place.device)
        with torch.autocast(self.place.device.type, enabled=False):  # the caller's precision is none of ours
            output = self.model(pixels.to(self.place.dtype))
        padded, original = (pixels.shape[2], pixels.shape[3]), (pictures[0].height, pictures[0].width)
        return [
            read_instances(classes.float(), masks.float(), padded, resized, original, floor=THRESHOLD)
            for classes, masks in zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
        ]


def prepare(pictures: list[Image.Image], device: torch.device) -> tuple[Tensor, tuple[int, int]]:
    """RGB pictures of one size as the network's input ``(n, 3, height, width)``, and ``(height, width)`` before the padding."""
    bytes_ = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).to(device)
    height, width = resized_size(*bytes_.shape[1:3])
    pixels = interpolate(bytes_.permute(0, 3, 1, 2).float(), (height, width), mode="bilinear", antialias=False).round()
    pixels = pad(pixels, (0, -width % DIVISOR, 0, -height % DIVISOR), value=PADDING)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std, (height, width)


def resized_size(height: int, width: int) -> tuple[int, int]:
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def read_instances(
    classes: Tensor,
    masks: Tensor,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
    floor: float = 0.0,
) -> list[Instance]:
    """What the network says of one picture, most probable class first.

    Args:
        classes: logits ``(queries, classes + 1)``, "no object" last.
        masks: logits ``(queries, height / 4, width / 4)`` of the padded input.
        padded, resized, original: ``(height, width)`` of the input, of the part of it that is picture, of the picture.
        floor: leaves out class probabilities up to this, before masks are enlarged. No score is larger than its
            class probability, so that scores above the floor are the same as without.
    """
    probabilities = classes.softmax(-1)[:, :-1]
    best, index = probabilities.flatten().topk(min(TOP, probabilities.numel()))
    best, index = best[best > floor], index[best > floor]
    if not len(index):
        return []
    queries, labels = index // probabilities.shape[1], index % probabilities.shape[1]
    logits = enlarged(masks[queries], padded, resized, original)
    inside = logits > 0
    quality = (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    scores, inside = (best * quality).tolist(), inside.cpu()
    rows = zip(labels.tolist(), scores, inside, strict=True)
    return [Instance(label, score, tight_box(mask), mask.numpy()) for label, score, mask in rows]


def enlarged(masks: Tensor, padded: tuple[int, int], resized: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Mask logits ``(n, h, w)`` as large as the picture: to the padded input, the padding cut off, to the picture; bilinear."""
    full = interpolate(masks[:, None], padded, mode="bilinear")[:, :, : resized[0], : resized[1]]
    return interpolate(full, original, mode="bilinear")[:, 0]


def tight_box(mask: Tensor) -> Box:
    """Left, top, right, bottom around a mask ``(height, width)``, the latter two exclusive; all 0 if it is empty."""
    if not mask.any():
        return 0.0, 0.0, 0.0, 0.0
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
