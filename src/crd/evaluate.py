"""Evaluation on fixed prompts with fixed noise: reward, judges, drift from the anchor, diversity within a prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from crd.batch import PromptGroup
from crd.config import CRDConfig
from crd.judges.fitting import SET_JUDGES, SetJudges, fitting_judges, fitting_set_judges
from crd.models.policy import Policy
from crd.models.weights import Weights
from crd.objectives.terms import noised, velocity_distance
from crd.processes import add_up, share_of
from crd.rewards.protocol import RewardSet
from crd.rollout import Sampling, chunks, collect
from crd.seeding import noise

DRIFT_SIGMAS = (0.25, 0.5, 0.75)
GATHERED = 64  # pictures that processes exchange at once
DIVERSITY_SIZE = 16  # pixels, both sides: pictures are compared after averaging down to this


@dataclass(frozen=True)
class Evaluation:
    """Numbers, and the pictures they come from in the order prompt by prompt; the same on every process (failures apart)."""

    metrics: dict[str, float]
    pictures: list[Image.Image]
    scores: dict[str, np.ndarray]  # (pictures,) by reward and judge, with reward and drift; NaN where there is none
    failures: dict[str, int]  # pictures of this process that a reward gave no score, by reward


def pairwise_distance(thumbnails: np.ndarray) -> float:
    """Mean root-mean-square distance over all pairs of ``(k, ...)`` pictures with values in [0, 1]."""
    k = len(thumbnails)
    if k < 2:
        return 0.0
    distances = [float(np.sqrt(((thumbnails[i] - thumbnails[j]) ** 2).mean())) for i in range(k) for j in range(i)]
    return sum(distances) / len(distances)


class Evaluator:
    """Evaluates named weights; splits the pictures over the processes and gathers them exactly.

    The noise of a picture follows from the seed and its noise id: by default its place in the evaluation.
    """

    def __init__(
        self,
        policy: Policy,
        rewards: RewardSet,
        prompts: list[PromptGroup],
        config: CRDConfig,
        accelerator: Accelerator,
        noise_ids: list[int] | None = None,
    ):
        self.policy, self.rewards, self.config, self.accelerator = policy, rewards, config, accelerator
        self.set_judges: SetJudges | None = None
        if config.evaluation.held_out_judges:
            size = policy.model.width, policy.model.height
            self.rewards = RewardSet([*rewards.rewards, *fitting_judges(prompts, size, rewards.rewards)])
            self.set_judges = fitting_set_judges(prompts, size)
        self.prompts = prompts
        self.members = [prompt for prompt in prompts for _ in range(config.evaluation.pictures_per_prompt)]
        self.noise_ids = list(range(len(self.members))) if noise_ids is None else noise_ids

    @property
    def judge_names(self) -> list[str]:
        """What an evaluation scores, rewards included."""
        return [reward.name for reward in self.rewards.rewards] + (list(SET_JUDGES) if self.set_judges else [])

    def __call__(
        self, name: Weights, guidance_scale: float, progress: Callable[[int], Any] = lambda pictures: None
    ) -> Evaluation:
        """Draws and scores all pictures; ``progress`` is told how many this process has drawn."""
        settings, count = self.config.evaluation, len(self.members)
        ids = list(share_of(count, self.accelerator))
        with self.policy.using(name):
            drawn = collect(
                self.policy,
                self.rewards,
                [self.members[i] for i in ids],
                [self.noise_ids[i] for i in ids],
                Sampling(settings.seed, "evaluation", settings.steps, self.config.rollout.batch_size, guidance_scale),
                progress,
            )
        drift = self._drift(name, guidance_scale, drawn.x0, ids)
        columns = {**drawn.scores.parts, "reward": drawn.scores.total, "drift": drift}  # whatever a reward is called
        everywhere = {key: add_up(values, ids, count, self.accelerator) for key, values in columns.items()}
        pictures = self._gather(drawn.pictures, ids)
        # a judge that scored nothing has no mean; the reward's is 0 then, and "failed" says that it is none
        metrics = {key: mean_of_known(v) for key, v in everywhere.items() if key == "reward" or not np.isnan(v).all()}
        metrics["failed"] = float(np.isnan(everywhere["reward"]).mean())
        metrics["diversity"] = self._diversity(pictures)
        if self.set_judges:
            texts, metadata = [m.text for m in self.members], [m.metadata for m in self.members]
            metrics |= self.set_judges(pictures, texts, metadata, settings.pictures_per_prompt)
        failures = {reward.name: drawn.scores.failures[reward.name] for reward in self.rewards.rewards if reward.weight}
        return Evaluation(metrics, pictures, everywhere, failures)

    @torch.no_grad()
    def _drift(self, name: Weights, guidance_scale: float, x0: Tensor, ids: list[int]) -> np.ndarray:
        """Squared velocity distance ``(n,)`` to the guided pretrained model at noised versions of the pictures themselves."""
        distances = []
        for part in self.policy.in_step(list(chunks(len(ids), self.config.rollout.batch_size))):
            # None: forward passes that only other processes need, of any picture
            x, here = (x0[part], ids[part]) if part else (torch.zeros(1, *x0.shape[1:], device=x0.device), [0])
            coming = [self.members[i].text for i in ids[part.stop :]] if part else []
            conditioning = self.policy.encode([self.members[i].text for i in here], ahead=coming)
            total = torch.zeros(len(here), device=self.policy.device)
            for sigma in DRIFT_SIGMAS:
                level = torch.full((1, len(here)), sigma, device=self.policy.device)
                noise_ids = [self.noise_ids[i] for i in here]
                eps = noise(tuple(x.shape[1:]), self.config.evaluation.seed, 0, f"drift-{sigma}", noise_ids).to(x.device)[None]
                noisy = noised(x, eps, level)[0]
                with self.policy.using(name):
                    own = self.policy.velocity(noisy, level[0], conditioning, guidance_scale)
                with self.policy.using("pretrained"):
                    anchor = self.policy.velocity(noisy, level[0], conditioning, self.config.reference_guidance)
                total += velocity_distance(own[None], anchor[None])[0]
            if part:
                distances.append((total / len(DRIFT_SIGMAS)).cpu().numpy())
        return np.concatenate(distances) if distances else np.zeros(0)

    def _gather(self, pictures: list[Image.Image], ids: list[int]) -> list[Image.Image]:
        if self.accelerator.num_processes == 1:
            return pictures
        height, width, own = self.policy.model.height, self.policy.model.width, dict(zip(ids, pictures, strict=True))
        everywhere: list[Image.Image] = []
        for part in chunks(len(self.members), GATHERED):  # all at once would be gigabytes
            whole = torch.zeros(part.stop - part.start, height, width, 3, dtype=torch.int32, device=self.policy.device)
            for row, i in enumerate(range(part.start, part.stop)):
                if i in own:
                    whole[row] = torch.from_numpy(np.array(own[i])).to(whole)
            arrays = self.accelerator.reduce(whole, "sum").to(torch.uint8).cpu().numpy()
            everywhere += [Image.fromarray(array) for array in arrays]
        return everywhere

    def _diversity(self, pictures: list[Image.Image]) -> float:
        k = self.config.evaluation.pictures_per_prompt
        size = (DIVERSITY_SIZE, DIVERSITY_SIZE)
        small = np.stack([np.asarray(p.resize(size, Image.Resampling.BOX), dtype=np.float32) / 255 for p in pictures])
        return sum(pairwise_distance(small[i : i + k]) for i in range(0, len(small), k)) / (len(small) // k)


def mean_of_known(values: np.ndarray) -> float:
    """Mean of the scores there are; 0 if there are none (then ``failed`` is 1)."""
    return float(np.nanmean(values)) if not np.isnan(values).all() else 0.0
