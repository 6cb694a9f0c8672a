"""What the nano world's detector reads in the base model's pictures: ``python benchmarks/detector_grid.py GRID.png``.

Draws prompts of each GenEval task, saves the pictures with the readings below them, and prints each task's
means of correct, strict and score. For checking the detector by eye.
"""

import argparse
from pathlib import Path

from accelerate import Accelerator
from PIL import Image, ImageDraw

from crd.batch import PromptGroup
from crd.inference import open_model
from crd.nano import world
from crd.nano.detector import detect
from crd.prompts import load_prompts
from crd.rewards.geneval import Detection, aggregate, judge
from crd.rewards.protocol import RewardSet
from crd.rollout import Sampling, collect

CELL, COLUMNS, LINE = 150, 12, 11  # pixels; pictures a row; pixels of a line of text
LINES = 6  # below a picture: the prompt and up to five objects


def cell(picture: Image.Image, prompt: PromptGroup, detections: list[Detection]) -> Image.Image:
    """A picture, twice enlarged, over its prompt (green if correct) and its objects, most confident first."""
    sheet = Image.new("RGB", (CELL, 2 * world.SIZE + LINES * LINE), "white")
    sheet.paste(picture.resize((2 * world.SIZE,) * 2, Image.Resampling.NEAREST), (0, 0))
    pen = ImageDraw.Draw(sheet)
    lines = [prompt.text.removeprefix("a photo of ")]
    lines += [f"{d.score:.2f} {d.color} {d.name}" for d in sorted(detections, key=lambda d: -d.score)]
    for i, line in enumerate(lines[:LINES]):
        fill = "black" if i else "green" if judge(detections, prompt.metadata).correct else "red"
        pen.text((2, 2 * world.SIZE + i * LINE), line, fill=fill, font_size=LINE - 1)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--prompts", type=int, default=12, help="of each task, at most")
    parser.add_argument("--pictures", type=int, default=2, help="of each prompt")
    options = parser.parse_args()
    policy, name, _ = open_model("nano", Accelerator())
    sets = [load_prompts(f"nano/{task}/train").first(options.prompts) for task in world.SHAPE_TASKS]
    members = [prompt for prompts in sets for prompt in prompts for _ in range(options.pictures)]
    with policy.using(name):
        sampling = Sampling(0, "detector-grid", 28, 48, options.guidance)
        drawn = collect(policy, RewardSet([]), members, list(range(len(members))), sampling)
    read = [detect(picture) for picture in drawn.pictures]
    cells = [cell(*parts) for parts in zip(drawn.pictures, members, read, strict=True)]
    sheet = Image.new("RGB", (COLUMNS * CELL, -(-len(cells) // COLUMNS) * cells[0].height), "white")
    for i, picture in enumerate(cells):
        sheet.paste(picture, (i % COLUMNS * CELL, i // COLUMNS * picture.height))
    sheet.save(options.grid)
    judged = [judge(detections, member.metadata) for detections, member in zip(read, members, strict=True)]
    tags = [member.metadata["tag"] for member in members]
    print(f"{len(members)} pictures, guidance {options.guidance}")
    for output in ("correct", "strict", "score"):
        summary = aggregate(tags, [getattr(judgement, output) for judgement in judged])
        tasks = "  ".join(f"{tag} {value:.2f}" for tag, value in summary.tasks.items())
        print(f"{output:8}overall {summary.overall:.3f}  pictures {summary.pictures:.3f}  {tasks}")


if __name__ == "__main__":
    main()
