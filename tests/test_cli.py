"""The command line, end to end on a tiny saved model, and what its help must not cost."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from crd.config import CRDConfig

HEAVY = ("torch", "diffusers", "transformers", "matplotlib", "onnxruntime", "accelerate")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["settings"]])
def test_help_imports_nothing_heavy(words):
    program = f"""
import sys
sys.argv = ["crd", *{words}]
from crd.cli import main
try:
    main()
finally:
    print("imported:", [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == "imported: []"


def test_help_names_the_commands(crd):
    code, printed = crd("--help")
    assert code == 0
    assert all(command in printed for command in ("train", "report", "eval", "sample", "settings", "nano"))
    code, printed = crd("train", "--help")
    assert code == 0 and "--dry-run" in printed and "KEY=VALUE" in printed and "resumes" in printed


def test_settings_lists_every_setting_with_default_and_meaning(crd):
    code, printed = crd("settings")
    assert code == 0
    lines = printed.splitlines()

    def flat(tree, prefix=""):
        for name, value in tree.items():
            yield from flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]

    for key, value in flat(CRDConfig().model_dump()):
        (where,) = [i for i, line in enumerate(lines) if line.startswith(f"{key} = ")]
        assert lines[where].removeprefix(f"{key} = ") == str(list(value) if isinstance(value, tuple) else value)
        assert len(lines[where + 1].strip()) > 3, f"{key} has no meaning"
    assert "train.learning_rate = 0.0003" in lines


def test_a_dry_run_prints_the_settings_and_the_plan_and_writes_nothing(recipe, crd):
    path = recipe()
    code, printed = crd("train", path, "train.epochs=7", "--dry-run")
    assert code == 0
    assert "epochs: 7" in printed and "group_size: 4" in printed
    assert "8 pictures (2 prompts x 4)" in printed
    assert "optimiser steps        7 in 7 epochs" in printed
    assert "ms per forward" in printed and "estimated time" in printed
    assert not path.with_suffix("").exists()
    settings = yaml.safe_load(printed[printed.index("output_dir:") : printed.index("plan for")])
    assert CRDConfig.model_validate(settings).train.epochs == 7


def test_a_dry_run_tells_of_what_would_end_the_run(recipe, crd, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    for override, message in {
        "rewards=[{name: bleu}]": "'bleu' is not known",
        f"output_dir={tmp_path / 'taken'}": "is not the folder of a run",
    }.items():
        code, printed = crd("train", recipe(), override, "--dry-run")
        assert code == 2 and message in printed


def test_train_report_eval_and_sample(recipe, crd, tmp_path, tiny_folder):
    path, control = recipe(), recipe("control", objective={"policy_weight": 0})
    run = path.with_suffix("")
    code, printed = crd("train", path)
    assert code == 0, printed
    assert "on held-out prompts" in printed and "before, guided" in printed and "In plain diffusers" in printed
    for name in ("summary.json", "README.md", "before_after.png", "curves.png", "pictures/base.png", "config.yaml"):
        assert (run / name).stat().st_size > 0
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["evaluation", "evaluation", "train", "evaluation", "train", "evaluation"]
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == ["step-000001", "step-000002"]

    # the three lines of plain diffusers that were printed
    lines = json.loads((run / "summary.json").read_text())["how_to_load"]
    assert all(line in printed for line in lines)
    names: dict = {}
    exec("import diffusers\n" + "\n".join(lines[:2]), names)
    pipe = names["pipe"]
    assert isinstance(pipe, StableDiffusion3Pipeline)
    assert pipe.get_active_adapters() == ["default_0"]

    metrics = (run / "metrics.jsonl").read_bytes()
    code, printed = crd("train", path)  # there is nothing left to do, and nothing happens to the record
    assert code == 0 and "Resuming after epoch 2 of 2" in printed
    assert (run / "metrics.jsonl").read_bytes() == metrics

    assert crd("train", control)[0] == 0
    code, printed = crd("report", run, "--control", control.with_suffix(""))
    assert code == 0 and "anchor alone" in printed

    reward = ("--reward", f"{tmp_path / 'rewards.py'}:redness")
    size = ("--count", 2, "--pictures", 2, "--steps", 3)
    code, printed = crd("eval", run, *reward, *size, "--output", tmp_path / "scores")
    assert code == 0, printed
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text())["suites"]["prompts"]["metrics"]
    last = json.loads(metrics.splitlines()[-1])
    assert scores["reward"] == pytest.approx(last["reward"], abs=1e-6)  # the same weights, prompts and seeds
    assert scores["drift"] == pytest.approx(last["drift"], rel=1e-4)
    assert (tmp_path / "scores" / "prompts.png").stat().st_size > 0

    code, printed = crd("sample", run, "a red square", "-o", tmp_path / "new" / "x.png", "--count", 2, "--steps", 2)
    assert code == 0 and "wrote" in printed
    with Image.open(tmp_path / "new" / "x.png") as picture:
        assert picture.size == (2 * 66 + 2, 66 + 2)
    drawn = []
    for lora in ((), ("--lora", run)):
        place = tmp_path / "plain.png"
        code, printed = crd("sample", tiny_folder, "a red square", "-o", place, "--count", 2, "--steps", 2, *lora)
        assert code == 0, printed
        with Image.open(place) as picture:
            drawn.append(picture.tobytes())
    assert drawn[0] != drawn[1], "the LoRA file was not put on the model"
    assert torch.get_default_dtype() == torch.float32
