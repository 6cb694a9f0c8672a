"""Two processes (gloo) give what one gives, with groups whole or split over processes, and with failed rewards."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from crd.log import read_record
from crd.processes import split

HERE = Path(__file__).parent


def train(folder, sections, processes):
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    command += [str(HERE / "train_tiny.py"), str(folder), json.dumps(sections)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_record(folder / "metrics.jsonl"), load_file(folder / "pytorch_lora_weights.safetensors")


SPLITS = {
    "groups whole": {"rollout": {"prompts_per_epoch": 4, "group_size": 3}, "train": {"steps_per_epoch": 2, "epochs": 2}},
    "groups split": {"rollout": {"prompts_per_epoch": 3, "group_size": 3}, "train": {"steps_per_epoch": 1, "epochs": 2}},
}


@pytest.mark.parametrize("name", SPLITS)
def test_two_processes_equal_one(tmp_path, name):
    sections = {**SPLITS[name], "evaluation": {"every": 2, "prompts": 3, "pictures_per_prompt": 1}}
    rows_one, weights_one = train(tmp_path / "one", sections, 1)
    rows_two, weights_two = train(tmp_path / "two", sections, 2)
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
    start = np.sqrt(sum((w**2).sum() for w in weights_one.values()))
    apart = np.sqrt(sum(((weights_one[k] - weights_two[k]) ** 2).sum() for k in weights_one))
    assert apart < 1e-4 * start


def test_split_covers_everything_once():
    for count in (0, 1, 5, 8):
        for processes in (1, 2, 3, 7):
            parts = [split(count, processes, rank) for rank in range(processes)]
            assert [i for part in parts for i in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
