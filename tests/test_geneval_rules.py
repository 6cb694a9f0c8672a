"""GenEval's rules against the published behaviour's golden values, invariances and a naive second implementation."""

import itertools
import random
from dataclasses import replace

import pytest

from crd.errors import CRDError
from crd.rewards.geneval import Detection, aggregate, judge
from crd.rewards.geneval.prompts import color_attr, colors, counting, position, single_object, two_object
from crd.rewards.geneval.rules import intersection_over_union, relations

MODES = ("reference", "repaired")


def found(name, left=0.0, top=0.0, color="red", score=0.95, size=20.0):
    return Detection(name, score, (left, top, left + size, top + size), color)


def several(name, count, **kwargs):
    return [found(name, left=30.0 * i, **kwargs) for i in range(count)]


def verdict(detections, row, mode="reference"):
    judgement = judge(detections, row, mode)
    return judgement.correct, judgement.strict, pytest.approx(judgement.score)


# ------------------------------------------------------------------------------------------ golden values


@pytest.mark.parametrize(
    ("subject", "target", "expected"),
    [
        ((0, 0, 50, 50), (200, 200, 250, 250), {"left of", "above"}),
        ((0, 0, 50, 50), (60, 30, 110, 80), {"left of"}),
        ((0, 0, 100, 100), (15, 0, 115, 100), set()),
        ((0, 0, 100, 100), (25, 0, 125, 100), set()),
        ((0, 0, 100, 100), (45, 0, 145, 100), {"left of"}),
    ],
)
def test_relations(subject, target, expected):
    assert relations(subject, target) == expected


LEFT = position("cup", "left of", "dog")
TWO_COLORS = color_attr("red", "cup", "blue", "dog")
RED = colors("red", "cup")
CUP, DOG = found("cup"), found("dog", left=100)

GOLDEN = [  # detections, metadata, correct, strict, published score, repaired score
    ("position right", [CUP, DOG], LEFT, True, True, 1, 1),
    ("position wrong", [found("cup", left=100), found("dog")], LEFT, False, False, 3 / 4, 2 / 3),
    ("target missing", [CUP], LEFT, False, False, 1 / 3, 1 / 3),
    ("subject missing", [DOG], LEFT, False, False, 1 / 3, 1 / 3),
    ("two subjects", [CUP, found("cup", top=40, score=0.5), DOG], LEFT, True, False, 1 / 3, 1 / 3),
    ("one colour wrong", [CUP, found("dog", left=50)], TWO_COLORS, False, False, 0.75, 0.75),
    ("one object missing", [CUP], TWO_COLORS, False, False, 0.5, 0.5),
    ("colour right", [CUP], RED, True, True, 1, 1),
    ("colour wrong", [replace(CUP, color="blue")], RED, False, False, 0.5, 0.5),
    ("no colour", [replace(CUP, color=None)], RED, False, False, 0.5, 0.5),
    ("coloured missing", [], RED, False, False, 0, 0),
    ("coloured twice", several("cup", 2), RED, True, False, 0, 0),
]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case[0])
def test_golden_table(case):
    _, detections, row, correct, strict, published, repaired = case
    assert verdict(detections, row) == (correct, strict, published)
    assert verdict(detections, row, "repaired") == (correct, strict, repaired)


FOUND = (0, 1, 2, 3, 4, 5, 6, 8, 16)


@pytest.mark.parametrize(
    ("count", "scores"),
    [
        (2, (0, 0.5, 1, 0.5, 0, -0.5, -1, -2, -6)),
        (3, (0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0, -2 / 3, -10 / 3)),
        (4, (0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0, -2)),
    ],
)
def test_counting(count, scores):
    for number, score in zip(FOUND, scores, strict=True):
        exact = number == count
        assert verdict(several("cup", number), counting("cup", count)) == (exact, exact, score)
        assert verdict(several("cup", number), counting("cup", count), "repaired") == (exact, exact, max(score, 0))


def test_single_object():
    for number, score in zip((0, 1, 2, 3, 16, 40), (0, 1, 0, -1, -14, -14), strict=True):  # at most 16 count
        assert verdict(several("cup", number), single_object("cup")) == (number >= 1, number == 1, score)
        assert verdict(several("cup", number), single_object("cup"), "repaired")[2] == max(score, 0)


def test_surplus_of_one_class_leaves_the_credit_of_the_other():
    """Repaired: each clause's term is clipped; -2 for four cups does not eat up the dog's 1."""
    detections = [*several("cup", 4), DOG]
    assert verdict(detections, two_object("cup", "dog"))[2] == -0.5
    assert verdict(detections, two_object("cup", "dog"), "repaired")[2] == 0.5


# -------------------------------------------------------------------------------- thresholds, duplicates


@pytest.mark.parametrize(("row", "threshold"), [(single_object("cup"), 0.3), (RED, 0.3), (counting("cup", 1), 0.9)])
@pytest.mark.parametrize("mode", MODES)
def test_thresholds_are_strict(row, threshold, mode):
    assert not judge([found("cup", score=threshold)], row, mode).correct
    assert judge([found("cup", score=threshold + 1e-6)], row, mode).correct


def test_an_object_that_is_detected_twice():
    """The known hack: published, two boxes in one place are two cups."""
    once = found("cup")
    again = replace(once, box=(1.0, 0.0, 21.0, 20.0), score=0.93)
    apart = replace(once, box=(8.0, 0.0, 28.0, 20.0))  # overlaps by less than half of both
    two = counting("cup", 2)
    assert [judge([once, again], two, mode).correct for mode in MODES] == [True, False]
    assert [judge([once, apart], two, mode).correct for mode in MODES] == [True, True]
    hidden = [replace(once, score=0.99 - 0.001 * i) for i in range(16)] + [found("cup", left=40, score=0.92)]
    assert judge(hidden, two, "repaired").correct  # the 16 are counted after duplicates are gone
    assert judge([once, replace(again, name="dog")], two_object("cup", "dog"), "repaired").correct


def test_intersection_over_union():
    assert intersection_over_union((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert intersection_over_union((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert intersection_over_union((0, 0, 2, 2), (2, 2, 4, 4)) == intersection_over_union((0, 0, 0, 0), (0, 0, 0, 0)) == 0


@pytest.mark.parametrize("mode", MODES)
def test_the_most_confident_objects_decide(mode):
    """A second cup of another colour or place does not matter to the benchmark, if it is less certain."""
    extra = found("cup", left=200, color="blue", score=0.5)
    for row in (RED, LEFT):
        assert judge([extra, CUP, DOG], row, mode).correct
        assert not judge([replace(extra, score=0.99), CUP, DOG], row, mode).correct


def test_colors_are_read_only_where_needed():
    class Costly:
        def __init__(self, detection):
            self.name, self.score, self.box = detection.name, detection.score, detection.box
            self.asked = 0

        @property
        def color(self):
            self.asked += 1
            return "red"

    cups = [Costly(found("cup", left=30 * i, score=0.9 - 0.1 * i)) for i in range(3)]
    judge(cups, two_object("cup", "dog"))
    assert [cup.asked > 0 for cup in cups] == [False, False, False]
    assert judge(cups, RED).correct
    assert [cup.asked > 0 for cup in cups] == [True, False, False]


# ------------------------------------------------------------------------------------------- invariances


def random_detections(rng, names=("cup", "dog"), largest=4):
    shades = ("red", "blue", None)
    return [
        found(name, rng.randrange(0, 200, 10), rng.randrange(0, 200, 10), rng.choice(shades), rng.choice((0.2, 0.5, 0.95)))
        for name in names
        for _ in range(rng.randint(0, largest))
    ]


ROWS = [
    single_object("cup"),
    two_object("cup", "dog"),
    counting("cup", 2),
    counting("dog", 3),
    RED,
    TWO_COLORS,
    *(position("cup", relation, "dog") for relation in ("left of", "right of", "above", "below")),
    # more than the six tasks ask for: several subjects and targets, colour and position in one clause
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 2}, {"class": "cup", "count": 2, "color": "red", "position": ["above", 0]}],
        "exclude": [{"class": "dog", "count": 4}],
    },
]


@pytest.mark.parametrize("mode", MODES)
def test_order_of_detections_does_not_matter(mode):
    rng = random.Random(0)
    for row, _ in itertools.product(ROWS, range(40)):
        detections = random_detections(rng)
        assert judge(detections, row, mode) == judge(rng.sample(detections, len(detections)), row, mode)


def moved(detections, move):
    return [replace(d, box=move(*d.box)) for d in detections]


@pytest.mark.parametrize(
    ("move", "swapped"),
    [
        (lambda x, y, x2, y2: (300 - x2, y, 300 - x, y2), {"left of": "right of", "right of": "left of"}),
        (lambda x, y, x2, y2: (x, 300 - y2, x2, 300 - y), {"above": "below", "below": "above"}),
        (lambda x, y, x2, y2: (y, x, y2, x2), {"left of": "above", "above": "left of", "right of": "below", "below": "right of"}),
        (lambda x, y, x2, y2: (3 * x + 7, 3 * y, 3 * x2 + 7, 3 * y2), {}),
    ],
    ids=["mirrored", "upside down", "transposed", "moved and enlarged"],
)
def test_relations_follow_the_picture(move, swapped):
    rng = random.Random(1)
    for _ in range(300):
        a = found("a", rng.randrange(200), rng.randrange(200)).box
        b = found("b", rng.randrange(200), rng.randrange(200), size=rng.randrange(5, 60)).box
        assert relations(move(*a), move(*b)) == {swapped.get(relation, relation) for relation in relations(a, b)}


def test_relations_are_opposites():
    rng = random.Random(2)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for _ in range(300):
        a, b = (tuple(map(float, found("a", rng.randrange(99), rng.randrange(99)).box)) for _ in range(2))
        assert relations(b, a) == {opposite[relation] for relation in relations(a, b)}


def test_bounds():
    rng = random.Random(3)
    for row, _ in itertools.product(ROWS, range(100)):
        judgement = judge(random_detections(rng), row)
        assert 0 <= judgement.score <= 1
        assert judgement.strict <= (judgement.score == 1)


# --------------------------------------------------------------------------- naive second implementation


def naive(detections, row):
    """The published rules once more, clause by clause, without any shared helper but the geometry: correct, strict, score."""
    limit = 0.9 if row["tag"] == "counting" else 0.3
    pool = {}
    for d in sorted(detections, key=lambda d: (-d.score, d.box)):
        if d.score > limit:
            pool.setdefault(d.name, []).append(d)
    answers = []
    for exact in (False, True):
        good, terms, earlier = True, [], []
        for clause in row["include"]:
            have, n, fine = pool.get(clause["class"], []), clause["count"], True
            terms.append(1 - abs(n - len(have)) / n)
            if (len(have) != n) if exact else (len(have) < n):
                fine = False
                if "color" in clause or "position" in clause:
                    terms.append(0)
            else:
                have = have[:n]
                if "color" in clause:
                    hits = len([d for d in have if d.color == clause["color"]])
                    terms.append(1 - (n - hits) / n)
                    fine = hits == n
                if "position" in clause and fine:
                    relation, where = clause["position"]
                    if earlier[where] is None:
                        fine = False
                        terms.append(0)
                    else:
                        fine = all(relation in relations(s.box, t.box) for s in have for t in earlier[where])
                        terms += [1] if fine else [0, 1]
            earlier.append(have if fine else None)
            good = good and fine
        answers.append((good, terms))
    correct = answers[0][0] and not any(len(pool.get(c["class"], [])) >= c["count"] for c in row.get("exclude", []))
    return correct, answers[1][0], sum(answers[1][1]) / len(answers[1][1])


def test_against_the_naive_implementation():
    rng = random.Random(4)
    seen = set()
    for row, _ in itertools.product(ROWS, range(200)):
        detections = random_detections(rng)
        assert verdict(detections, row) == naive(detections, row)
        judgement = judge(detections, row, "reference")
        seen.add((judgement.correct, judgement.strict))
    assert seen == {(False, False), (True, False), (True, True)}


# ---------------------------------------------------------------------------------- aggregation, metadata


def test_aggregation():
    summary = aggregate(["counting", "counting", "counting", "colors"], [True, False, False, True])
    assert summary.tasks == {"counting": pytest.approx(1 / 3), "colors": 1}
    assert summary.overall == pytest.approx(2 / 3)
    assert summary.pictures == pytest.approx(1 / 2)


def test_aggregation_keeps_every_score():
    """Published logging drops a score that happens to be -10; here it counts."""
    assert aggregate(["single_object"] * 2, [-10, 1]).pictures == -4.5


def test_nothing_to_aggregate():
    with pytest.raises(CRDError, match="no pictures"):
        aggregate([], [])


CLAUSE = {"class": "cup", "count": 1}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"include": [CLAUSE]}, "tag None"),
        ({"tag": "shape", "include": [CLAUSE]}, "'shape' is none of single_object"),
        ({"tag": "colors"}, "include"),
        ({"tag": "colors", "include": []}, "include"),
        ({"tag": "colors", "include": [{"class": "cup"}]}, "needs class and count"),
        ({"tag": "colors", "include": [{**CLAUSE, "colour": "red"}]}, "colour"),
        ({"tag": "colors", "include": [{**CLAUSE, "color": 3}]}, "must be text"),
        ({"tag": "colors", "include": [{"class": "cup", "count": 0}]}, "at least 1"),
        ({"tag": "colors", "include": [{"class": "cup", "count": 1.0}]}, "whole number"),
        ({"tag": "position", "include": [CLAUSE, {**CLAUSE, "position": ["beside", 0]}]}, "beside"),
        ({"tag": "position", "include": [CLAUSE, {**CLAUSE, "position": ["above", 1]}]}, "earlier clause"),
        ({"tag": "position", "include": [CLAUSE, {**CLAUSE, "position": "above"}]}, "earlier clause"),
        ({"tag": "counting", "include": [CLAUSE], "exclude": {"cup": 2}}, "exclude"),
        ({"tag": "counting", "include": [CLAUSE], "exclude": [{"class": "cup"}]}, "needs class and count"),
    ],
)
def test_bad_metadata(metadata, message):
    with pytest.raises(CRDError, match=message):
        judge([], metadata)


def test_exclude_may_be_absent_or_none():
    assert judge([CUP], {**single_object("cup"), "exclude": None}).correct
