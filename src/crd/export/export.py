"""`crd export`: one folder that can be given away, whole or not there at all."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from crd.errors import CRDError
from crd.export import Form
from crd.export.base_model import pipeline_folder, pipeline_index
from crd.export.card import exported_card
from crd.export.comfyui import check_mapped, comfyui_tensors
from crd.export.hub import check_login, push
from crd.export.lora_file import LoraLayers, read_lora
from crd.export.merged import write_merged, write_replaced
from crd.lora_settings import FILE_NAME
from crd.run_folder import RunFolder

#: what a reader of the model card needs beside it
COMPANIONS = ("config.yaml", "evaluation_prompts.json", "before_after.png", "curves.png")


def export_run(run: Path, form: Form, output: Path | None = None, repo: str | None = None, private: bool = False) -> Path:
    """Writes a finished run as ``form`` into ``output`` and uploads it to ``repo`` if given; returns the folder.

    ``output`` must not exist; its default is ``RUN/export/FORM``. Raises CRDError if the run is unknown, unfinished or
    damaged, if its base model cannot be had or has no form of that kind, or if disk or hub refuse. What is
    incomplete never lies under the final name.
    """
    folder = RunFolder(run)
    config = folder.config()
    result, summary = folder.finished(config), _summary(folder)
    tuned = result if config.model.tuning == "full" else read_lora(result)
    target = output or folder.path / "export" / form
    if target.exists():
        raise CRDError(f"--output: {target} exists. Give another folder, or remove it.")
    if private and not repo:
        raise CRDError("--private goes with --push-to-hub REPO.")
    if form is not Form.MERGED and isinstance(tuned, Path):
        raise CRDError(f"--to {form}: {run} tuned the whole backbone (model.tuning full), so there is no LoRA. Use --to merged.")
    base = pipeline_folder(config.model.path) if form is Form.MERGED else None
    if form is Form.COMFYUI and isinstance(tuned, LoraLayers):
        index = pipeline_index(config.model.path)
        if not index:
            raise CRDError(f"model.path: the base model {config.model.path}, whose class decides the names, cannot be had.")
        check_mapped(index.get(tuned.backbone, (None, None))[1])
    if repo:
        check_login()
    partial = target.with_name(f"{target.name}.partial")  # of an export that was killed; it holds nothing else
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(form, folder, tuned, base, partial)
        (partial / "README.md").write_text(exported_card(folder, config, summary, form, repo or target.name), encoding="utf-8")
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        raise CRDError(f"--output: {target} cannot be written: {error}. Make room there, or give another folder.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if repo:
        push(target, repo, private)
    return target


def _write(form: Form, folder: RunFolder, tuned: LoraLayers | Path, base: Path | None, partial: Path) -> None:
    """The weights, and what a reader of the model card needs."""
    if base and isinstance(tuned, Path):
        write_replaced(tuned, base, partial)
    elif base and isinstance(tuned, LoraLayers):
        write_merged(tuned, base, partial)
    elif form is Form.COMFYUI and isinstance(tuned, LoraLayers):
        save_file(comfyui_tensors(tuned), partial / f"{folder.path.resolve().name}.safetensors", {"format": "pt"})
    else:
        shutil.copyfile(folder.path / FILE_NAME, partial / FILE_NAME)
    for name in COMPANIONS:
        if (folder.path / name).is_file():
            shutil.copyfile(folder.path / name, partial / name)


def _summary(folder: RunFolder) -> dict[str, Any]:
    try:
        return json.loads(folder.summary.read_text())
    except (OSError, ValueError) as error:
        raise CRDError(f"{folder.summary} cannot be read: {error}. Write it again with `crd report {folder.path}`.") from error
