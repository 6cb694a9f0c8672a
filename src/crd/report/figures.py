"""The two figures of a run: the same prompts and seeds before and after, and the curves."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from crd.alarm import DIRECTED
from crd.export.card import public_label
from crd.report.pictures import read_column

BEFORE_AFTER_PROMPTS = 8

Row = dict[str, Any]


def before_after(path: Path, sheets: dict[str, Path], prompts: list[str], pictures_per_prompt: int, total_prompts: int) -> None:
    """One column per prompt, one row per sheet (title -> grid), with the same noise down each column."""
    count = min(BEFORE_AFTER_PROMPTS, len(prompts))
    figure, axes = plt.subplots(len(sheets), count, figsize=(1.5 * count + 1.4, 1.65 * len(sheets)), squeeze=False)
    for i, (title, sheet) in enumerate(sheets.items()):
        pictures = read_column(sheet, pictures_per_prompt, total_prompts)
        for j in range(count):
            axis = axes[i][j]
            axis.imshow(pictures[j])
            axis.set_xticks([])
            axis.set_yticks([])
            if i == 0:
                axis.set_title(_wrap(prompts[j]), fontsize=7, parse_math=False)  # prompts may hold dollar signs
        axes[i][0].set_ylabel(title, fontsize=8)
    figure.suptitle("The same prompts and seeds", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _wrap(text: str, width: int = 20) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def curves(
    path: Path, training: list[Row], evaluations: list[Row], control: list[Row], alarms: list[Row], judges: list[str]
) -> None:
    """Reward and drift on held-out prompts against optimiser steps, with judges, the base models as lines, and hack alarms."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 6), sharex=True)
    held_out = [row for row in evaluations if row["label"].startswith("epoch")]
    base = {row["label"]: row for row in evaluations if row["label"].startswith("base")}
    start = [base["base"]] if "base" in base else []
    for axis, key in ((top, "reward"), (bottom, "drift")):
        points = start + held_out
        axis.plot([r["step"] for r in points], [r[key] for r in points], "o-", color="C0", label="held-out prompts")
        alone = [row for row in control if row["label"].startswith("epoch")]
        if alone:
            points = start + alone
            axis.plot([r["step"] for r in points], [r[key] for r in points], "s:", color="C3", label="anchor alone, held-out")
        for label, style in (("base", "--"), ("base-guided", "-.")):
            if label in base and key == "reward":
                name = f"{label.replace('-', ', ')} (guidance {base[label]['guidance_scale']:g})"
                axis.axhline(base[label][key], color="grey", linestyle=style, linewidth=1, label=name)
    for name, color in zip(DIRECTED, ("C2", "C4", "C5"), strict=True):
        seen = [row for row in start + held_out if name in judges and name in row]
        if seen:
            top.plot([r["step"] for r in seen], [r[name] for r in seen], ".--", color=color, linewidth=1, label=f"judge: {name}")
    top.plot([r["step"] for r in training], [r["reward"] for r in training], color="C0", alpha=0.35, label="rollouts")
    top.set_ylabel("reward")
    bottom.set_ylabel("drift: squared velocity distance\nto the guided pretrained model")
    bottom.set_xlabel("optimiser steps")
    for alarm in alarms:
        for axis in (top, bottom):
            axis.axvline(alarm["step"], color="C1", linewidth=1)
        text = f"hack alarm: {public_label(alarm['sign'])}"
        top.annotate(text, (alarm["step"], top.get_ylim()[0]), rotation=90, fontsize=7, color="C1")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
