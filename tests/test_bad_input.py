"""Whatever a user can get wrong ends in one clear message and exit code 2, and nothing is overwritten."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from tiny import tiny_config, tiny_pipeline, tiny_settings

from crd import checkpoint
from crd.config import CRDConfig
from crd.errors import CRDError
from crd.log import Record, read_record
from crd.models.load import load_policy
from crd.prompts import load_prompts, make_prompt_set
from crd.recipe import CHANGEABLE, build_config, load_config
from crd.rewards.named import resolve_reward
from crd.rewards.protocol import NamedReward, RewardSet
from crd.run_folder import RunFolder
from crd.trainer import CRDTrainer


def complaint(function, *arguments, **named) -> str:
    with pytest.raises(CRDError) as raised:
        function(*arguments, **named)
    return str(raised.value)


def refused(answer, *pieces) -> None:
    """The command ended with 2, without a traceback, and its message names all the pieces."""
    code, printed = answer
    assert code == 2, printed
    assert "Traceback" not in printed
    assert "crd: " in printed
    for piece in pieces:
        assert str(piece) in printed, printed


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "data, pieces",
    [
        ({"train": {"lerning_rate": 1}}, ["train.lerning_rate", "Did you mean 'learning_rate'?"]),
        ({"trian": {}}, ["trian", "Did you mean 'train'?"]),
        ({"xyzzy": 1}, ["xyzzy", "There are: output_dir, seed, model"]),
        ({"rewards": [{"name": "blue", "wieght": 2}]}, ["rewards.0.wieght", "Did you mean 'weight'?"]),
        ({"evaluation": {"judges": [{"nmae": "blue"}]}}, ["evaluation.judges.0.nmae", "Did you mean 'name'?"]),
        ({"old": {"slop": 1}}, ["old.slop", "Did you mean 'slope'?"]),
        ({"train": {"epochs": "many"}}, ["train.epochs", "integer", "'many'"]),
        ({"train": {"epochs": 2.5}}, ["train.epochs", "integer", "2.5"]),
        ({"train": {"learning_rate": float("inf")}}, ["train.learning_rate", "finite", "inf"]),
        ({"train": {"betas": [0.9, 1.5]}}, ["train.betas.1", "less than 1", "1.5"]),
        ({"train": 5}, ["train", "dictionary", "5"]),
        ({"model": {"precision": "float16"}}, ["model.precision", "'bfloat16'", "'float16'"]),
        ({"rollout": {"group_size": 1}}, ["rollout.group_size", "greater than or equal to 2", "got 1"]),
        (
            {"rollout": {"prompts_per_epoch": 4}, "train": {"steps_per_epoch": 3}},
            ["train.steps_per_epoch (3)", "rollout.prompts_per_epoch (4)", "divide"],
        ),
        ({"objective": {"policy_weight": 0}, "anchor": {"strength": 0}}, ["policy_weight", "anchor.strength", "nothing"]),
        ({"anchor": {"strength": 0.1, "minimum": 0.2}}, ["anchor.minimum (0.2)", "anchor.strength (0.1)"]),
        ({"rewards": []}, ["rewards", "at least one"]),
        ({"rewards": [{"name": "blue"}, {"name": "blue"}]}, ["rewards", "once", "blue"]),
        ({"rewards": [{"name": "ocr"}], "evaluation": {"judges": [{"name": "ocr"}]}}, ["evaluation.judges", "once", "ocr"]),
        ({"trackers": ["excel"]}, ["trackers.0", "'tensorboard'", "'excel'"]),
        (None, ["settings", "dictionary"]),
    ],
)
def test_wrong_settings_are_named_with_value_and_remedy(data, pieces):
    message = complaint(build_config, data)
    for piece in pieces:
        assert piece in message


def test_every_wrong_setting_is_named_at_once():
    message = complaint(build_config, {"train": {"epochs": 0, "typo": 1}, "noise": {"levels": -1}})
    assert all(key in message for key in ("train.epochs", "train.typo", "noise.levels"))


@pytest.mark.parametrize(
    "text, pieces",
    [
        (None, ["there is no recipe"]),
        ("- a\n- b\n", ["section: settings", "list"]),
        ("", ["section: settings"]),
        ("train: {epochs: [1\n", ["cannot be read", "line"]),
        ("train: {epochs: 1}\ntrain:\n  x:\n y\n", ["cannot be read", "line"]),
        ("train: {epochs: 1}\nseed: 1\ntrain: {learning_rate: 0.1}\n", ["train is given twice", "line 3"]),
        ("seed: !!int x\n", ["cannot be read", "'x'"]),
    ],
)
def test_wrong_recipes(tmp_path, crd, text, pieces):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    refused(crd("train", path), path, *pieces)
    refused(crd("train", path, "--dry-run"), path, *pieces)


@pytest.mark.parametrize(
    "override, pieces",
    [
        ("train.epochs", ["'train.epochs' is no setting", "section.key=value"]),
        ("=3", ["'=3' is no setting"]),
        ("train.epochs=[1", ["train.epochs=[1", "cannot be read"]),
        ("train={epochs: 1, epochs: 2}", ["cannot be read"]),
        ("seed=!!int x", ["seed=!!int x", "cannot be read"]),
        ("seed.deeper=1", ["seed is not a section"]),
        ("train.epoch=1", ["train.epoch:", "Did you mean 'epochs'?"]),
        ("rollout.group_size=1", ["rollout.group_size", "got 1"]),
    ],
)
def test_wrong_overrides(recipe, crd, override, pieces):
    path = recipe()
    path.write_text(path.read_text() + "seed: 0\n")
    refused(crd("train", path, override), *pieces)
    assert not path.with_suffix("").exists()


def test_overrides_replace_the_recipe(recipe):
    config = load_config(recipe(), ["train.learning_rate=1e-3", "sampler.delay=7", "model.height=null"])
    assert (config.train.learning_rate, config.sampler.delay, config.model.height) == (1e-3, 7, None)


def test_a_date_is_a_name_of_a_folder(recipe):
    path = recipe()
    path.write_text(path.read_text().replace(f"output_dir: {path.with_suffix('')}", "output_dir: 2024-31-12"))
    assert load_config(path, []).output_dir == Path("2024-31-12")
    assert load_config(path, ["output_dir=2024-11-23"]).output_dir == Path("2024-11-23")


def test_settings_that_may_change_exist():
    for key in CHANGEABLE:
        tree = CRDConfig().model_dump()
        for part in key.split("."):
            tree = tree[part]


# --------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    "name, text, pieces",
    [
        ("missing.txt", None, ["there is no file", ".jsonl"]),
        ("empty.txt", "", ["holds no prompts"]),
        ("blank.txt", "\n \n\n", ["holds no prompts"]),
        ("empty.jsonl", "", ["holds no prompts"]),
        ("hole.txt", "a cat\n\na dog\n", ["line 2", "non-empty"]),
        ("broken.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', ["line 2", "JSON"]),
        ("list.jsonl", '["a"]\n', ["line 1", '"prompt"']),
        ("keyless.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', ["line 2", '"prompt"']),
        ("number.jsonl", '{"prompt": 5}\n', ["line 1", "5"]),
        ("hole.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"}\n', ["line 2"]),
        ("prompts.csv", "a\n", [".txt", ".jsonl"]),
        ("latin.txt", b"caf\xe9\n", ["UTF-8"]),
    ],
)
def test_wrong_prompt_files(tmp_path, recipe, crd, name, text, pieces):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(crd("train", recipe(prompts={"train": str(path), "evaluation": "nano/text/heldout"})), path, *pieces)
    assert not (tmp_path / "run").exists()


def test_a_prompt_folder_is_no_prompt_file(tmp_path):
    assert "cannot be read" in complaint(load_prompts, str(tmp_path))


def test_unknown_nano_prompts_are_listed():
    message = complaint(load_prompts, "nano/texts/train")
    assert "'nano/texts/train'" in message and "counting" in message and "heldout" in message


def test_prompt_files_as_editors_leave_them(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa cat\r\na\u2028dog\r\na cat\r\n\r\n".encode())
    assert load_prompts(str(tmp_path / "p.txt")).texts == ("a cat", "a\u2028dog")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b", "k": 1}\n\n')
    assert load_prompts(str(tmp_path / "p.jsonl")).metadata == ({"k": 1},)


def test_wrong_prompt_lists(tmp_path, pipeline):
    config = tiny_config(tmp_path / "run")
    message = complaint(CRDTrainer, pipeline, train_prompts=[], config=config)
    assert "train prompts" in message and "no prompts" in message
    message = complaint(CRDTrainer, pipeline, eval_prompts=["a cat", " "], config=config)
    assert "evaluation prompts, line 2" in message
    assert "'x'" not in complaint(make_prompt_set, [{"text": "x"}], "train_prompts")


def test_prompts_without_a_quoted_word_cannot_be_scored_by_reading(tmp_path, recipe, crd):
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    prompts = {"train": str(tmp_path / "p.txt"), "evaluation": "nano/text/heldout"}
    path = recipe(prompts=prompts, rewards=[{"name": "ocr", "options": {"detect": False}}])
    refused(crd("train", path), "prompts.train", "double quotes", "'ocr'", "'a cat'")
    assert not (tmp_path / "run").exists()


def test_some_prompts_without_a_quoted_word_count_as_failed(tmp_path, pipeline):
    rewards = [{"name": "ocr", "options": {"detect": False}}]
    config = tiny_config(tmp_path / "run", rewards=rewards, reward_failure_limit=0.5, train={"epochs": 1})
    prompts = {"train_prompts": ['a sign that says "CAT"', "a red square"], "eval_prompts": ['a sign that says "DOG"']}
    CRDTrainer(pipeline, **prompts, config=config).train()
    (row,) = [row for row in read_record(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert row["failed"] == 0.5


# --------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    "name, pieces",
    [
        ("ocrr", ["'ocrr' is not known", "ocr_exact", "file.py:function"]),
        ("{tmp}/missing.py:score", ["there is no file", "missing.py"]),
        ("{tmp}/r.py:score", ["defines no score"]),
        ("{tmp}/r.py:LIMIT", ["LIMIT is no function"]),
        ("{tmp}/broken.py:score", ["cannot be imported", "SyntaxError", "line 1"]),
        ("{tmp}/needs.py:score", ["cannot be imported", "no_such_package", "needs.py, line 1"]),
        ("{tmp}/fails.py:score", ["cannot be imported", "KeyError", "fails.py, line 4"]),
        ("{tmp}/quits.py:score", ["cannot be imported", "SystemExit", "quits.py, line 1"]),
        ("json:score", ["json defines no score"]),
        ("no_such_package.rewards:score", ["cannot be imported", "no_such_package"]),
        (":score", ["neither a module nor a .py file"]),
    ],
)
def test_wrong_rewards(tmp_path, recipe, crd, name, pieces):
    (tmp_path / "r.py").write_text("LIMIT = 3\n")
    (tmp_path / "broken.py").write_text("def score(:\n")
    (tmp_path / "needs.py").write_text("import no_such_package\n")
    (tmp_path / "fails.py").write_text("import json\n\ndef load():\n    return json.loads('{}')['weights']\n\nload()\n")
    (tmp_path / "quits.py").write_text("raise SystemExit(2)\n")
    refused(crd("train", recipe(rewards=[{"name": name.format(tmp=tmp_path)}])), "rewards", *pieces)
    assert not (tmp_path / "run").exists()


def test_a_reward_file_may_define_dataclasses_and_hide_no_module(tmp_path):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 3\n"
    (tmp_path / "json.py").write_text(text + "def score(images, prompts):\n    return [A().x] * len(images)\n")
    assert resolve_reward(f"{tmp_path / 'json.py'}:score", {})([None], [""]) == [3]
    assert sys.modules["json"] is json
    (tmp_path / "halves.py").write_text("1 / 0\n")
    assert "ZeroDivisionError" in complaint(resolve_reward, f"{tmp_path / 'halves.py'}:score", {})
    assert "crd_reward_halves" not in sys.modules


def test_wrong_reward_options():
    assert "{'detekt': True}" in complaint(resolve_reward, "ocr", {"detekt": True})
    assert "takes no options" in complaint(resolve_reward, "json:dumps", {"a": 1})


def test_rewards_of_one_name_would_be_mixed_up(tmp_path, pipeline):
    assert "names of their own, got a, a" in complaint(RewardSet, [NamedReward("a", max), NamedReward("a", min)])
    both = [lambda images, prompts: [0.0] * len(images), lambda images, prompts: [1.0] * len(images)]
    assert "<lambda>" in complaint(CRDTrainer, pipeline, reward_funcs=both, config=tiny_config(tmp_path / "run"))
    assert "reward_funcs" in complaint(CRDTrainer, pipeline, reward_funcs=[], config=tiny_config(tmp_path / "run"))


# ---------------------------------------------------------------------------------------------- models


def test_wrong_models(tmp_path, recipe, crd, tiny_folder):
    refused(crd("train", recipe(model={"path": str(tmp_path)})), "model.path", tmp_path, "model_index.json")
    refused(crd("sample", tmp_path / "nowhere", "a cat"), "model.path", "nowhere", "model_index.json")
    refused(crd("eval", "some/model", "--reward", "blue"), "model.path", "'some/model'")

    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    )
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "ddpm")
    refused(crd("train", recipe(model={"path": str(tmp_path / "ddpm")})), "DDPMPipeline", "StableDiffusion3Pipeline")
    refused(crd("train", recipe(model={"height": 65})), "model.height is 65", "multiple of")
    refused(crd("train", recipe(model={"lora_targets": ["attn.to_q", "nose"]})), "model.lora_targets", "nose")

    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_folder, damaged)
    (weights,) = (damaged / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(crd("train", recipe(model={"path": str(damaged)})), "model.path", damaged)
    (damaged / "model_index.json").write_text("{")
    refused(crd("train", recipe(model={"path": str(damaged)})), "model.path", damaged)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------- run folders, checkpoints


@pytest.fixture
def finished(recipe, crd):
    """A finished run of one epoch: its recipe."""
    path = recipe(train={"epochs": 1})
    code, printed = crd("train", path)
    assert code == 0, printed
    return path


def test_corrupt_checkpoints(finished, crd):
    run = finished.with_suffix("")
    newest = checkpoint.complete(run / "checkpoints")[-1]
    tensors, facts = newest / "state.safetensors", newest / "state.json"
    whole, words = tensors.read_bytes(), facts.read_text()
    middle = len(whole) // 2
    damages = [
        (tensors, whole[:middle], ["damaged", "Remove"]),
        (tensors, whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], ["damaged", "checksum", "Remove"]),
        (facts, words[:-5].encode(), ["cannot be read", "Remove"]),
        (facts, b"[]", ["cannot be read", "Remove"]),
        (facts, b"\xff\xfe", ["cannot be read", "Remove"]),
        (facts, words.replace('"epoch": 1', '"epoch": 0').encode(), ["damaged", "Remove"]),
        (facts, words.replace('"format": 1', '"format": 7').encode(), ["format 7", "reads 1"]),
    ]
    for path, content, pieces in damages:
        before = path.read_bytes()
        assert before != content
        path.write_bytes(content)
        lora = (run / "pytorch_lora_weights.safetensors").read_bytes()
        refused(crd("train", finished), newest, *pieces)
        assert path.read_bytes() == content and (run / "pytorch_lora_weights.safetensors").read_bytes() == lora
        path.write_bytes(before)
    tensors.unlink()
    refused(crd("train", finished), newest, "cannot be read", "Remove")
    shutil.rmtree(newest)  # as the message says
    code, printed = crd("train", finished)
    assert code == 0 and "Resuming after epoch 0" in printed


def test_weights_of_another_rank(tmp_path, pipeline):
    config, other = tiny_config(tmp_path), tiny_config(tmp_path, model={"lora_rank": 8})
    cpu = torch.device("cpu")
    policy = load_policy(pipeline, config.model, cpu)
    tensors = {name: torch.zeros(9, 9) for name in policy.state()}
    assert "other LoRA rank" in complaint(
        policy.load_state, {key: value.shape for key, value in tensors.items()}, tensors.items()
    )
    policy.save(tmp_path)
    wider = load_policy(tiny_pipeline(), other.model, cpu)
    assert "rank" in complaint(wider.load, tmp_path / "pytorch_lora_weights.safetensors")


def test_a_run_of_other_settings_is_not_overwritten(finished, crd):
    run = finished.with_suffix("")
    before = contents(run)
    refused(crd("train", finished, "train.learning_rate=0.5", "model.lora_rank=8"), run, "train.learning_rate: 0.001 -> 0.5")
    assert contents(run) == before
    (run / "config.yaml").write_text("train: {epochs: [\n")
    refused(crd("train", finished), run / "config.yaml", "cannot be read")
    (run / "config.yaml").write_text("train: {epochs: 0}\n")
    refused(crd("report", run), run / "config.yaml", "train.epochs", "got 0")


def test_lost_records_are_noticed(finished, crd):
    run = finished.with_suffix("")
    (run / "metrics.jsonl").unlink()
    refused(crd("report", run), "metrics.jsonl", "no evaluation")
    refused(crd("train", finished), "metrics.jsonl", "0 bytes", "another output_dir")


def test_damaged_records_are_named(finished, crd):
    metrics = finished.with_suffix("") / "metrics.jsonl"
    metrics.write_text("nonsense\n" + metrics.read_text())
    refused(crd("report", metrics.parent), metrics, "'nonsense")


def test_foreign_folders_and_files_are_left_alone(tmp_path, recipe, crd):
    path = recipe()
    foreign = tmp_path / "run"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    refused(crd("train", path), "output_dir", foreign, "Give another output_dir")
    assert contents(foreign) == {"thesis.tex": b"years of work"}
    shutil.rmtree(foreign)
    foreign.write_text("years of work")
    refused(crd("train", path), "output_dir", foreign, "Give another output_dir")
    assert foreign.read_text() == "years of work"
    refused(crd("train", path, f"output_dir={foreign}/below"), "output_dir", "cannot be written")
    refused(crd("train", path, "output_dir=/proc/run"), "output_dir", "/proc/run", "cannot be written")


def test_an_unfinished_run_can_be_neither_reported_nor_used(tmp_path, crd):
    nothing, unfinished = tmp_path / "nothing", RunFolder(tmp_path / "unfinished")
    nothing.mkdir()
    unfinished.open(tiny_config(unfinished.path), write=True)
    before = contents(tmp_path)
    refused(crd("report", nothing), nothing, "not the folder of a run")
    refused(crd("report", tmp_path / "absent"), "absent", "not the folder of a run")
    refused(crd("report", unfinished.path), "not finished", "crd train")
    refused(crd("eval", nothing, "--reward", "blue"), nothing, "model_index.json")
    refused(crd("eval", unfinished.path, "--reward", "blue"), "not finished", "crd train")
    refused(crd("sample", nothing, "a cat"), nothing, "model_index.json")
    refused(crd("sample", unfinished.path, "a cat"), "not finished", "crd train")
    assert contents(tmp_path) == before


def test_wrong_arguments_of_sample_and_eval(tmp_path, crd, tiny_folder):
    refused(crd("sample", tiny_folder, "  "), "prompt is empty")
    refused(crd("sample", tiny_folder, "a cat", "-o", tmp_path / "cat.tiff"), "cat.tiff", ".png")
    refused(crd("eval", tiny_folder, "--prompts", tmp_path / "none.txt", "--reward", "blue"), "none.txt")
    refused(crd("eval", tiny_folder, "--reward", "blues"), "'blues' is not known")
    refused(crd("eval", tiny_folder, "--reward", "blue", "--reward", "blue", "--count", 1), "names of their own")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_files(monkeypatch):
    """``small_files(size)``: from here on no file may grow beyond that many bytes, as on a disk that is full."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # early versions of 3.11 would leave half of it
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_earlier_checkpoints(finished, crd, small_files):
    run = finished.with_suffix("")
    earlier = {path.name: contents(path) for path in checkpoint.complete(run / "checkpoints")}
    small_files(50_000)  # a checkpoint has 95 000
    refused(crd("train", finished, "train.epochs=3"), "step-000002", "disk space", "same command")
    small_files(resource.RLIM_INFINITY)
    assert {path.name: contents(path) for path in checkpoint.complete(run / "checkpoints")} == earlier
    for path in checkpoint.complete(run / "checkpoints"):
        checkpoint.load(path)
    code, printed = crd("train", finished, "train.epochs=3")
    assert code == 0 and "Resuming after epoch 1 of 3" in printed
    checkpoint.load(checkpoint.complete(run / "checkpoints")[-1])


def test_a_full_disk_at_each_file(tmp_path, recipe, crd, small_files):
    path = recipe(train={"epochs": 1})
    small_files(300)
    refused(crd("train", path), "output_dir", tmp_path / "run", "cannot be written")
    small_files(3_000)
    refused(crd("train", path), tmp_path / "run", "disk space", "same command")  # the first grid of pictures
    small_files(120_000)
    refused(crd("train", path), tmp_path / "run", "disk space", "same command")  # the last figure


def test_a_full_disk_for_records_and_pictures(tmp_path, crd, tiny_folder):
    record = Record(tmp_path / "record.jsonl")
    record.path = Path("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        record.write({"a": 1})
    (tmp_path / "cat.png").symlink_to("/dev/full")
    answer = crd("sample", tiny_folder, "a cat", "-o", tmp_path / "cat.png", "--count", 1, "--steps", 1)
    refused(answer, "No space left")
    (tmp_path / "file").write_text("")
    where = ("--output", tmp_path / "file" / "below")
    refused(crd("eval", tiny_folder, "--reward", "blue", "--count", 1, "--steps", 1, *where), "below")


def test_nothing_of_a_wrong_recipe_reaches_the_disk(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(tmp_path / "run", train={"epochs": 0})))
    program = [sys.executable, "-m", "crd", "train", str(path)]
    done = subprocess.run(program, check=False, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 2 and "train.epochs" in done.stderr and "Traceback" not in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_the_message_of_an_unreadable_checkpoint_does_not_hide_its_facts(tmp_path):
    saved = checkpoint.save(tmp_path, 3, {"a": torch.ones(2)}, {"epoch": 1}, keep=2)
    assert json.loads((saved / "state.json").read_text())["epoch"] == 1
    tensors, facts = checkpoint.load(saved)
    assert tensors["a"].tolist() == [1, 1] and facts["step"] == 3
