"""Every recipe is valid; the control differs from its run in the reward term only; the example runs."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from tiny import tiny_pipeline
from tiny_flux import tiny_flux
from tiny_unet import tiny_sdxl

from crd.bench.suite import load_suite, suite_runs
from crd.plan.counts import forwards_per_epoch
from crd.prompts import load_prompts
from crd.recipe import differences, dump_config, load_config

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SUITES = sorted((ROOT / "benchmarks" / "suites").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_valid_and_survives_a_round_trip(path, tmp_path):
    config = load_config(path, [])
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy, []) == config


@pytest.mark.parametrize("path", SUITES, ids=lambda p: p.stem)
def test_suite_is_valid_and_its_runs_cost_the_same(path):
    suite = load_suite(path)
    runs = suite_runs(suite)
    assert len(runs) == len(suite.tasks) * len(suite.variants) * len(suite.seeds)
    for run in runs:
        per_epoch = forwards_per_epoch(run.config)
        assert abs(run.config.train.epochs * per_epoch - suite.forward_passes) <= per_epoch / 2, run.name


def test_the_headline_differs_in_the_method_only():
    runs = suite_runs(load_suite(ROOT / "benchmarks" / "suites" / "headline.yaml"))
    methods = {run.variant: run for run in runs if (run.task, run.seed) == ("ocr", 0)}
    for variant, run in methods.items():
        changed = {line.split(":")[0].split(".")[0] for line in differences(methods["crd"].config, run.config)}
        assert changed <= {"algorithm", "objective", "awm", "flow_grpo", "rwr", "anchor", "old", "sampler", "train"}, variant
        assert run.config.rollout == methods["crd"].config.rollout
        assert run.config.evaluation == methods["crd"].config.evaluation


def test_the_control_differs_in_the_reward_term_only():
    run, control = (load_config(ROOT / "recipes" / f"nano-ocr{name}.yaml", []) for name in ("", "-anchor-alone"))
    changed = {line.split(":")[0] for line in differences(run, control)}
    assert changed == {"objective.policy_weight", "anchor.adaptation"}
    assert run.train == control.train and run.evaluation == control.evaluation


def test_the_published_recipe_has_the_published_numbers():
    """theory, section 8."""
    config = load_config(ROOT / "recipes" / "sd35-medium-ocr.yaml", [])
    assert (config.rollout.prompts_per_epoch, config.rollout.group_size, config.rollout.steps) == (48, 24, 10)
    assert (config.model.lora_rank, config.model.lora_alpha, config.train.learning_rate) == (32, 64, 3e-4)
    assert (config.anchor.strength, config.anchor.guidance_scale, config.anchor.adaptation) == (0.1, 4.5, "adaptive")
    assert (config.train.betas, config.train.weight_decay, config.train.clip_norm) == ((0.9, 0.999), 1e-4, 1.0)


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["own_reward.py", str(tmp_path / "run")])
    runpy.run_path(str(ROOT / "examples" / "own_reward.py"))
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()
    assert (tmp_path / "run" / "before_after.png").exists()


REAL = (
    "sd35-medium-ocr",
    "sd35-medium-geneval",
    "sd35-medium-ocr-80gb",
    "sd35-medium-ocr-24gb",
    "sd35-medium-ocr-full",
    "flux1-dev-ocr",
    "sdxl-aesthetic",
)


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    """A folder of a tiny random pipeline for the first word of a recipe's name."""
    folder = tmp_path_factory.mktemp("models")
    for name, pipeline in (("sd35", tiny_pipeline()), ("flux1", tiny_flux(guidance_embeds=True)), ("sdxl", tiny_sdxl())):
        pipeline.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", REAL)
def test_real_recipes_pass_their_plan_with_tiny_weights(name, tiny_models, tmp_path, crd):
    """The settings fit the family; only the weights, their size and the prompt files are swapped."""
    for split in ("train", "test"):
        crd("prompts", "ocr", "--split", split, "--size", 60, "-o", tmp_path / f"{split}.txt")
    small = [f"model.path={tiny_models / name.split('-')[0]}", "model.height=null", "model.width=null", "model.compile=false"]
    small += [f"prompts.train={tmp_path / 'train.txt'}", f"prompts.evaluation={tmp_path / 'test.txt'}"]
    small += [f"model.prompt_cache_folder={tmp_path / 'cache'}", "model.max_sequence_length=null"]
    recipe = ROOT / "recipes" / f"{name}.yaml"
    code, out = crd("plan", recipe, *small, "--gpu", "h100")
    assert code == 0 and "GiB of 79: fits" in out, out
    code, out = crd("train", recipe, *small, "--dry-run")
    assert code == 0 and "estimated time" in out, out


@pytest.mark.parametrize("name", ["nano-custom-reward", "nano-several-rewards"])
def test_small_recipes_run(name, tmp_path, crd, monkeypatch):
    monkeypatch.chdir(ROOT)
    short = ["train.epochs=1", "evaluation.before=false", "evaluation.prompts=2", "evaluation.steps=2", "rollout.steps=2"]
    short += [f"output_dir={tmp_path / 'run'}", "rollout.prompts_per_epoch=2", "rollout.group_size=4", "noise.levels=1"]
    code, out = crd("train", f"recipes/{name}.yaml", *short)
    assert code == 0 and "on held-out prompts" in out, out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["after"]["failed"] == 0


def test_mixed_prompts_are_the_nano_worlds():
    """Training prompts of both kinds, none of them held out."""
    mixed = load_prompts(str(ROOT / "recipes" / "prompts" / "nano-mixed.jsonl"))
    known = [load_prompts(f"nano/{task}/train").texts for task in ("text", "geneval")]
    assert set(mixed.texts) <= {text for texts in known for text in texts}
    held_out = load_prompts(str(ROOT / "recipes" / "prompts" / "nano-mixed-heldout.jsonl"))
    assert not set(mixed.texts) & set(held_out.texts)
