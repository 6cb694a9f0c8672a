"""What the caller of the trainer gave, as Python objects or by name, brought into one form and written into the settings."""

from collections.abc import Sequence
from types import FunctionType
from typing import Any

from diffusers import DiffusionPipeline

from crd.config import CRDConfig, RewardConfig
from crd.errors import CRDError
from crd.prompts import PromptSet, load_prompts, make_prompt_set
from crd.rewards.named import resolve_reward
from crd.rewards.ocr import OCRReward, quoted_target
from crd.rewards.protocol import NamedReward, RewardFunction
from crd.seeding import derive_seed

Prompts = str | Sequence[str | dict[str, Any]] | PromptSet


def prompt_set(prompts: Prompts, setting: str) -> PromptSet:
    """From a file name, a list, or as it is."""
    if isinstance(prompts, PromptSet):
        return prompts
    return load_prompts(prompts) if isinstance(prompts, str) else make_prompt_set(prompts, setting)


def named_rewards(functions: Sequence[RewardFunction | str] | None, config: CRDConfig) -> list[NamedReward]:
    """The rewards that were given, or else those of the settings."""
    if functions is None:
        return [NamedReward(r.name, resolve_reward(r.name, r.options), r.weight) for r in config.rewards]
    if not functions:
        raise CRDError("reward_funcs is empty: give at least one callable or name.")
    return [NamedReward(f, resolve_reward(f, {})) if isinstance(f, str) else NamedReward(_name_of(f), f) for f in functions]


def judges(config: CRDConfig) -> list[NamedReward]:
    """Scores that are shown and never trained on."""
    return [NamedReward(r.name, resolve_reward(r.name, r.options), 0.0) for r in config.evaluation.judges]


def _name_of(function: Any) -> str:
    return function.__name__ if isinstance(function, FunctionType) else type(function).__name__


def check_targets(rewards: list[NamedReward], prompts: PromptSet) -> None:
    """Prompts that give an OCR reward nothing to look for end the run before it begins."""
    reading = [reward.name for reward in rewards if isinstance(reward.function, OCRReward)]
    if reading and not any(quoted_target(text) for text in prompts.texts):
        raise CRDError(
            f"prompts.train: no prompt has a word in double quotes, which the reward {reading[0]!r} looks for, "
            f'e.g. a sign that says "STAR". The first prompt is {prompts.texts[0]!r}.'
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
    if isinstance(prompts, str):
        return prompts
    texts = prompt_set(prompts, setting).texts
    return f"<{len(texts)} prompts, {derive_seed(0, *texts):016x}>"
