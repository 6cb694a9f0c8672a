"""The hack alarm: its rule on made-up records, and on real runs that it flags, stops and rolls back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_tiny import weights_of

from crd import checkpoint
from crd.alarm import alarm_settings, best_evaluation, find_alarms, watched
from crd.cli import _show
from crd.config import AlarmConfig
from crd.errors import CRDError
from crd.export.card import _table
from crd.given_checks import check_alarm_judges
from crd.recipe import build_config
from crd.report import figures

SETTINGS = AlarmConfig()


def row(label, reward, tesseract, diversity=0.1, **more):
    epoch = int(label.removeprefix("epoch-")) if label.startswith("epoch") else 0
    return {
        "label": label,
        "epoch": epoch,
        "step": 2 * epoch,
        "reward": reward,
        "tesseract": tesseract,
        "diversity": diversity,
        **more,
    }


BASE = [row("base", 0.4, 0.3), row("base-guided", 0.9, 0.8, 0.08)]


def signs(rows, settings=SETTINGS):
    return [(alarm.step, alarm.sign) for alarm in find_alarms(rows, settings)]


def test_rising_together_is_no_alarm():
    assert signs([*BASE, row("epoch-1", 0.6, 0.5), row("epoch-2", 0.8, 0.46), row("epoch-3", 0.9, 0.7)]) == []


def test_reward_up_and_judge_down_is_one_with_its_step():
    rows = [*BASE, row("epoch-1", 0.6, 0.5), row("epoch-2", 0.8, 0.44)]
    assert signs(rows) == [(4, "tesseract")]
    text = find_alarms(rows, SETTINGS)[0].text
    assert "0.600 to 0.800 since epoch-1" in text and "tesseract fell from 0.500 to 0.440" in text


def test_both_falling_is_a_bad_run_but_no_hack():
    assert signs([*BASE, row("epoch-1", 0.6, 0.5), row("epoch-2", 0.5, 0.3)]) == []


def test_the_best_evaluation_counts_not_the_last():
    """A slow slide, each step of it below the threshold, is caught in the end."""
    rows = [*BASE, *(row(f"epoch-{k}", 0.5 + 0.1 * k, 0.6 - 0.03 * k) for k in range(1, 5))]
    assert signs(rows) == [(6, "tesseract"), (8, "tesseract")]


def test_guided_model_is_no_standard_for_judges_but_is_for_diversity():
    assert signs([*BASE, row("epoch-1", 0.95, 0.5)]) == []
    assert signs([*BASE, row("epoch-1", 0.6, 0.5, diversity=0.039)]) == [(2, "diversity")]
    assert signs([*BASE, row("epoch-1", 0.6, 0.5, diversity=0.041)]) == []


def test_settings_choose_judges_and_thresholds():
    rows = [*BASE, row("epoch-1", 0.6, 0.5, alignment=0.9), row("epoch-2", 0.8, 0.44, alignment=0.8)]
    assert signs(rows) == [(4, "tesseract"), (4, "alignment")]
    assert signs(rows, AlarmConfig(judges=("alignment",))) == [(4, "alignment")]
    assert signs(rows, AlarmConfig(judge_fall=0.2)) == []
    assert signs(rows, AlarmConfig(reward_rise=0.3)) == []


def test_best_evaluation_is_by_judges_and_without_alarm():
    rows = [*BASE, row("epoch-1", 0.6, 0.5), row("epoch-2", 0.7, 0.55), row("epoch-3", 0.9, 0.45)]
    assert best_evaluation(rows, SETTINGS)["label"] == "epoch-2"
    alike = [*BASE, row("epoch-1", 0.6, 0.5), row("epoch-2", 0.7, 0.9, diversity=0.01)]
    assert best_evaluation(alike, SETTINGS)["label"] == "epoch-1"
    assert best_evaluation([row("epoch-1", 0.6, 0.0), row("epoch-2", 0.5, 0.0)], AlarmConfig(judges=()))["label"] == "epoch-1"


def test_a_judge_that_is_trained_on_is_no_judge(capsys, monkeypatch, tmp_path):
    config = build_config(
        {"rewards": [{"name": "tesseract"}, {"name": "ocr", "weight": 0.5}, {"name": "geneval_net", "weight": 0.0}]}
    )
    rows = [
        row("epoch-1", 0.6, 0.9, drift=0.1, geneval_net=0.2, alignment=0.9),
        row("epoch-2", 0.8, 0.5, drift=0.1, geneval_net=0.2, alignment=0.8),
    ]
    settings = alarm_settings(config)
    assert watched(rows, settings) == ["geneval_net", "alignment"]  # what has no weight is not trained on
    assert signs(rows, settings) == [(4, "alignment")]
    after = {**rows[1], "guidance_scale": 1.0}
    summary = {"before": None, "before_guided": None, "anchor_alone": None, "after": after, "alarms": [], "how_to_load": []}
    assert "never trained on: geneval_net, alignment.\n" in _table(config, summary)
    _show(summary, Path("run"), config)
    assert "never trained on: geneval_net, alignment\n" in capsys.readouterr().out
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    figures.curves(tmp_path / "curves.png", [], rows, [], [], ["geneval_net", "alignment"])
    monkeypatch.undo()
    lines = [line.get_label() for line in drawn[0].axes[0].lines]
    figures.plt.close(drawn[0])
    assert [name for name in lines if "judge" in name] == ["judge: geneval_net", "judge: alignment"]


@pytest.mark.parametrize(
    ("alarm", "message"),
    [
        ({"judges": ["tesseract"]}, "alarm.judges: tesseract is trained on"),
        ({"action": "stop"}, None),
        ({"judges": ["pickscore"]}, "pickscore is not evaluated"),
    ],
)
def test_an_alarm_by_a_judge_that_is_trained_on_is_refused(alarm, message):
    config = build_config({"rewards": [{"name": "tesseract"}], "alarm": alarm})
    if message is None:
        check_alarm_judges(config, ["tesseract", "alignment"])
    else:
        with pytest.raises(CRDError, match=message):
            check_alarm_judges(config, ["tesseract", "alignment"])


HACK = """
import numpy as np


def redness(images, prompts, **metadata):
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]


def plainness(images, prompts, **metadata):
    return [1 - value for value in redness(images, prompts)]
"""


@pytest.fixture
def hacked(recipe, tmp_path):
    """A recipe whose judge falls exactly as the reward rises; with the two exchanged, the other way round."""

    def make(name, tuning="lora", reward="plainness", judge="redness", **alarm):
        path = recipe(
            name,
            model={"tuning": tuning},
            rewards=[{"name": f"{tmp_path / 'hack.py'}:{reward}"}],
            train={"epochs": 6, "learning_rate": 3e-3},
            evaluation={"every": 1, "judges": [{"name": f"{tmp_path / 'hack.py'}:{judge}"}]},
            objective={"policy_weight": 0.0},  # towards the guided model, which paints less red
            anchor={"adaptation": "constant"},
            alarm={"judges": [f"{tmp_path / 'hack.py'}:{judge}"], "judge_fall": 4e-4, "reward_rise": 0.0, **alarm},
        )
        (tmp_path / "hack.py").write_text(HACK)
        return path, tmp_path / name

    return make


def test_flagging_says_it_in_log_summary_model_card_and_output(hacked, crd, caplog):
    path, folder = hacked("flagged", diversity_ratio=0.0)
    code, printed = crd("train", path)
    summary = json.loads((folder / "summary.json").read_text())
    assert code == 0 and summary["epochs"] == 6 and summary["rolled_back_to"] is None
    first = summary["alarms"][0]
    assert first["sign"].endswith("redness") and first["step"] >= 1
    assert f"HACK ALARM at optimiser step {first['step']}" in printed
    assert f"hack alarm at optimiser step {first['step']}" in caplog.text
    card = (folder / "README.md").read_text()
    assert first["text"].replace(first["sign"], "hack.py:redness") in card and str(folder.parent / "hack.py") not in card


def test_stopping_ends_the_run_for_good(hacked, crd):
    path, folder = hacked("stopped", action="stop", diversity_ratio=0.0)
    assert crd("train", path)[0] == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["epochs"] < 6 and len({alarm["epoch"] for alarm in summary["alarms"]}) == 1
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    assert crd("train", path)[0] == 0  # the same command again does not go on
    assert json.loads((folder / "summary.json").read_text()) == summary
    again = load_file(folder / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(again[key], value) for key, value in weights.items())


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_rolling_back_gives_the_best_student(hacked, crd, tuning):
    path, folder = hacked("back", tuning, action="roll_back", diversity_ratio=0.0)
    assert crd("train", path)[0] == 0
    summary = json.loads((folder / "summary.json").read_text())
    label = summary["rolled_back_to"]
    epoch = int(label.removeprefix("epoch-"))
    assert epoch < summary["epochs"]
    # a run that simply ends at that epoch has the same weights
    plain, other = hacked("plain", tuning)
    assert crd("train", plain, f"train.epochs={epoch}")[0] == 0
    rolled, ended = weights_of(folder), weights_of(other)
    for key, value in ended.items():
        np.testing.assert_allclose(rolled[key], value, rtol=1e-5, atol=1e-6)
    assert summary["after"]["reward"] == json.loads((other / "summary.json").read_text())["after"]["reward"]
    assert crd("train", path)[0] == 0
    assert json.loads((folder / "summary.json").read_text())["rolled_back_to"] == label


def test_the_best_student_is_kept_until_a_checkpoint_knows_a_better_one(hacked, crd, monkeypatch):
    path, folder = hacked("killed", reward="redness", judge="plainness", action="roll_back", diversity_ratio=0.0)

    def full(folder, step, *rest):
        if step == 3:
            raise OSError("no space left")
        return save(folder, step, *rest)

    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", full)
    code, printed = crd("train", path)
    assert code == 2 and "no space left" in printed
    assert sorted(kept.name for kept in (folder / "best").iterdir()) == ["epoch-0002", "epoch-0003"]
    monkeypatch.setattr(checkpoint, "save", save)
    assert crd("train", path)[0] == 0
    assert [kept.name for kept in (folder / "best").iterdir()] == ["epoch-0006"]


def test_weights_that_were_not_kept_cannot_be_rolled_back_to(hacked, crd):
    path, folder = hacked("late", diversity_ratio=0.0)
    assert crd("train", path)[0] == 0
    rows = (folder / "metrics.jsonl").read_text()
    code, printed = crd("train", path, "alarm.action=roll_back")
    assert code == 2 and "were not kept" in printed and "alarm.action=stop" in printed
    assert (folder / "metrics.jsonl").read_text() == rows
    assert crd("train", path, "alarm.action=stop")[0] == 0
