"""Settings of the base model's pretraining; the defaults are those of the shipped weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BuildConfig:
    """Sizes, lengths and rates of both stages."""

    seed: int = 0
    vae_pictures: int = 16_000
    vae_steps: int = 3_500
    vae_batch: int = 16
    vae_learning_rate: float = 2e-3
    bank_pictures: int = 36_000
    text_share: float = 0.6  # signs among the bank's pictures; the rest are shapes
    steps: int = 4_800
    batch: int = 64
    learning_rate: float = 2e-3
    clean_steps: int = 1_500  # with true captions, batches as the bank; then captions are noisy
    noisy_text_share: float = 0.35  # signs in a batch from then on
    letter_noise: float = 0.6  # share of a noisy caption's letters that are replaced by a random one
    word_noise: float = 0.3  # the same for colours, shapes, numbers and directions
    compile: bool = True  # torch.compile the common step; needs a C++ compiler
    save_every: int = 500  # optimiser steps
