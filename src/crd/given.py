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
from crd.rewards.named import resolve_reward
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
    if isinstance(functions, str) or callable(functions) or not functions:
        raise CRDError(f"reward_funcs: expected a list of at least one callable or name, got {functions!r}.")
    if wrong := [function for function in functions if not (isinstance(function, str) or callable(function))]:
        raise CRDError(f"reward_funcs: expected callables or names, got {wrong[0]!r}.")
    return [NamedReward(f, resolve_reward(f, {})) if isinstance(f, str) else NamedReward(_name_of(f), f) for f in functions]


def judges(config: CRDConfig) -> list[NamedReward]:
    """Scores that are shown and never trained on."""
    return [NamedReward(r.name, resolve_reward(r.name, r.options), 0.0, r.applies_to) for r in config.evaluation.judges]


def _name_of(function: Any) -> str:
    return function.__name__ if isinstance(function, FunctionType) else type(function).__name__


def as_given(
    config: CRDConfig,
    model: str | DiffusionPipeline | None,
    rewards: list[NamedReward] | None,
    train_prompts: Prompts | None,
    eval_prompts: Prompts | None,
) -> CRDConfig:
    """The settings with what was given as Python objects named in them, so that the run folder tells what it holds."""
    changes: dict[str, Any] = {}
    if not (model is None or isinstance(model, str | DiffusionPipeline)):
        raise CRDError(f"model: expected a name, a folder's name or a loaded DiffusionPipeline, got a {type(model).__name__}.")
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
