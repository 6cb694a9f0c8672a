"""The model card: what was trained from what, how it was judged, how to load it, and under which licence."""

import inspect
import json
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

import diffusers
import yaml

from crd.alarm import held_out
from crd.config import CRDConfig
from crd.export import Form
from crd.export.base_model import hub_id, local_folder, pipeline_index, public_name
from crd.export.licence import base_licence
from crd.export.merged import class_and_component
from crd.run_folder import RunFolder

Row = dict[str, Any]

ALGORITHMS = {
    "crd": "Centered Reward Distillation",
    "nft": "DiffusionNFT",
    "awm": "advantage weighted matching",
    "flow_grpo": "Flow-GRPO",
    "rwr": "reward-weighted regression",
}
#: class that loads a pipeline of any class, named where the base model's own is not known
GENERAL = "DiffusionPipeline"
KINDS = {Form.LORA: "LoRA", Form.MERGED: "Fine-tuned pipeline", Form.COMFYUI: "LoRA for ComfyUI"}


def run_card(folder: RunFolder, config: CRDConfig, summary: Row) -> str:
    """The card of a run folder, for use on this machine."""
    form = Form.MERGED if config.model.tuning == "full" else Form.LORA
    return _card(folder, config, summary, form, "\n".join(["import diffusers", *summary["how_to_load"]]))


def exported_card(folder: RunFolder, config: CRDConfig, summary: Row, form: Form, place: str) -> str:
    """The card of an export; ``place`` is how its readers call it: a hub id or a folder's name."""
    if form is Form.COMFYUI:
        name = f"{folder.path.resolve().name}.safetensors"
        usage = f"# copy {name} into ComfyUI/models/loras and choose it in the node LoraLoaderModelOnly, strength 1"
    else:
        base = hub_id(config.model.path) or f"path/to/{public_name(config.model.path)}"
        lines = loading_lines(folder, config, base, place)
        if form is Form.MERGED:
            lines = [lines[0].replace(f'"{base}"', f'"{place}"'), lines[2]]
        usage = "\n".join(["import diffusers", *lines])
    return _card(folder, config, summary, form, usage)


def run_loading_lines(folder: RunFolder, config: CRDConfig) -> list[str]:
    """Three lines of plain diffusers that load the result on this machine."""
    found = local_folder(config.model.path)
    base = str(found.resolve()) if found else config.model.path
    return loading_lines(folder, config, base, str(folder.path.resolve()))


def loading_lines(folder: RunFolder, config: CRDConfig, base: str, place: str) -> list[str]:
    """Lines of plain diffusers: the base pipeline, the tuned weights, a picture as the evaluation drew it."""
    index = pipeline_index(config.model.path)
    kind = index.get("_class_name", GENERAL)
    absent = [name for name, entry in index.items() if entry == [None, None]]
    without = "".join(f", {name}=None" for name in absent if name.startswith(("text_encoder", "tokenizer")))
    prompt = json.loads((folder.path / "evaluation_prompts.json").read_text())[0]
    return [
        f'pipe = diffusers.{kind}.from_pretrained("{base}"{without})',
        _load_backbone(folder.result(config), place) if config.model.tuning == "full" else f'pipe.load_lora_weights("{place}")',
        f"pipe({', '.join([repr(prompt), *_call_arguments(kind, config)])}).images[0]",
    ]


def _load_backbone(backbone: Path, place: str) -> str:
    kind, component = class_and_component(backbone)
    return f'pipe.{component} = diffusers.{kind}.from_pretrained("{place}/{backbone.name}")'


def _call_arguments(kind: str, config: CRDConfig) -> list[str]:
    """Arguments of the pipeline's call that draw as the evaluation does, as far as pipelines of this class take them."""
    known = inspect.signature(getattr(diffusers, kind).__call__).parameters if kind != GENERAL else {}
    guidance = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
    scale = config.evaluation.guidance_scale
    values = {
        "height": config.model.height,
        "width": config.model.width,
        "num_inference_steps": config.evaluation.steps,
        guidance: scale - 1 if kind == "ZImagePipeline" else scale,  # Z-Image counts from 0 (docs/models.md)
        "max_sequence_length": 1 if config.model.path == "nano" else config.model.max_sequence_length,
    }
    if guidance == "true_cfg_scale":
        values["guidance_scale"] = config.model.distilled_guidance
    arguments = [f"{name}={value:g}" for name, value in values.items() if value is not None and name in known]
    return [*arguments, "negative_prompt=''"] if guidance == "true_cfg_scale" and scale > 1 else arguments


def public_label(name: str) -> str:
    """A reward, judge or prompt set as others may know it: of a file its name, of an address its path without the host."""
    if "://" in name:
        return urlsplit(name).path.strip("/") or "a reward server"
    return name if name.startswith("nano/") else PurePath(name).name


def _card(folder: RunFolder, config: CRDConfig, summary: Row, form: Form, usage: str) -> str:
    licence = base_licence(config.model.path)
    rewards = ", ".join(f"{public_label(reward.name)} (weight {reward.weight:g})" for reward in config.rewards)
    return f"""---
{yaml.safe_dump(_front_matter(config, form, licence.front_matter), sort_keys=False, allow_unicode=True).strip()}
---
# {KINDS[form]} by {ALGORITHMS[config.algorithm]}

Base model: `{public_name(config.model.path)}`. Rewards: {rewards}. Training prompts: `{public_label(config.prompts.train)}`.
{summary["epochs"]} epochs of {summary["pictures_per_epoch"]} pictures, {summary["optimiser_steps"]} optimiser steps.
All settings: `config.yaml`.

On held-out prompts (`{public_label(config.prompts.evaluation)}`, listed in `evaluation_prompts.json`),
{config.evaluation.steps} steps, fixed seeds:

{_table(config, summary)}
{_verdict(summary)}

![before and after](before_after.png)
![curves](curves.png)

```python
{usage}
```

## Licence

{licence.sentence}
"""


def _front_matter(config: CRDConfig, form: Form, licence: Row) -> Row:
    """The head of the card, by the names the hub knows; it takes only names of its own repositories for ``base_model``."""
    base = hub_id(config.model.path)
    relation = "finetune" if form is Form.MERGED else "adapter"
    return {
        **({"base_model": base, "base_model_relation": relation} if base else {}),
        **licence,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "reinforcement-learning", "crd"] + ([] if form is Form.MERGED else ["lora"]),
    }


def _table(config: CRDConfig, summary: Row) -> str:
    judges = [name for name in held_out(config) if name in summary["after"]]
    columns = ["reward", *judges, "drift", "diversity"]
    rows = {
        "pretrained": summary["before"],
        "pretrained, guided": summary["before_guided"],
        "anchor alone, same budget": summary["anchor_alone"],
        "this model": summary["after"],
    }
    table = f"| weights | guidance | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}\n"
    for name, row in rows.items():
        if row:
            figures = " | ".join(f"{row[column]:.3f}" if column in row else "" for column in columns)
            table += f"| {name} | {row['guidance_scale']:g} | {figures} |\n"
    return table + (f"\nHeld-out judges, never trained on: {', '.join(judges)}.\n" if judges else "")


def _verdict(summary: Row) -> str:
    texts = [(alarm["text"].replace(alarm["sign"], public_label(alarm["sign"])), alarm["step"]) for alarm in summary["alarms"]]
    signs = "".join(f"\n* {text} (optimiser step {step})" for text, step in texts)
    verdict = f"The hack alarm was raised:\n{signs}" if signs else "The hack alarm was not raised."
    if summary["rolled_back_to"]:
        verdict += f"\n\nThese weights are those of {summary['rolled_back_to']}, which held-out judges liked best."
    return verdict
