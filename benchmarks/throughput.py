"""Milliseconds per row on the embedded model, by tile size: ``python benchmarks/throughput.py``.

A row is one picture at one noise level. The sizes are measured in alternation, three rounds, and the median
is given, since machines are noisy. Forward: no gradient. Training: student with gradient, old, guided anchor.
"""

import json
import statistics
import time

import torch
from accelerate import Accelerator

from crd.batch import Samples
from crd.config import CRDConfig
from crd.models.load import load_policy
from crd.step import TrainStep
from crd.tiles import StepMembers

SIZES = (12, 24, 48, 96, 192)
GROUPS, MEMBERS, LEVELS = 4, 12, 4


def make_step(policy, micro_batch: int) -> TrainStep:
    config = CRDConfig(
        rollout={"prompts_per_epoch": GROUPS, "group_size": MEMBERS, "steps": 10},
        noise={"levels": LEVELS},
        train={"steps_per_epoch": 1, "micro_batch": micro_batch},
    )
    return TrainStep(policy, config, Accelerator())


@torch.no_grad()
def forward_ms(policy, rows: int) -> float:
    conditioning = policy.encode(["a photo of a ring"] * rows)
    x = torch.randn(rows, *policy.model.latent_shape, device=policy.device)
    sigma = torch.full((rows,), 0.5, device=policy.device)
    began = time.perf_counter()
    policy.velocity(x, sigma, conditioning).sum().item()
    return 1000 * (time.perf_counter() - began) / rows


def training_ms(step: TrainStep) -> float:
    count = GROUPS * MEMBERS
    group = torch.arange(GROUPS).repeat_interleave(MEMBERS)
    device = step.policy.device
    samples = Samples(
        x0=torch.randn(count, *step.policy.model.latent_shape, device=device),
        sample_id=torch.arange(count),
        prompt=group,
        group=group,
        advantage=torch.rand(count),
    )
    conditioning = step.policy.encode([f"a photo of a {color} ring" for color in ("red", "blue", "green", "black")])
    members = StepMembers(group, samples.advantage, torch.arange(count))
    began = time.perf_counter()
    step(samples, conditioning, members, 0)
    return 1000 * (time.perf_counter() - began) / (count * LEVELS)


if __name__ == "__main__":
    config = CRDConfig()
    policy = load_policy("nano", config.model, Accelerator().device)
    steps = {size: make_step(policy, size) for size in SIZES}
    forward, training = {s: [] for s in SIZES}, {s: [] for s in SIZES}
    for _ in range(4):  # the first round warms up
        for size in SIZES:
            forward[size].append(forward_ms(policy, size))
            training[size].append(training_ms(steps[size]))
    for size in SIZES:
        row = {
            "tile": size,
            "forward_ms": statistics.median(forward[size][1:]),
            "training_ms": statistics.median(training[size][1:]),
        }
        print(json.dumps({k: round(v, 2) for k, v in row.items()}))
