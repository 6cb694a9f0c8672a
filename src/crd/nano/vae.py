"""The picture autoencoder of the nano base model: a small diffusers ``AutoencoderKL``, factor 8, 16 channels."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from crd.nano.settings import BuildConfig
from crd.nano.state import load_optimizer, save_optimizer
from crd.seeding import generator

KL_WEIGHT = 3e-4  # weak: only keeps the latents bounded


def make_vae(channels: tuple[int, int, int, int] = (16, 32, 64, 64), groups: int = 8) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=groups,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def _learning_rate(step: int, config: BuildConfig) -> float:
    """Warm-up over 100 steps, then half a cosine down to 2 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.vae_steps))
    return config.vae_learning_rate * min(1, (step + 1) / 100) * (0.02 + 0.98 * cosine)


def train_vae(pictures: Tensor, folder: Path, config: BuildConfig, report: Callable[[str], None]) -> AutoencoderKL:
    """Trains on ``pictures (N, 3, 64, 64)`` uint8; restarts from ``folder/vae.safetensors`` where it stopped."""
    torch.manual_seed(config.seed)
    vae = make_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.vae_learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    start = 0
    if (folder / "vae.safetensors").exists():
        vae.load_state_dict(load_file(folder / "vae.safetensors"))
        start = load_optimizer(optimizer, folder / "vae_optimizer.safetensors")
    began = time.monotonic()
    for step in range(start, config.vae_steps):
        draws = generator(config.seed, step, "vae-batch")
        index = torch.randint(len(pictures), (config.vae_batch,), generator=draws)
        x = (pictures[index].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample(generator=draws)).sample - x
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = error.abs().mean() + error.square().mean() + KL_WEIGHT * kl
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, config)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if done % 100 == 0 or done == config.vae_steps:
            left = (time.monotonic() - began) / (done - start) * (config.vae_steps - done)
            report(f"vae {done}/{config.vae_steps}  L1 {error.abs().mean():.4f}  KL {kl:.3f}  {left / 60:.1f} min left")
        if done % config.save_every == 0 or done == config.vae_steps:
            save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, folder / "vae.safetensors")
            save_optimizer(optimizer, done, folder / "vae_optimizer.safetensors")
    return vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, batch: int = 256) -> Tensor:
    """Posterior means ``(N, 16, 8, 8)`` of uint8 pictures."""
    parts = [vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in pictures.split(batch)]
    return torch.cat(parts).contiguous()


@torch.no_grad()
def reconstruction_error(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean absolute error in grey levels (0 to 255)."""
    x = pictures.float() / 127.5 - 1
    return float(F.l1_loss(vae.decode(vae.encode(x).latent_dist.mode()).sample, x) * 127.5)
