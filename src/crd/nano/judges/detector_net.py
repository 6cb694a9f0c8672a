"""A learned detector of the world's shapes: it has other holes than the rule-based one that a run may be trained on."""

import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from crd.nano.judges.data import Bank, cell_middles, degrade
from crd.nano.judges.trunk import CELL, CHANNELS, batches, make_trunk
from crd.nano.world import COLORS, SHAPES, SIZE
from crd.rewards.geneval.detector import Detection
from crd.rewards.geneval.rules import intersection_over_union
from crd.seeding import generator

GRID = SIZE // CELL
OWN, NEAR = 5.0, 7.0  # pixels from a cell's middle: a shape's middle within OWN is the cell's; up to NEAR nobody is blamed
MEAN_DIAMETER = 20.0
OVERLAP = 0.3  # intersection over union above which two detections are one
LOWEST = 0.05  # confidence below which nothing is reported


class DetectorNet(nn.Module):
    """Per cell of 8 pixels: whether a shape's middle lies near, which shape, which colour, where and how large."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = make_trunk()
        self.head = nn.Conv2d(CHANNELS, 1 + len(SHAPES) + len(COLORS) + 3, 1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Objectness ``(n, 64)``, shapes ``(n, 64, 5)``, colours ``(n, 64, 6)``, boxes ``(n, 64, 3)``: dx, dy, log size."""
        out = self.head(self.trunk(pictures)).flatten(2).transpose(1, 2)
        presence, shapes, colors, boxes = out.split([1, len(SHAPES), len(COLORS), 3], dim=-1)
        return presence[..., 0], shapes, colors, boxes


def _middles() -> Tensor:
    return torch.tensor(cell_middles())


def assign(items: Tensor) -> tuple[Tensor, Tensor]:
    """For items ``(n, k, 5)``: which item each cell is near ``(n, 64)``, and its distance in pixels (infinite without items)."""
    offset = (items[:, None, :, 2:4] - _middles()[None, :, None]).abs().amax(-1)
    distance, index = torch.where(items[:, None, :, 0] >= 0, offset, math.inf).min(-1)
    return index, distance


def detection_loss(net: DetectorNet, pictures: Tensor, items: Tensor) -> Tensor:
    """Binary cross-entropy of presence, and on the cells of shapes cross-entropies and the boxes' L1 error."""
    presence, shapes, colors, boxes = net(pictures)
    index, distance = assign(items)
    own, clear = distance <= OWN, (distance <= OWN) | (distance > NEAR)
    loss = F.binary_cross_entropy_with_logits(presence[clear], own[clear].float(), reduction="sum") / len(pictures)
    picture, cell = own.nonzero(as_tuple=True)
    if not len(picture):
        return loss
    item = items[picture, index[picture, cell]]
    target = torch.cat([(item[:, 2:4] - _middles()[cell]) / CELL, (item[:, 4:] / MEAN_DIAMETER).log()], -1)
    loss = loss + F.cross_entropy(shapes[picture, cell], item[:, 0].long())
    loss = loss + F.cross_entropy(colors[picture, cell], item[:, 1].long())
    return loss + F.l1_loss(boxes[picture, cell], target)


def training_loss(net: DetectorNet, bank: Bank, batch: int, seed: int, step: int) -> Tensor:
    """Loss of one step on spoilt pictures of the bank."""
    rng = generator(seed, step, "detector-batch")
    rows = torch.randint(len(bank), (batch,), generator=rng)
    pictures = degrade(bank.pictures[rows].float() / 127.5 - 1, rng)
    return detection_loss(net, pictures, bank.items[rows])


class NetDetector:
    """The network as a detector of GenEval's rules: ``(images) -> list[list[Detection]]``."""

    def __init__(self, net: DetectorNet):
        self.net = net

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> list[list[Detection]]:
        found: list[list[Detection]] = []
        for part in batches(images):
            presence, shapes, colors, boxes = self.net(part)
            confidence, shape = (presence.sigmoid()[..., None] * shapes.softmax(-1)).max(-1)
            middles = _middles() + CELL * boxes[..., :2]
            radius = MEAN_DIAMETER / 2 * boxes[..., 2:].clamp(-2, 2).exp()
            corners = torch.cat([middles - radius, middles + radius], -1)
            found += [
                _without_doubles(*row)
                for row in zip(confidence.tolist(), shape.tolist(), colors.argmax(-1).tolist(), corners.tolist(), strict=True)
            ]
        return found


def _without_doubles(confidence: list[float], shapes: list[int], colors: list[int], boxes: list[list[float]]) -> list[Detection]:
    """Detections of the cells, most confident first, each without the weaker ones that cover the same place."""
    kept: list[Detection] = []
    for cell in sorted(range(len(confidence)), key=lambda cell: -confidence[cell]):
        left, top, right, bottom = boxes[cell]
        box = (left, top, right, bottom)
        if confidence[cell] >= LOWEST and all(intersection_over_union(box, other.box) <= OVERLAP for other in kept):
            kept.append(Detection(SHAPES[shapes[cell]], confidence[cell], box, list(COLORS)[colors[cell]]))
    return kept
