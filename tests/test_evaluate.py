"""Evaluation: diversity against a hand-made case, drift against its definition, guided base has none, grids read back."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny import redness, tiny_config, tiny_pipeline

from crd import processes
from crd.config import RewardConfig
from crd.errors import CRDError
from crd.evaluate import DRIFT_SIGMAS, Evaluator, pairwise_distance
from crd.model_source import find_model
from crd.models.load import load_policy
from crd.prompts import make_prompt_set
from crd.report import figures
from crd.report.pictures import read_column, save_grid
from crd.rewards.protocol import NamedReward, RewardSet
from crd.suite_run import Drawing, _evaluate, evaluate_suites
from crd.suites import Suite, chosen_suites


def test_pairwise_distance():
    a, b, c = np.zeros((2, 2)), np.ones((2, 2)), np.full((2, 2), 0.5)
    assert pairwise_distance(np.stack([a, b, c])) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert pairwise_distance(np.stack([a])) == 0


@pytest.fixture
def evaluator(tmp_path):
    torch.manual_seed(0)
    config = tiny_config(tmp_path / "run")
    policy = load_policy(tiny_pipeline(), config.model, torch.device("cpu"))
    prompts = make_prompt_set(["a photo of a ring", "a photo of a cross"], "test").first(2)
    return Evaluator(policy, RewardSet([NamedReward("red", redness)]), prompts, config, Accelerator(cpu=True))


def test_evaluation_is_repeatable_and_the_guided_base_has_no_drift(evaluator):
    first, again = evaluator("student", 1.0), evaluator("student", 1.0)
    assert first.metrics == again.metrics and len(first.pictures) == 4
    base = evaluator("pretrained", 1.0)
    assert base.metrics["reward"] == pytest.approx(first.metrics["reward"], abs=1e-6)  # LoRA starts at zero
    assert base.metrics["drift"] > 1e-4
    assert evaluator("pretrained", 4.5).metrics["drift"] < 1e-10


def test_drift_against_its_definition(evaluator):
    from crd.seeding import noise

    policy, ids = evaluator.policy, [0, 1, 2, 3]
    x0 = torch.randn(4, *policy.model.latent_shape, generator=torch.Generator().manual_seed(0))
    got = evaluator._drift("student", 1.0, x0, ids)
    conditioning = policy.encode([m.text for m in evaluator.members])
    empty = policy.encode([""] * 4)
    expected = np.zeros(4)
    with torch.no_grad(), policy.using("pretrained"):
        for sigma in DRIFT_SIGMAS:
            eps = noise(policy.model.latent_shape, 1234, 0, f"drift-{sigma}", ids)
            x, s = (1 - sigma) * x0 + sigma * eps, torch.full((4,), sigma)
            own, nothing = policy.velocity(x, s, conditioning), policy.velocity(x, s, empty)
            guided = nothing + 4.5 * (own - nothing)
            expected += ((own - guided) ** 2).mean((1, 2, 3)).numpy() / 3
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_grids_read_back(tmp_path):
    pictures = [Image.new("RGB", (5, 4), (i, 2 * i, 0)) for i in range(6)]
    save_grid(pictures, 3, tmp_path / "grid.png")
    for column in range(3):
        read = read_column(tmp_path / "grid.png", 3, 2, column)
        assert [p.tobytes() for p in read] == [pictures[i].tobytes() for i in (column, column + 3)]


def test_prompts_with_dollar_signs_are_drawn_as_they_are(tmp_path):
    save_grid([Image.new("RGB", (5, 4))], 1, tmp_path / "grid.png")
    figures.before_after(tmp_path / "figure.png", {"before": tmp_path / "grid.png"}, ['a sign "$\\frac$"'], 1, 1)
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_an_output_that_is_a_file_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(CRDError, match=r"--output: .*taken cannot be made a folder"):
        evaluate_suites(find_model("nano"), [], Drawing(), tmp_path / "taken")


def test_drift_is_measured_to_the_model_that_was_asked_for(tmp_path):
    """Two runs with different anchors, compared: with the same reference the pretrained model drifts as much in both."""
    policy = load_policy(tiny_pipeline(), tiny_config(tmp_path).model, torch.device("cpu"))

    def drift(anchor, reference):
        sections = {"anchor": {"guidance_scale": anchor}, "evaluation": {"reference_guidance_scale": reference}}
        config = tiny_config(tmp_path, **sections)
        members = make_prompt_set(["a photo of a ring"], "test").first(1)
        evaluator = Evaluator(policy, RewardSet([NamedReward("redness", redness)]), members, config, Accelerator(cpu=True))
        return evaluator("pretrained", 1.0).metrics["drift"]

    assert drift(1.0, None) == 0 and drift(4.5, None) > 0
    assert drift(1.0, 4.5) == drift(4.5, 4.5) == drift(4.5, None)


@pytest.mark.parametrize(("weights", "shown"), [((1.0, 0.0), False), ((1.0, -0.5), True), ((2.0, 0.0), True)])
def test_the_combined_reward_is_left_out_only_where_it_is_one_of_them(evaluator, weights, shown):
    names = ("red", "again")
    rewards = RewardSet([NamedReward(name, redness, weight) for name, weight in zip(names, weights, strict=True)])
    chosen = tuple(RewardConfig(name=name, weight=weight) for name, weight in zip(names, weights, strict=True))
    suite = Suite("tiny", "test", make_prompt_set(["a photo of a ring"], "test"), chosen)
    drawing, accelerator = Drawing(pictures=2), evaluator.accelerator
    scores, _ = _evaluate(evaluator.policy, "student", suite, rewards, evaluator.config, drawing, accelerator)
    assert ("reward" in scores.scores) == shown


def test_what_was_given_in_python_is_asked_for(tmp_path):
    """A run has its own prompts and rewards by name only."""
    own = {"prompts": {"evaluation": "<2 prompts, 0123456789abcdef>"}, "rewards": [{"name": "redness"}]}
    config = tiny_config(tmp_path, **own)
    with pytest.raises(CRDError, match=r"<2 prompts, 0123456789abcdef>, .* Give --prompts FILE"):
        chosen_suites(config, rewards=["blue"])
    with pytest.raises(CRDError, match=r"redness, which was given in Python .* Give --reward FILE.py:redness"):
        chosen_suites(config, prompts="nano/text/heldout")
    assert len(chosen_suites(config, prompts="nano/text/heldout", rewards=["blue"])) == 1
    assert len(chosen_suites(config, names=["ocr-nano"])) == 1


def test_one_process_needs_nothing_that_a_mac_or_windows_lacks(monkeypatch):
    alone = SimpleNamespace(num_processes=1, device=torch.device("mps"))  # which has no float64, and is not here at all
    np.testing.assert_array_equal(processes.add_up(np.array([1.5, np.nan]), [2, 0], 3, alone), [np.nan, 0, 1.5])
    assert processes.peak_memory_mib(torch.device("cpu")) > 10 and "resource" not in vars(processes)
    monkeypatch.setattr(sys, "platform", "win32")
    assert processes.peak_memory_mib(torch.device("cpu")) == 0
