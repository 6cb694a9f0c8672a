"""Tiny models of the real classes, with random weights, made in a second; and the command line on them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import sys

import pytest
import torch
import yaml
from tiny import tiny_pipeline, tiny_settings

torch.set_num_threads(1)

#: a reward that depends on every picture, as users write them
REWARD = """
import numpy as np


def redness(images, prompts, **metadata):
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]
"""


@pytest.fixture
def pipeline():
    """A random SD3 pipeline of the nano world's shapes, small enough for hundreds of steps."""
    return tiny_pipeline()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The same pipeline as a folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


def write_recipe(folder, model_folder, name, **sections):
    """Writes ``name.yaml`` in ``folder``, for a run in ``folder/name`` of the saved model with a reward from a file."""
    (folder / "rewards.py").write_text(REWARD)
    model = {"path": str(model_folder), **sections.pop("model", {})}
    rewards = sections.pop("rewards", [{"name": f"{folder / 'rewards.py'}:redness"}])
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(folder / name, model=model, rewards=rewards, **sections)))
    return path


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """``recipe(name, **sections)`` is :func:`write_recipe` in tmp_path."""
    return lambda name="run", **sections: write_recipe(tmp_path, tiny_folder, name, **sections)


@pytest.fixture
def crd(monkeypatch, capsys):
    """``crd("train", recipe)`` is the command of that name in this process: exit code and everything it printed."""
    from crd.cli import main

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["crd", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out + printed.err

    return run
