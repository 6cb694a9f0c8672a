"""What a reward is, and how several are called, checked and added up."""

import math
import traceback
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image

from crd.errors import CRDError
from crd.log import logger


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


@dataclass(frozen=True)
class Scores:
    """Scores of some pictures; NaN where there is none."""

    total: np.ndarray  # (n,) weighted sum; NaN if any part with a weight is
    parts: dict[str, np.ndarray]  # (n,) by reward
    failures: dict[str, int] = field(default_factory=dict)  # pictures without a score, by reward


class RewardSet:
    """Weighted rewards as one. A reward that raises or answers nonsense fails for that batch of pictures, and is logged."""

    def __init__(self, rewards: list[NamedReward]):
        names = [reward.name for reward in rewards]
        if len(set(names)) < len(names):  # scores are kept by name
            raise CRDError(f"rewards and judges need names of their own, got {', '.join(names)}. Rename or drop one.")
        self.rewards = rewards
        self._logged: set[str] = set()

    def score(self, images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        keys = dict.fromkeys(key for entry in metadata for key in entry if key not in ("prompt", "images", "prompts"))
        columns = {key: [entry.get(key) for entry in metadata] for key in keys}
        parts = {reward.name: self._one(reward, images, prompts, columns) for reward in self.rewards}
        # a judge has no weight, and its failure is none of the reward's
        total = sum((r.weight * parts[r.name] for r in self.rewards if r.weight), np.zeros(len(images)))
        failures = {name: int(np.isnan(values).sum()) for name, values in parts.items()}
        return Scores(total, parts, failures)

    def _one(
        self, reward: NamedReward, images: list[Image.Image], prompts: list[str], columns: dict[str, list[Any]]
    ) -> np.ndarray:
        if not images:  # a process may have none
            return np.zeros(0)
        try:
            answer = list(reward.function(images, prompts, **columns))
            if len(answer) != len(images):
                raise ValueError(f"returned {len(answer)} scores for {len(images)} pictures")
            values = np.array([math.nan if value is None else float(value) for value in answer])
        except Exception as error:  # noqa: BLE001  a reward is the user's code: count, log, go on within the limit
            self._log_once(reward.name, error)
            return np.full(len(images), math.nan)
        values[~np.isfinite(values)] = math.nan
        return values

    def _log_once(self, name: str, error: Exception) -> None:
        """Logs each kind of failure once with its traceback; the count is in the metrics."""
        key = f"{name}: {type(error).__name__}: {error}"
        if key not in self._logged:
            self._logged.add(key)
            logger.warning("reward %s failed: %s\n%s", name, error, "".join(traceback.format_exception(error)))
