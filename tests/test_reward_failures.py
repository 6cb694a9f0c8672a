"""Rewards that fail: counted and left out below the limit, a clear end above it, and never a silent 0."""

import json
import math
import threading

import pytest
import torch
from PIL import Image
from tiny import redness, tiny_config, tiny_pipeline
from train_tiny import same

from crd import checkpoint
from crd.advantages import normalise
from crd.batch import PromptGroup
from crd.errors import CRDError
from crd.log import read_record
from crd.models.load import load_policy
from crd.rewards.protocol import NamedReward, RewardSet
from crd.rollout import collect, rollout_sampling
from crd.trainer import CRDTrainer


def raises(scores):
    raise RuntimeError("the reward server is gone")


#: what a reward may answer instead of a number for each picture
NONSENSE = {
    "raises": raises,
    "too short": lambda scores: scores[:-1],
    "too long": lambda scores: [*scores, 0.5],
    "nothing": lambda scores: None,
    "None": lambda scores: [None for _ in scores],
    "NaN": lambda scores: [math.nan for _ in scores],
    "inf": lambda scores: [math.inf for _ in scores],
    "minus inf": lambda scores: [-math.inf for _ in scores],
    "strings": lambda scores: ["good" for _ in scores],
    "lists": lambda scores: [[score] for score in scores],
    "by index": lambda scores: dict(enumerate(scores)),
    "digits": lambda scores: "1" * len(scores),
}


class Flaky:
    """:func:`redness`, but at the calls for which ``when`` holds (counted from 1) it answers nonsense."""

    def __init__(self, kind, when):
        self.kind, self.when = kind, when
        self.calls = 0
        self.given = []  # the scores of each call, or None

    def __call__(self, images, prompts, **metadata):
        self.calls += 1
        scores = redness(images, prompts)
        fails = self.when(self.calls)
        self.given.append(None if fails else scores)
        return NONSENSE[self.kind](scores) if fails else scores


def rows(folder, kind="train"):
    return [row for row in read_record(folder / "metrics.jsonl") if row["kind"] == kind]


#: 4 pictures of 2 prompts at each of the 3 evaluations, 8 pictures an epoch, in batches of 2: 2 + 2 + 4 + 2 calls
BATCHES = {"prompts_per_epoch": 2, "group_size": 4, "batch_size": 2}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_no_score(kind, caplog):
    reward = Flaky(kind, when=lambda call: call > 1)
    images = [Image.new("RGB", (8, 8), (51 * i, 0, 0)) for i in range(3)]
    rewards = RewardSet([NamedReward("mine", reward)])
    first, *others = [rewards.score(images, ["a"] * 3, [{}] * 3) for _ in range(3)]
    assert first.total == pytest.approx([0, 0.2, 0.4]) and first.failures == {"mine": 0}
    for scores in others:
        assert len(scores.total) == 3 and all(math.isnan(score) for score in scores.total)
        assert scores.failures == {"mine": 3}
    assert caplog.text.count("reward mine failed") <= 1  # each kind of failure is told once


@pytest.mark.parametrize("kind", ["raises", "too short", "None", "NaN"])
def test_below_the_limit_the_run_goes_on_and_counts(tmp_path, pipeline, kind, caplog):
    reward = Flaky(kind, when=lambda call: call in (6, 10))
    config = tiny_config(tmp_path / "run", rollout=BATCHES, train={"epochs": 1}, reward_failure_limit=0.5)
    CRDTrainer(pipeline, reward_funcs=[reward], config=config).train()
    (row,) = rows(tmp_path / "run")
    assert row["failed"] == 0.25
    known = [score for given in reward.given[4:8] if given for score in given]
    assert row["reward"] == pytest.approx(sum(known) / 6, abs=1e-6)  # the mean of the others, nothing counts as 0
    assert [row["failed"] for row in rows(tmp_path / "run", "evaluation")] == [0, 0, 0.5]
    assert "25.0% of the pictures of epoch 1 got no reward (Flaky: 2)" in caplog.text
    if kind == "raises":
        assert "the reward server is gone" in caplog.text and "Traceback" in caplog.text


@pytest.mark.parametrize("kind", ["raises", "NaN"])
def test_above_the_limit_the_run_stops_and_goes_on_when_mended(tmp_path, kind):
    def run(name, reward):
        config = tiny_config(tmp_path / name, rollout=BATCHES, reward_failure_limit=0.2, checkpoint={"every": 5})
        return CRDTrainer(tiny_pipeline(), reward_funcs=[reward], config=config).train()

    run("smooth", Flaky(kind, when=lambda call: False))
    with pytest.raises(CRDError) as raised:  # calls 1 to 10: evaluations and epoch 1
        run("mended", Flaky(kind, when=lambda call: call in (12, 13)))
    message = str(raised.value)
    assert "50.0% of the pictures of epoch 2" in message and "Flaky: 4" in message
    assert "reward_failure_limit is 20.0%" in message and "same command again" in message
    newest = checkpoint.complete(tmp_path / "mended" / "checkpoints")[-1]
    assert checkpoint.load(newest)[1]["epoch"] == 1
    run("mended", Flaky(kind, when=lambda call: False))
    for name in ("metrics.jsonl", "checkpoints/step-000002/state.safetensors"):
        assert (tmp_path / "mended" / name).read_bytes() == (tmp_path / "smooth" / name).read_bytes()


def test_a_failed_evaluation_loses_no_epoch_and_is_made_again(tmp_path):
    def run(name, reward):
        config = tiny_config(tmp_path / name, rollout=BATCHES, checkpoint={"every": 5})
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"every": 2})})
        return CRDTrainer(tiny_pipeline(), reward_funcs=[reward], config=config).train()

    run("smooth", Flaky("raises", when=lambda call: False))
    with pytest.raises(CRDError, match=r"100.0% of the pictures of evaluation epoch-0002 got no reward"):
        run("mended", Flaky("raises", when=lambda call: call > 12))  # 4 calls before training, 4 an epoch
    newest = checkpoint.complete(tmp_path / "mended" / "checkpoints")[-1]
    assert checkpoint.load(newest)[1]["epoch"] == 2
    mended = Flaky("raises", when=lambda call: False)
    run("mended", mended)
    assert mended.calls == 2
    same(tmp_path / "mended", tmp_path / "smooth")


def test_a_baseline_without_rewards_is_never_recorded(tmp_path, pipeline):
    config = tiny_config(tmp_path / "run", rollout=BATCHES, train={"epochs": 1})
    with pytest.raises(CRDError, match=r"100\.0% of the pictures of evaluation base got no reward \(Flaky: 4\)"):
        CRDTrainer(pipeline, reward_funcs=[Flaky("raises", when=lambda call: True)], config=config).train()
    assert rows(tmp_path / "run", "evaluation") == []
    CRDTrainer(tiny_pipeline(), reward_funcs=[Flaky("raises", when=lambda call: False)], config=config).train()
    assert [row["failed"] for row in rows(tmp_path / "run", "evaluation")] == [0, 0, 0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["before"]["reward"] > 0


def test_a_run_whose_limit_allows_everything_survives_an_epoch_without_rewards(tmp_path, pipeline):
    reward = Flaky("None", when=lambda call: 5 <= call <= 8)
    config = tiny_config(tmp_path / "run", rollout=BATCHES, reward_failure_limit=1.0)
    CRDTrainer(pipeline, reward_funcs=[reward], config=config).train()
    assert [row["failed"] for row in rows(tmp_path / "run")] == [1, 0]


def test_in_two_passes_too(tmp_path, pipeline):
    reward = Flaky("None", when=lambda call: 5 <= call <= 8 or call == 11)
    config = tiny_config(tmp_path / "run", rollout=BATCHES, reward_failure_limit=1.0, train={"micro_batch": 2})
    CRDTrainer(pipeline, reward_funcs=[reward], config=config).train()
    assert [row["failed"] for row in rows(tmp_path / "run")] == [1, 0.25]


def test_a_failing_judge_leaves_the_reward_alone(tmp_path, pipeline):
    (tmp_path / "judge.py").write_text("def judge(images, prompts, **metadata):\n    raise ValueError('no')\n")
    judges = [{"name": f"{tmp_path / 'judge.py'}:judge"}]
    config = tiny_config(tmp_path / "run", train={"epochs": 1}, evaluation={"judges": judges})
    CRDTrainer(pipeline, reward_funcs=[redness], config=config).train()
    assert all(row["failed"] == 0 and row["reward"] > 0 for row in rows(tmp_path / "run", "evaluation"))


@pytest.mark.parametrize("spread_of", ["rollout", "prompt"])
@pytest.mark.parametrize("lost", [[2], [0, 5], [4, 5, 6], [4, 5, 6, 7]])
def test_failed_samples_leave_the_others_as_if_they_had_never_been(spread_of, lost):
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(3)) + 2  # far from 0
    group = torch.arange(12) // 4
    rewards[lost] = math.nan
    everything = normalise(rewards, group, clip=5.0, spread_of=spread_of)
    # a sample that is alone in its prompt has nothing to be compared with
    kept = torch.tensor([i for i in range(12) if i not in lost and sum(j // 4 == i // 4 for j in lost) < 3])
    _, dense = group[kept].unique(return_inverse=True)
    without = normalise(rewards[kept], dense, clip=5.0, spread_of=spread_of)
    assert everything.valid.nonzero().squeeze(1).tolist() == kept.tolist()
    assert torch.equal(everything.value[kept], without.value)
    assert everything.zero_spread == without.zero_spread
    assert (everything.value[~everything.valid] == 0.5).all()


def test_one_failing_reward_of_several_fails_the_sample():
    good, bad = NamedReward("good", lambda i, p: [1.0, 2.0], 1.0), NamedReward("bad", lambda i, p: [None, 3.0], 0.5)
    scores = RewardSet([good, bad]).score([Image.new("RGB", (2, 2))] * 2, ["a", "b"], [{}, {}])
    assert math.isnan(scores.total[0]) and scores.total[1] == 3.5
    assert scores.parts["good"].tolist() == [1, 2] and scores.failures == {"good": 0, "bad": 1}


def test_what_one_reward_does_to_its_pictures_no_other_sees():
    def shrinks(images, prompts):
        for image in images:
            image.thumbnail((2, 2))
        return [1.0 for _ in images]

    def width(images, prompts):
        return [image.width for image in images]

    pictures = [Image.new("RGB", (8, 8))]
    rewards = RewardSet([NamedReward("shrinks", shrinks), NamedReward("width", width)])
    assert rewards.score(pictures, ["a"], [{}]).parts["width"] == [8] and pictures[0].width == 8


def test_running_out_of_memory_is_not_the_rewards_failure():
    def hungry(images, prompts, **metadata):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        RewardSet([NamedReward("hungry", hungry)]).score([Image.new("RGB", (8, 8))], ["x"], [{}])


def test_a_rollout_that_is_broken_off_waits_for_no_reward(pipeline):
    release, calls = threading.Event(), []

    def slow(images, prompts):
        calls.append(len(images))
        release.wait(10)
        return [1.0] * len(images)

    def break_off(pictures, told=[]):  # noqa: B006
        told.append(pictures)
        if len(told) == 3:
            raise KeyboardInterrupt

    config = tiny_config("unused", rollout={"batch_size": 1})
    policy = load_policy(pipeline, config.model, torch.device("cpu"))
    prompts, before = [PromptGroup(0, "a photo of a ring", {})] * 5, set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        collect(policy, RewardSet([NamedReward("slow", slow)]), prompts, [*range(5)], rollout_sampling(config, 0), break_off)
    (scorer,) = set(threading.enumerate()) - before  # still in its first call
    release.set()
    scorer.join()
    assert calls == [1]
