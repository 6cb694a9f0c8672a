"""The result of a run: the LoRA file, the summary, the figures and the model card."""

import json
from pathlib import Path
from typing import Any

from crd.alarm import find_alarms
from crd.batch import PromptGroup
from crd.config import CRDConfig
from crd.errors import CRDError
from crd.log import read_record
from crd.models.policy import Policy
from crd.report.figures import before_after, curves
from crd.run_folder import RunFolder

Row = dict[str, Any]


def write_result(folder: RunFolder, config: CRDConfig, policy: Policy, members: list[PromptGroup]) -> None:
    """Writes the student as a standard diffusers LoRA file, then everything that describes it."""
    partial = folder.path / "partial-lora"  # renamed when whole: the file tells a finished run from others
    policy.save_lora(str(partial), "student")
    (partial / folder.lora.name).replace(folder.lora)
    partial.rmdir()
    prompts = list(dict.fromkeys(member.text for member in members))
    (folder.path / "evaluation_prompts.json").write_text(json.dumps(prompts, indent=1))
    write_report(folder, config)


def write_report(folder: RunFolder, config: CRDConfig, control: RunFolder | None = None) -> Row:
    """Summary, figures and model card from the records; ``control`` is a run with the reward term off, to set beside."""
    rows = read_record(folder.metrics)
    training = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    if not evaluations:
        raise CRDError(f"{folder.metrics} holds no evaluation; it is the record that a report is made of.")
    rolled_back = next((row["label"] for row in rows if row["kind"] == "roll_back"), None)
    final = next((row for row in evaluations if row["label"] == rolled_back), evaluations[-1])
    other = [row for row in read_record(control.metrics) if row["kind"] == "evaluation"] if control else []
    summary = _summary(folder, config, training, evaluations, other) | {"after": _numbers(final), "rolled_back_to": rolled_back}
    summary["alarms"] = [alarm.as_row() for alarm in find_alarms(evaluations, config.alarm)]
    folder.summary.write_text(json.dumps(summary, indent=1) + "\n")
    prompts = json.loads((folder.path / "evaluation_prompts.json").read_text())
    sheets = {"before": folder.pictures / "base.png", "before,\nguided": folder.pictures / "base-guided.png"}
    sheets |= {"after": folder.pictures / f"{final['label']}.png"}
    if control and other:
        sheets["anchor alone"] = control.pictures / f"{other[-1]['label']}.png"
    present = {title: path for title, path in sheets.items() if path.exists()}
    before_after(folder.path / "before_after.png", present, prompts, config.evaluation.pictures_per_prompt, len(prompts))
    curves(folder.path / "curves.png", training, evaluations, other, summary["alarms"])
    (folder.path / "README.md").write_text(_model_card(folder, config, summary))
    return summary


def _summary(folder: RunFolder, config: CRDConfig, training: list[Row], evaluations: list[Row], control: list[Row]) -> Row:
    by_label = {row["label"]: _numbers(row) for row in evaluations}
    timing = read_record(folder.timing)
    rollouts = [row for row in timing if "rollout" in row]
    epochs = max(1, len(rollouts))
    summary: Row = {
        "before": by_label.get("base"),
        "before_guided": by_label.get("base-guided"),
        "anchor_alone": _numbers(control[-1]) if control else None,
        "epochs": len(training),
        "optimiser_steps": training[-1]["step"] if training else 0,
        "seconds_per_epoch": {
            part: round(sum(row[part] for row in rollouts) / epochs, 2) for part in ("rollout", "reward", "train")
        },
        "seconds_evaluation": round(sum(row.get("evaluation", 0.0) for row in timing), 1),
        "training_forwards": rollouts[-1]["forwards"] if rollouts else 0,
        "peak_memory_MiB": round(max((row["peak_memory_MiB"] for row in rollouts), default=0)),
        "pictures_per_epoch": config.rollout.prompts_per_epoch * config.rollout.group_size,
        "guidance_of_before_guided": config.reference_guidance,
        "how_to_load": loading_lines(folder, config),
    }
    return summary


def _numbers(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in ("kind", "epoch", "step", "label")}


def loading_lines(folder: RunFolder, config: CRDConfig) -> list[str]:
    """Three lines of plain diffusers that load the result."""
    from crd.models.load import absent_components, nano_folder

    model = str(nano_folder()) if config.model.path == "nano" else config.model.path
    absent = absent_components(model) if Path(model).exists() else {}
    without = "".join(f", {name}=None" for name in ("text_encoder_3", "tokenizer_3") if name in absent)
    prompt = json.loads((folder.path / "evaluation_prompts.json").read_text())[0]
    call = f"num_inference_steps={config.evaluation.steps}, guidance_scale={config.evaluation.guidance_scale:g}"
    call += f", max_sequence_length={config.model.sequence_length(256)}"
    return [
        f'pipe = diffusers.StableDiffusion3Pipeline.from_pretrained("{model}"{without})',
        f'pipe.load_lora_weights("{Path(folder.path).resolve()}")',
        f"pipe({prompt!r}, {call}).images[0]",
    ]


def _model_card(folder: RunFolder, config: CRDConfig, summary: Row) -> str:
    def line(name: str, row: Row | None) -> str:
        if row is None:
            return ""
        return f"| {name} | {row['guidance_scale']:g} | {row['reward']:.3f} | {row['drift']:.3f} | {row['diversity']:.3f} |\n"

    table = "| weights | guidance | reward | drift | diversity |\n|---|---|---|---|---|\n"
    table += line("pretrained", summary["before"]) + line("pretrained, guided", summary["before_guided"])
    table += line("anchor alone, same budget", summary["anchor_alone"]) + line("this LoRA", summary["after"])
    rewards = ", ".join(f"{reward.name} (weight {reward.weight:g})" for reward in config.rewards)
    held_out = "".join(f"\n* {alarm['text']} (optimiser step {alarm['step']})" for alarm in summary["alarms"])
    verdict = f"The hack alarm was raised:\n{held_out}" if held_out else "The hack alarm was not raised."
    if summary["rolled_back_to"]:
        verdict += f"\n\nThese weights are those of {summary['rolled_back_to']}, which held-out judges liked best."
    loading = "\n".join(["import diffusers", *summary["how_to_load"]])
    return f"""---
base_model: {config.model.path}
library_name: diffusers
tags: [lora, text-to-image, reinforcement-learning, centered-reward-distillation]
---
# LoRA by Centered Reward Distillation

Base model: `{config.model.path}`. Rewards: {rewards}. {summary["epochs"]} epochs of {summary["pictures_per_epoch"]} pictures,
{summary["optimiser_steps"]} optimiser steps. All settings: `config.yaml`. The licence of the base model applies.

On held-out prompts (`evaluation_prompts.json`), {config.evaluation.steps} steps, fixed seeds:

{table}
{verdict}

![before and after](before_after.png)
![curves](curves.png)

```python
{loading}
```
"""
