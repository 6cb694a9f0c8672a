"""What a run will do, in words: pictures, forward passes, memory, time."""

import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from crd.config import CRDConfig
from crd.micro_batch import ON_CPU, rows_per_step, with_levels, with_micro_batch
from crd.models.load import load_policy
from crd.models.policy import Policy
from crd.plan.counts import evaluation_rows, evaluation_scales, forwards_per_epoch, rollout_rows, training_rows
from crd.plan.footprint import Footprint, footprint
from crd.plan.gpus import find_gpu
from crd.plan.memory import Memory
from crd.prompts import load_prompts


@dataclass(frozen=True)
class Plan:
    """What was counted of a run, and how fast a forward pass of one picture is."""

    config: CRDConfig  # with definite numbers of noise levels and of rows per forward pass
    counted: Footprint
    prompts: int  # distinct ones to train on
    seconds: float  # per forward pass of one picture

    @property
    def passes(self) -> float:
        """Forward passes of an epoch; gradient checkpointing makes one of them twice."""
        recomputed = training_rows(self.config) if self.config.train.gradient_checkpointing else 0
        return forwards_per_epoch(self.config) + recomputed

    def work(self) -> list[str]:
        """What the run does, whatever it runs on."""
        config, counted = self.config, self.counted
        rollout, evaluation, train = config.rollout, config.evaluation, config.train
        trained = "all of a copy" if config.model.tuning == "full" else f"LoRA rank {config.model.lora_rank}"
        return [
            f"plan for {config.output_dir}",
            f"  model                  {_many(counted.backbone_parameters)} parameters frozen, "
            f"{_many(counted.trained_parameters)} trained ({trained})",
            f"  training prompts       {self.prompts}, {rollout.prompts_per_epoch} of them per epoch",
            f"  per epoch              {rollout.prompts_per_epoch * rollout.group_size} pictures "
            f"({rollout.prompts_per_epoch} prompts x {rollout.group_size})",
            f"  rollout forwards       {rollout_rows(config)} per epoch ({rollout.steps} steps)",
            f"  training forwards      {self.passes - rollout_rows(config):.0f} per epoch ({training_rows(config)} "
            "sample-timesteps; a backward counts as 2)",
            f"  operations             {counted.row_flops / 1e9:.3g} GFLOP a forward, "
            f"{self.passes * counted.row_flops / 1e15:.3g} PFLOP an epoch",
            f"  optimiser steps        {train.epochs * train.steps_per_epoch} in {train.epochs} epochs",
            f"  evaluations            {len(evaluation_scales(config))} of {evaluation.prompts * evaluation.pictures_per_prompt} "
            f"pictures, {evaluation_rows(config)} forwards in all",
            f"  rows per forward pass  {train.micro_batch}",
        ]

    def time(self) -> str:
        epoch = self.passes * self.seconds
        total = self.config.train.epochs * epoch + evaluation_rows(self.config) * self.seconds
        return (
            f"  estimated time         {_duration(epoch)} an epoch, {_duration(total)} in all on one process; "
            "decoding and reward not counted"
        )


def plan_lines(config: CRDConfig, gpu: str | None = None, utilisation: float = 0.35) -> list[str]:
    """The plan in words, for this machine or a named GPU; loads the model.

    Times on a GPU are operations over ``utilisation`` of what its maker states.
    """
    load_prompts(config.prompts.evaluation)  # a mistake there is better known now
    if gpu is None:
        return _plan_here(config)
    card = find_gpu(gpu)
    model = config.model
    if model.precision == "auto":  # as it will be there, not as it would be here
        model = model.model_copy(update={"precision": "bfloat16"})
    policy = load_policy(model.path, model, Accelerator().device, names=("student",))
    config, counted = with_levels(config, policy), footprint(policy)
    prompts = len(load_prompts(config.prompts.train))
    memory = Memory(counted, config, card, prompts)
    seconds = counted.row_flops / (card.bf16_tflops * 1e12 * utilisation)
    plan = Plan(with_micro_batch(config, memory.rows), counted, prompts, seconds)
    speed = f"  assumed speed          {utilisation:.0%} of {card.bf16_tflops:g} TFLOP/s ({gpu})"
    return [*plan.work(), *memory.lines(), speed, plan.time()]


def _plan_here(config: CRDConfig) -> list[str]:
    policy = load_policy(config.model.path, config.model, Accelerator().device, names=("student",))
    config = with_levels(config, policy)
    config = with_micro_batch(config, config.train.micro_batch or min(rows_per_step(config), ON_CPU))
    seconds = _seconds_per_forward(policy, config.train.micro_batch)
    plan = Plan(config, footprint(policy), len(load_prompts(config.prompts.train)), seconds)
    return [*plan.work(), f"  measured here          {1000 * seconds:.2f} ms per forward of one picture", plan.time()]


def _many(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"


def _seconds_per_forward(policy: Policy, rows: int) -> float:
    """Median time of a forward pass per picture, on this machine."""
    count = min(rows, 32)
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
