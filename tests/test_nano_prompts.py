"""The nano world's GenEval prompt sets: complete, disjoint in content, composed as documented."""

from collections import Counter

import pytest

from crd.errors import CRDError
from crd.nano import world
from crd.nano.geneval import geneval_rows
from crd.prompts import FORMS, load_prompts
from crd.rewards.geneval.rules import check_metadata

TRAIN, HELD_OUT = (load_prompts(f"nano/geneval/{split}") for split in ("train", "heldout"))


def tags(prompts):
    return [entry["tag"] for entry in prompts.metadata]


def test_composition():
    assert Counter(tags(TRAIN)) == {"two_object": 14, "counting": 10, "colors": 24, "position": 60, "color_attr": 26}
    assert Counter(tags(HELD_OUT)) == {
        "single_object": 5,
        "two_object": 6,
        "counting": 5,
        "colors": 6,
        "position": 20,
        "color_attr": 28,
    }


def test_held_out_tasks_take_turns():
    assert tags(HELD_OUT)[:30] == list(world.SHAPE_TASKS) * 5
    first = Counter(tags(HELD_OUT)[:36])
    assert first == {"single_object": 5, "two_object": 6, "counting": 5, "colors": 6, "position": 7, "color_attr": 7}


def test_train_is_shuffled():
    assert len(set(tags(TRAIN)[:20])) >= 4


def content(row):
    """What the picture shows, whatever the order or direction in which it is told."""
    clauses = row["include"]
    if row["tag"] == "position":
        (target, subject), relation = clauses, clauses[1]["position"][0]
        if relation in ("right of", "below"):
            target, subject = subject, target
        return "position", subject["class"], target["class"], relation in ("left of", "right of")
    return row["tag"], frozenset((c["class"], c["count"], c.get("color")) for c in clauses)


def test_disjoint_in_text_and_content():
    assert not set(TRAIN.texts) & set(HELD_OUT.texts)
    train, held_out = ({content(row) for row in geneval_rows(split)} for split in ("train", "heldout"))
    assert not train & held_out
    assert len(held_out) == 5 + 3 + 5 + 6 + 10 + 14


def test_which_sets_are_disjoint_is_as_the_messages_say():
    disjoint = []
    for task in ("text", *world.SHAPE_TASKS, "geneval"):
        train, held_out = (set(load_prompts(f"nano/{task}/{split}").texts) for split in ("train", "heldout"))
        assert train == held_out or not train & held_out
        disjoint += [task] * (train != held_out)
    assert f"disjoint from train for {', '.join(disjoint[:-1])} and {disjoint[-1]}," in FORMS


def test_every_relation_is_held_out_for_some_pairs():
    relations = Counter(row["include"][1]["position"][0] for row in geneval_rows("heldout") if row["tag"] == "position")
    assert relations == {"left of": 6, "right of": 6, "above": 4, "below": 4}


def test_every_prompt_of_the_small_tasks_is_in_one_of_the_sets():
    all_texts = {*TRAIN.texts, *HELD_OUT.texts}
    for task, count in (("single_object", 5), ("two_object", 20), ("counting", 15), ("colors", 30), ("position", 80)):
        known = {text for split in ("train", "heldout") for text in load_prompts(f"nano/{task}/{split}").texts}
        assert len(known) == count and known <= all_texts


def test_held_out_colors_are_the_base_models():
    for prompts, held_out in ((TRAIN, False), (HELD_OUT, True)):
        for entry in prompts.metadata:
            for clause in entry["include"]:
                assert "color" not in clause or ((clause["color"], clause["class"]) in world.HELD_OUT_PAIRS) == held_out


@pytest.mark.parametrize("prompts", [TRAIN, HELD_OUT], ids=["train", "heldout"])
def test_metadata(prompts):
    for entry in prompts.metadata:
        check_metadata(entry)


def test_sets_are_fixed():
    assert geneval_rows("train") == geneval_rows("train")
    assert load_prompts("nano/geneval/train").texts == TRAIN.texts


def test_unknown_split():
    with pytest.raises(CRDError, match="geneval"):
        load_prompts("nano/geneval/test")
