"""GenEval prompts to train on, in the published mixture of tasks, and to test on: the official 553 or unseen objects.

Source of the mixture: Flow-GRPO's training set of 50,000 prompts. Its lines are not reproduced; tasks, weights and the exclusion
of the test prompts are.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from crd.rewards.geneval import prompts
from crd.rewards.geneval.prompts import COCO_CLASSES, COLORS, OFFICIAL, Row, Vocabulary, generate
from crd.seeding import python_rng

#: of the tasks in training; single_object has none
TASK_WEIGHTS = {"position": 0.7, "counting": 0.5, "color_attr": 0.3, "colors": 0.1, "two_object": 0.1}
TRAIN_SIZE = 50_000
MIRRORED = {"right of": "left of", "below": "above"}  # a relation, and the one from the other side
UNSEEN = 20  # classes that the unseen-object split holds out

#: classes that only the unseen-object split's test names: the same ones for every seed, so that its two files fit
UNSEEN_CLASSES = tuple(sorted(python_rng(0, "geneval-unseen").sample(COCO_CLASSES, UNSEEN), key=COCO_CLASSES.index))


def vocabulary(classes: Iterable[str]) -> Vocabulary:
    """The official one, restricted to some classes."""
    return Vocabulary(tuple(classes), COLORS, never_colored=OFFICIAL.never_colored)


def geneval_test_rows(unseen_objects: bool = False) -> list[Row]:
    """The official 553 prompts in their order; or those of the same generator that name held-out classes only."""
    return generate(vocabulary(UNSEEN_CLASSES)) if unseen_objects else generate()


def geneval_train_rows(
    size: int = TRAIN_SIZE, seed: int = 0, unseen_objects: bool = False, progress: Callable[[int], Any] = lambda rows: None
) -> list[Row]:
    """``size`` shuffled rows with the published task weights, none of which shows what an official test prompt shows.

    A task with fewer distinct prompts than its part is drawn with replacement (counting: some 160), the others without.
    ``unseen_objects`` leaves out every prompt that names a held-out class. ``progress`` is told how many rows were made.
    """
    held_out = {content(row) for row in geneval_test_rows()}
    words = vocabulary(name for name in COCO_CLASSES if not (unseen_objects and name in UNSEEN_CLASSES))
    rows: list[Row] = []
    for tag, count in task_sizes(size).items():
        rng = python_rng(seed, "geneval-train", tag)
        make, arguments = possible(words, tag)
        # more than are needed, since test prompts fall out: two orders of each at most
        drawn = rng.sample(arguments, min(len(arguments), count + 2 * len(held_out)))
        open_ = [row for row in itertools.starmap(make, drawn) if content(row) not in held_out]
        rows += open_[:count] if count <= len(open_) else rng.choices(open_, k=count)
        progress(count)
    return python_rng(seed, "geneval-train").sample(rows, size)


def task_sizes(size: int) -> dict[str, int]:
    """``size`` divided in the proportions of the weights, by largest remainders."""
    total = sum(TASK_WEIGHTS.values())
    parts = {tag: size * weight / total for tag, weight in TASK_WEIGHTS.items()}
    sizes = {tag: int(part) for tag, part in parts.items()}
    for tag in sorted(parts, key=lambda tag: sizes[tag] - parts[tag])[: size - sum(sizes.values())]:
        sizes[tag] += 1
    return sizes


def content(row: Row) -> tuple[Any, ...]:
    """What a picture of the row shows, in whatever order it is told: "A left of B" is "B right of A"."""
    if row["tag"] == "position":
        target, subject = row["include"]
        relation = subject["position"][0]
        first, second = (subject, target) if relation in MIRRORED else (target, subject)
        return "position", first["class"], MIRRORED.get(relation, relation), second["class"]
    return row["tag"], frozenset((clause["class"], clause["count"], clause.get("color")) for clause in row["include"])


def possible(words: Vocabulary, tag: str) -> tuple[Callable[..., Row], list[tuple[Any, ...]]]:
    """What makes a row of a task, and the arguments of all its rows, once each in a fixed order."""
    pairs = itertools.permutations(words.classes, 2)
    match tag:
        case "two_object":
            return prompts.two_object, list(pairs)
        case "counting":
            return prompts.counting, list(itertools.product(words.classes, words.counts))
        case "colors":
            return prompts.colors, list(itertools.product(words.colors, words.colored_classes))
        case "position":
            return prompts.position, [(a, relation, b) for a, b in pairs for relation in words.relations]
        case "color_attr":
            colors = list(itertools.permutations(words.colors, 2))
            colored = itertools.permutations(words.colored_classes, 2)
            return prompts.color_attr, [(color_a, a, color_b, b) for a, b in colored for color_a, color_b in colors]
    raise ValueError(f"{tag} is no task of the mixture")
