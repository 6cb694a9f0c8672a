"""What a reward is, and how several are called, checked and added up."""

import math
import traceback
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from crd.errors import CRDError
from crd.log import logger
from crd.rewards.ocr import quoted_target


class RewardFunction(Protocol):
    """``reward(images, prompts, **metadata) -> one number (or None) per picture``.

    ``metadata`` holds one list per key of the prompts' metadata, as long as ``images``; a picture whose
    prompt lacks the key has None there. None or NaN means that no score could be given: the sample is
    then left out, it does not count as zero.
    """

    def __call__(self, images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]: ...


@dataclass(frozen=True)
class NamedReward:
    """One reward of a run with its weight in the sum."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    applies_to: str | None = None  # "quoted", or the metadata key that a prompt must have; None: every prompt

    def applies(self, prompt: str, metadata: dict[str, Any]) -> bool:
        """Whether pictures of this prompt are scored."""
        if self.applies_to is None:
            return True
        return bool(quoted_target(prompt)) if self.applies_to == "quoted" else metadata.get(self.applies_to) is not None


@dataclass(frozen=True)
class Scores:
    """Scores of some pictures; NaN where there is none."""

    total: np.ndarray  # (n,) weighted sum over what applies; NaN if any such part has failed, or none applies
    parts: dict[str, np.ndarray]  # (n,) by reward; NaN also where it does not apply
    failures: dict[str, int] = field(default_factory=dict)  # pictures that should have a score and have none, by reward


class RewardSet:
    """Weighted rewards as one. A reward that raises or answers nonsense fails for that batch of pictures, and is logged."""

    def __init__(self, rewards: list[NamedReward]):
        names = [reward.name for reward in rewards]
        if len(set(names)) < len(names):  # scores are kept by name
            raise CRDError(f"rewards and judges need names of their own, got {', '.join(names)}. Rename or drop one.")
        self.rewards = rewards
        self._logged: set[str] = set()

    def score(self, images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        total, parts, failures = np.zeros(len(images)), {}, {}
        scored = np.zeros(len(images), dtype=bool)  # by anything with a weight
        for reward in self.rewards:
            here = [i for i, prompt in enumerate(prompts) if reward.applies(prompt, metadata[i])]
            values = np.full(len(images), math.nan)
            values[here] = self._one(reward, [images[i] for i in here], [prompts[i] for i in here], [metadata[i] for i in here])
            parts[reward.name], failures[reward.name] = values, int(np.isnan(values[here]).sum())
            if reward.weight:  # a judge has none, and its failure is none of the reward's
                total[here] += reward.weight * values[here]
                scored[here] = True
        if any(reward.weight for reward in self.rewards):
            total[~scored] = math.nan
        return Scores(total, parts, failures)

    def _one(
        self, reward: NamedReward, images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]
    ) -> np.ndarray:
        if not images:  # a process may have none
            return np.zeros(0)
        keys = dict.fromkeys(key for entry in metadata for key in entry if key not in ("prompt", "images", "prompts"))
        columns = {key: [entry.get(key) for entry in metadata] for key in keys}
        try:
            given = reward.function([image.copy() for image in images], prompts, **columns)  # it may change them
            if isinstance(given, str | dict | set):  # which are iterable, but not in the pictures' order, or not over scores
                raise TypeError(f"returned a {type(given).__name__}, expected a list of numbers")
            answer = list(given)
            if len(answer) != len(images):
                raise ValueError(f"returned {len(answer)} scores for {len(images)} pictures")
            values = np.array([math.nan if value is None else float(value) for value in answer])
        except torch.OutOfMemoryError:  # of the run, and no fault of the reward: the trainer says which settings to change
            raise
        except Exception as error:  # noqa: BLE001  a reward is the user's code: count, log, go on within the limit
            self._log_once(reward.name, error)
            return np.full(len(images), math.nan)
        values[~np.isfinite(values)] = math.nan
        if reward.weight and np.isnan(values).any():  # a judge may well have nothing to say
            self._log_once(reward.name, ValueError("gave no score for some pictures (None, NaN or infinite)"))
        return values

    def _log_once(self, name: str, error: Exception) -> None:
        """Logs each kind of failure once with its traceback; the count is in the metrics."""
        key = f"{name}: {type(error).__name__}: {error}"
        if key not in self._logged:
            self._logged.add(key)
            logger.warning("reward %s failed: %s\n%s", name, error, "".join(traceback.format_exception(error)))
