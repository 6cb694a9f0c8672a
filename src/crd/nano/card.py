"""The base model's quality, measured: ``crd nano card`` writes it beside the weights."""

import json
from pathlib import Path

from crd.inference import evaluate_model

GUIDANCE = 4.5  # of the anchor
PROMPTS, STEPS = 200, 28


def write_card(model: str, output: Path) -> str:
    """Evaluates signs and shapes with and without guidance; writes ``README.md`` and grids; returns the card."""
    rows = []
    for guidance in (GUIDANCE, 1.0):
        folder = output / f"text-guidance-{guidance:g}"
        metrics = evaluate_model(model, "nano/text/heldout", ["ocr", "ocr_exact"], PROMPTS, 3, STEPS, guidance, 1234, folder)
        rows.append((guidance, metrics))
    for task in ("single_object", "two_object", "counting", "colors", "position", "color_attr"):
        folder = output / f"{task}-guidance-{GUIDANCE:g}"
        evaluate_model(model, f"nano/{task}/heldout", ["blue"], 12, 4, STEPS, GUIDANCE, 1234, folder)
    (output / "quality.json").write_text(json.dumps({f"guidance {g:g}": m for g, m in rows}, indent=1) + "\n")
    table = "".join(f"| {g:g} | {m['ocr']:.3f} | {m['ocr_exact']:.3f} | {m['diversity']:.3f} |\n" for g, m in rows)
    card = CARD.format(table=table, steps=STEPS)
    (output / "README.md").write_text(card)
    return card


CARD = """# The nano base model

A Stable Diffusion 3 pipeline (64x64 pictures, 8x8 latents of 16 channels, 3.7M parameters in the transformer and the text
encoders, 1M in the autoencoder), pretrained from nothing on the nano world by `crd nano build`; the log is `build.log`.
It draws coloured shapes in GenEval's six tasks and signs with words of 3 to 5 capital letters. Apache-2.0.

200 held-out words (never in pretraining), 3 pictures each, {steps} steps, read by RapidOCR:

| guidance | OCR reward | exact | diversity |
|---|---|---|---|
{table}
Shapes: `docs/nano.md` has GenEval's score by task. To the eye, with guidance: one shape is mostly right, two and their places
often, numbers often, and colours of pairs that pretraining never showed (a red ring) mostly wrong; squares and circles can be
soft. `crd nano card` writes their grids beside this file.
"""
