"""DeepSpeed's ZeRO on two processes (gloo): moments in two pieces give what one process gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from several import ZERO1, free_port, on_processes
from tiny import tiny_config, tiny_pipeline
from train_tiny import COMMON, same, several_epochs, train_tiny

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; `make test-extras` installs it")

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "machines.md"
CASES = {
    "groups split, in two passes": {"rollout": {"prompts_per_epoch": 3, "group_size": 3}, "train": {"micro_batch": 5}},
    "one process without samples": {"rollout": {"prompts_per_epoch": 4, "group_size": 2}, "train": {"steps_per_epoch": 2}},
    "full fine-tuning": {"rollout": {"prompts_per_epoch": 3, "group_size": 2}, "model": {"tuning": "full"}},
}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(tmp_path, name):
    sections = {**COMMON, **CASES[name]}
    on_processes(1, train_tiny, tmp_path / "one", sections, "some_fail")
    on_processes(2, train_tiny, tmp_path / "two", sections, "some_fail", environment=ZERO1)
    same(tmp_path / "one", tmp_path / "two")


def test_resumed_on_another_number_of_processes(tmp_path):
    on_processes(1, train_tiny, tmp_path / "smooth", several_epochs(4))
    on_processes(2, train_tiny, tmp_path / "moved", several_epochs(1), environment=ZERO1)
    on_processes(2, train_tiny, tmp_path / "moved", several_epochs(2), environment=ZERO1)
    on_processes(1, train_tiny, tmp_path / "moved", several_epochs(3))
    on_processes(2, train_tiny, tmp_path / "moved", several_epochs(4), environment=ZERO1)
    same(tmp_path / "smooth", tmp_path / "moved")


def what_a_process_keeps(folder):
    """Share of the moments on this process, the norm if a gradient of the main process is not finite, and the count of steps."""
    from accelerate import Accelerator

    from crd.models.load import load_policy
    from crd.step import TrainStep

    config = tiny_config(folder)
    policy = load_policy(tiny_pipeline(), config.model, torch.device("cpu"))
    step = TrainStep(policy, config, Accelerator())
    trained = sum(p.numel() for p in step.parameters)
    (state,) = step.update.engine.optimizer.state.values()
    for parameter in step.parameters:
        parameter.grad = torch.zeros_like(parameter)
    if step.accelerator.is_main_process:
        step.parameters[0].grad[0] = torch.nan
    return state["exp_avg"].numel() / trained, float(step.update.gradient_norm()), float(state["step"])


def test_moments_are_shared_out_and_every_process_hears_of_a_bad_gradient(tmp_path):
    for share, norm, count in on_processes(2, what_a_process_keeps, tmp_path, environment=ZERO1):
        assert 0.5 <= share < 0.51 and norm != norm and count == 0


BAD = {
    "zero_stage": {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "offload_optimizer_device": {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
    "gradient_clipping": {"ACCELERATE_GRADIENT_CLIPPING": "1.0"},
    "gradient_accumulation_steps": {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
}


@pytest.mark.parametrize("setting", BAD)
def test_settings_of_accelerate_that_would_do_harm_are_refused(tmp_path, setting):
    with pytest.raises(AssertionError, match=f"CRDError: accelerate's deepspeed setting {setting} is"):
        on_processes(2, train_tiny, tmp_path, {}, environment=ZERO1 | BAD[setting])


def test_launched_by_accelerate_with_the_documented_configuration(tmp_path):
    config = yaml.safe_load(DOCS.read_text().split("```yaml\n")[2].split("```")[0])
    config |= {"num_processes": 2, "main_process_port": free_port()}
    (tmp_path / "zero1.yaml").write_text(yaml.safe_dump(config))
    sections = {"rollout": {"prompts_per_epoch": 3, "group_size": 2}, "train": {"epochs": 1}, **COMMON}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "zero1.yaml")]
    command += [str(HERE / "train_tiny.py"), str(tmp_path / "two"), json.dumps(sections)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    on_processes(1, train_tiny, tmp_path / "one", sections)
    same(tmp_path / "one", tmp_path / "two")
