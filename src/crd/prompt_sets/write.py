"""``crd prompts``: from the generators to files."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from crd.errors import CRDError
from crd.prompt_sets import geneval, ocr
from crd.rewards.geneval.prompts import to_jsonl


def write_geneval(
    output: Path, split: ocr.Split, size: int | None, seed: int | None, unseen_objects: bool, force: bool
) -> dict[str, int]:
    """Writes a GenEval prompt file (JSONL); returns the number of prompts by task."""
    check_output(output, ".jsonl", force)
    if split == "test":
        if size is not None or seed is not None:
            raise CRDError("--size and --seed are for --split train: the test prompts are fixed. Leave them out.")
        rows = geneval.geneval_test_rows(unseen_objects)
    else:
        size = geneval.TRAIN_SIZE if size is None else size
        with tqdm(total=size, unit="prompt", desc="GenEval") as bar:
            rows = geneval.geneval_train_rows(size, seed or 0, unseen_objects, bar.update)
    write_atomically(output, to_jsonl(rows))
    return count_by(row["tag"] for row in rows)


def write_ocr(
    output: Path, split: ocr.Split, size: int | None, seed: int, words: Path | None, longest: int, force: bool
) -> dict[str, int]:
    """Writes prompts with texts to spell (one a line); returns the number of prompts by the number of words to spell."""
    check_output(output, ".txt", force)
    known = ocr.read_words(words) if words else ocr.SHIPPED_WORDS
    size = ocr.DEFAULT_SIZES[split] if size is None else size
    with tqdm(total=size, unit="prompt", desc="OCR") as bar:
        prompts = ocr.ocr_prompts(split, size, seed, known, longest, bar.update)
    write_atomically(output, "".join(f"{prompt}\n" for prompt in prompts))
    lengths = [len(prompt.split('"')[1].split()) for prompt in prompts]
    return count_by(f"{length} word" + "s" * (length > 1) for length in lengths)


def count_by(kinds: Iterable[str]) -> dict[str, int]:
    """How many there are of each kind, in the kinds' order."""
    return dict(sorted(Counter(kinds).items()))


def check_output(path: Path, suffix: str, force: bool) -> None:
    """Raises CRDError if the file has another kind of name, or exists and was not to be replaced."""
    if path.suffix != suffix:
        raise CRDError(f"--output: {path} must end in {suffix}.")
    if path.exists() and not force:
        raise CRDError(f"--output: {path} exists. Give another name, or --force to replace it.")


def write_atomically(path: Path, text: str) -> None:
    """A reader finds the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CRDError(f"--output: {path} cannot be written: {error}") from error
