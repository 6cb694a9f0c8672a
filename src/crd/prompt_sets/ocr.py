"""Prompts that ask for a text to be written, as the OCR reward reads it: templates times words, split by word.

No word of the training prompts is a word of the test prompts, so that the test asks for spelling and not for memory.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from crd.errors import CRDError
from crd.nano.words import MORE_HELD_OUT, WORDS
from crd.seeding import derive_seed, python_rng

Split = Literal["train", "test"]

SHIPPED_WORDS = (*WORDS, *MORE_HELD_OUT)  # 3 to 5 capital letters
TEST_SHARE = 5  # one word in so many is for testing
DEFAULT_SIZES = {"train": 20_000, "test": 1_000}  # about those of the published sets
LONGEST = 3  # words of a text

TEMPLATES = (
    'A sign that says "{}"',
    'A wooden sign by a country road that says "{}"',
    'A neon sign above a bar at night reading "{}"',
    'A chalkboard in a small cafe with "{}" written on it',
    'A white coffee mug with the text "{}" printed on it',
    'A T-shirt on a hanger with the words "{}" across the front',
    'A book on a desk whose cover is titled "{}"',
    'A birthday cake with "{}" written in icing',
    'A street poster that announces "{}" in bold letters',
    'A city bus whose display shows "{}"',
    'A shop window with "{}" painted on the glass',
    'A brick wall with graffiti spelling "{}"',
    'A stone above a doorway engraved with "{}"',
    'A handwritten note on a fridge that reads "{}"',
    'A cardboard box stamped with "{}"',
    'A newspaper page with the headline "{}"',
    'A phone screen that shows the message "{}"',
    'A red balloon with "{}" printed on it',
    'A banner between two trees that says "{}"',
    'A label on a glass bottle that reads "{}"',
    'A train station board that shows "{}"',
    'A small boat with the name "{}" on its side',
    'A sandy beach with "{}" drawn in the sand',
    'A robot that holds up a card with "{}" on it',
)


def read_words(path: Path) -> list[str]:
    """One word a line; raises CRDError with the line number. Blank lines and repeated words are left out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise CRDError(f"--words: there is no file {path.resolve()}. Give a text file with one word a line.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CRDError(f"--words: {path} cannot be read as UTF-8 text: {error}") from None
    for number, line in enumerate(lines, 1):
        if len(line.split()) > 1 or '"' in line:
            raise CRDError(f"{path}, line {number}: expected one word without double quotes, got {line.strip()[:80]!r}.")
    words = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not words:
        raise CRDError(f"--words: {path} holds no words; one a line is expected.")
    return words


def words_of(words: Sequence[str], split: Split) -> list[str]:
    """The words of a split. It is a function of the word alone, whatever its case and its list, so that no word changes sides."""
    test = [derive_seed(0, "ocr-word", word.casefold()) % TEST_SHARE == 0 for word in words]
    return [word for word, is_test in zip(words, test, strict=True) if is_test == (split == "test")]


def ocr_prompts(
    split: Split,
    size: int,
    seed: int = 0,
    words: Sequence[str] = SHIPPED_WORDS,
    longest: int = LONGEST,
    progress: Callable[[int], Any] = lambda prompts: None,
) -> list[str]:
    """``size`` shuffled distinct prompts whose texts have 1 to ``longest`` different words of the split, in equal parts.

    Raises CRDError if there are too few words. ``progress`` is told how many prompts were made.
    """
    own = words_of(words, split)
    prompts: list[str] = []
    for count in range(1, longest + 1):
        share = size * count // longest - size * (count - 1) // longest
        possible = len(TEMPLATES) * math.perm(len(own), count)
        if share > possible:
            raise CRDError(
                f"{len(own)} of the {len(words)} words are for the split {split!r}, which makes {possible} prompts of {count} "
                f"word(s) with {len(TEMPLATES)} templates; {share} are needed for a size of {size}. "
                "Give more words or a smaller size."
            )
        rng = python_rng(seed, "ocr-prompts", split, count)
        drawn: dict[str, None] = {}
        while len(drawn) < share:
            drawn[rng.choice(TEMPLATES).format(" ".join(rng.sample(own, count)))] = None
        prompts += drawn
        progress(share)
    return python_rng(seed, "ocr-prompts", split).sample(prompts, size)
