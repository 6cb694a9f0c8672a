"""What the caller of the trainer gave, as Python objects or by name, brought into one form and written into the settings."""

import functools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from diffusers import DiffusionPipeline

from crd.config import CRDConfig, RewardConfig
from crd.errors import CRDError
from crd.prompts import PromptSet, load_prompts, make_prompt_set
from crd.recipe import build_config
from crd.rewards.named import resolve_reward
from crd.rewards.protocol import NamedReward, RewardFunction
from crd.seeding import derive_seed

if TYPE_CHECKING:
    from datasets import Dataset

Prompts: TypeAlias = Union[str, Path, Sequence[str | dict[str, Any]], "Dataset", PromptSet]
Reward: TypeAlias = RewardFunction | NamedReward | str

RECORD_FIELDS = frozenset(
    ("reward", "drift", "diversity", "failed", "kind", "epoch", "step", "label", "guidance_scale", "vendi", "frechet")
)


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


def settings(config: CRDConfig | dict[str, Any] | None) -> CRDConfig:
    """The settings that were given; a dictionary holds what a recipe does."""
    if isinstance(config, dict):
        return build_config(config)
    if not (config is None or isinstance(config, CRDConfig)):
        raise CRDError(f"config: expected a CRDConfig or a dictionary of its sections, got a {type(config).__name__}.")
    return config or CRDConfig()


def named_rewards(functions: Iterable[Reward] | None, config: CRDConfig) -> list[NamedReward]:
    """The rewards that were given, or else those of the settings."""
    if functions is None:
        return [NamedReward(r.name, resolve_reward(r.name, r.options), r.weight, r.applies_to) for r in config.rewards]
    several = isinstance(functions, Iterable) and not isinstance(functions, str)
    given = [_named_reward(function) for function in functions] if several else []
    if not given:
        raise CRDError(f"reward_funcs: expected a list of at least one callable or name, got {functions!r}.")
    if taken := [reward.name for reward in given if reward.name in RECORD_FIELDS]:  # scores stand beside these
        raise CRDError(f"rewards: {', '.join(taken)} is the name of a field of the record. Rename the function.")
    return given


def _named_reward(given: Reward) -> NamedReward:
    if isinstance(given, NamedReward):
        return given
    if isinstance(given, str):
        return NamedReward(given, resolve_reward(given, {}))
    if not callable(given):
        raise CRDError(f"reward_funcs: expected callables, names or NamedReward, got {given!r}.")
    return NamedReward(_name_of(given), given)


def judges(config: CRDConfig) -> list[NamedReward]:
    """Scores that are shown and never trained on."""
    return [NamedReward(r.name, resolve_reward(r.name, r.options), 0.0, r.applies_to) for r in config.evaluation.judges]


def _name_of(function: Any) -> str:
    """Of a function, method or class its own; of any other object that can be called, that of its class."""
    if isinstance(function, functools.partial):
        return _name_of(function.func)
    return getattr(function, "__name__", type(function).__name__)


def as_given(
    config: CRDConfig,
    model: str | Path | DiffusionPipeline | None,
    rewards: list[NamedReward] | None,
    train_prompts: Prompts | None,
    eval_prompts: Prompts | None,
) -> CRDConfig:
    """The settings with what was given as Python objects named in them, so that the run folder tells what it holds."""
    model = config.model.path if model is None else model
    if not isinstance(model, str | Path | DiffusionPipeline):
        raise CRDError(f"model: expected a name, a folder or a loaded DiffusionPipeline, got a {type(model).__name__}.")
    if isinstance(model, DiffusionPipeline):
        path = model.config.get("_name_or_path") or type(model).__name__
    else:
        path = os.path.expanduser(model)
    changes: dict[str, Any] = {
        "output_dir": config.output_dir.expanduser(),
        "model": config.model.model_copy(update={"path": str(path)}),
    }
    if rewards is not None:
        changes["rewards"] = tuple(RewardConfig(name=r.name, weight=r.weight, applies_to=r.applies_to) for r in rewards)
    given = {"train": train_prompts, "evaluation": eval_prompts}
    names = {key: _named(prompts, f"{key} prompts") for key, prompts in given.items() if prompts is not None}
    changes["prompts"] = prompts = config.prompts.model_copy(update=names)
    if "evaluation" not in prompts.model_fields_set and not prompts.train.startswith("nano/"):
        raise CRDError(
            f"prompts.evaluation is not given, and its default, {prompts.evaluation}, does not go with training prompts of your "
            "own. Give prompts of their kind that are not trained on: prompts.evaluation in a recipe, eval_prompts in Python."
        )
    return config.model_copy(update=changes)


def _named(prompts: Prompts, setting: str) -> str:
    """The name of a file; or for a list its length, and a number that no list of other prompts or metadata has."""
    if isinstance(prompts, str | Path):
        return str(prompts)
    given = prompt_set(prompts, setting)
    rows = [given.texts[index] + (repr(given.metadata[index]) if given.metadata[index] else "") for index in given.lines]
    return f"<{len(rows)} prompts, {derive_seed(0, *rows):016x}>"
