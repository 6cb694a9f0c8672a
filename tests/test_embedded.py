"""The embedded base model: plain diffusers loads it and draws our pictures; it spells with guidance and badly without."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny import redness, tiny_config, tiny_pipeline

from crd import CRDTrainer
from crd.config import ModelConfig
from crd.models.load import load_policy, nano_folder
from crd.prompts import load_prompts
from crd.rewards.ocr import OCRReward
from crd.rollout import draw_latents

WORDS = list(load_prompts("nano/text/heldout").texts[:16])


@pytest.fixture(scope="module")
def plain():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusion3Pipeline.from_pretrained(nano_folder())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_plain_diffusers_gives_our_pictures(plain):
    policy = load_policy("nano", ModelConfig(), torch.device("cpu"))
    start = torch.randn(3, *policy.model.latent_shape, generator=torch.Generator().manual_seed(0))
    with policy.using("pretrained"):
        ours = policy.model.decode(draw_latents(policy, policy.encode(WORDS[:3]), start, policy.model.sigmas(8), 4.5))
    common = {"num_inference_steps": 8, "guidance_scale": 4.5, "max_sequence_length": 1}
    theirs = plain(WORDS[:3], latents=start, **common).images
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1


def test_headroom(plain):
    """With guidance it spells, without it does not: what RL is for. The full table is in the model card."""
    scores = {}
    for guidance in (1.0, 4.5):
        generator = torch.Generator().manual_seed(0)
        images = plain(WORDS, num_inference_steps=20, guidance_scale=guidance, max_sequence_length=1, generator=generator).images
        scores[guidance] = np.mean(OCRReward()(images, WORDS))
    assert scores[4.5] > 0.7 and 0.2 < scores[1.0] < 0.6


def test_the_default_sequence_length_works_too(plain):
    """``pipe(prompt)`` adds 256 zero tokens; the model was trained with them as well."""
    images = plain(WORDS[:8], num_inference_steps=12, guidance_scale=4.5, generator=torch.Generator().manual_seed(0)).images
    assert np.mean(OCRReward()(images, WORDS[:8])) > 0.6


def test_size_of_the_weights():
    assert sum(f.stat().st_size for f in nano_folder().rglob("*") if f.is_file()) < 20 * 2**20


def test_a_tracker_by_name(tmp_path):
    config = tiny_config(tmp_path / "run", trackers=["tensorboard"], train={"epochs": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard and its protocol buffers
        CRDTrainer(model=tiny_pipeline(), reward_funcs=[redness], config=config).train()
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
