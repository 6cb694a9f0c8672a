"""Generated prompt files: published weights, nothing of the test sets, the same bytes for the same options."""

import json
from collections import Counter

import pytest

from crd.errors import CRDError
from crd.nano.world import article
from crd.prompt_sets import geneval, ocr
from crd.prompts import load_prompts
from crd.rewards.geneval.prompts import COCO_CLASSES, generate, to_jsonl
from crd.rewards.geneval.rules import check_metadata
from crd.rewards.ocr import quoted_target


@pytest.fixture(scope="module")
def train_rows():
    return geneval.geneval_train_rows()


def test_the_published_weights(train_rows):
    counts = {"position": 20_588, "counting": 14_706, "color_attr": 8_824, "colors": 2_941, "two_object": 2_941}
    assert Counter(row["tag"] for row in train_rows) == counts
    assert len({row["tag"] for row in train_rows[:20]}) >= 3  # shuffled
    for row in train_rows[::100]:
        check_metadata(row)


@pytest.mark.parametrize("size", [1, 2, 7, 100, 12_345])
def test_sizes_add_up_and_are_within_one_of_their_share(size):
    sizes = geneval.task_sizes(size)
    assert sum(sizes.values()) == size
    assert all(abs(sizes[tag] - size * weight / 1.7) < 1 for tag, weight in geneval.TASK_WEIGHTS.items())


def other_wordings(row):
    """All prompts that ask for the same picture, written by hand from the clauses."""
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    names = [" ".join(filter(None, [clause.get("color"), clause["class"]])) for clause in row["include"]]
    a = [f"{article(name)}" for name in names]
    match row["tag"]:
        case "two_object" | "color_attr":
            return {f"a photo of {a[0]} and {a[1]}", f"a photo of {a[1]} and {a[0]}"}
        case "position":
            relation = row["include"][1]["position"][0]
            return {f"a photo of {a[1]} {relation} {a[0]}", f"a photo of {a[0]} {opposite[relation]} {a[1]}"}
    return {row["prompt"]}


def test_no_test_prompt_in_any_order_of_objects(train_rows):
    official = generate()
    forbidden = set().union(*map(other_wordings, official))
    # one pair of official prompts differs in the order of objects only, so two wordings less
    assert len(forbidden) == 553 + 99 + 100 + 100 - 2 and {row["prompt"] for row in official} < forbidden
    train = {row["prompt"] for row in train_rows}
    assert not train & forbidden
    assert not {row["prompt"] for row in geneval.geneval_train_rows(3_000, seed=5)} & forbidden


def test_only_tasks_with_too_few_prompts_repeat_and_then_use_all(train_rows):
    distinct = {tag: len({row["prompt"] for row in train_rows if row["tag"] == tag}) for tag in geneval.TASK_WEIGHTS}
    assert distinct["counting"] == 240 - 80
    assert distinct["position"] == 20_588 and distinct["color_attr"] == 8_824 and distinct["two_object"] == 2_941
    assert 600 < distinct["colors"] <= 790 - 94


def test_training_on_the_file_keeps_the_weights(tmp_path, train_rows):
    (tmp_path / "g.jsonl").write_text(to_jsonl(train_rows[:2_000]))
    prompts = load_prompts(str(tmp_path / "g.jsonl"))
    drawn = Counter(group.metadata["tag"] for group in prompts.epoch(0, 0, 2_000))
    assert drawn == Counter(row["tag"] for row in train_rows[:2_000])


def test_draws_are_spread_over_classes(train_rows):
    names = Counter(clause["class"] for row in train_rows if row["tag"] == "position" for clause in row["include"])
    assert len(names) == 80
    mean = 2 * 20_588 / 80
    chi_square = sum((count - mean) ** 2 / mean for count in names.values())
    assert chi_square < 124  # 99.9 % quantile of 79 degrees of freedom; without replacement it is smaller still


def test_unseen_objects():
    held_out = set(geneval.UNSEEN_CLASSES)
    assert len(held_out) == 20 and held_out < set(COCO_CLASSES)
    train, test = geneval.geneval_train_rows(2_000, unseen_objects=True), geneval.geneval_test_rows(unseen_objects=True)
    assert not {clause["class"] for row in train for clause in row["include"]} & held_out
    assert {clause["class"] for row in test for clause in row["include"]} <= held_out
    assert set(Counter(row["tag"] for row in test)) == {"single_object", *geneval.TASK_WEIGHTS}


def test_rows_are_a_function_of_size_and_seed():
    assert geneval.geneval_train_rows(200, seed=1) == geneval.geneval_train_rows(200, seed=1)
    assert geneval.geneval_train_rows(200, seed=1) != geneval.geneval_train_rows(200, seed=2)
    assert ocr.ocr_prompts("train", 200, seed=1) == ocr.ocr_prompts("train", 200, seed=1)
    assert ocr.ocr_prompts("train", 200, seed=1) != ocr.ocr_prompts("train", 200, seed=2)


# ------------------------------------------------------------------------------------------------ texts


def words_in(prompts):
    return {word for prompt in prompts for word in quoted_target(prompt).split()}


def test_words_are_disjoint():
    train, test = ocr.ocr_prompts("train", 20_000), ocr.ocr_prompts("test", 1_000, seed=3)
    assert len(set(train)) == 20_000 and len(set(test)) == 1_000
    assert not words_in(train) & words_in(test)
    assert words_in(train) | words_in(test) == set(ocr.SHIPPED_WORDS)
    assert 0.15 < len(words_in(test)) / len(ocr.SHIPPED_WORDS) < 0.25


def test_a_word_never_changes_sides():
    own = ["Zephyr", "naïve", *(word.lower() for word in ocr.SHIPPED_WORDS[:50])]
    upper = [word.upper() for word in reversed(own)]
    assert {word.upper() for word in ocr.words_of(own, "test")} == set(ocr.words_of(upper, "test"))


def test_lengths_are_equal_parts_and_templates_are_all_used():
    prompts = ocr.ocr_prompts("test", 1_000)
    assert Counter(len(quoted_target(prompt).split()) for prompt in prompts) == {1: 333, 2: 333, 3: 334}
    assert all(prompt.count('"') == 2 for prompt in prompts)
    assert len({prompt.replace(quoted_target(prompt), "{}") for prompt in prompts}) == len(set(ocr.TEMPLATES))
    assert Counter(len(quoted_target(p).split()) for p in ocr.ocr_prompts("test", 7, longest=1)) == {1: 7}


def test_all_prompts_that_there_are_and_one_more():
    words = [f"w{i}" for i in range(10)]
    possible = len(ocr.TEMPLATES) * len(ocr.words_of(words, "train"))
    assert len(set(ocr.ocr_prompts("train", possible, words=words, longest=1))) == possible
    with pytest.raises(CRDError, match=f"makes {possible} prompts"):
        ocr.ocr_prompts("train", possible + 1, words=words, longest=1)


# ------------------------------------------------------------------------------------------ command line


def test_files(crd, tmp_path):
    path = tmp_path / "sub" / "train.jsonl"
    code, printed = crd("prompts", "geneval", "-o", path, "--size", 500)
    assert code == 0 and "position" in printed and "206" in printed and "together" in printed, printed
    first = path.read_bytes()
    assert [json.loads(line) for line in first.splitlines()] == geneval.geneval_train_rows(500)
    code, printed = crd("prompts", "geneval", "-o", path, "--size", 400)
    assert code == 2 and str(path) in printed and "--force" in printed and path.read_bytes() == first
    assert crd("prompts", "geneval", "-o", path, "--size", 500, "--seed", 1, "--force")[0] == 0
    assert path.read_bytes() != first
    assert crd("prompts", "geneval", "-o", path, "--size", 500, "--force")[0] == 0
    assert path.read_bytes() == first and list(path.parent.iterdir()) == [path]
    assert load_prompts(str(path)).metadata[0]["tag"]


def test_the_official_file(crd, tmp_path):
    code, printed = crd("prompts", "geneval", "--split", "test", "-o", tmp_path / "t.jsonl")
    assert code == 0 and "553" in printed
    assert (tmp_path / "t.jsonl").read_text() == to_jsonl(generate())


def test_text_files(crd, tmp_path):
    (tmp_path / "words.txt").write_text("\ufeffÄpfel\r\nBirnen\n\n" + "\n".join(f"Wort{i}" for i in range(30)))
    path = tmp_path / "t.txt"
    code, printed = crd("prompts", "ocr", "--split", "test", "--size", 20, "--words", tmp_path / "words.txt", "-o", path)
    assert code == 0 and "2 words" in printed and "20" in printed
    lines = path.read_text().splitlines()
    assert len(lines) == 20 and words_in(lines) <= set(
        ocr.words_of(["Äpfel", "Birnen", *(f"Wort{i}" for i in range(30))], "test")
    )


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        (["geneval", "-o", "{tmp}/x.txt"], ["x.txt", ".jsonl"]),
        (["ocr", "-o", "{tmp}/x.jsonl"], ["x.jsonl", ".txt"]),
        (["geneval", "--split", "test", "--size", "5", "-o", "{tmp}/x.jsonl"], ["--size", "fixed"]),
        (["geneval", "--split", "dev", "-o", "{tmp}/x.jsonl"], ["dev"]),
        (["geneval", "--size", "0", "-o", "{tmp}/x.jsonl"], ["--size"]),
        (["ocr", "--words", "{tmp}/none.txt", "-o", "{tmp}/x.txt"], ["--words", "none.txt"]),
        (["ocr", "--words", "{tmp}/phrase.txt", "-o", "{tmp}/x.txt"], ["line 2", "two words"]),
        (["ocr", "--words", "{tmp}/quote.txt", "-o", "{tmp}/x.txt"], ["line 1", "double quotes"]),
        (["ocr", "--words", "{tmp}/blank.txt", "-o", "{tmp}/x.txt"], ["no words"]),
        (["ocr", "--words", "{tmp}/latin.txt", "-o", "{tmp}/x.txt"], ["UTF-8"]),
        (["ocr", "--size", "999999999", "-o", "{tmp}/x.txt"], ["smaller size"]),
        (["ocr", "-o", "/proc/x.txt", "--size", "5"], ["cannot be written"]),
    ],
)
def test_mistakes(crd, tmp_path, words, pieces):
    (tmp_path / "phrase.txt").write_text("one\ntwo words\n")
    (tmp_path / "quote.txt").write_text('"one"\n')
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    code, printed = crd("prompts", *(word.format(tmp=tmp_path) for word in words))
    assert code == 2 and all(piece in printed for piece in pieces), printed
    assert not list(tmp_path.glob("x.*"))
