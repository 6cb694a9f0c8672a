"""What the judges learn from: pictures of the world with their shapes and captions, and the same pictures spoilt."""

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import trange

from crd.nano.judges.captions import caption
from crd.nano.judges.trunk import CELL
from crd.nano.world import (
    COLORS,
    LETTER_PITCH,
    SHAPE_TASKS,
    SHAPES,
    SIZE,
    SUPERSAMPLING,
    TINTS,
    Item,
    Prompt,
    draw_item,
    draw_prompt,
    layout,
    render,
    text_prompt,
)
from crd.seeding import python_rng

MAX_ITEMS = 8
CELL_CLASSES = 1 + 26 + len(SHAPES)  # what a cell shows: nothing, a letter, a shape
VAE_LATENT_NOISE = 0.5  # at most, in the units of unit-variance latents: what an unsure denoiser leaves


@dataclass(frozen=True)
class Bank:
    """Pictures ``(n, 3, 64, 64)`` uint8, items ``(n, 8, 5)`` (shape, colour, x, y, diameter; shape -1: none) and captions."""

    pictures: Tensor
    items: Tensor
    prompts: list[Prompt | None]  # None: a scene that no caption of the world describes
    near: list[list[str]]  # for those, captions that are almost right
    cells: Tensor  # (n, 64, 2) what each cell's middle shows: 0, a letter or a shape; and its colour (-1: none)
    contents: Tensor  # (n,) equal numbers for pictures that one caption may fit

    def __len__(self) -> int:
        return len(self.prompts)


def judge_prompt(rng: random.Random) -> Prompt:
    """Signs (most of random letters, so that any spelling is known) and shapes, held-out words and pairs included."""
    if rng.random() < 0.5:
        if rng.random() < 0.3:
            return draw_prompt("text", rng, "heldout" if rng.random() < 0.3 else "train")
        return text_prompt("".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.choices((3, 4, 5), (0.25, 0.35, 0.4))[0])))
    task = rng.choice((*SHAPE_TASKS, "position", "position"))  # relations are the hardest to learn
    return draw_prompt(task, rng, "heldout" if task in ("colors", "color_attr") and rng.random() < 0.3 else "train")


def free_scene(rng: random.Random) -> list[Item]:
    """0 to 7 shapes of any colour and size that do not overlap: more than captions ask for, often of one shape."""
    shape, one_shape = rng.choice(SHAPES), rng.random() < 0.6
    items: list[Item] = []
    wanted = rng.randint(0, 7)
    for _ in range(12 * wanted):
        diameter = rng.uniform(13, 34 if wanted < 3 else 22)
        x, y = (rng.uniform(diameter / 2 + 1, SIZE - diameter / 2 - 1) for _ in range(2))
        apart = all((a.x - x) ** 2 + (a.y - y) ** 2 > ((a.diameter + diameter) / 2 + 2) ** 2 for a in items)
        if apart and len(items) < wanted:
            items.append(Item(shape if one_shape else rng.choice(SHAPES), rng.choice(list(COLORS)), x, y, diameter))
    return items


def draw_items(items: list[Item], rng: random.Random) -> Image.Image:
    """A picture of the shapes in the world's manner."""
    canvas = Image.new("RGB", (SIZE * SUPERSAMPLING,) * 2, rng.choice(TINTS))
    pen = ImageDraw.Draw(canvas)
    for item in items:
        draw_item(pen, item)
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


def render_bank(count: int, seed: int, split: str, free_share: float = 0.2) -> Bank:
    """Pictures of random captions, and of free scenes; another ``split`` name is another set of pictures."""
    pictures, rows, prompts, near, cells, contents = [], [], [], [], [], []
    numbers: dict[str, int] = {}
    for i in trange(count, desc=f"pictures ({split})", unit="picture"):
        rng = python_rng(seed, "judges", split, i)
        prompt = None if rng.random() < free_share else judge_prompt(rng)
        if prompt and prompt.metadata["tag"] == "text":
            items, picture, content = [], render(prompt, rng), prompt.metadata["word"]
            cells.append(letter_cells(content))
        else:
            items = layout(prompt.metadata, rng) if prompt else free_scene(rng)
            picture, content = draw_items(items, rng), str(sorted(item.shape for item in items))
            cells.append(item_cells(items))
        pictures.append(np.asarray(picture))
        rows.append(_item_rows(items))
        prompts.append(prompt)
        near.append([] if prompt else _near_free_scene(items))
        contents.append(numbers.setdefault(content, len(numbers)))
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return Bank(stacked, torch.tensor(rows), prompts, near, torch.tensor(cells), torch.tensor(contents))


def cell_middles() -> list[tuple[float, float]]:
    """In pixels, row by row."""
    axis = [(i + 0.5) * CELL for i in range(SIZE // CELL)]
    return [(x, y) for y in axis for x in axis]


def letter_cells(word: str) -> list[list[int]]:
    """Per cell the number of the sign's letter there (1 to 26) or 0."""
    pitch, height = LETTER_PITCH[len(word)]
    left = (SIZE - pitch * len(word)) / 2
    cells = []
    for x, y in cell_middles():
        at = int((x - left) // pitch)
        written = 0 <= at < len(word) and abs(y - SIZE / 2) < height / 2
        cells.append([ord(word[at]) - ord("A") + 1 if written else 0, -1])
    return cells


def item_cells(items: list[Item]) -> list[list[int]]:
    """Per cell the number of the shape whose circle holds its middle (27 to 31) and its colour, or 0 and -1."""
    cells = []
    for x, y in cell_middles():
        here = [i for i in items if (i.x - x) ** 2 + (i.y - y) ** 2 < (i.diameter / 2) ** 2]
        cells.append([27 + SHAPES.index(here[0].shape), list(COLORS).index(here[0].color)] if here else [0, -1])
    return cells


def _item_rows(items: list[Item]) -> list[list[float]]:
    rows = [[float(SHAPES.index(i.shape)), float(list(COLORS).index(i.color)), i.x, i.y, i.diameter] for i in items]
    return rows + [[-1.0, 0.0, 0.0, 0.0, 0.0]] * (MAX_ITEMS - len(rows))


def _near_free_scene(items: list[Item]) -> list[str]:
    """Captions of one to four of the scene's most frequent shape, without the right one."""
    counts = Counter(item.shape for item in items)
    shape, found = counts.most_common(1)[0] if counts else (SHAPES[0], 0)
    return [caption([(n, None, shape)]) for n in (1, 2, 3, 4) if len(counts) != 1 or n != found]


@torch.no_grad()
def through_autoencoder(pictures: Tensor, vae: AutoencoderKL, rng: torch.Generator) -> Tensor:
    """uint8 pictures encoded, disturbed in the latents by up to VAE_LATENT_NOISE, and decoded, as uint8."""
    latents = vae.encode(pictures.float() / 127.5 - 1).latent_dist.mode()
    scale = VAE_LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, generator=rng) / vae.config.scaling_factor
    decoded = vae.decode(latents + scale * torch.randn(latents.shape, generator=rng)).sample
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def degrade(pictures: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures in [-1, 1] with blur (to 1.2 pixels), noise (to 40 of 255) and tinted channels, each in part of the batch."""
    n = len(pictures)
    gain = 1 + 0.1 * (2 * torch.rand(n, 3, 1, 1, generator=rng) - 1)
    shift = 0.1 * (2 * torch.rand(n, 3, 1, 1, generator=rng) - 1)
    sigma = (2.4 * torch.rand(n, generator=rng) - 1.2).clamp(min=0.05)
    amount = (torch.rand(n, 1, 1, 1, generator=rng) * 80 / 127.5 - 40 / 127.5).clamp(min=0)
    noisy = blur(pictures, sigma) * gain + shift + amount * torch.randn(pictures.shape, generator=rng)
    return noisy.clamp(-1, 1)


def blur(pictures: Tensor, sigma: Tensor, radius: int = 3) -> Tensor:
    """Gaussian blur of ``(n, c, h, w)`` with one width per picture, ``sigma (n,)`` in pixels."""
    n, c, h, w = pictures.shape
    distance = torch.arange(-radius, radius + 1) ** 2
    kernel = torch.softmax(-distance / (2 * sigma[:, None] ** 2), 1).repeat_interleave(c, 0)
    flat = F.pad(pictures.reshape(1, n * c, h, w), (radius,) * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=n * c)
    return F.conv2d(flat, kernel[:, None, None, :], groups=n * c).reshape(n, c, h, w)
