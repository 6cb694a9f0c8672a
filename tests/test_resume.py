"""Killed, interrupted or extended: a run that goes on ends with the same bytes as one that was never stopped."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import redness, tiny_config, tiny_pipeline

from crd import CRDTrainer, checkpoint
from crd.errors import CRDError
from crd.log import Record, read_record
from crd.lora_settings import FILE_NAME

EPOCHS = 5
KILLS = 5
PATIENCE = 300  # seconds, on a machine that is busy with other things

#: starts processes that have everything imported already, by forking one that did and has done nothing else
fresh = multiprocessing.get_context("forkserver")
fresh.set_forkserver_preload(["pytest", "crd.trainer", "crd.inference", "crd.cli", "conftest"])


def command_line(words: list[str], output: Path) -> None:
    """What ``crd words`` does, printing to a file."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.argv = ["crd", *words]
    from crd.cli import main

    main()


def start(recipe: Path, output: Path):
    process = fresh.Process(target=command_line, args=(["train", str(recipe)], output))
    process.start()
    return process


def finish(process) -> int:
    process.join(PATIENCE)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def outcome(recipe: Path) -> dict:
    """Everything of a finished run that must not depend on how often it was stopped."""
    run = recipe.with_suffix("")
    newest = checkpoint.complete(run / "checkpoints")[-1]
    _, facts = checkpoint.load(newest)
    files = ["metrics.jsonl", f"checkpoints/{newest.name}/state.safetensors"]
    files += [str(path.relative_to(run)) for path in sorted((run / "pictures").iterdir())]
    contents = {name: (run / name).read_bytes() for name in files}
    contents["metrics.jsonl"] = contents["metrics.jsonl"].replace(bytes(recipe.parent), b"")  # in the reward's name
    # of the LoRA file its words and its tensors: safetensors writes the header's entries in an order of chance
    with safe_open(run / "pytorch_lora_weights.safetensors", "pt") as lora:
        words = json.dumps(lora.metadata(), sort_keys=True).encode()
        tensors = {key: lora.get_tensor(key).numpy().tobytes() for key in lora.keys()}  # noqa: SIM118
    return contents | tensors | {"words": words, "forwards": facts["forwards"]}


def same(recipe: Path, other: Path) -> None:
    a, b = outcome(recipe), outcome(other)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


def settings(epochs: int) -> dict:
    return {"train": {"epochs": epochs}, "evaluation": {"every": 2, "prompts": 1}}


@pytest.fixture(scope="module")
def smooth(tmp_path_factory, tiny_folder):
    """A run of ``EPOCHS`` epochs that nothing stops, by the installed program; and the seconds that its training took."""
    from conftest import write_recipe

    path = write_recipe(tmp_path_factory.mktemp("smooth"), tiny_folder, "run", **settings(EPOCHS))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    program = [sys.executable, "-m", "crd", "train", str(path)]
    done = subprocess.run(program, check=False, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return path


def test_killed_at_random_moments(smooth, recipe, tmp_path):
    path, output = recipe(**settings(EPOCHS)), tmp_path / "output"
    metrics = path.with_suffix("") / "metrics.jsonl"
    rng = random.Random(0)
    codes = []
    for _ in range(KILLS):
        rows = len(read_record(metrics)) + rng.randint(0, 2)
        process = start(path, output)
        while process.is_alive() and len(read_record(metrics)) < rows:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        codes.append(finish(process))
    assert codes.count(-signal.SIGKILL) >= 2, f"too few kills came in time: {codes}"
    assert finish(start(path, output)) == 0, output.read_text()
    same(path, smooth)


def test_interrupted_by_the_user(smooth, recipe, tmp_path):
    path, output = recipe(**settings(EPOCHS)), tmp_path / "output"
    metrics = path.with_suffix("") / "metrics.jsonl"
    process = start(path, output)
    until = time.monotonic() + PATIENCE
    while not any(row["kind"] == "train" for row in read_record(metrics)):
        assert process.is_alive() and time.monotonic() < until, output.read_text()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 0
    printed = output.read_text()
    assert "Stopping after this epoch" in printed and "Run the same command again to go on" in printed
    assert "Traceback" not in printed
    trained = [row for row in read_record(metrics) if row["kind"] == "train"]
    assert 1 <= len(trained) < EPOCHS
    assert not (metrics.parent / "summary.json").exists()
    assert finish(start(path, output)) == 0
    assert f"Resuming after epoch {len(trained)} of {EPOCHS}" in output.read_text()
    same(path, smooth)


def test_more_epochs_later(smooth, recipe, crd):
    path = recipe(**settings(2))  # its last epoch is one that is evaluated in any case
    assert crd("train", path)[0] == 0
    code, printed = crd("train", path, f"train.epochs={EPOCHS}")
    assert code == 0 and f"Resuming after epoch 2 of {EPOCHS}" in printed
    same(path, smooth)


def test_fewer_epochs_later(tmp_path):
    """The result is then that of the epochs done, with an evaluation of its own; still fewer cannot be had."""

    def trainer(epochs):
        sections = {"train": {"epochs": epochs}, "evaluation": {"every": 10, "prompts": 1, "pictures_per_prompt": 1}}
        return CRDTrainer(tiny_pipeline(), reward_funcs=[redness], config=tiny_config(tmp_path / "run", **sections))

    run = tmp_path / "run"
    trainer(1).train()
    assert (run / "summary.json").exists() and (run / FILE_NAME).exists()
    going_on = trainer(3)
    going_on.rewards = None  # whatever ends it
    with pytest.raises(AttributeError):
        going_on.train()
    assert not (run / "summary.json").exists() and not (run / FILE_NAME).exists()  # of one epoch: no result of this run

    interrupted = trainer(3)
    train_epoch = interrupted._train_epoch
    interrupted._train_epoch = lambda bar: (train_epoch(bar), setattr(interrupted.stop, "asked", True))[0]  # as Ctrl-C does
    interrupted.train()
    assert [row["label"] for row in read_record(run / "metrics.jsonl") if row["kind"] == "evaluation"][-1] == "epoch-0001"
    trainer(2).train()
    summary = json.loads((run / "summary.json").read_text())
    labels = [row["label"] for row in read_record(run / "metrics.jsonl") if row["kind"] == "evaluation"]
    assert labels[-1] == "epoch-0002" and summary["after"]["guidance_scale"] == 1.0
    with pytest.raises(CRDError, match=r"train.epochs is 1, but the run in .* has done 2 epochs"):
        trainer(1).train()


def test_whatever_a_kill_leaves_half_written(smooth, recipe, crd):
    path = recipe(**settings(EPOCHS))
    run = path.with_suffix("")
    run.mkdir()
    (run / "config.yaml.partial").write_text("model: {pa")  # killed while the settings were written
    assert crd("train", path, "train.epochs=2")[0] == 0
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "epoch": 3, "rew')
    assert len(read_record(run / "metrics.jsonl")) == 5  # a torn last line is no row
    assert crd("report", run)[0] == 0
    (run / "checkpoints" / "partial-000003").mkdir()
    (run / "checkpoints" / "partial-000003" / "state.safetensors").write_bytes(b"torn")
    (run / "partial-result").mkdir()
    (run / "partial-result" / "pytorch_lora_weights.safetensors").write_bytes(b"torn")
    (run / "config.yaml.partial").write_text("model: {pa")
    (run / "pictures" / "epoch-0004.png").write_bytes(b"torn")
    assert crd("train", path)[0] == 0
    same(path, smooth)
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    assert not (run / "partial-result").exists() and not (run / "config.yaml.partial").exists()


def test_records_are_cut_back_to_the_checkpoint(tmp_path):
    record = Record(tmp_path / "r.jsonl")
    record.write({"a": 1})
    length = record.length()
    record.write({"a": 2})
    assert read_record(record.path) == [{"a": 1}, {"a": 2}]
    again = Record(record.path, length)
    assert again.length() == length
    again.write({"a": 3})
    assert [json.loads(line)["a"] for line in record.path.read_text().splitlines()] == [1, 3]
