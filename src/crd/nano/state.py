"""Optimiser state as safetensors, so that pretraining can be interrupted without pickles."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def save_optimizer(optimizer: torch.optim.Optimizer, step: int, path: Path) -> None:
    state = optimizer.state_dict()["state"]
    tensors = {f"{i}.{name}": value.contiguous() for i, entry in state.items() for name, value in entry.items()}
    save_file(tensors, path, metadata={"step": str(step)})


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> int:
    """Restores the state in place and returns the step it was saved at."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])
