"""Pretraining at toy size: it runs, restarts where it stopped, and its folder loads in plain diffusers."""

import warnings

import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from crd.nano.build import build
from crd.nano.settings import BuildConfig

TOY = {"vae_pictures": 24, "vae_steps": 2, "vae_batch": 4, "bank_pictures": 24, "batch": 4, "clean_steps": 2, "compile": False}


def test_build_and_restart(tmp_path):
    whole = build(BuildConfig(**TOY, steps=4, save_every=4), tmp_path / "a", tmp_path / "a" / "pipeline")
    build(BuildConfig(**TOY, steps=2, save_every=2, learning_rate=2e-3), tmp_path / "b", tmp_path / "b" / "early")
    restarted = build(BuildConfig(**TOY, steps=4, save_every=4), tmp_path / "b", tmp_path / "b" / "pipeline")
    for name in ("vae", "text_encoder", "text_encoder_2", "transformer"):
        files = [load_file(next((folder / name).glob("*.safetensors"))) for folder in (whole, restarted)]
        assert files[0].keys() == files[1].keys()
        for key in files[0]:
            torch.testing.assert_close(files[0][key], files[1][key], rtol=2e-3, atol=2e-4)


def test_the_folder_loads_in_plain_diffusers(tmp_path):
    from tiny import tiny_pipeline

    tiny_pipeline().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    states = pipe.encode_prompt(prompt="a photo of a ring", prompt_2=None, prompt_3=None, max_sequence_length=5)[0]
    assert states.shape[1] == 16 + 5 and states[:, 16:].abs().max() == 0  # the silent T5
    picture = pipe("a photo of a ring", num_inference_steps=2).images[0]
    assert picture.size == (64, 64)
