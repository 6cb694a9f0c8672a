"""How many sample-timesteps go through the backbone together when the recipe leaves it to us."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from crd.config import CRDConfig
from crd.errors import CRDError
from crd.models.policy import Policy
from crd.noise_levels import levels_per_picture
from crd.processes import from_main
from crd.sharding import here

ON_CPU = 96  # rows; larger ones are no faster there (docs/experiments.md)
HEADROOM = 0.9  # of the memory that is free


def with_levels(config: CRDConfig, policy: Policy) -> CRDConfig:
    """The settings with as many noise levels as there are to train at, so that whatever is counted from them is exact."""
    levels = levels_per_picture(config, policy.model.sigmas(config.rollout.steps, config.rollout.shift)[:-1])
    return config.model_copy(update={"noise": config.noise.model_copy(update={"levels": levels})})


def rows_per_step(config: CRDConfig) -> int:
    """Sample-timesteps of one optimiser step; at most, unless the settings are :func:`with_levels`."""
    pictures = config.rollout.prompts_per_epoch * config.rollout.group_size // config.train.steps_per_epoch
    return pictures * levels_per_picture(config)


def with_micro_batch(config: CRDConfig, rows: int) -> CRDConfig:
    """The settings with a definite number of rows per forward pass."""
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": rows})})


def settle_micro_batch(policy: Policy, config: CRDConfig, found: Path, accelerator: Accelerator) -> int:
    """The recipe's rows per pass; if it leaves them open, those of the run's ``found.json``; else as many as fit.

    A run keeps what it chose, so that it goes on with the same sums. Raises CRDError if sizes cannot be tried.
    """
    if config.train.micro_batch:
        return config.train.micro_batch
    main = accelerator.is_main_process and found.exists()
    if rows := recorded_micro_batch(from_main(found.read_bytes() if main else b"", accelerator)):
        return rows
    if policy.sharded:  # a process that runs out of memory in the middle of a pass leaves the others waiting
        raise CRDError("train.micro_batch is left open, but a sharded backbone (FSDP2) cannot try out sizes: give a number.")
    return choose_micro_batch(policy, rows_per_step(with_levels(config, policy)), accelerator)


def recorded_micro_batch(found: bytes) -> int | None:
    """The rows that a run's ``found.json`` names; None if it names none, as a damaged one."""
    try:
        rows = json.loads(found)["micro_batch"]
    except (ValueError, KeyError, TypeError):
        return None
    return rows if isinstance(rows, int) and rows > 0 else None


def choose_micro_batch(policy: Policy, most: int, accelerator: Accelerator) -> int:
    """The largest power of two, at most ``most`` rows, whose forward and backward pass fits on every process's device."""
    if policy.device.type != "cuda":
        return min(most, ON_CPU)
    free, _ = torch.cuda.mem_get_info(policy.device)
    budget = HEADROOM * (free + torch.cuda.memory_reserved(policy.device))
    here = largest_fitting(lambda rows: _peak_bytes(policy, rows) <= budget, most)
    everywhere = accelerator.gather(torch.tensor([here], device=policy.device))
    return int(everywhere.min())  # the same on every process: it decides how many passes a step takes


def largest_fitting(fits: Callable[[int], bool], most: int) -> int:
    """The largest of 1, 2, 4, ... below ``most``, or ``most`` itself, that fits; 1 if none does."""
    rows = 1
    while rows < most and fits(min(2 * rows, most)):
        rows = min(2 * rows, most)
    return rows


def _peak_bytes(policy: Policy, rows: int) -> float:
    """Peak memory of one forward and backward pass of the student, in bytes; infinite if there is not enough.

    A later pass also finds the gradient of the one before it and both moments of AdamW, which are not there yet.
    """
    x = torch.zeros(rows, *policy.model.latent_shape, device=policy.device)
    sigma = torch.full((rows,), 0.5, device=policy.device)
    conditioning = policy.encode([""]).select(torch.zeros(rows, dtype=torch.long, device=policy.device))
    torch.cuda.reset_peak_memory_stats(policy.device)
    try:
        policy.velocity(x, sigma, conditioning).square().mean().backward()
        later = 3 * sum(here(p).nbytes for _, p in policy.parameters("student"))
        return float(torch.cuda.max_memory_allocated(policy.device) + later)
    except torch.cuda.OutOfMemoryError:
        return float("inf")
    finally:
        for _, parameter in policy.parameters("student"):
            parameter.grad = None
        torch.cuda.empty_cache()
