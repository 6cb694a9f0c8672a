"""``crd nano judges``: trains the two networks on the world's pictures and measures them on pictures never trained on."""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import trange

from crd.models.load import nano_folder
from crd.nano.judges import alignment, detector_net
from crd.nano.judges.accuracy import measure
from crd.nano.judges.alignment import AlignmentNet
from crd.nano.judges.data import Bank, render_bank, through_autoencoder
from crd.nano.judges.detector_net import DetectorNet
from crd.nano.judges.load import load_alignment, load_detector
from crd.seeding import generator

WEIGHT_DECAY = 1e-3
Loss = Callable[[int], Tensor]


@dataclass(frozen=True)
class JudgesConfig:
    """Settings of the judges' training; the defaults are those of the shipped weights."""

    seed: int = 0
    pictures: int = 20_000
    autoencoded: int = 2_000  # of them, that went through the base model's autoencoder with disturbed latents
    batch: int = 128
    detector_steps: int = 400
    alignment_steps: int = 1_300
    learning_rate: float = 5e-3
    measured: int = 2_000  # pictures for the accuracies


def judges_config(seed: int, steps: int | None) -> JudgesConfig:
    """The defaults with a seed and, if given, the same number of steps for both networks."""
    config = JudgesConfig(seed=seed)
    return replace(config, detector_steps=steps, alignment_steps=steps) if steps else config


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A linear warm-up over a tenth of the steps, and a linear fall to zero."""
    return peak * min(10 * (step + 1) / steps, (steps - step) / (0.9 * steps), 1.0)


def train(net: nn.Module, loss_of: Loss, steps: int, peak: float, name: str) -> list[float]:
    """AdamW on ``loss_of(step)``; trains in place and returns the losses of all steps."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)
    losses = []
    net.train()
    with trange(steps, desc=name, unit="step") as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)
            loss = loss_of(step)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
    net.eval()
    return losses


def make_bank(config: JudgesConfig) -> Bank:
    """Training pictures, the first of them as the base model's autoencoder would give them."""
    bank = render_bank(config.pictures, config.seed, "train")
    vae = AutoencoderKL.from_pretrained(nano_folder() / "vae", torch_dtype=torch.float32).eval()
    rng, chunk = generator(config.seed, "latent-noise"), 64
    for start in trange(0, config.autoencoded, chunk, desc="through the autoencoder", unit_scale=chunk, unit="picture"):
        part = slice(start, min(start + chunk, config.autoencoded))
        bank.pictures[part] = through_autoencoder(bank.pictures[part], vae, rng)
    return bank


def save_half(net: nn.Module, path: Path) -> None:
    """Weights in half precision; whole numbers as they are."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, path)


def set_feature_scale(net: AlignmentNet, pictures: Tensor) -> None:
    """Stores mean and spread of the features over uint8 pictures of the world, so that every feature counts alike."""
    with torch.no_grad():
        features = torch.cat([net.features(part.float() / 127.5 - 1) for part in pictures.split(256)])
    net.feature_mean.copy_(features.mean(0))
    net.feature_spread.copy_(features.std(0).clamp(min=1e-3))


def train_judges(config: JudgesConfig, output: Path) -> None:
    """Trains the networks that the folder ``output`` does not hold yet, and saves them there in half precision."""
    output.mkdir(parents=True, exist_ok=True)
    bank = None
    for name, make, loss, steps in (
        ("detector", DetectorNet, detector_net.training_loss, config.detector_steps),
        ("alignment", AlignmentNet, alignment.training_loss, config.alignment_steps),
    ):
        if (output / f"{name}.safetensors").exists():
            continue
        bank = bank or make_bank(config)
        torch.manual_seed(config.seed)
        net = make().to(memory_format=torch.channels_last)
        train(net, functools.partial(loss, net, bank, config.batch, config.seed), steps, config.learning_rate, name)
        if isinstance(net, AlignmentNet):
            set_feature_scale(net, bank.pictures[-2000:])
        save_half(net, output / f"{name}.safetensors")


def build_judges(config: JudgesConfig, output: Path) -> dict[str, dict[str, float]]:
    """Trains what is missing and measures both networks; writes and returns ``accuracy.json``."""
    train_judges(config, output)
    accuracy = measure(load_detector(output), load_alignment(output), config.measured, config.seed)
    (output / "accuracy.json").write_text(json.dumps({"settings": asdict(config), **accuracy}, indent=1) + "\n")
    return accuracy
