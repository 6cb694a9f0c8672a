"""Several rewards at once: each scores the prompts that it applies to, and no scale drowns another."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import redness, tiny_config

from crd import CRDTrainer
from crd.errors import CRDError
from crd.log import read_record
from crd.rewards.protocol import NamedReward, RewardSet

BLACK = Image.new("RGB", (8, 8))
PROMPTS = ['a sign that says "STAR"', "a photo of a ring", "a photo of two rings"]
METADATA = [{}, {"include": [{"class": "ring", "count": 1}]}, {"include": [{"class": "ring", "count": 2}]}]


def seen_by(scores):
    seen = []

    def reward(images, prompts, **metadata):
        seen.append((prompts, metadata))
        return scores(prompts)

    return reward, seen


def test_each_reward_scores_what_it_applies_to():
    reading, read = seen_by(lambda prompts: [0.5] * len(prompts))
    counting, counted = seen_by(lambda prompts: [1.0, None])
    both, _ = seen_by(lambda prompts: [10.0] * len(prompts))
    rewards = RewardSet(
        [
            NamedReward("reading", reading, 1.0, "quoted"),
            NamedReward("counting", counting, 2.0, "include"),
            NamedReward("both", both, 0.1),
            NamedReward("judge", reading, 0.0, "include"),
        ]
    )
    scores = rewards.score([BLACK] * 3, PROMPTS, METADATA)
    assert read[0] == (PROMPTS[:1], {})
    assert counted[0] == (PROMPTS[1:], {"include": [METADATA[1]["include"], METADATA[2]["include"]]})
    np.testing.assert_array_equal(scores.total, [1.5, 3.0, np.nan])
    np.testing.assert_array_equal(scores.parts["reading"], [0.5, np.nan, np.nan])
    assert scores.failures == {"reading": 0, "counting": 1, "both": 0, "judge": 0}


def test_a_picture_that_nothing_applies_to_has_no_score():
    rewards = RewardSet([NamedReward("reading", lambda images, prompts, **metadata: [1.0] * len(images), 1.0, "quoted")])
    scores = rewards.score([BLACK] * 2, PROMPTS[:2], METADATA[:2])
    np.testing.assert_array_equal(scores.total, [1.0, np.nan])
    assert scores.failures == {"reading": 0}


def test_prompts_without_a_reward_end_the_run_before_it_begins(tmp_path, pipeline):
    rewards = [{"name": "blue", "applies_to": "include"}]
    config = tiny_config(tmp_path / "run", rewards=rewards)
    with pytest.raises(
        CRDError, match=r"none applies to 1 of 2 training prompts, the first is 'a photo of a ring'.*blue to include"
    ):
        CRDTrainer(
            model=pipeline,
            train_prompts=["a photo of a ring", {"prompt": "two", "include": []}],
            eval_prompts=["a photo of a disc"],
            config=config,
        )


def large(images, prompts, **metadata):
    """The same order of pictures turned round, on a scale that drowns :func:`redness`."""
    return [-1000 * score for score in redness(images, prompts)]


def half(images, prompts, **metadata):
    return [0.5 * score for score in redness(images, prompts)]


@pytest.mark.parametrize("combine", ["rewards", "advantages"])
def test_what_the_student_sees(tmp_path, pipeline, combine, monkeypatch):
    """redness + half - 1000 redness: as rewards the last decides, as advantages two stand against one."""
    config = tiny_config(tmp_path / "run", advantage={"combine": combine, "spread_of": "prompt"}, train={"epochs": 1})
    trainer = CRDTrainer(model=pipeline, reward_funcs=[redness, half, large], config=config)
    seen = {}
    optimise = trainer._optimise

    def watch(drawn, ids, groups, centered, advantages):
        seen["red"], seen["advantage"] = drawn.scores.parts["redness"], advantages.value
        return optimise(drawn, ids, groups, centered, advantages)

    monkeypatch.setattr(trainer, "_optimise", watch)
    trainer.train()
    red = torch.from_numpy(seen["red"]).reshape(2, 4)
    red = (red - red.mean(1, keepdim=True)).flatten()
    sign = torch.corrcoef(torch.stack([red, seen["advantage"].double()]))[0, 1]
    assert sign > 0.95 if combine == "advantages" else sign < -0.95
    row = next(row for row in read_record(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train")
    assert row["reward_large"] == pytest.approx(-1000 * row["reward_redness"], rel=1e-6)
