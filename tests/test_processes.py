"""Two processes (gloo) give what one gives, with groups whole or split over processes, and with failed rewards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from several import free_port, on_processes
from train_tiny import same, train_tiny

from crd.errors import CRDError
from crd.processes import launched, split

HERE = Path(__file__).parent

SPLITS = {
    "groups whole": {"rollout": {"prompts_per_epoch": 4, "group_size": 3}, "train": {"steps_per_epoch": 2, "epochs": 2}},
    "groups split": {"rollout": {"prompts_per_epoch": 3, "group_size": 3}, "train": {"steps_per_epoch": 1, "epochs": 2}},
}
COMMON = {"reward_failure_limit": 1.0, "evaluation": {"every": 2, "prompts": 3, "pictures_per_prompt": 1}}


@pytest.mark.parametrize("name", SPLITS)
def test_two_processes_equal_one(tmp_path, name):
    sections = {**SPLITS[name], **COMMON}
    on_processes(1, train_tiny, tmp_path / "one", sections, "some_fail")
    on_processes(2, train_tiny, tmp_path / "two", sections, "some_fail")
    same(tmp_path / "one", tmp_path / "two")


def test_launched_by_torchrun(tmp_path):
    sections = {**SPLITS["groups split"], **COMMON}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += [str(HERE / "train_tiny.py"), str(tmp_path / "two"), json.dumps(sections)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sharded: False" in done.stdout
    on_processes(1, train_tiny, tmp_path / "one", sections)
    same(tmp_path / "one", tmp_path / "two")


def train_without_shared_files(folder, sections):
    """As on two nodes with file systems of their own: each process has another folder under the same name."""
    return train_tiny(f"{folder}-{os.environ.get('RANK', '0')}", sections)


def test_only_the_main_process_needs_the_folder(tmp_path):
    def sections(epochs):
        return {"train": {"epochs": epochs}, "evaluation": {"before": False, "every": 1, "prompts": 1}}

    on_processes(1, train_without_shared_files, tmp_path / "smooth", sections(2))
    on_processes(2, train_without_shared_files, tmp_path / "run", sections(1))
    on_processes(2, train_without_shared_files, tmp_path / "run", sections(2))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["run-0", "smooth-0"]
    same(tmp_path / "smooth-0", tmp_path / "run-0")


def alone_after_all(folder):
    del os.environ["ACCELERATE_USE_CPU"]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with pytest.raises(CRDError, match=r"2 processes were launched.*ACCELERATE_USE_CPU=true"):
        launched([], folder)


def test_launched_processes_that_do_not_know_of_each_other(tmp_path):
    on_processes(2, alone_after_all, tmp_path)


def test_split_covers_everything_once():
    for count in (0, 1, 5, 8):
        for processes in (1, 2, 3, 7):
            parts = [split(count, processes, rank) for rank in range(processes)]
            assert [i for part in parts for i in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
