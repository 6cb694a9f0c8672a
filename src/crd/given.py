"""What the caller of the trainer gave, as Python objects or by name, brought into one form and written into the settings."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from diffusers import DiffusionPipeline

from crd.config import CRDConfig, RewardConfig
from crd.errors import CRDError
from crd.prompts import PromptSet, load_prompts, make_prompt_set
from crd.rewards.geneval.detector import Detector
from crd.rewards.geneval.prompts import COCO_CLASSES, COLORS
from crd.rewards.geneval.reward import GenEvalReward
from crd.rewards.geneval.rules import check_metadata
from crd.rewards.named import resolve_reward
from crd.rewards.ocr import OCRReward, quoted_target
from crd.rewards.protocol import NamedReward, RewardFunction
from crd.seeding import derive_seed

if TYPE_CHECKING:
    from datasets import Dataset

Prompts: TypeAlias = Union[str, Path, Sequence[str | dict[str, Any]], "Dataset", PromptSet]


def prompt_set(prompts: Prompts, setting: str) -> PromptSet:
    """From a file name, a list, a ``datasets.Dataset`` with a column "prompt" (the others are metadata), or as it is."""
    if isinstance(prompts, PromptSet):
        return prompts
    if isinstance(prompts, str | Path):
        return load_prompts(str(prompts))
    if isinstance(prompts, list | tuple):
        return make_prompt_set(prompts, setting)
    if "datasets" in sys.modules:  # else nobody can have handed one over; the library is optional and slow to load
        from datasets import Dataset

        if isinstance(prompts, Dataset):
            return make_prompt_set(_dataset_rows(prompts, setting), setting)
    raise CRDError(
        f"{setting}: expected a file name, a list of prompts or a datasets.Dataset, got a {type(prompts).__name__}. "
        "Of a DatasetDict give one split, of an IterableDataset a list of its rows."
    )


def _dataset_rows(dataset: "Dataset", setting: str) -> Iterator[dict[str, Any]]:
    if "prompt" not in dataset.column_names:
        raise CRDError(
            f'{setting}: the dataset has no column "prompt" but {", ".join(dataset.column_names)}. '
            'Rename one: dataset.rename_column("caption", "prompt").'
        )
    return map(_without_nulls, dataset)


def _without_nulls(value: Any) -> Any:
    """Arrow's tables give every object every key; what was absent is None there, and absent again here."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def named_rewards(functions: Sequence[RewardFunction | str] | None, config: CRDConfig) -> list[NamedReward]:
    """The rewards that were given, or else those of the settings."""
    if functions is None:
        return [NamedReward(r.name, resolve_reward(r.name, r.options), r.weight, r.applies_to) for r in config.rewards]
    if not functions:
        raise CRDError("reward_funcs is empty: give at least one callable or name.")
    return [NamedReward(f, resolve_reward(f, {})) if isinstance(f, str) else NamedReward(_name_of(f), f) for f in functions]


def judges(config: CRDConfig) -> list[NamedReward]:
    """Scores that are shown and never trained on."""
    return [NamedReward(r.name, resolve_reward(r.name, r.options), 0.0, r.applies_to) for r in config.evaluation.judges]


def _name_of(function: Any) -> str:
    return function.__name__ if isinstance(function, FunctionType) else type(function).__name__


def check_targets(rewards: list[NamedReward], prompts: PromptSet) -> None:
    """Prompts that give an OCR or GenEval reward nothing to judge end the run before it begins."""
    reading = [reward.name for reward in rewards if isinstance(reward.function, OCRReward)]
    if reading and not any(quoted_target(text) for text in prompts.texts):
        raise CRDError(
            f"prompts.train: no prompt has a word in double quotes, which the reward {reading[0]!r} looks for, "
            f'e.g. a sign that says "STAR". The first prompt is {prompts.texts[0]!r}.'
        )
    for reward in rewards:
        if isinstance(reward.function, GenEvalReward):
            _check_geneval(reward.name, reward.function, prompts)


def _check_geneval(name: str, reward: GenEvalReward, prompts: PromptSet) -> None:
    judged = [(text, entry) for text, entry in zip(prompts.texts, prompts.metadata, strict=True) if "include" in entry]
    if not judged:
        raise CRDError(
            f"prompts.train: no prompt has GenEval metadata (tag, include), which the reward {name!r} needs. "
            f"`crd prompts geneval` writes such a file. The first prompt is {prompts.texts[0]!r}."
        )
    known = _words_of(reward.detector)
    for text, entry in judged:
        try:
            check_metadata(entry)
        except CRDError as error:
            raise CRDError(f"prompts.train: {text!r}: {error}") from None
        clauses = [*entry["include"], *(entry.get("exclude") or ())]
        for key, words in known.items():
            if unknown := [clause[key] for clause in clauses if clause.get(key, words[0]) not in words]:
                raise CRDError(
                    f"prompts.train: {text!r}: the detector of the reward {name!r} knows no {key} {unknown[0]!r}; "
                    f"it knows {', '.join(words)}. Leave such prompts out, or give another detector."
                )


def _words_of(detector: Detector) -> dict[str, tuple[str, ...]]:
    """The values of clauses' keys that a detector can name; nothing of one that is not ours."""
    from crd.nano import world  # here, since the world loads matplotlib
    from crd.nano.detector import NanoDetector
    from crd.nano.judges import NetDetector

    if isinstance(detector, NanoDetector | NetDetector):
        return {"class": tuple(world.SHAPES), "color": tuple(world.COLORS)}
    if "crd.rewards.geneval.mask2former" in sys.modules:  # where it is not loaded, nobody has such a detector
        from crd.rewards.geneval.mask2former import Mask2FormerDetector

        if isinstance(detector, Mask2FormerDetector):
            return {"class": COCO_CLASSES, "color": COLORS}
    return {}


def check_applicable(rewards: list[NamedReward], prompts: PromptSet) -> None:
    """Every prompt must have a reward, or its pictures are drawn for nothing."""
    rows = zip(prompts.texts, prompts.metadata, strict=True)
    bare = [text for text, metadata in rows if not any(reward.applies(text, metadata) for reward in rewards if reward.weight)]
    if bare:
        rules = ", ".join(f"{reward.name} to {reward.applies_to or 'all'}" for reward in rewards)
        raise CRDError(
            f"rewards: none applies to {len(bare)} of {len(prompts)} training prompts, the first is {bare[0]!r}. "
            f"They apply so: {rules}. Drop these prompts or change rewards[].applies_to."
        )


def as_given(
    config: CRDConfig,
    model: str | DiffusionPipeline | None,
    rewards: list[NamedReward] | None,
    train_prompts: Prompts | None,
    eval_prompts: Prompts | None,
) -> CRDConfig:
    """The settings with what was given as Python objects named in them, so that the run folder tells what it holds."""
    changes: dict[str, Any] = {}
    if model is not None:
        path = model if isinstance(model, str) else str(model.config.get("_name_or_path") or type(model).__name__)
        changes["model"] = config.model.model_copy(update={"path": path})
    if rewards is not None:
        changes["rewards"] = tuple(RewardConfig(name=r.name, weight=r.weight) for r in rewards)
    given = {"train": train_prompts, "evaluation": eval_prompts}
    names = {key: _named(prompts, f"{key} prompts") for key, prompts in given.items() if prompts is not None}
    changes["prompts"] = config.prompts.model_copy(update=names)
    return config.model_copy(update=changes)


def _named(prompts: Prompts, setting: str) -> str:
    """The name of a file; or for a list its length, and a number that is this list's alone."""
    if isinstance(prompts, str | Path):
        return str(prompts)
    given = prompt_set(prompts, setting)
    texts = [given.texts[index] for index in given.lines]
    return f"<{len(texts)} prompts, {derive_seed(0, *texts):016x}>"
