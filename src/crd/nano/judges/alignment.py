"""Whether a picture shows what its caption says: a small network that reads the picture for the words of the caption."""

import math
import random
import string
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from crd.nano.judges.captions import MAX_TOKENS, hard_negatives, pad, tokenize, vocabulary_size, word_numbers
from crd.nano.judges.data import CELL_CLASSES, Bank, degrade
from crd.nano.judges.trunk import BATCH, CELL, CHANNELS, batches, make_trunk
from crd.nano.world import COLORS, SHAPES, SIZE
from crd.seeding import generator, python_rng

SIDE = SIZE // CELL  # cells
WIDTH = 64  # of words and of cells
FEATURE_LAYERS, FEATURES = 2, 48  # of the trunk, whose output says how a picture is drawn; deeper ones forget tint and place
HARD_NEGATIVES, OTHERS = 3, 2  # captions of a picture in a step, beside its own: nearly right ones, and of other pictures


class AlignmentNet(nn.Module):
    """Words of a caption look at the cells of a picture and at each other, twice; then one logit: does all of it fit?

    A joint reading tells near captions apart (a letter, a place, a colour) far sooner than two towers with one vector each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = make_trunk()
        self.narrow = nn.Sequential(nn.Conv2d(CHANNELS, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.names = nn.Linear(WIDTH, CELL_CLASSES + len(COLORS))  # what a cell shows
        self.rows, self.columns = (nn.Parameter(torch.randn(SIDE, WIDTH)) for _ in range(2))  # where a cell is
        self.words = nn.Embedding(vocabulary_size(), WIDTH, padding_idx=0)
        self.order = nn.Parameter(torch.randn(MAX_TOKENS, WIDTH))
        layer = nn.TransformerDecoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, 2)
        for block in self.layers.layers:  # queries as keys at first: words begin by looking at cells that show them
            query, key, _ = block.multihead_attn.in_proj_weight.data.chunk(3)
            key.copy_(query)
        self.answer = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1))
        self.register_buffer("class_words", word_numbers([*string.ascii_uppercase, *SHAPES]), persistent=False)
        self.register_buffer("color_words", word_numbers(COLORS), persistent=False)
        self.register_buffer("feature_mean", torch.zeros(FEATURES))  # over the world's pictures; set after training
        self.register_buffer("feature_spread", torch.ones(FEATURES))

    def look(self, pictures: Tensor) -> Tensor:
        """Pictures ``(n, 3, 64, 64)`` in [-1, 1] to cells ``(n, 64, WIDTH)``."""
        return self.narrow(self.trunk(pictures)).flatten(2).transpose(1, 2)

    def features(self, pictures: Tensor) -> Tensor:
        """Means over the picture ``(n, 48)`` of an early layer, for distances between sets; not scaled yet."""
        return self.trunk[:FEATURE_LAYERS](pictures).mean((2, 3))

    def describe(self, cells: Tensor) -> Tensor:
        """What the cells show in the vectors of the captions' words, so that a letter seen and a letter read are alike."""
        classes, colors = self.names(cells).split([CELL_CLASSES, len(COLORS)], dim=-1)
        shares = classes.softmax(-1)[..., 1:]  # of letters and shapes; an empty cell has no word
        painted = shares[..., 26:].sum(-1, keepdim=True)
        return shares @ self.words(self.class_words) + painted * (colors.softmax(-1) @ self.words(self.color_words))

    def forward(self, cells: Tensor, tokens: Tensor) -> Tensor:
        """Logits ``(n,)`` that captions ``(n, MAX_TOKENS)`` fit pictures ``(n, 64, WIDTH)``."""
        absent = tokens == 0
        places = (self.rows[:, None] + self.columns).flatten(0, 1)
        seen = cells + self.describe(cells) + places
        states = self.layers(self.words(tokens) + self.order, seen, tgt_key_padding_mask=absent)
        return self.answer((states * ~absent[..., None]).sum(1) / math.sqrt(MAX_TOKENS))[:, 0]


def naming_loss(named: Tensor, shown: Tensor) -> Tensor:
    """Cross-entropies of what the cells show: ``named (n, 64, classes + colours)``, ``shown (n, 64, 2)`` (colour -1: none).

    Means over the empty cells, the others, and the coloured ones, added: most cells are empty and would drown the letters.
    """
    classes, colors = named.split([CELL_CLASSES, len(COLORS)], dim=-1)
    losses = F.cross_entropy(classes.transpose(1, 2), shown[..., 0], reduction="none")
    empty, painted = shown[..., 0] == 0, shown[..., 1] >= 0
    parts = [losses[empty], losses[~empty], F.cross_entropy(colors[painted], shown[..., 1][painted], reduction="none")]
    return torch.stack([part.sum() / max(len(part), 1) for part in parts]).sum()


def alignment_loss(logits: Tensor, right: Tensor) -> Tensor:
    """Binary cross-entropies of ``logits (n, 1 + HARD_NEGATIVES + OTHERS)``: own captions, near ones, others.

    The first column is right where ``right (n,)`` says so (a scene without a caption has a wrong one there), the rest is wrong.
    """
    own = F.binary_cross_entropy_with_logits(logits[:, 0], right.float())
    return own + F.softplus(logits[:, 1 : 1 + HARD_NEGATIVES]).mean() + F.softplus(logits[:, 1 + HARD_NEGATIVES :]).mean()


def captions_of(bank: Bank, rows: list[int], rng: random.Random) -> list[str]:
    """Captions for each row: its own (or a wrong one), near ones, and those of other rows that surely do not fit."""
    texts = []
    for row in rows:
        prompt = bank.prompts[row]
        texts += [prompt.text] if prompt else near_captions(bank, row, 1, rng)
        texts += near_captions(bank, row, HARD_NEGATIVES, rng)
        texts += [_other_caption(bank, row, rng) for _ in range(OTHERS)]
    return texts


def _other_caption(bank: Bank, row: int, rng: random.Random) -> str:
    while True:
        other = rng.randrange(len(bank))
        prompt = bank.prompts[other]
        if prompt and bank.contents[other] != bank.contents[row]:
            return prompt.text


def near_captions(bank: Bank, row: int, count: int, rng: random.Random) -> list[str]:
    """Hard negatives of one row of the bank."""
    prompt = bank.prompts[row]
    return rng.choices(bank.near[row], k=count) if prompt is None else hard_negatives(prompt, count, rng)


def training_loss(net: AlignmentNet, bank: Bank, batch: int, seed: int, step: int) -> Tensor:
    """Loss of one step on spoilt pictures of the bank with fresh wrong captions, and of naming the cells.

    Naming teaches letters and shapes much sooner than captions alone would.
    """
    rng, words = generator(seed, step, "alignment-batch"), python_rng(seed, step, "wrong-captions")
    rows = torch.randint(len(bank), (batch,), generator=rng)
    cells = net.look(degrade(bank.pictures[rows].float() / 127.5 - 1, rng))
    texts = captions_of(bank, rows.tolist(), words)
    tokens = pad([row for text in texts if (row := tokenize(text))])
    each = len(texts) // batch
    logits = net(cells.repeat_interleave(each, 0), tokens).view(batch, each)
    right = torch.tensor([bank.prompts[i] is not None for i in rows.tolist()])
    return alignment_loss(logits, right) + naming_loss(net.names(cells), bank.cells[rows])


class AlignmentReward:
    """Probability that a picture shows what its caption says and nothing else; None for captions of another world."""

    def __init__(self, net: AlignmentNet):
        self.net = net

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]:
        tokens = [tokenize(prompt) for prompt in prompts]
        known = [i for i, row in enumerate(tokens) if row is not None]
        if not known:
            return [None] * len(images)
        captions = pad([row for row in tokens if row is not None]).split(BATCH)
        pictures = batches([images[i] for i in known])
        logits = [self.net(self.net.look(part), read) for part, read in zip(pictures, captions, strict=True)]
        scores: list[float | None] = [None] * len(images)
        for i, score in zip(known, torch.cat(logits).sigmoid().tolist(), strict=True):
            scores[i] = score
        return scores


@torch.no_grad()
def picture_features(net: AlignmentNet, images: list[Image.Image]) -> np.ndarray:
    """Features ``(n, 48)`` in float64 for distances between sets, each with mean 0 and spread 1 over pictures of the world."""
    raw = torch.cat([net.features(part) for part in batches(images)])
    return ((raw - net.feature_mean) / net.feature_spread).double().numpy()
