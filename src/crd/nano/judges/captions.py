"""Captions as tokens, and captions that a picture almost fits: hard negatives."""

import functools
import random
import re
import string
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from crd.nano.world import COLORS, COUNT_WORDS, LETTER_PITCH, RELATIONS, SHAPES, Prompt, article, captions_vocabulary, plural

MAX_TOKENS = 12
Thing = tuple[int, str | None, str]  # how many, colour, shape
Scene = tuple[list[Thing], str | None]  # and the relation of the first to the second


@functools.cache
def _vocabulary() -> dict[str, int]:
    return {word: index for index, word in enumerate(captions_vocabulary(), 1)}  # 0 is padding


def vocabulary_size() -> int:
    return len(_vocabulary()) + 1


def tokenize(text: str) -> list[int] | None:
    """Numbers of the words, letters of a sign one by one; None if the text is no caption of this world."""
    vocabulary = _vocabulary()
    tokens = [vocabulary.get(piece) for piece in re.findall(r"[a-z]+|[A-Z]|[^\sa-zA-Z]", text)]
    known = [token for token in tokens if token is not None]
    return known if 0 < len(known) == len(tokens) <= MAX_TOKENS else None


def word_numbers(words: Iterable[str]) -> Tensor:
    """Token numbers of single words or letters."""
    return torch.tensor([_vocabulary()[word] for word in words])


def pad(rows: list[list[int]]) -> Tensor:
    """Token numbers ``(n, MAX_TOKENS)``, zero at the end."""
    return torch.tensor([row + [0] * (MAX_TOKENS - len(row)) for row in rows])


def hard_negatives(prompt: Prompt, count: int, rng: random.Random) -> list[str]:
    """``count`` captions of the same kind that differ in one thing and are wrong for a picture of ``prompt``.

    Signs: a letter replaced, two letters exchanged, one dropped or added. Shapes: another shape, colour, number or relation,
    colours exchanged, one shape more or less. Captions that are merely less precise are never among them.
    """
    if prompt.metadata["tag"] == "text":
        return [f'a sign that says "{word}"' for word in _near_words(prompt.metadata["word"], count, rng)]
    kinds = [rng.sample(kind, len(kind)) for kind in _near_scenes(*described(prompt.metadata)) if kind]
    rng.shuffle(kinds)  # one of each kind in turn, else the rare kinds (colours exchanged) would hardly be seen
    turns = [scene for turn in zip_longest(*kinds) for scene in turn if scene]
    texts = list(dict.fromkeys(caption(*scene) for scene in turns))
    return texts[:count] if len(texts) >= count else rng.choices(texts, k=count)


def _near_words(word: str, count: int, rng: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        at, letter = rng.randrange(len(word)), rng.choice(string.ascii_uppercase)
        edit = rng.choices(("replace", "exchange", "drop", "add"), (5, 2, 1, 1))[0]
        if edit == "replace":
            other = word[:at] + letter + word[at + 1 :]
        elif edit == "exchange":
            to = rng.randrange(len(word))
            letters = list(word)
            letters[at], letters[to] = letters[to], letters[at]
            other = "".join(letters)
        else:
            other = word[:at] + word[at + 1 :] if edit == "drop" else word[:at] + letter + word[at:]
        if other != word and len(other) in LETTER_PITCH:
            found[other] = None
    return list(found)


def described(metadata: dict[str, Any]) -> tuple[list[Thing], str | None]:
    """What GenEval metadata of this world ask for, in the caption's order, with the relation of the first to the second."""
    entries = metadata["include"]
    relation = next((entry["position"][0] for entry in entries if "position" in entry), None)
    things = [(entry["count"], entry.get("color"), entry["class"]) for entry in entries]
    return (things[::-1] if relation else things), relation


def caption(things: list[Thing], relation: str | None = None) -> str:
    """In the world's wording, e.g. ``a photo of a red ring and a blue circle``."""
    return "a photo of " + f" {relation or 'and'} ".join(_phrase(*thing) for thing in things)


def _phrase(count: int, color: str | None, shape: str) -> str:
    noun = " ".join(filter(None, (color, shape if count == 1 else plural(shape))))
    return article(noun) if count == 1 else f"{COUNT_WORDS[count]} {noun}"


def _near_scenes(things: list[Thing], relation: str | None) -> list[list[Scene]]:
    """Descriptions that contradict the given one in one respect, by kind."""
    absent = [shape for shape in SHAPES if shape not in {shape for _, _, shape in things}]
    other_shapes: list[Scene] = []
    other_colors: list[Scene] = []
    other_counts: list[Scene] = []
    for i, (count, color, shape) in enumerate(things):
        before, after = things[:i], things[i + 1 :]
        other_shapes += [([*before, (count, color, other), *after], relation) for other in absent]
        if color:
            other_colors += [([*before, (count, other, shape), *after], relation) for other in COLORS if other != color]
        else:  # two circles for a circle, or for a circle and a square
            counts = [(other, None, shape) for other in (1, *COUNT_WORDS)]
            other_counts += [([thing], None) for thing in counts if [thing] != things]
    other_relations: list[Scene] = [(things, other) for other in RELATIONS if relation and other != relation]
    kinds = [other_shapes, other_colors, other_counts, other_relations]
    if len(things) == 1:
        (_, color, shape) = things[0]
        second = [c for c in COLORS if c != color] if color else [None]
        return [*kinds, [([(1, color, shape), (1, c, other)], None) for other in absent for c in second]]
    (_, c1, a), (_, c2, b) = things
    return [*kinds, [([(1, c2, a), (1, c1, b)], None)]] if c1 else kinds
