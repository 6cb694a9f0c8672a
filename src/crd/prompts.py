"""Prompt sets: files, lists, the nano world's; and which prompts an epoch takes from them."""

import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crd.batch import PromptGroup
from crd.errors import CRDError
from crd.log import logger
from crd.seeding import derive_seed, python_rng

NANO_PROMPTS = 400  # drawn at most for a shape task of the nano world
MAX_LINE = 1_000_000  # bytes; a longer line is no prompt but a file of another kind
RESERVED = ("images", "prompts")  # arguments that every reward has anyway
HELD_OUT = "SPLIT heldout is disjoint from train for text, colors, color_attr and geneval, and the same prompts for other tasks"
FORMS = f"Give a .txt file (one prompt a line), a .jsonl file or nano/TASK/SPLIT ({HELD_OUT})."


@dataclass(frozen=True)
class PromptSet:
    """Distinct prompts with metadata; a prompt's identity is its position.

    A source may list a prompt several times, as GenEval's training mixture does to give tasks their weights: training then
    draws it as often as it is listed, evaluation takes it once.
    """

    texts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]
    lines: tuple[int, ...]  # of the source: the position of the prompt that each holds

    def __len__(self) -> int:
        return len(self.texts)

    def group(self, index: int) -> PromptGroup:
        return PromptGroup(index, self.texts[index], self.metadata[index])

    def epoch(self, seed: int, epoch: int, count: int) -> list[PromptGroup]:
        """The prompts of an epoch: a function of (seed, epoch). Each pass over the lines is a new permutation."""
        size = len(self.lines)
        orders: dict[int, list[int]] = {}  # by pass: shuffling a large set once for every prompt would take a minute
        picked: list[int] = []
        for position in range(epoch * count, (epoch + 1) * count):
            turn, offset = divmod(position, size)
            if turn not in orders:
                orders[turn] = python_rng(seed, turn, "prompt-order").sample(range(size), size)
            picked.append(self.lines[orders[turn][offset]])
        return [self.group(i) for i in picked]

    def first(self, count: int) -> list[PromptGroup]:
        """The first prompts (all, if there are fewer)."""
        return [self.group(i) for i in range(min(count, len(self)))]


def make_prompt_set(rows: Iterable[str | dict[str, Any]], source: str) -> PromptSet:
    """From strings or from ``{"prompt": ..., metadata}``; prompts of one text and metadata are one prompt."""
    positions: dict[tuple[str, str], int] = {}
    texts: list[str] = []
    metadata: list[dict[str, Any]] = []
    lines: list[int] = []
    kinds: dict[str, tuple[str, int]] = {}
    for number, row in enumerate(rows, 1):
        text = row.get("prompt") if isinstance(row, dict) else row
        if not isinstance(text, str) or not text.strip():
            raise CRDError(f"{source}, line {number}: expected a non-empty prompt, got {text!r}.")
        entry = {key: value for key, value in row.items() if key != "prompt"} if isinstance(row, dict) else {}
        _check_metadata(entry, kinds, source, number)
        identity = text.strip(), repr(entry)
        if identity not in positions:
            positions[identity] = len(texts)
            texts.append(text.strip())
            metadata.append(entry)
        lines.append(positions[identity])
    if not texts:
        raise CRDError(f"{source} holds no prompts; at least one is needed.")
    if repeats := len(lines) - len(texts):
        logger.warning(
            "%s: %d of %d lines repeat an earlier one: training draws a prompt as often as it is listed, evaluation once",
            source,
            repeats,
            len(lines),
        )
    return PromptSet(tuple(texts), tuple(metadata), tuple(lines))


def _check_metadata(entry: dict[Any, Any], kinds: dict[str, tuple[str, int]], source: str, number: int) -> None:
    """Raises CRDError for keys that no reward could be given and for a key that changes its type from line to line."""
    for key, value in entry.items():
        if not isinstance(key, str) or key in RESERVED:
            raise CRDError(
                f"{source}, line {number}: metadata cannot be called {key!r}; keys are text, and {', '.join(RESERVED)} are "
                "arguments that every reward has. Rename the key."
            )
        if value is None:
            continue
        kind, before = kinds.setdefault(key, (_kind(value), number))
        if _kind(value) != kind:
            raise CRDError(
                f"{source}, line {number}: the metadata {key!r} is {_kind(value)} here ({value!r}), but {kind} in line {before}; "
                "a key needs one type, or null."
            )


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def load_prompts(source: str) -> PromptSet:
    """``nano/TASK/SPLIT``, a ``.txt`` file (one prompt a line) or a ``.jsonl`` file; raises CRDError with the line number."""
    if source.startswith("nano/"):
        return _nano_prompts(source)
    path = Path(source).expanduser()
    if not os.path.exists(path):  # Path.exists raises an error if the name is too long
        raise CRDError(f"prompts: there is no file {str(path.resolve())[:500]}. {FORMS} Prompts themselves are given as a list.")
    if path.is_dir() or path.suffix not in (".txt", ".jsonl"):
        raise CRDError(f"prompts: {path} cannot be read as prompts. {FORMS}")
    try:
        if path.suffix == ".txt":
            return make_prompt_set((line for _, line in _lines(path)), str(path))
        return make_prompt_set((_json_line(line, path, number) for number, line in _lines(path)), str(path))
    except OSError as error:
        raise CRDError(f"prompts: {path} cannot be read: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, without blank ones at the end; a file of any size, one line at a time."""
    blank: list[tuple[int, str]] = []
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            if len(raw) > MAX_LINE:
                raise CRDError(f"{path}, line {number}: more than {MAX_LINE} bytes; expected one prompt a line.")
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise CRDError(f"{path}, line {number}: cannot be read as UTF-8 text: {error}. Save it as UTF-8.") from None
            blank.append((number, line.rstrip("\r\n")))
            if line.strip():
                yield from blank
                blank.clear()


def _json_line(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise CRDError(f"{path}, line {number}: not a JSON object ({reason}).") from None
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
                f"prompts: {source!r} is none of nano/TASK/SPLIT with TASK {', '.join(tasks)} and SPLIT train, heldout. "
                f"{HELD_OUT}."
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
    distinct = {prompt.text: {**prompt.metadata, "prompt": prompt.text} for prompt in drawn}
    return make_prompt_set(distinct.values(), source)
