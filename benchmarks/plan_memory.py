"""The plan's memory against what a forward and backward pass really takes, on this machine: ``python benchmarks/plan_memory.py``.

Predicted is what `crd plan` counts for the rows of a training pass; measured is the memory that is in use between forward and
backward pass beyond what was before, of the allocator on a GPU and of the process on the CPU (where freed memory may stay with
the process).
"""

import json
import resource

import torch
from accelerate import Accelerator

from crd.config import ModelConfig
from crd.models.load import load_policy
from crd.models.policy import Policy
from crd.plan.footprint import footprint
from crd.plan.memory import SLACK


def used_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with open("/proc/self/statm") as file:  # peaks only rise: what is needed is the present
        return int(file.read().split()[1]) * resource.getpagesize()


def kept_bytes(policy: Policy, rows: int) -> int:
    x = torch.randn(rows, *policy.model.latent_shape, device=policy.device)
    conditioning = policy.encode([""]).select(torch.zeros(rows, dtype=torch.long, device=policy.device))
    sigma = torch.full((rows,), 0.5, device=policy.device)
    before = used_bytes(policy.device)
    velocity = policy.velocity(x, sigma, conditioning)
    kept = used_bytes(policy.device) - before
    velocity.square().mean().backward()
    return kept


def main() -> None:
    device = Accelerator().device
    policy = load_policy("nano", ModelConfig(path="nano"), device)
    counted = footprint(policy)
    kept_bytes(policy, 4)  # libraries are loaded by now
    for rows in (24, 96, 192):
        measured, predicted = (
            kept_bytes(policy, rows),
            counted.pass_bytes + SLACK * rows * (counted.row_bytes + counted.transient_bytes),
        )
        row = {"rows": rows, "predicted_MiB": predicted / 2**20, "measured_MiB": measured / 2**20, "ratio": predicted / measured}
        print(json.dumps({key: round(value, 2) for key, value in row.items()}))


if __name__ == "__main__":
    main()
