"""What a run will do, in words: pictures, forward passes, memory, time."""

import time

import torch
from accelerate import Accelerator

from crd.config import CRDConfig
from crd.micro_batch import ON_CPU, with_micro_batch
from crd.models.load import load_policy
from crd.models.policy import Policy
from crd.plan.counts import forwards_per_epoch, forwards_per_row, rollout_rows, training_rows
from crd.plan.footprint import footprint
from crd.plan.gpus import find_gpu
from crd.plan.memory import Memory
from crd.prompts import load_prompts


def plan_lines(config: CRDConfig, gpu: str | None = None, utilisation: float = 0.35) -> list[str]:
    """The plan in words, for this machine or a named GPU; loads the model.

    Times on a GPU are operations over ``utilisation`` of what its maker states; decoding and rewards are not counted.
    """
    rollout, evaluation, train = config.rollout, config.evaluation, config.train
    policy = load_policy(config.model.path, config.model, Accelerator().device)
    seconds = _seconds_per_forward(policy, config) if gpu is None else None
    if train.gradient_checkpointing:
        policy.model.backbone.disable_gradient_checkpointing()  # counted without, and then with
    counted = footprint(policy)
    prompts = len(load_prompts(config.prompts.train))
    memory = Memory(counted, config, find_gpu(gpu), prompts) if gpu else None
    rows = memory.rows if memory else (train.micro_batch or ON_CPU)
    config = with_micro_batch(config, max(1, rows))
    evaluations = (2 if evaluation.before else 0) + -(-train.epochs // evaluation.every)
    evaluation_rows = evaluation.prompts * evaluation.pictures_per_prompt * (evaluation.steps + 9) * evaluations
    recomputed = training_rows(config) if train.gradient_checkpointing else 0
    per_epoch = forwards_per_epoch(config) + recomputed
    if gpu:
        seconds = counted.row_flops / (find_gpu(gpu).bf16_tflops * 1e12 * utilisation)
    assert seconds is not None
    epoch = per_epoch * seconds
    lines = [
        f"plan for {config.output_dir}",
        f"  model                  {_many(counted.backbone_parameters)} parameters frozen, "
        f"{_many(counted.lora_parameters)} trained (LoRA rank {config.model.lora_rank})",
        f"  training prompts       {prompts}, {rollout.prompts_per_epoch} of them per epoch",
        f"  per epoch              {rollout.prompts_per_epoch * rollout.group_size} pictures "
        f"({rollout.prompts_per_epoch} prompts x {rollout.group_size})",
        f"  rollout forwards       {rollout_rows(config)} per epoch ({rollout.steps} steps)",
        f"  training forwards      {training_rows(config) * forwards_per_row(config) + recomputed:.0f} per epoch "
        f"({training_rows(config)} sample-timesteps x {forwards_per_row(config):g}; a backward counts as 2)",
        f"  operations             {counted.row_flops / 1e9:.3g} GFLOP a forward, "
        f"{per_epoch * counted.row_flops / 1e15:.3g} PFLOP an epoch",
        f"  optimiser steps        {train.epochs * train.steps_per_epoch} in {train.epochs} epochs",
        f"  evaluations            {evaluations} of {evaluation.prompts * evaluation.pictures_per_prompt} pictures",
        f"  rows per forward pass  {rows}" + ("" if train.micro_batch else " (chosen: train.micro_batch is 0)"),
    ]
    if memory:
        lines += memory.lines()
        lines.append(f"  assumed speed          {utilisation:.0%} of {find_gpu(gpu).bf16_tflops:g} TFLOP/s ({gpu})")  # type: ignore[arg-type]
    else:
        lines.append(f"  measured here          {1000 * seconds:.2f} ms per forward of one picture")
    total = train.epochs * epoch + evaluation_rows * seconds
    return [
        *lines,
        f"  estimated time         {_duration(epoch)} an epoch, {_duration(total)} in all on one process; "
        "decoding and reward not counted",
    ]


def _many(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"


def _seconds_per_forward(policy: Policy, config: CRDConfig) -> float:
    """Median time of a forward pass per picture, on this machine."""
    count = min(config.train.micro_batch or ON_CPU, 32)
    conditioning = policy.encode(["a sign"] * count)
    x = torch.zeros(count, *policy.model.latent_shape, device=policy.device)
    sigma = torch.full((count,), 0.5, device=policy.device)
    times = []
    with torch.no_grad():
        for _ in range(5):
            began = time.perf_counter()
            policy.velocity(x, sigma, conditioning).sum().item()
            times.append((time.perf_counter() - began) / count)
    return sorted(times)[2]
