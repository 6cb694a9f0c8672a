"""What a run will do, from its settings alone: pictures, forward passes, optimiser steps."""

import time

import torch

from crd.config import CRDConfig
from crd.prompts import load_prompts


def forwards_per_row(config: CRDConfig) -> float:
    """Forward passes of the backbone per sample-timestep of training; a backward pass counts as two."""
    student = 3.0
    anchor = 0 if config.anchor.strength == 0 else (1 if config.anchor.guidance_scale == 1 else 2)
    old = 1.0 if config.objective.policy_weight > 0 and config.algorithm in ("crd", "nft", "awm") else 0.0
    rows = config.rollout.group_size * (1 if config.objective.levels == "each" else config.noise.levels)
    centered = config.algorithm == "crd" and config.objective.policy_weight > 0
    two_pass = centered and (rows > config.train.micro_batch or config.objective.centering == "batch")
    return student + anchor + old + (1.0 if two_pass else 0.0)


def rollout_rows(config: CRDConfig) -> int:
    """Forward passes of the backbone in one epoch's rollout, one per picture and step, two if guided."""
    pictures = config.rollout.prompts_per_epoch * config.rollout.group_size
    return pictures * config.rollout.steps * (1 if config.rollout.guidance_scale == 1 else 2)


def training_rows(config: CRDConfig) -> int:
    """Sample-timesteps that one epoch trains on (at most: of a rollout's grid, levels below the minimum are left out)."""
    levels = min(config.noise.levels, config.rollout.steps) if config.noise.source == "rollout" else config.noise.levels
    return config.rollout.prompts_per_epoch * config.rollout.group_size * levels


def forwards_per_epoch(config: CRDConfig) -> float:
    """Forward passes of the backbone per epoch, rollout and training, in rows; a backward pass counts as two."""
    return rollout_rows(config) + training_rows(config) * forwards_per_row(config)


def plan_lines(config: CRDConfig) -> list[str]:
    """The plan in words; loads the model to time one forward pass on this machine."""
    rollout, evaluation, train = config.rollout, config.evaluation, config.train
    pictures = rollout.prompts_per_epoch * rollout.group_size
    train_rows = training_rows(config)
    evaluations = (2 if evaluation.before else 0) + -(-train.epochs // evaluation.every)
    evaluation_rows = evaluation.prompts * evaluation.pictures_per_prompt * (evaluation.steps + 9) * evaluations
    seconds = _seconds_per_forward(config)
    total = (train.epochs * forwards_per_epoch(config) + evaluation_rows) * seconds
    prompts = len(load_prompts(config.prompts.train))
    return [
        f"plan for {config.output_dir}",
        f"  training prompts       {prompts}, {rollout.prompts_per_epoch} of them per epoch",
        f"  per epoch              {pictures} pictures ({rollout.prompts_per_epoch} prompts x {rollout.group_size})",
        f"  rollout forwards       {rollout_rows(config)} per epoch ({rollout.steps} steps)",
        f"  training forwards      {train_rows * forwards_per_row(config):.0f} per epoch ({train_rows} sample-timesteps x "
        f"{forwards_per_row(config):g}; a backward counts as 2)",
        f"  optimiser steps        {train.epochs * train.steps_per_epoch} in {train.epochs} epochs",
        f"  evaluations            {evaluations} of {evaluation.prompts * evaluation.pictures_per_prompt} pictures",
        f"  measured here          {1000 * seconds:.2f} ms per forward of one picture, decoding and reward not counted",
        f"  estimated time         {total / 60:.0f} min on one process such as this",
    ]


def _seconds_per_forward(config: CRDConfig) -> float:
    """Median time of a forward pass per picture, on this machine."""
    from accelerate import Accelerator

    from crd.models.load import load_policy

    device = Accelerator().device
    policy = load_policy(config.model.path, config.model, device)
    count = min(config.train.micro_batch, 32)
    conditioning = policy.encode(["a sign"] * count)
    x = torch.zeros(count, *policy.model.latent_shape, device=device)
    sigma = torch.full((count,), 0.5, device=device)
    times = []
    with torch.no_grad():
        for _ in range(5):
            began = time.perf_counter()
            policy.velocity(x, sigma, conditioning).sum().item()
            times.append((time.perf_counter() - began) / count)
    return sorted(times)[2]
