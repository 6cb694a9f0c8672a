"""How many forward passes a run makes, from its settings alone."""

from crd.config import CRDConfig
from crd.micro_batch import ON_CPU


def forwards_per_row(config: CRDConfig) -> float:
    """Forward passes of the backbone per sample-timestep of training; a backward pass counts as two."""
    student = 3.0
    anchor = 0 if config.anchor.strength == 0 else (1 if config.anchor.guidance_scale == 1 else 2)
    old = 1.0 if config.objective.policy_weight > 0 and config.algorithm in ("crd", "nft", "awm") else 0.0
    rows = config.rollout.group_size * (1 if config.objective.levels == "each" else config.noise.levels)
    centered = config.algorithm == "crd" and config.objective.policy_weight > 0
    two_pass = centered and (rows > (config.train.micro_batch or ON_CPU) or config.objective.centering == "batch")
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
