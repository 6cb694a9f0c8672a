"""Mistakes that would otherwise cost a run, or be recorded as numbers."""

import pytest
from tiny import redness, tiny_config

from crd import CRDTrainer
from crd.errors import CRDError
from crd.log import read_record


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


def test_a_plan_looks_at_the_evaluation_prompts_too(recipe, crd):
    code, printed = crd("train", recipe(prompts={"evaluation": "nowhere.txt"}), "--dry-run")
    assert code == 2 and "nowhere.txt" in printed


def test_help_shows_defaults(crd):
    code, printed = crd("plan", "--help")
    assert code == 0 and "this machine" in " ".join(printed.split())
