"""Trains the tiny pipeline; run by itself, or by a launcher on several processes. Arguments: folder, sections as JSON."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny import redness, tiny_config, tiny_pipeline

from crd import CRDTrainer
from crd.log import read_record


def some_fail(images, prompts, **metadata):
    """As :func:`redness`, without a score for every picture of some of the prompts."""
    return [None if sum(map(ord, prompt)) % 2 else score for prompt, score in zip(prompts, redness(images, prompts), strict=True)]


#: of runs that are compared over numbers of processes
COMMON = {"reward_failure_limit": 1.0, "evaluation": {"every": 2, "prompts": 1, "pictures_per_prompt": 1}}


def several_epochs(epochs):
    """Sections of a run that is stopped and gone on with; three prompts divide by no number of processes here."""
    evaluation = {**COMMON["evaluation"], "every": 1}
    return {"rollout": {"prompts_per_epoch": 3, "group_size": 3}, "train": {"epochs": epochs}, "evaluation": evaluation}


def train_tiny(folder, sections, reward="redness"):
    """Trains; returns what the process knows of itself."""
    chosen = {"redness": redness, "some_fail": some_fail}[reward]
    trainer = CRDTrainer(model=tiny_pipeline(), reward_funcs=[chosen], config=tiny_config(folder, **sections))
    trainer.train()
    return {"sharded": trainer.policy.sharded}


def weights_of(folder):
    """The trained weights of a run, whatever their form."""
    (file,) = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("backbone/*.safetensors")]
    return load_file(file)


def same(one, two):
    """Two folders of runs hold the same rows and weights, but for the rounding of sums in another order."""
    rows_one, rows_two = (read_record(Path(folder) / "metrics.jsonl") for folder in (one, two))
    assert len(rows_one) == len(rows_two)
    for a, b in zip(rows_one, rows_two, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if isinstance(value, float):
                # R is here a difference of nearly equal float32 errors, and its correlation magnifies their rounding
                tolerance = 2e-2 if key == "matching_correlation" else 2e-5
                assert b[key] == pytest.approx(value, rel=2e-3, abs=tolerance), key
            else:
                assert b[key] == value
    weights_one, weights_two = weights_of(one), weights_of(two)
    size = np.sqrt(sum((w**2).sum() for w in weights_one.values()))
    apart = np.sqrt(sum(((weights_one[k] - weights_two[k]) ** 2).sum() for k in weights_one))
    assert apart < 1e-4 * size


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("sharded:", train_tiny(sys.argv[1], json.loads(sys.argv[2]))["sharded"])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
