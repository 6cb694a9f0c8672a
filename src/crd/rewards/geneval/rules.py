"""GenEval's rules: from detections and a prompt's metadata to a verdict and a reward.

Two modes. ``reference`` is the published behaviour, oddities included. ``repaired``, the default, differs in
three places:

* Count terms are clipped at 0; the published ones fall to -14, and one such picture rules its group's spread.
* A violated relation adds one term, 0; the published code adds a 0 and a 1, so that it earns 3/4.
* Boxes of one class that nearly coincide are one object; published, an object that is detected twice counts as two.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from crd.errors import CRDError
from crd.rewards.geneval.detector import Detection

Mode = Literal["repaired", "reference"]
Box = tuple[float, float, float, float]

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")

THRESHOLD = 0.3  # detections must be more confident than this
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16  # of a class
POSITION_MARGIN = 0.1  # of the two sizes together, taken off the distance of the centres
SAME_OBJECT = 0.8  # intersection over union above which the repaired mode sees one object


@dataclass(frozen=True)
class Judgement:
    """``correct``: the benchmark's rule (extra objects allowed, unless excluded). ``strict``: counts exact.
    ``score``: partial credit, the reward that training optimises; at most 1, in the repaired mode at least 0."""

    correct: bool
    strict: bool
    score: float


@dataclass(frozen=True)
class Summary:
    """Means of something per picture (correctness, score)."""

    tasks: dict[str, float]  # by tag, in the order of TAGS; tags without a picture are left out
    overall: float  # unweighted mean of the tasks: the official score
    pictures: float  # mean over all pictures, as training logs have it


def judge(detections: list[Detection], metadata: dict[str, Any], mode: Mode = "repaired") -> Judgement:
    """Judges one picture; raises CRDError for metadata that is not GenEval's."""
    check_metadata(metadata)
    names = {clause["class"] for clause in (*metadata["include"], *(metadata.get("exclude") or ()))}
    threshold = COUNTING_THRESHOLD if metadata["tag"] == "counting" else THRESHOLD
    objects = {name: confident_objects(detections, name, threshold, mode) for name in names}
    strict, score = _exact_score(objects, metadata["include"], mode)
    return Judgement(_benchmark_correct(objects, metadata), strict, score)


def confident_objects(detections: Iterable[Detection], name: str, threshold: float, mode: Mode) -> list[Detection]:
    """The objects of a class that count, most confident first, at most 16."""
    # the box decides between equal scores, so that the order of the detections does not matter
    candidates = sorted((d for d in detections if d.name == name and d.score > threshold), key=lambda d: (-d.score, d.box))
    kept: list[Detection] = []
    for candidate in candidates:
        if mode == "reference" or all(intersection_over_union(candidate.box, other.box) <= SAME_OBJECT for other in kept):
            kept.append(candidate)
    return kept[:MAX_OBJECTS]


def intersection_over_union(a: Box, b: Box) -> float:
    """In [0, 1]; 0 if both boxes are empty."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


def relations(subject: Box, target: Box) -> set[str]:
    """How the subject lies to the target, e.g. ``{"left of", "above"}``; empty if too close.

    Per axis the distance of the centres less a tenth of both sizes must be more than half of the distance.
    """
    offsets, rest = [], []
    for low, high in ((0, 2), (1, 3)):  # x to the right, y down
        offset = (subject[low] + subject[high] - target[low] - target[high]) / 2
        sizes = subject[high] - subject[low] + target[high] - target[low]
        offsets.append(offset)
        rest.append(math.copysign(max(abs(offset) - POSITION_MARGIN * sizes, 0.0), offset))
    if max(map(abs, rest)) < 1e-3:
        return set()
    x, y = (value / math.hypot(*offsets) for value in rest)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


def aggregate(tags: list[str], values: Iterable[float]) -> Summary:
    """Task means and both ways of averaging; ``values`` (correctness or score) is as long as ``tags``."""
    by_tag: dict[str, list[float]] = {}
    for tag, value in zip(tags, values, strict=True):
        by_tag.setdefault(_known_tag(tag), []).append(float(value))
    if not by_tag:
        raise CRDError("GenEval: there are no pictures to average over; at least one is needed.")
    tasks = {tag: math.fsum(by_tag[tag]) / len(by_tag[tag]) for tag in TAGS if tag in by_tag}
    pictures = math.fsum(value for values_ in by_tag.values() for value in values_) / len(tags)
    return Summary(tasks, math.fsum(tasks.values()) / len(tasks), pictures)


# ------------------------------------------------------------------------------------------------- rules


def _benchmark_correct(objects: dict[str, list[Detection]], metadata: dict[str, Any]) -> bool:
    groups: list[list[Detection] | None] = []  # the objects that satisfy each clause so far; None: it failed
    for clause in metadata["include"]:
        group = objects[clause["class"]][: clause["count"]]
        groups.append(group if len(group) == clause["count"] and _clause_holds(group, clause, groups) else None)
    excluded = any(len(objects[clause["class"]]) >= clause["count"] for clause in metadata.get("exclude") or ())
    return None not in groups and not excluded


def _clause_holds(group: list[Detection], clause: dict[str, Any], groups: list[list[Detection] | None]) -> bool:
    return _right_colors(group, clause) == len(group) and ("position" not in clause or _related(group, clause, groups))


def _exact_score(objects: dict[str, list[Detection]], include: list[dict[str, Any]], mode: Mode) -> tuple[bool, float]:
    """Whether all clauses hold with exact counts, and the mean of all clauses' terms."""
    terms: list[float] = []
    groups: list[list[Detection] | None] = []
    for clause in include:
        found = objects[clause["class"]]
        holds = len(found) == clause["count"] and _clause_holds(found, clause, groups)
        terms += _terms(found, clause, groups, mode)
        groups.append(found if holds else None)
    return None not in groups, sum(terms) / len(terms)


def _terms(found: list[Detection], clause: dict[str, Any], groups: list[list[Detection] | None], mode: Mode) -> list[float]:
    """Terms of one clause: count, colour, relation; of the latter two only what the earlier ones allow to judge."""
    count = clause["count"]
    amount = 1 - abs(count - len(found)) / count
    terms = [amount if mode == "reference" else max(amount, 0.0)]
    if len(found) != count:
        return [*terms, 0.0] if "color" in clause or "position" in clause else terms
    right = _right_colors(found, clause)
    if "color" in clause:
        terms.append(right / count)
    if "position" in clause and right == count:
        related = _related(found, clause, groups)
        terms.append(float(related))
        if mode == "reference" and not related and groups[clause["position"][1]] is not None:
            terms.append(1.0)
    return terms


def _right_colors(group: list[Detection], clause: dict[str, Any]) -> int:
    """How many objects have the clause's colour; all, if it names none."""
    return sum(d.color == clause["color"] for d in group) if "color" in clause else len(group)


def _related(group: list[Detection], clause: dict[str, Any], groups: list[list[Detection] | None]) -> bool:
    """True if the clause pointed at holds and each object has the relation to each of its objects."""
    relation, index = clause["position"]
    targets = groups[index]
    return targets is not None and all(relation in relations(a.box, b.box) for a in group for b in targets)


# ---------------------------------------------------------------------------------------------- metadata


def check_metadata(metadata: dict[str, Any]) -> None:
    """Raises CRDError, naming the key and value, for metadata that is not in GenEval's format."""
    _known_tag(metadata.get("tag"))
    include = metadata.get("include")
    if not isinstance(include, list) or not include:
        raise CRDError(f"GenEval metadata: include must be a list of at least one clause, got {include!r}.")
    for index, clause in enumerate(include):
        _check_clause(clause, "include", {"class", "count", "color", "position"})
        if "position" in clause:
            _check_position(clause["position"], index)
    exclude = metadata.get("exclude")
    if not (exclude is None or isinstance(exclude, list)):
        raise CRDError(f"GenEval metadata: exclude must be a list of clauses or absent, got {exclude!r}.")
    for clause in exclude or ():
        _check_clause(clause, "exclude", {"class", "count"})


def _known_tag(tag: Any) -> str:
    if tag not in TAGS:
        raise CRDError(f"GenEval metadata: tag {tag!r} is none of {', '.join(TAGS)}.")
    return tag


def _check_clause(clause: Any, where: str, known: set[str]) -> None:
    if not isinstance(clause, dict) or not {"class", "count"} <= set(clause):
        raise CRDError(f"GenEval metadata: a clause of {where} needs class and count, got {clause!r}.")
    if unknown := set(clause) - known:
        raise CRDError(f"GenEval metadata: a clause of {where} may hold {', '.join(sorted(known))}; got {sorted(unknown)}.")
    if not isinstance(clause["class"], str) or not isinstance(clause.get("color", ""), str):
        raise CRDError(f"GenEval metadata: class and color must be text, got {clause!r}.")
    if type(clause["count"]) is not int or clause["count"] < 1:
        raise CRDError(f"GenEval metadata: count must be a whole number of at least 1, got {clause['count']!r}.")


def _check_position(position: Any, index: int) -> None:
    match position:
        case [relation, int(target)] if relation in RELATIONS and 0 <= target < index:
            return
    raise CRDError(
        f"GenEval metadata: position must be [relation, index of an earlier clause] with relation one of "
        f"{', '.join(RELATIONS)}, got {position!r} in clause {index}."
    )
