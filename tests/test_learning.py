"""CRD learns: on a dense reward the embedded model climbs several of its own standard deviations in a few epochs."""

import pytest
from tiny import redness

from crd import CRDTrainer
from crd.log import read_record
from crd.recipe import build_config

EPOCHS = 8


def run(folder, **sections):
    """Reward on other prompts before and after, and the standard deviation of the first rollout's rewards."""
    config = {
        "output_dir": str(folder),
        "rollout": {"prompts_per_epoch": 2, "group_size": 8, "steps": 5, "batch_size": 16},
        "noise": {"levels": 3},
        "train": {"epochs": EPOCHS, "steps_per_epoch": 2, "learning_rate": 1e-3, "micro_batch": 64},
        "evaluation": {"every": EPOCHS, "prompts": 4, "pictures_per_prompt": 4, "steps": 5, "held_out_judges": False},
        **sections,
    }
    CRDTrainer(
        reward_funcs=[redness],
        train_prompts="nano/single_object/train",
        eval_prompts="nano/two_object/heldout",
        config=build_config(config),
    ).train()
    rows = read_record(folder / "metrics.jsonl")
    evaluations = {row["label"]: row["reward"] for row in rows if row["kind"] == "evaluation"}
    return evaluations["base"], evaluations[f"epoch-{EPOCHS:04d}"], next(r["reward_std"] for r in rows if r["kind"] == "train")


@pytest.mark.parametrize("objective", [{}, {"levels": "halves"}], ids=str)
def test_reward_climbs(tmp_path, objective):
    before, after, spread = run(tmp_path / "run", objective=objective)
    assert after > before + spread


def test_without_the_reward_term_it_does_not(tmp_path):
    anchor = {"strength": 0.1, "guidance_scale": 1.0, "adaptation": "constant"}
    before, after, spread = run(tmp_path / "run", objective={"policy_weight": 0.0}, anchor=anchor)
    assert abs(after - before) < 0.2 * spread
