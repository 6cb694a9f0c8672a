"""CRD learns: on a dense reward the tiny model must climb several of its own standard deviations in a few epochs."""

import pytest
from tiny import redness, tiny_config, tiny_pipeline

from crd import CRDTrainer
from crd.log import read_record


def run(folder, **sections):
    sections = {
        "rollout": {"prompts_per_epoch": 2, "group_size": 8, "steps": 4, "batch_size": 16},
        "noise": {"levels": 4},
        "anchor": {"strength": 0.0, "minimum": 0.0},
        "train": {"epochs": 12, "steps_per_epoch": 2, "learning_rate": 1e-2, "micro_batch": 64},
        "evaluation": {"every": 12, "prompts": 4, "pictures_per_prompt": 4, "steps": 4},
        **sections,
    }
    CRDTrainer(model=tiny_pipeline(), reward_funcs=[redness], config=tiny_config(folder, **sections)).train()
    rows = read_record(folder / "metrics.jsonl")
    evaluations = {row["label"]: row for row in rows if row["kind"] == "evaluation"}
    spread = next(row for row in rows if row["kind"] == "train")["reward_std"]
    return evaluations, spread


@pytest.mark.parametrize("objective", [{}, {"average_levels": True}, {"weighting": "softmax"}], ids=str)
def test_reward_climbs(tmp_path, objective):
    evaluations, spread = run(tmp_path / "run", objective=objective)
    assert evaluations["epoch-0012"]["reward"] > evaluations["base"]["reward"] + 1.5 * spread


def test_without_the_reward_term_it_does_not(tmp_path):
    evaluations, spread = run(
        tmp_path / "run",
        objective={"policy_weight": 0.0},
        anchor={"strength": 0.1, "guidance_scale": 1.0, "adaptation": "constant"},
    )
    assert abs(evaluations["epoch-0012"]["reward"] - evaluations["base"]["reward"]) < 0.5 * spread
