"""Judges that run by default: those that fit the prompts, never the training reward itself, and they do not touch it."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny import redness, tiny_config, tiny_pipeline

from crd.batch import PromptGroup
from crd.evaluate import Evaluator
from crd.judges.fitting import fitting_judges, fitting_set_judges
from crd.models.load import load_policy
from crd.prompts import load_prompts, make_prompt_set
from crd.rewards.protocol import NamedReward, RewardSet

NANO, LARGE = (64, 64), (512, 512)


def names(prompts, size, rewards=()):
    return {judge.name for judge in fitting_judges(prompts, size, [NamedReward(name, redness) for name in rewards])}


def test_judges_follow_the_prompts():
    signs, shapes = load_prompts("nano/text/heldout").first(3), load_prompts("nano/geneval/heldout").first(3)
    own = make_prompt_set(["a cat on a mat"], "list").first(1)
    quoting = [PromptGroup(0, 'a shop called "STAR"', {})]
    assert names(signs, NANO, ["ocr"]) == {"saturation", "background", "tesseract", "alignment"}
    assert names(shapes, NANO, ["geneval"]) == {"saturation", "background", "alignment", "geneval_net"}
    assert names(own, NANO) == {"saturation", "background"}
    assert names(quoting, LARGE) == {"saturation", "background", "tesseract"}
    assert names(signs, LARGE) == {"saturation", "background", "tesseract"}
    assert fitting_set_judges(shapes, NANO) is not None and fitting_set_judges(shapes, LARGE) is None


def test_a_reward_is_no_judge_of_itself():
    signs = load_prompts("nano/text/heldout").first(3)
    assert "tesseract" not in names(signs, NANO, ["tesseract"])


@pytest.mark.parametrize("prompts", ["nano/text/heldout", "nano/geneval/heldout"])
def test_evaluation_has_them_beside_an_unchanged_reward(tmp_path, prompts):
    policy = load_policy(tiny_pipeline(), tiny_config(tmp_path).model, torch.device("cpu"))
    members, results = load_prompts(prompts).first(3), []
    for asked in (True, False):
        config = tiny_config(tmp_path, evaluation={"prompts": 3, "pictures_per_prompt": 2, "steps": 2, "held_out_judges": asked})
        evaluator = Evaluator(policy, RewardSet([NamedReward("redness", redness)]), members, config, Accelerator(cpu=True))
        results.append(evaluator("pretrained", 1.0).metrics)
    with_judges, without = results
    assert {key: with_judges[key] for key in without} == without
    judge = "tesseract" if "text" in prompts else "geneval_net"
    assert set(with_judges) - set(without) == {"saturation", "background", "alignment", "vendi", "frechet", judge}
    assert all(np.isfinite(value) for value in with_judges.values())
    assert 0 <= with_judges["alignment"] < 0.5 and with_judges[judge] < 0.5  # random weights draw nothing
    assert with_judges["frechet"] > 1 and 1 <= with_judges["vendi"] <= 2


def test_the_worlds_own_pictures_please_them():
    from crd.nano.judges.sets import real_pictures

    prompts = load_prompts("nano/geneval/heldout").first(12)
    texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
    pictures: list[Image.Image] = real_pictures(texts, metadata, 1, seed=7)
    judges = RewardSet(fitting_judges(prompts, NANO, []))
    parts = judges.score(pictures, texts, metadata).parts
    assert parts["geneval_net"].mean() > 0.9 and parts["alignment"].mean() > 0.7
