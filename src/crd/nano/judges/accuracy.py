"""How good the judges are, on pictures that they were not trained on: clean, spoilt, and through the autoencoder."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from crd.judges.diversity import mean_vendi_score
from crd.judges.frechet import frechet_distance
from crd.models.load import nano_folder
from crd.nano.judges.alignment import AlignmentNet, AlignmentReward, near_captions, picture_features
from crd.nano.judges.data import Bank, degrade, render_bank, through_autoencoder
from crd.nano.judges.detector_net import DetectorNet, NetDetector
from crd.nano.judges.sets import REAL_PICTURES, real_pictures
from crd.nano.world import COLORS, HELD_OUT_PAIRS, HELD_OUT_WORDS, SHAPES, Prompt, draw_prompt
from crd.rewards.geneval.rules import judge
from crd.seeding import generator, python_rng

NEGATIVES = 9  # hard ones, beside the right caption
CONFIDENT = 0.5  # detections that count where no GenEval rule says
FLOOR_PROMPTS, SHOWN = (12, 16), 8  # prompts, and pictures of each: 96 and 128 pictures


def measure(detector: DetectorNet, alignment: AlignmentNet, count: int, seed: int) -> dict[str, dict[str, float]]:
    """Shares of right answers by condition, and the floor of the Fréchet distance (real pictures against real ones)."""
    bank = render_bank(count, seed, "measured")
    vae = AutoencoderKL.from_pretrained(nano_folder() / "vae", torch_dtype=torch.float32).eval()
    rng = generator(seed, "measured-noise")
    spoilt = degrade(bank.pictures.float() / 127.5 - 1, rng)
    conditions = {
        "clean": bank.pictures,
        "degraded": ((spoilt + 1) * 127.5).round().to(torch.uint8),
        "autoencoded": torch.cat([through_autoencoder(part, vae, rng) for part in bank.pictures.split(64)]),
    }
    results = {}
    for name, pictures in conditions.items():
        images = to_images(pictures)
        results[name] = {
            **_detector_accuracy(NetDetector(detector), images, bank),
            **_alignment_accuracy(AlignmentReward(alignment), images, bank, seed),
        }
    results["floor"] = _floor(alignment, seed)
    return results


def to_images(pictures: Tensor) -> list[Image.Image]:
    """uint8 ``(n, 3, h, w)`` as pictures."""
    return [Image.fromarray(array) for array in pictures.permute(0, 2, 3, 1).numpy()]


def _detector_accuracy(detector: NetDetector, images: list[Image.Image], bank: Bank) -> dict[str, float]:
    """GenEval's strict rule on right captions, and scenes whose shapes and colours are all found and nothing else."""
    verdicts: dict[str, list[bool]] = {}
    for detections, items, prompt in zip(detector(images), bank.items, bank.prompts, strict=True):
        if prompt and prompt.metadata["tag"] == "text":
            continue
        if prompt:
            verdicts.setdefault(prompt.metadata["tag"], []).append(judge(detections, prompt.metadata).strict)
        there = Counter((SHAPES[int(row[0])], list(COLORS)[int(row[1])]) for row in items if row[0] >= 0)
        found = Counter((d.name, d.color) for d in detections if d.score > CONFIDENT)
        verdicts.setdefault("scene" if prompt else "free scene", []).append(there == found)
    return {f"geneval_net {tag}": float(np.mean(values)) for tag, values in sorted(verdicts.items())}


def _kind(prompt: Prompt) -> str:
    """Under which name a caption's results are averaged."""
    if prompt.metadata["tag"] == "text":
        return "held-out word" if prompt.metadata["word"] in HELD_OUT_WORDS else "other word"
    held_out = any((entry.get("color"), entry["class"]) in HELD_OUT_PAIRS for entry in prompt.metadata["include"])
    return "held-out pair" if held_out else prompt.metadata["tag"]


def _alignment_accuracy(reward: AlignmentReward, images: list[Image.Image], bank: Bank, seed: int) -> dict[str, float]:
    """Share of pictures whose caption beats its 9 hard negatives, by kind, and mean scores of right and wrong captions."""
    rng = python_rng(seed, "measured-negatives")
    rows = [(i, prompt) for i, prompt in enumerate(bank.prompts) if prompt]
    texts = [[prompt.text, *near_captions(bank, i, NEGATIVES, rng)] for i, prompt in rows]
    shown = [images[i] for i, _ in rows for _ in range(1 + NEGATIVES)]
    answers = reward(shown, [text for row in texts for text in row])
    scores = np.array(answers, dtype=float).reshape(len(rows), 1 + NEGATIVES)
    won: dict[str, list[bool]] = {}
    for (_, prompt), row in zip(rows, scores, strict=True):
        won.setdefault(_kind(prompt), []).append(bool(row[0] > row[1:].max()))
    accuracies = {f"alignment {kind}": float(np.mean(values)) for kind, values in sorted(won.items())}
    return {**accuracies, "alignment of right": float(scores[:, 0].mean()), "alignment of wrong": float(scores[:, 1:].mean())}


def _floor(alignment: AlignmentNet, seed: int) -> dict[str, float]:
    """Fréchet distance to other real pictures of the same prompts, and Vendi score, of real pictures."""
    rng = python_rng(seed, "floor")
    kinds: dict[str, Callable[[], Prompt]] = {
        "signs": lambda: draw_prompt("text", rng, "heldout"),
        "position": lambda: draw_prompt("position", rng),
        "color_attr": lambda: draw_prompt("color_attr", rng, "heldout"),
    }
    floor = {}
    for kind, draw in kinds.items():
        prompts: dict[str, Prompt] = {}
        while len(prompts) < FLOOR_PROMPTS[-1]:
            prompt = draw()
            prompts[prompt.text] = prompt
        texts, metadata = list(prompts), [p.metadata for p in prompts.values()]
        shown = picture_features(alignment, real_pictures(texts, metadata, SHOWN, seed + 1))
        real = picture_features(alignment, real_pictures(texts, metadata, REAL_PICTURES, seed))
        for count in FLOOR_PROMPTS:
            distance = frechet_distance(shown[: count * SHOWN], real[: count * REAL_PICTURES])
            floor[f"frechet {kind} {count * SHOWN} pictures"] = distance
        floor[f"vendi {kind} of {SHOWN}"] = mean_vendi_score(shown, SHOWN)
    return floor
