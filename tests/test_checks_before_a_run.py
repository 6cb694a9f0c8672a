"""Mistakes that would otherwise cost a run, or be recorded as numbers."""

import functools
import json
from pathlib import Path

import pytest
import torch
from tiny import redness, tiny_config, tiny_pipeline

from crd import CRDTrainer
from crd.config import CRDConfig, RewardConfig
from crd.errors import CRDError
from crd.given import as_given, named_rewards, settings
from crd.log import read_record
from crd.models.load import load_policy
from crd.recipe import dump_config
from crd.report.result import check_control
from crd.rewards.protocol import NamedReward
from crd.run_folder import RunFolder


def nothing(images, prompts, **metadata):
    return [None] * len(images)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"rewards": [{"name": "blue"}, {"name": "jpeg_compressibility", "applies_to": "inclde"}]},
            "jpeg_compressibility applies to no",
        ),
        (
            {"alarm": {"judges": ["tesseractt"], "action": "stop"}},
            "tesseractt is not evaluated; evaluated are blue",
        ),
        ({"trackers": ["wandb"]}, "wandb is not installed: pip install 'crd-diffusion"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(tmp_path, pipeline, sections, said):
    with pytest.raises(CRDError, match=said.replace("[", r"\[")):
        CRDTrainer(model=pipeline, config=tiny_config(tmp_path / "run", **sections))


@pytest.mark.parametrize("given", [redness, "ocr", [], [3]])
def test_reward_funcs_of_the_wrong_kind(tmp_path, pipeline, given):
    with pytest.raises(CRDError, match="reward_funcs: expected"):
        CRDTrainer(model=pipeline, reward_funcs=given, config=tiny_config(tmp_path / "run"))


def test_rewards_in_the_forms_that_python_has(tmp_path, pipeline):
    """Named by the function; a generator is not used up by the check; a NamedReward brings its weight."""

    class Judge:
        def warmth(self, images, prompts, **metadata):
            return redness(images, prompts)

    several = (
        functools.partial(redness),
        Judge().warmth,
        NamedReward("signs", redness, 0.5, "quoted"),
        "blue",
    )
    config = tiny_config(tmp_path / "run")
    rewards = named_rewards((reward for reward in several), config)
    assert [(r.name, r.weight, r.applies_to) for r in rewards] == [
        ("redness", 1, None),
        ("warmth", 1, None),
        ("signs", 0.5, "quoted"),
        ("blue", 1, None),
    ]
    trainer = CRDTrainer(model=pipeline, reward_funcs=[several[2]], config=config)
    assert trainer.config.rewards == (RewardConfig(name="signs", weight=0.5, applies_to="quoted"),)


def test_settings_in_the_forms_that_python_has(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings({"train": {"epochs": 3}}).train.epochs == 3
    assert settings(None) == settings({}) == CRDConfig()
    with pytest.raises(CRDError, match="Did you mean 'train'"):
        settings({"trian": {}})
    with pytest.raises(CRDError, match=r"config: expected .* got a str"):
        settings("recipe.yaml")
    config = as_given(settings({"output_dir": "~/run"}), Path("~/model"), None, None, None)
    assert config.output_dir == tmp_path / "run" and config.model.path == str(tmp_path / "model")
    assert as_given(config, Path("nano"), None, None, None).model.path == "nano"


def test_a_model_of_the_wrong_kind(tmp_path):
    with pytest.raises(CRDError, match=r"model: expected .* got a object"):
        CRDTrainer(model=object(), reward_funcs=[redness], config=tiny_config(tmp_path / "run"))


@pytest.mark.parametrize("name", ["label", "kind", "epoch", "drift", "reward"])
def test_rewards_named_like_fields_of_the_record(tmp_path, pipeline, name):
    def score(images, prompts, **metadata):
        return redness(images, prompts)

    score.__name__ = name
    with pytest.raises(CRDError, match=f"{name} is the name of a field of the record"):
        CRDTrainer(model=pipeline, reward_funcs=[score], config=tiny_config(tmp_path / "run"))


def test_a_pipeline_is_trained_twice_from_its_pretrained_weights(tmp_path, pipeline):
    """As where a cell of a notebook is run again."""
    records = []
    for rank, name in ((4, "once"), (2, "other"), (4, "again")):
        config = tiny_config(tmp_path / name, train={"epochs": 1}, model={"lora_rank": rank})
        CRDTrainer(model=pipeline, reward_funcs=[redness], config=config).train()
        records.append(read_record(tmp_path / name / "metrics.jsonl"))
    assert records[0] == records[2] and records[0] != records[1]


def test_a_judge_that_scores_nothing_has_no_number(tmp_path, pipeline, caplog):
    """Rather than 0, which would be a fall, and an alarm."""
    (tmp_path / "judge.py").write_text("def judge(images, prompts, **metadata):\n    return [None] * len(images)\n")
    name = f"{tmp_path / 'judge.py'}:judge"
    judges = {"judges": [{"name": name}]}
    config = tiny_config(tmp_path / "run", evaluation=judges, alarm={"judges": [name], "action": "roll_back"})
    CRDTrainer(model=pipeline, reward_funcs=[redness], config=config).train()
    rows = [row for row in read_record(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "evaluation"]
    assert rows and all(name not in row for row in rows)
    assert "gave no score" not in caplog.text


def test_a_reward_that_gives_none_is_named_in_the_log(tmp_path, pipeline, caplog):
    with pytest.raises(CRDError, match="got no reward"):
        CRDTrainer(model=pipeline, reward_funcs=[nothing], config=tiny_config(tmp_path / "run")).train()
    assert "reward nothing failed: gave no score" in caplog.text


def test_a_control_that_was_trained_on_the_reward_is_refused(recipe, crd):
    path = recipe(train={"epochs": 1})
    assert crd("train", path)[0] == 0
    code, printed = crd("report", path.with_suffix(""), "--control", path.with_suffix(""))
    assert code == 2 and "objective.policy_weight=0" in printed


def test_a_control_is_finished_and_evaluated_as_the_run_was(tmp_path):
    """Else its base, or numbers on other prompts, would stand there as those of the anchor alone."""
    config, control = tiny_config(tmp_path / "run"), RunFolder(tmp_path / "control")

    def complaint(**sections):
        other = tiny_config(control.path, **{"objective": {"policy_weight": 0}, **sections})
        control.settings.write_text(dump_config(other))
        with pytest.raises(CRDError) as told:
            check_control(config, control)
        return str(told.value)

    control.path.mkdir()
    assert "is not finished" in complaint()
    control.result(config).touch()
    assert "prompts.evaluation: nano/text/heldout -> a.txt" in complaint(prompts={"evaluation": "a.txt"})
    assert "evaluation.steps: 3 -> 4" in complaint(evaluation={"steps": 4})
    assert "rewards" in complaint(rewards=[{"name": "ocr"}])
    alike = {"before": False, "every": 7}
    control.settings.write_text(dump_config(tiny_config(control.path, objective={"policy_weight": 0}, evaluation=alike)))
    check_control(config, control)


def test_a_report_takes_the_numbers_of_the_student(recipe, crd, tmp_path):
    """Of a run and of a control, whatever was evaluated last: its base is no anchor alone."""
    run, control = (recipe(name, train={"epochs": 1}, objective={"policy_weight": w}) for name, w in (("run", 1), ("alone", 0)))
    assert crd("train", run)[0] == crd("train", control)[0] == 0
    last = {}
    for path in (run.with_suffix(""), control.with_suffix("")):
        rows = read_record(path / "metrics.jsonl")
        (last[path.name],) = [row["reward"] for row in rows if row.get("label", "").startswith("epoch")]
        guided = next(row for row in rows if row.get("label") == "base-guided")
        with (path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({**guided, "reward": -1.0}) + "\n")
    code, printed = crd("report", run.with_suffix(""), "--control", control.with_suffix(""))
    assert code == 0, printed
    summary = json.loads((run.with_suffix("") / "summary.json").read_text())
    assert summary["after"]["reward"] == last["run"] and summary["anchor_alone"]["reward"] == last["alone"]


def test_a_plan_looks_at_the_evaluation_prompts_too(recipe, crd):
    code, printed = crd("train", recipe(prompts={"evaluation": "nowhere.txt"}), "--dry-run")
    assert code == 2 and "nowhere.txt" in printed


def test_a_pipeline_in_float16_is_refused_for_training_alone(tmp_path):
    pipeline, config = tiny_pipeline().to(torch.float16), tiny_config(tmp_path / "run")
    with pytest.raises(CRDError, match=r"float16, in which the gradients .* torch_dtype=torch.bfloat16"):
        CRDTrainer(pipeline, reward_funcs=[redness], config=config)
    load_policy(pipeline, config.model, torch.device("cpu"), names=("student",))


def test_the_folder_is_looked_at_before_the_model(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    config = tiny_config(tmp_path / "run")
    with pytest.raises(CRDError, match="is not the folder of a run"):
        CRDTrainer(str(tmp_path / "no-model"), reward_funcs=[redness], config=config)


def test_help_shows_defaults(crd):
    code, printed = crd("plan", "--help")
    assert code == 0 and "this machine" in " ".join(printed.split())
