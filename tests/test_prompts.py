"""Prompt files and lists: what is refused and where, what repeats mean, large files, tables of the datasets library."""

import json
import logging
from collections import Counter

import pytest
from tiny import tiny_config

from crd.config import CRDConfig
from crd.errors import CRDError
from crd.given import as_given, prompt_set
from crd.given_checks import check_targets, warn_of_shared_prompts
from crd.prompts import MAX_LINE, load_prompts, make_prompt_set
from crd.rewards.geneval import GenEvalReward
from crd.rewards.geneval.prompts import color_attr, position, single_object
from crd.rewards.named import resolve_reward
from crd.rewards.protocol import NamedReward
from crd.trainer import CRDTrainer


def complaint(function, *arguments):
    with pytest.raises(CRDError) as told:
        function(*arguments)
    return str(told.value)


def write(folder, rows, name="prompts.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "content", "pieces"),
    [
        ("latin.txt", "a cat\na café\n".encode("latin-1"), ["line 2", "UTF-8"]),
        ("wide.txt", "a cat\n".encode("utf-16"), ["line 1", "UTF-8"]),
        ("long.txt", b"a cat\n" + b"x" * (MAX_LINE + 1), ["line 2", str(MAX_LINE)]),
        ("deep.jsonl", b'{"prompt": "a", "k": ' + b"[" * 200_000 + b"}\n", ["line 1", "JSON"]),
        ("types.jsonl", b'{"prompt": "a", "n": 3}\n{"prompt": "b", "n": "3"}\n', ["line 2", "'n'", "text", "a number", "line 1"]),
        ("truth.jsonl", b'{"prompt": "a", "n": 3}\n{"prompt": "b", "n": true}\n', ["line 2", "true or false"]),
        ("taken.jsonl", b'{"prompt": "a"}\n{"prompt": "b", "images": []}\n', ["line 2", "'images'", "Rename"]),
    ],
)
def test_wrong_files_are_told_by_line(tmp_path, name, content, pieces):
    (tmp_path / name).write_bytes(content)
    message = complaint(load_prompts, str(tmp_path / name))
    assert all(piece in message for piece in [name, *pieces]), message


def test_metadata_that_a_line_lacks_or_has_as_null_is_no_change_of_type(tmp_path):
    rows = [{"prompt": "a", "n": 1}, {"prompt": "b"}, {"prompt": "c", "n": None}, {"prompt": "d", "n": 0.5}]
    prompts = load_prompts(write(tmp_path, rows))
    assert prompts.metadata == ({"n": 1}, {}, {"n": None}, {"n": 0.5})


def test_repeats_are_counted_said_and_keep_their_weight(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "crd"):
        prompts = load_prompts(write(tmp_path, [{"prompt": "a"}, {"prompt": "b"}, {"prompt": " b "}, {"prompt": "a", "k": 1}]))
    assert "1 of 4 lines repeat" in caplog.text
    assert prompts.texts == ("a", "b", "a") and prompts.metadata == ({}, {}, {"k": 1})  # other metadata: another prompt
    assert prompts.lines == (0, 1, 1, 2)
    drawn = Counter(group.index for epoch in range(4) for group in prompts.epoch(0, epoch, 3))
    assert drawn == {0: 3, 1: 6, 2: 3}  # three passes over four lines
    assert [group.index for group in prompts.first(9)] == [0, 1, 2]


def test_an_epoch_of_a_large_file_is_quick_and_a_permutation(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(9_000)))
    prompts = load_prompts(str(path))
    drawn = [group.index for epoch in range(3) for group in prompts.epoch(1, epoch, 3_000)]
    assert sorted(drawn) == list(range(9_000)) and drawn != sorted(drawn)
    assert [group.index for group in prompts.epoch(1, 1, 3_000)] == drawn[3_000:6_000]


def test_lists():
    assert "line 2" in complaint(make_prompt_set, ["a", 5], "train prompts")
    assert "'prompts'" in complaint(make_prompt_set, [{"prompt": "a", "prompts": 1}], "train prompts")
    assert "7" in complaint(make_prompt_set, [{"prompt": "a", 7: 1}], "train prompts")
    assert "no prompts" in complaint(prompt_set, [], "train prompts")
    message = complaint(prompt_set, {"prompt": "a"}, "train_prompts")
    assert "train_prompts" in message and "got a dict" in message


def test_a_path_is_a_file_name(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a cat\n")
    assert prompt_set(path, "train prompts").texts == ("a cat",)
    assert named(path) == str(path)


def named(prompts):
    """What a run's settings call these training prompts."""
    return as_given(CRDConfig(), None, None, prompts, ["a bird"]).prompts.train


def test_a_list_is_known_by_its_texts_and_metadata():
    """Else a run would go on with other targets of the same prompts."""
    lists = [
        ["a cat", "a dog"],
        [{"prompt": "a cat", "k": 1}, "a dog"],
        [{"prompt": "a cat", "k": 2}, "a dog"],
        ["a dog", "a cat"],
    ]
    assert len({named(rows) for rows in lists}) == len(lists)
    assert named(lists[0]) == named([{"prompt": "a cat"}, {"prompt": "a dog"}]) == "<2 prompts, 538d54c137428170>"


def test_prompts_of_ones_own_need_evaluation_prompts_of_their_kind(tmp_path):
    """The default ones are signs of the nano world, and nobody would see that the numbers are theirs."""
    (tmp_path / "p.txt").write_text("a cat\n")
    own = {"prompts": {"train": str(tmp_path / "p.txt")}}
    for config, given in ((CRDConfig(), ["a cat"]), (CRDConfig(), tmp_path / "p.txt"), (CRDConfig(**own), None)):
        assert "eval_prompts in Python" in complaint(as_given, config, None, None, given, None)
    as_given(CRDConfig(prompts={**own["prompts"], "evaluation": "nano/text/heldout"}), None, None, None, None)  # as was said
    as_given(CRDConfig(), None, None, "nano/geneval/train", None)
    as_given(CRDConfig(), None, None, None, None)


def test_prompts_that_are_in_both_sets_are_counted(caplog):
    train, held_out = make_prompt_set(["a", "b", "c"], "train"), make_prompt_set(["d", "c", "b", "e"], "evaluation")
    warn_of_shared_prompts(train, held_out)
    assert "2 of 4 evaluation prompts are training prompts too" in caplog.text and "the first is 'c'" in caplog.text
    caplog.clear()
    warn_of_shared_prompts(make_prompt_set(["a"], "train"), held_out)
    assert not caplog.text


def test_a_text_of_many_lines_is_no_file(tmp_path, monkeypatch):
    assert "Prompts themselves are given as a list" in complaint(load_prompts, "a photo of a circle\n" * 100)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("a cat\n")
    assert load_prompts("~/p.txt").texts == ("a cat",)


# ---------------------------------------------------------------------------------------------- datasets


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets")


def test_a_dataset(datasets):
    table = datasets.Dataset.from_list([{"prompt": "a cat", "level": 1}, {"prompt": "a dog", "level": None}])
    assert prompt_set(table, "train prompts").texts == ("a cat", "a dog")
    assert prompt_set(table, "train prompts").metadata == ({"level": 1}, {})
    assert named(table) == named([{"prompt": "a cat", "level": 1}, "a dog"])


def test_a_dataset_of_geneval_prompts_has_no_keys_that_were_absent(datasets):
    rows = [single_object("ring"), color_attr("red", "ring", "blue", "cross")]
    prompts = prompt_set(datasets.Dataset.from_list(rows), "train prompts")
    assert list(prompts.metadata) == [{key: value for key, value in row.items() if key != "prompt"} for row in rows]
    check_targets([NamedReward("geneval", resolve_reward("geneval", {}))], prompts)


def test_other_tables_are_told_what_to_do(datasets):
    table = datasets.Dataset.from_dict({"caption": ["a cat"]})
    message = complaint(prompt_set, table, "train_prompts")
    assert "train_prompts" in message and "caption" in message and "rename_column" in message
    assert "one split" in complaint(prompt_set, datasets.DatasetDict(train=table), "train_prompts")
    assert "no prompts" in complaint(prompt_set, datasets.Dataset.from_dict({"prompt": []}), "train_prompts")


def test_training_takes_a_dataset(datasets, tmp_path, pipeline):
    table = datasets.Dataset.from_dict({"prompt": ["a photo of a ring", "a photo of a cross"]})
    trainer = CRDTrainer(pipeline, train_prompts=table, eval_prompts=["a photo of a disc"], config=tiny_config(tmp_path / "run"))
    assert trainer.train_prompts.texts == ("a photo of a ring", "a photo of a cross")


# ----------------------------------------------------------------------------------- GenEval's metadata


@pytest.mark.parametrize(
    ("row", "pieces"),
    [
        ({**single_object("ring"), "tag": "one"}, ["tag", "'one'"]),
        ({**single_object("ring"), "include": []}, ["include"]),
        (single_object("banana"), ["a photo of a banana", "class 'banana'", "circle, square"]),
        (color_attr("red", "ring", "mauve", "cross"), ["color 'mauve'", "red"]),
        ({**position("ring", "left of", "cross"), "include": [{"class": "ring", "count": 1, "position": ["near", 0]}]}, ["near"]),
    ],
)
def test_geneval_metadata_that_the_reward_cannot_use(tmp_path, row, pieces):
    prompts = load_prompts(write(tmp_path, [single_object("ring"), {**row, "prompt": row["prompt"] + " "}]))
    message = complaint(check_targets, [NamedReward("geneval", resolve_reward("geneval", {}))], prompts)
    assert all(piece in message for piece in ["prompts.train", *pieces]), message
    check_targets([NamedReward("blue", resolve_reward("blue", {}))], prompts)  # nobody reads it


def test_geneval_needs_metadata_and_a_detector_of_ones_own_may_know_anything():
    plain, fruit = make_prompt_set(["a cat"], "list"), make_prompt_set([single_object("banana")], "list")
    rewards = [NamedReward("geneval", resolve_reward("geneval", {}))]
    assert "crd prompts geneval" in complaint(check_targets, rewards, plain)
    check_targets([NamedReward("own", GenEvalReward(lambda images: [[] for _ in images]))], fruit)
