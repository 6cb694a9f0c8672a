"""Prompt sets: files, lists, the nano world's; and which prompts an epoch takes from them."""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crd.batch import PromptGroup
from crd.errors import CRDError
from crd.seeding import derive_seed, python_rng

NANO_PROMPTS = 400  # drawn at most for a shape task of the nano world
FORMS = "Give a .txt file (one prompt a line), a .jsonl file or nano/TASK/SPLIT."


@dataclass(frozen=True)
class PromptSet:
    """Distinct prompts with metadata; a prompt's identity is its position."""

    texts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.texts)

    def group(self, index: int) -> PromptGroup:
        return PromptGroup(index, self.texts[index], self.metadata[index])

    def epoch(self, seed: int, epoch: int, count: int) -> list[PromptGroup]:
        """The prompts of an epoch: a function of (seed, epoch). Each pass over the set is a new permutation."""
        size = len(self)
        picked: list[int] = []
        for position in range(epoch * count, (epoch + 1) * count):
            turn, offset = divmod(position, size)
            picked.append(python_rng(seed, turn, "prompt-order").sample(range(size), size)[offset])
        return [self.group(i) for i in picked]

    def first(self, count: int) -> list[PromptGroup]:
        """The first prompts (all, if there are fewer)."""
        return [self.group(i) for i in range(min(count, len(self)))]


def make_prompt_set(rows: Iterable[str | dict[str, Any]], source: str) -> PromptSet:
    """From strings or from ``{"prompt": ..., metadata}``; repeated prompts are kept once."""
    entries: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        text = row.get("prompt") if isinstance(row, dict) else row
        if not isinstance(text, str) or not text.strip():
            raise CRDError(f"{source}, line {number}: expected a non-empty prompt, got {text!r}.")
        entries.setdefault(text.strip(), {k: v for k, v in row.items() if k != "prompt"} if isinstance(row, dict) else {})
    if not entries:
        raise CRDError(f"{source} holds no prompts; at least one is needed.")
    return PromptSet(tuple(entries), tuple(entries.values()))


def load_prompts(source: str) -> PromptSet:
    """``nano/TASK/SPLIT``, a ``.txt`` file (one prompt a line) or a ``.jsonl`` file; raises CRDError with the line number."""
    if source.startswith("nano/"):
        return _nano_prompts(source)
    path = Path(source)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also cut at signs within a prompt
    except FileNotFoundError:
        raise CRDError(f"prompts: there is no file {path.resolve()}. {FORMS}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CRDError(f"prompts: {path} cannot be read as UTF-8 text: {error}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    if path.suffix == ".jsonl":
        return make_prompt_set([_json_line(line, path, n) for n, line in enumerate(lines, 1)], str(path))
    if path.suffix == ".txt":
        return make_prompt_set(lines, str(path))
    raise CRDError(f"prompts: {path} is of no known kind. {FORMS}")


def _json_line(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CRDError(f"{path}, line {number}: not a JSON object ({error.msg}).") from None
    if not isinstance(row, dict) or "prompt" not in row:
        raise CRDError(f'{path}, line {number}: expected an object with a "prompt" key.')
    return row


def _nano_prompts(source: str) -> PromptSet:
    from crd.nano import world
    from crd.nano.geneval import geneval_rows

    tasks = ("text", "geneval", *world.SHAPE_TASKS)
    match source.split("/"):
        case ["nano", task, "train" | "heldout" as split] if task in tasks:
            pass
        case _:
            raise CRDError(
                f"prompts: {source!r} is none of nano/TASK/SPLIT with TASK {', '.join(tasks)} and SPLIT train, heldout."
            )
    if task == "geneval":
        return make_prompt_set(geneval_rows(split), source)  # type: ignore[arg-type]
    if task == "text":
        words = list(world.TRAIN_WORDS if split == "train" else world.HELD_OUT_WORDS)
        random.Random(derive_seed(0, "words", split)).shuffle(words)
        drawn = [world.text_prompt(word) for word in words]
    else:
        rng = python_rng(0, "nano-prompts", task, split)
        drawn = [world.draw_prompt(task, rng, split) for _ in range(NANO_PROMPTS)]  # type: ignore[arg-type]
    return make_prompt_set([{**prompt.metadata, "prompt": prompt.text} for prompt in drawn], source)
