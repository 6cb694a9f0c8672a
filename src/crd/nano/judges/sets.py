"""Judgements of whole sets of pictures: distance to the world's own pictures of the same captions, and diversity."""

import functools
import json
from typing import Any

import numpy as np
from PIL import Image

from crd.judges.diversity import mean_vendi_score
from crd.judges.frechet import frechet_distance
from crd.nano.judges.alignment import picture_features
from crd.nano.judges.load import load_alignment
from crd.nano.world import Prompt, render
from crd.seeding import python_rng

REAL_PICTURES = 16  # of a caption, to compare with


def real_pictures(prompts: list[str], metadata: list[dict[str, Any]], per_prompt: int, seed: int = 0) -> list[Image.Image]:
    """Pictures of the world for each distinct prompt, prompt by prompt; a function of prompts and seed."""
    distinct = {text: Prompt(text, entry) for text, entry in zip(prompts, metadata, strict=True)}
    return [render(p, python_rng(seed, "real-pictures", p.text, i)) for p in distinct.values() for i in range(per_prompt)]


@functools.lru_cache(maxsize=16)
def _real_features(described: tuple[str, ...]) -> np.ndarray:
    prompts, metadata = zip(*map(json.loads, described), strict=True)
    return picture_features(load_alignment(), real_pictures(list(prompts), list(metadata), REAL_PICTURES))


def of_this_world(metadata: list[dict[str, Any]]) -> bool:
    """Whether the world could draw all of these prompts."""
    return all("word" in entry or "include" in entry for entry in metadata)


def frechet_to_world(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> float:
    """Fréchet distance between the features of the pictures and of the world's own pictures of the same captions.

    Real pictures against real ones do not give 0 but the floor in ``weights/accuracy.json``, which falls with their number.
    Every prompt must come with its metadata, and with equally many pictures.
    """
    distinct = dict.fromkeys(json.dumps([text, entry], sort_keys=True) for text, entry in zip(prompts, metadata, strict=True))
    return frechet_distance(picture_features(load_alignment(), images), _real_features(tuple(distinct)))


def set_judges(
    images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]], pictures_per_prompt: int
) -> dict[str, float]:
    """``vendi`` (1 to pictures_per_prompt) and, if the nano world has the prompts and there are two pictures, ``frechet`` (>= 0).

    Images, prompts and metadata have one entry per picture and are ordered prompt by prompt.
    """
    scores = {"vendi": mean_vendi_score(picture_features(load_alignment(), images), pictures_per_prompt)}
    if of_this_world(metadata) and len(images) > 1:
        scores["frechet"] = frechet_to_world(images, prompts, metadata)
    return scores
