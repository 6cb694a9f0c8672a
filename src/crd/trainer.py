"""The only loop: roll out, normalise, take optimiser steps, move the snapshots, and now and then evaluate and save."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from tqdm.auto import tqdm

from crd import checkpoint
from crd.advantages import Advantages, combine, normalise
from crd.alarm import alarm_settings, best_evaluation, find_alarms, students
from crd.batch import PromptGroup, Samples
from crd.config import CRDConfig
from crd.errors import CRDError
from crd.evaluate import Evaluation, Evaluator, mean_of_known
from crd.failures import SkippedSteps, check_failures
from crd.given import Prompts, Reward, as_given, judges, named_rewards, prompt_set, settings
from crd.given_checks import check_alarm_judges, check_prompts, check_trackers, warn_of_unknown_words
from crd.interrupt import StopRequest
from crd.log import Record, logger, read_record
from crd.micro_batch import settle_micro_batch, with_micro_batch
from crd.models.family import check_guidance
from crd.models.load import load_policy
from crd.processes import add_up, from_main, launched, peak_memory_mib, share_of, split, tensors_from_main
from crd.recipe import dump_config
from crd.report.pictures import save_grid
from crd.report.result import check_best, forget_others, forget_result, restore_best, save_best, write_result
from crd.rewards.protocol import RewardSet
from crd.rollout import Drawn, collect, rollout_sampling
from crd.run_folder import RunFolder
from crd.seeding import derive_seed
from crd.step import TrainStep
from crd.tiles import StepMembers


class CRDTrainer:
    """Fine-tunes a diffusers text-to-image pipeline with rewards.

    Args:
        model: pipeline, local folder, hub id or "nano"; default: ``config.model.path``.
        reward_funcs: callables (see :class:`crd.rewards.RewardFunction`), names, or :class:`crd.rewards.NamedReward` with a
            weight; default: ``config.rewards``.
        train_prompts: file, list of strings or of ``{"prompt": ..., metadata}``; default: ``config.prompts.train``.
        eval_prompts: held-out prompts in the same forms; default: ``config.prompts.evaluation``.
        config: every setting, or a dictionary with the sections of a recipe.

    Raises:
        CRDError: for anything the caller can put right, with what to do.
    """

    def __init__(
        self,
        model: str | Path | DiffusionPipeline | None = None,
        reward_funcs: Iterable[Reward] | None = None,
        train_prompts: Prompts | None = None,
        eval_prompts: Prompts | None = None,
        config: CRDConfig | dict[str, Any] | None = None,
    ):
        config = settings(config)
        rewards = named_rewards(reward_funcs, config)
        self.config = config = as_given(config, model, None if reward_funcs is None else rewards, train_prompts, eval_prompts)
        check_trackers(config)
        self.accelerator = launched(config.trackers, config.output_dir)
        self.folder = RunFolder(config.output_dir)
        if self.accelerator.is_main_process:
            self.folder.open(config, write=False)  # before anything is loaded: what cannot be resumed is known in a second
        self.train_prompts = prompt_set(train_prompts if train_prompts is not None else config.prompts.train, "train_prompts")
        self.eval_prompts = prompt_set(eval_prompts if eval_prompts is not None else config.prompts.evaluation, "eval_prompts")
        check_prompts(rewards, self.train_prompts, self.eval_prompts)
        self.rewards = RewardSet(rewards)
        torch.manual_seed(derive_seed(config.seed, "lora-init"))
        pipeline = model if isinstance(model, DiffusionPipeline) else config.model.path
        self.policy = load_policy(pipeline, config.model, self.accelerator.device)
        check_guidance(self.policy.model, config)
        everything = RewardSet([*rewards, *judges(config)])  # their networks take memory of the same GPU: before sizes are tried
        if config.train.gradient_checkpointing:
            self.policy.model.backbone.enable_gradient_checkpointing()
        self.micro_batch = settle_micro_batch(self.policy, config, self.folder.found, self.accelerator)
        self.step = TrainStep(self.policy, with_micro_batch(config, self.micro_batch), self.accelerator)
        held_out = self.eval_prompts.first(config.evaluation.prompts)
        self.evaluator = Evaluator(self.policy, everything, held_out, config, self.accelerator)
        check_alarm_judges(config, self.evaluator.judge_names)
        self.epoch = 0  # epochs done
        self.steps_done = 0  # optimiser steps
        self.evaluations: list[dict[str, Any]] = []  # rows of all evaluations so far
        self._skipped = SkippedSteps()
        self.stop = StopRequest()
        warn_of_unknown_words(self.policy.model, [*self.train_prompts.texts, *self.eval_prompts.texts])

    # ---------------------------------------------------------------------------------------- loop

    def train(self) -> Path:
        """Trains to ``config.train.epochs``, resuming what the run folder holds; returns the folder with the result."""
        try:
            return self._train()
        except torch.OutOfMemoryError as error:
            raise CRDError(
                f"the device ran out of memory in epoch {self.epoch + 1}; the checkpoints are untouched. Lower train.micro_batch "
                f"(now {self.micro_batch}) or rollout.batch_size (now {self.config.rollout.batch_size}), which change no result, "
                f"or set train.gradient_checkpointing; `crd plan` shows what takes how much. {error}"
            ) from error
        except (OSError, SafetensorError) as error:  # of records, pictures and the result: most often a full disk
            raise CRDError(
                f"the run in {self.folder.path} stopped: {error}. Its checkpoints are untouched: free some disk space "
                "or mend the permissions, then run the same command again to go on."
            ) from error

    def _train(self) -> Path:
        config = self.config
        resumed = self._resume()
        if config.trackers:
            self.accelerator.init_trackers("crd", config={"settings": dump_config(config)})
        with (
            self.stop.listening(self._say),
            tqdm(
                total=config.train.epochs, initial=self.epoch, unit="epoch", disable=not self.accelerator.is_main_process
            ) as bar,
        ):
            self._begin(resumed)
            stopping = self.stop.agreed(self.accelerator)  # not whether it was asked: that comes to processes at different times
            while not self._done() and not stopping:
                row = self._train_epoch(bar)
                self.epoch += 1
                bar.update()
                bar.set_postfix(reward=f"{row['reward']:.3f}", drift=f"{row['anchor_distance']:.3f}")
                if self._evaluation_due():
                    self._evaluate_student()
                stopping = self.stop.agreed(self.accelerator)
                if self._done() or stopping or self.epoch % config.checkpoint.every == 0:
                    self._save()
        self._end()
        self.accelerator.wait_for_everyone()
        if config.trackers:
            self.accelerator.end_training()
        return self.folder.path

    def _begin(self, resumed: bool) -> None:
        """What must be there before the next epoch."""
        if not resumed:  # a checkpoint of epoch 0 has them in its record
            if self.config.evaluation.before:
                self._first_evaluations()
            self._save()
        elif self._evaluation_due():  # it failed, or was not due then
            self._evaluate_student()
        if not self._done() and self.accelerator.is_main_process:
            forget_result(self.folder, self.config)  # of fewer epochs

    def _end(self) -> None:
        """The result, if there is nothing left to train."""
        if not self._done():
            self._say(f"Stopped after epoch {self.epoch}; everything is saved. Run the same command again to go on.")
        elif self._halted() and self.config.alarm.action == "roll_back":
            if self.accelerator.is_main_process:
                self._roll_back()
        else:
            self._evaluate_student()  # the alarm may be told to end a run between two evaluations
            write_result(self.folder, self.config, self.policy, self.evaluator.members)

    def _done(self) -> bool:
        return self.epoch >= self.config.train.epochs or self._halted()

    def _train_epoch(self, bar: tqdm) -> dict[str, float]:
        config, began = self.config, time.perf_counter()
        groups = self.train_prompts.epoch(config.seed, self.epoch, config.rollout.prompts_per_epoch)
        ids = self._local_ids()
        drawn = self._roll_out(groups, ids, bar)
        rolled = time.perf_counter()
        total = len(groups) * config.rollout.group_size
        rewards = torch.from_numpy(add_up(drawn.scores.total, ids, total, self.accelerator)).float()
        failed = float(rewards.isnan().float().mean())
        if failed > config.reward_failure_limit:
            self._save()  # the state of the epoch's beginning
        check_failures(failed, f"epoch {self.epoch + 1}", drawn.scores.failures, config.reward_failure_limit)
        parts = {r.name: add_up(drawn.scores.parts[r.name], ids, total, self.accelerator) for r in self.rewards.rewards}
        together = config.rollout.group_size if config.objective.centering == "prompt" else total // config.train.steps_per_epoch
        centered = torch.arange(total) // together
        advantages = self._advantages(rewards, parts, centered)
        statistics = self._optimise(drawn, ids, groups, centered, advantages)
        known = rewards[~rewards.isnan()]
        row = {
            "epoch": self.epoch + 1,
            "step": self.steps_done,
            "reward": float(known.mean()) if len(known) else 0.0,
            "reward_std": float(known.std(correction=0)) if len(known) else 0.0,
            "zero_spread_groups": advantages.zero_spread,
            "failed": failed,
            **_parts(parts),
            **statistics,
        }
        self._record("train", row)
        self._time(
            rollout=rolled - began - drawn.reward_seconds,
            reward=drawn.reward_seconds,
            train=time.perf_counter() - rolled,
            forwards=self.step.forwards,
            peak_memory_MiB=peak_memory_mib(self.policy.device),
        )
        return row

    def _roll_out(self, groups: list[PromptGroup], ids: list[int], bar: tqdm) -> Drawn:
        config = self.config
        done = 0

        def progress(pictures: int) -> None:
            nonlocal done
            done += pictures
            bar.set_description(f"rollout {done}/{len(ids)}")

        prompts = [groups[i // config.rollout.group_size] for i in ids]
        with self.policy.using("sampler"):
            sampling = rollout_sampling(config, self.epoch)
            drawn = collect(self.policy, self.rewards, prompts, ids, sampling, progress, keep_pictures=False)
        bar.set_description("training")
        return drawn

    def _advantages(self, rewards: torch.Tensor, parts: dict[str, np.ndarray], centered: torch.Tensor) -> Advantages:
        settings = self.config.advantage
        if settings.combine == "advantages":
            stacked = torch.stack([torch.from_numpy(part) for part in parts.values()])
            weights = torch.tensor([reward.weight for reward in self.rewards.rewards])
            rewards = combine(stacked, weights, rewards, centered, spread_of=settings.spread_of)
        return normalise(rewards, centered, clip=settings.clip, spread_of=settings.spread_of)

    def _local_ids(self) -> list[int]:
        """Global sample ids of this process: its share of each optimiser step, so that no sample ever moves."""
        config = self.config
        per_step = config.rollout.prompts_per_epoch * config.rollout.group_size // config.train.steps_per_epoch
        share = share_of(per_step, self.accelerator)
        return [step * per_step + i for step in range(config.train.steps_per_epoch) for i in share]

    def _optimise(
        self, drawn: Drawn, ids: list[int], groups: list[PromptGroup], centered: torch.Tensor, advantages: Advantages
    ) -> dict[str, float]:
        """The epoch's optimiser steps; returns the mean of their statistics. ``centered`` tells what is centered together."""
        config = self.config
        conditioning = self.policy.encode([prompt.text for prompt in groups])
        sample_id = torch.tensor(ids, dtype=torch.long)
        local = Samples(
            x0=drawn.x0,
            sample_id=sample_id,
            prompt=sample_id // config.rollout.group_size,
            group=centered[sample_id],
            advantage=advantages.value[sample_id],
            path=drawn.path,
        )
        rows = []
        for index in range(config.train.steps_per_epoch):
            whole = torch.tensor(list(split(len(centered), config.train.steps_per_epoch, index)))
            whole = whole[advantages.valid[whole]]  # failed samples leave the step
            mine = torch.isin(whole, sample_id)
            keep = torch.isin(sample_id, whole).nonzero()[:, 0]
            members = StepMembers(
                group=centered[whole].unique(return_inverse=True)[1],
                advantage=advantages.value[whole],
                mine=mine.nonzero()[:, 0],
            )
            statistics = self.step(local.select(keep), conditioning, members, self.steps_done)
            self._skipped.count(statistics["gradient_norm"], self.steps_done, config.train.learning_rate)
            self.policy.blend("old", config.old(self.steps_done))
            self.policy.blend("sampler", config.sampler(self.steps_done))
            self.steps_done += 1
            rows.append(statistics)
        return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}

    # ---------------------------------------------------------------------------------- evaluation

    def _first_evaluations(self) -> None:
        """The pretrained model as the student starts (no guidance), and as its users know it (guided)."""
        self._evaluate("pretrained", self.config.evaluation.guidance_scale, "base")
        if self.config.reference_guidance != self.config.evaluation.guidance_scale:
            self._evaluate("pretrained", self.config.reference_guidance, "base-guided")

    def _evaluation_due(self) -> bool:
        return self.epoch > 0 and (self.epoch == self.config.train.epochs or self.epoch % self.config.evaluation.every == 0)

    def _evaluate_student(self) -> None:
        """Once per epoch."""
        label = f"epoch-{self.epoch:04d}"
        if self.epoch > 0 and all(row["label"] != label for row in self.evaluations):
            self._evaluate("student", self.config.evaluation.guidance_scale, label)
            self._watch()

    def _evaluate(self, name: Any, guidance_scale: float, label: str) -> Evaluation:
        began = time.perf_counter()
        evaluation = self.evaluator(name, guidance_scale)
        failed, limit = evaluation.metrics["failed"], self.config.reward_failure_limit
        if failed > limit and name == "student":
            self._save()  # without the evaluation, which is made again when the run goes on
        check_failures(failed, f"evaluation {label}", evaluation.failures, limit)  # before it is recorded for good
        row = {"epoch": self.epoch, "step": self.steps_done, "label": label, "guidance_scale": guidance_scale}
        self.evaluations.append({**row, **evaluation.metrics})
        self._record("evaluation", self.evaluations[-1])
        self._time(evaluation=time.perf_counter() - began)
        if self.accelerator.is_main_process:
            path = self.folder.pictures / f"{label}.png"
            save_grid(evaluation.pictures, self.config.evaluation.pictures_per_prompt, path)
        return evaluation

    # ---------------------------------------------------------------------------------- hack alarm

    def _watch(self) -> None:
        """Says what the newest evaluation alarms of; keeps the weights that held-out judges like best."""
        newest, settings = self.evaluations[-1], alarm_settings(self.config)
        for alarm in find_alarms(self.evaluations, settings):
            if alarm.label == newest["label"] and self.accelerator.is_main_process:
                logger.warning("hack alarm at optimiser step %d: %s", alarm.step, alarm.text)
        keep = settings.action == "roll_back" and best_evaluation(self.evaluations, settings) is newest
        if keep:
            save_best(self.folder, self.policy, newest["label"])

    def _halted(self) -> bool:
        """Whether the alarm has ended the run; every process has the same evaluations."""
        settings = alarm_settings(self.config)
        return settings.action != "flag" and bool(find_alarms(self.evaluations, settings))

    def _roll_back(self) -> None:
        """The result is then the student of the best evaluation; the newest checkpoint stays as it is."""
        best = best_evaluation(self.evaluations, alarm_settings(self.config))
        check_best(self.folder, best["label"])
        if not any(row["kind"] == "roll_back" for row in read_record(self.folder.metrics)):
            self.metrics.write({"kind": "roll_back", "label": best["label"], "epoch": best["epoch"], "step": best["step"]})
        restore_best(self.folder, self.config, best["label"], self.evaluator.members)
        self._say(f"The hack alarm ended the run; its result is the student of {best['label']}.")

    # --------------------------------------------------------------------------- records and state

    def _record(self, kind: str, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.metrics.write({"kind": kind, **row})
        if self.config.trackers:
            numbers = {f"{kind}/{k}": v for k, v in row.items() if isinstance(v, float)}
            self.accelerator.log(numbers, step=self.steps_done)

    def _time(self, **seconds: float) -> None:
        if self.accelerator.is_main_process:
            self.timing.write({"epoch": self.epoch + 1, **seconds})

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(line)

    def _resume(self) -> bool:
        """Goes on from the newest checkpoint, if there is one; the main process alone reads and writes the folder."""
        tensors, facts = self._open_folder() if self.accelerator.is_main_process else ({}, {})
        facts = json.loads(from_main(json.dumps(facts).encode(), self.accelerator))
        self.evaluations = facts.pop("evaluations")
        if facts:
            optimizer = {key: tensors.pop(key) for key in list(tensors) if key.startswith("optimizer/")}
            self.policy.load_state(*tensors_from_main(tensors, self.accelerator))
            self.step.update.load_state(tensors_from_main(optimizer, self.accelerator)[1])
            self.epoch, self.steps_done = facts["epoch"], facts["step"]
            self.step.forwards = facts["forwards"]
            self._say(f"Resuming after epoch {self.epoch} of {self.config.train.epochs}.")
        if self.epoch > self.config.train.epochs:
            raise CRDError(
                f"train.epochs is {self.config.train.epochs}, but the run in {self.folder.path} has done {self.epoch} epochs: "
                "give at least as many, or another output_dir."
            )
        return bool(facts)

    def _open_folder(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The newest checkpoint, if there is one, and the evaluations before it; cuts off the records of what came after."""
        self.folder.open(self.config, write=True)
        found = {"micro_batch": self.micro_batch, "sigmas": self.step.points.tolist()}
        self.folder.found.write_text(json.dumps(found) + "\n")
        latest = checkpoint.complete(self.folder.checkpoints)
        tensors, facts = checkpoint.load(latest[-1]) if latest else ({}, {})
        lengths = facts.get("records", {"metrics": 0, "timing": 0})
        self.metrics = Record(self.folder.metrics, lengths["metrics"])
        self.timing = Record(self.folder.timing, lengths["timing"])
        rows = read_record(self.folder.metrics)
        evaluations = [{k: v for k, v in row.items() if k != "kind"} for row in rows if row["kind"] == "evaluation"]
        return tensors, {**facts, "evaluations": evaluations}

    def _save(self) -> None:
        # of all processes: what is in pieces they put together
        tensors = {**self.policy.state(), **self.step.update.state()}
        if self.accelerator.is_main_process:
            facts = {
                "epoch": self.epoch,
                "forwards": self.step.forwards,
                "records": {"metrics": self.metrics.length(), "timing": self.timing.length()},
            }
            checkpoint.save(self.folder.checkpoints, self.steps_done, tensors, facts, self.config.checkpoint.keep)
            # only now: a checkpoint knows of the best
            if self.config.alarm.action == "roll_back" and students(self.evaluations):
                forget_others(self.folder, best_evaluation(self.evaluations, alarm_settings(self.config))["label"])
        self.accelerator.wait_for_everyone()


def _parts(parts: dict[str, np.ndarray]) -> dict[str, float]:
    """Means of several rewards, each by itself, over the pictures that it scored."""
    several = parts if len(parts) > 1 else {}
    return {f"reward_{name}": mean_of_known(part) for name, part in several.items() if not np.isnan(part).all()}
