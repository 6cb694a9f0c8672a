"""FSDP2 on two processes (gloo): the backbone in two pieces gives what one process gives, whatever their shares are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from several import FSDP2, free_port, on_processes
from tiny import tiny_config, tiny_pipeline
from train_tiny import COMMON, same, several_epochs, train_tiny

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "machines.md"

#: shares that differ: of pictures, of batches, of tiles, of what is left when the rewards of a prompt fail
CASES = {
    "groups split, in two passes": {
        "rollout": {"prompts_per_epoch": 3, "group_size": 3, "batch_size": 4},
        "train": {"micro_batch": 5, "gradient_checkpointing": True},
    },
    "groups whole, one process without samples": {
        "rollout": {"prompts_per_epoch": 4, "group_size": 2},
        "train": {"steps_per_epoch": 2},
        "objective": {"levels": "halves"},
    },
    "stored paths": {
        "algorithm": "flow_grpo",
        "rollout": {"prompts_per_epoch": 3, "group_size": 3, "batch_size": 4},
        "train": {"micro_batch": 5},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(tmp_path, name):
    sections = {**COMMON, **CASES[name]}
    on_processes(1, train_tiny, tmp_path / "one", sections, "some_fail")
    sharded = on_processes(2, train_tiny, tmp_path / "two", sections, "some_fail", environment=FSDP2)
    assert [done["sharded"] for done in sharded] == [True, True]
    same(tmp_path / "one", tmp_path / "two")


def test_resumed_on_another_number_of_processes(tmp_path):
    on_processes(1, train_tiny, tmp_path / "smooth", several_epochs(3))
    on_processes(2, train_tiny, tmp_path / "moved", several_epochs(1), environment=FSDP2)
    on_processes(1, train_tiny, tmp_path / "moved", several_epochs(2))
    on_processes(2, train_tiny, tmp_path / "moved", several_epochs(3), environment=FSDP2)
    same(tmp_path / "smooth", tmp_path / "moved")


def gathers(folder):
    """All-gathers of passes on this process, its share of the backbone's weights, and velocities with all named weights."""
    from torch.distributed.tensor.debug import CommDebugMode

    from crd.models.load import load_policy

    policy = load_policy(tiny_pipeline(), tiny_config(folder).model, torch.device("cpu"))
    whole = sum(p.numel() for p in policy.model.backbone.parameters())
    local = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in policy.model.backbone.parameters())
    lora = sum(p.numel() for name in ("student", "old", "sampler") for _, p in policy.parameters(name))
    x = torch.ones(2, *policy.model.latent_shape)
    arguments = x, torch.full((2,), 0.5), policy.encode(["a", "b"])
    counts = {}

    def count(name, work):
        with CommDebugMode() as comm:
            result = work()
        counts[name] = comm.get_total_counts()
        return result

    def forward(name):
        with torch.no_grad(), policy.using(name):
            return policy.velocity(*arguments).numpy()

    count("first", lambda: forward("student"))
    velocities = {name: count(name, lambda name=name: forward(name)) for name in ("student", "old", "sampler", "pretrained")}
    if os.environ.get("RANK", "0") == "0":
        policy.save(folder)  # asks no other process for anything, and leaves the weights as they are
    count("after saving", lambda: forward("student"))
    student = count("with gradient", lambda: policy.velocity(*arguments))
    forward("pretrained")
    count("backward", lambda: student.square().sum().backward())
    gradient = [p.grad.numpy() for _, p in policy.parameters("student")]
    return counts, (local - lora) / (whole - lora), velocities, gradient


def test_gathers_no_more_than_passes_need(tmp_path):
    blocks = 2
    (one,) = on_processes(1, gathers, tmp_path / "one")
    two = on_processes(2, gathers, tmp_path / "two", environment=FSDP2)
    assert one[0] == dict.fromkeys(one[0], 0) and one[1] == 1
    for counts, share, velocities, gradient in two:
        # what is outside of the blocks stays together after the first pass
        later = {key: value for key, value in counts.items() if key != "first"}
        assert later == dict.fromkeys(later, blocks) and counts["first"] <= blocks + 2
        assert 0.45 < share < 0.55
        for name, velocity in velocities.items():
            np.testing.assert_array_equal(velocity, one[2][name])
        for a, b in zip(gradient, one[3], strict=True):
            np.testing.assert_array_equal(a, b)


BAD = {
    "fsdp_version": {"FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"},
    "fsdp_auto_wrap_policy": {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"},
    "fsdp_cpu_ram_efficient_loading": {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    "fsdp_offload_params": {"FSDP_OFFLOAD_PARAMS": "true"},
    "fsdp_activation_checkpointing": {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
    "cannot shard": {"FSDP_TRANSFORMER_CLS_TO_WRAP": "NoSuchBlock"},
}


def complaints():
    from crd.errors import CRDError
    from crd.sharding import shard

    said = {}
    for name, bad in BAD.items():
        before = {key: os.environ.get(key) for key in bad}
        os.environ.update(bad)
        try:
            shard(torch.nn.Linear(2, 2), [])
        except CRDError as error:
            said[name] = str(error)
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value
    return said


def test_settings_of_accelerate_that_would_do_harm_are_refused():
    for said in on_processes(2, complaints, environment=FSDP2):
        assert said.keys() == BAD.keys()
        assert all(name in text for name, text in said.items())


def test_launched_by_accelerate_with_the_documented_configuration(tmp_path):
    config = yaml.safe_load(DOCS.read_text().split("```yaml\n")[1].split("```")[0])
    config |= {"num_processes": 2, "main_process_port": free_port()}
    (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump(config))
    sections = {"rollout": {"prompts_per_epoch": 3, "group_size": 2}, "train": {"epochs": 1}, **COMMON}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "fsdp2.yaml")]
    command += [str(HERE / "train_tiny.py"), str(tmp_path / "two"), json.dumps(sections)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sharded: True" in done.stdout
    on_processes(1, train_tiny, tmp_path / "one", sections)
    same(tmp_path / "one", tmp_path / "two")
