"""``crd nano build``: pretrains the embedded base model on the nano world, restartable at any point.

Stages: pictures for the autoencoder -> autoencoder -> bank of latents -> transformer -> pipeline folder.
Each leaves its result in the build folder; the same command goes on where the last one stopped.
"""

import json
import random
import string
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import trange

from crd.nano.base import NanoParts
from crd.nano.pretrain import Bank, train_transformer
from crd.nano.settings import BuildConfig
from crd.nano.vae import encode, make_vae, reconstruction_error, train_vae
from crd.nano.world import HELD_OUT_WORDS, SHAPE_TASKS, Prompt, draw_prompt, render, text_prompt
from crd.seeding import python_rng


def random_word(rng: random.Random) -> str:
    """3 to 5 random letters; never a held-out word."""
    while True:
        length = rng.choices((3, 4, 5), (0.25, 0.35, 0.4))[0]
        word = "".join(rng.choices(string.ascii_uppercase, k=length))
        if word not in HELD_OUT_WORDS:
            return word


def bank_prompt(rng: random.Random, text_share: float) -> Prompt:
    """A caption of the pretraining set: signs (mostly random letters, so that spelling generalises) and shapes."""
    if rng.random() >= text_share:
        return draw_prompt(rng.choice(SHAPE_TASKS), rng)
    return text_prompt(random_word(rng)) if rng.random() < 0.7 else draw_prompt("text", rng)


def _vae_pictures(config: BuildConfig) -> Tensor:
    """uint8 ``(N, 3, 64, 64)``: signs and the six shape tasks in turn."""
    pictures = []
    for i in trange(config.vae_pictures, desc="pictures for the autoencoder", unit="picture"):
        rng = python_rng(config.seed, i, "probe")
        prompt = draw_prompt("text" if i % 2 else SHAPE_TASKS[i // 2 % 6], rng)
        pictures.append(np.asarray(render(prompt, rng)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def build_vae(config: BuildConfig, folder: Path, report: Callable[[str], None]) -> AutoencoderKL:
    """Trains the autoencoder, or loads the finished one, with its latents scaled to unit variance."""
    vae = make_vae()
    if not (folder / "vae_done.json").exists():
        pictures = _vae_pictures(config)
        trained = train_vae(pictures, folder, config, report)
        latents = encode(trained, pictures[:4000])
        error = reconstruction_error(trained, pictures[:500])
        scale = {"shift_factor": float(latents.mean()), "scaling_factor": float(1 / latents.std()), "error": error}
        (folder / "vae_done.json").write_text(json.dumps(scale))
        report(f"autoencoder: mean absolute error {error:.2f} of 255")
    done = json.loads((folder / "vae_done.json").read_text())
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
    vae.register_to_config(shift_factor=done["shift_factor"], scaling_factor=done["scaling_factor"])
    return vae.eval()


def build_bank(config: BuildConfig, vae: AutoencoderKL, parts: NanoParts, folder: Path) -> Bank:
    """Renders, encodes and tokenises the pretraining set once."""
    path = folder / "bank.safetensors"
    if not path.exists():
        latents, tokens, chunk = [], [], 256
        for start in trange(0, config.bank_pictures, chunk, desc="bank of latents", unit_scale=chunk, unit="picture"):
            pictures, captions = [], []
            for i in range(start, min(start + chunk, config.bank_pictures)):
                rng = python_rng(config.seed, i, "bank")
                prompt = bank_prompt(rng, config.text_share)
                captions.append(prompt.text)
                pictures.append(np.asarray(render(prompt, rng)))
            batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
            latents.append((encode(vae, batch) - vae.config.shift_factor) * vae.config.scaling_factor)
            tokens.append(parts.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids)
        save_file({"latents": torch.cat(latents), "tokens": torch.cat(tokens)}, path)
    data = load_file(path)
    empty = parts.tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    is_sign = (data["tokens"] == parts.tokenizer.convert_tokens_to_ids("sign")).any(1)
    return Bank(data["latents"], data["tokens"], empty, is_sign.nonzero()[:, 0], (~is_sign).nonzero()[:, 0])


def build(config: BuildConfig, folder: Path, output: Path) -> Path:
    """Runs every stage that is not done yet and writes the pipeline folder ``output`` in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def report(line: str) -> None:
        stamped = f"{(time.monotonic() - began) / 60:6.1f} min  {line}"
        print(stamped, flush=True)
        with (folder / "build.log").open("a") as log:
            log.write(stamped + "\n")

    report(f"settings {json.dumps(asdict(config))}")
    torch.manual_seed(config.seed)
    parts = NanoParts.make()
    vae = build_vae(config, folder, report)
    bank = build_bank(config, vae, parts, folder)
    train_transformer(parts, bank, folder, config, report)
    pipeline = parts.pipeline(vae)
    # halved on disk; the text encoders stay as they are, since transformers loads them in the precision it finds
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(output)
    report(f"saved {output}")
    return output
