"""The pretrained model without training, evaluated once per task with the settings, prompts and noise of the runs."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from crd.bench.suite import BASELINES, Suite, task_config
from crd.config import CRDConfig
from crd.errors import CRDError
from crd.recipe import build_config, plain


def baseline_file(suite: Suite, task: str, name: str) -> Path:
    return suite.output / task / BASELINES / f"{name}.json"


def read_baseline(suite: Suite, task: str, name: str) -> dict[str, float] | None:
    """Metrics of a baseline, if it was evaluated; raises CRDError if that was with other settings."""
    path = baseline_file(suite, task, name)
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    before, now = build_config(stored["settings"]), task_config(suite, task)
    if (stored["guidance_scale"], _decisive(before)) != (suite.baselines[name], _decisive(now)):
        raise CRDError(f"{path} was evaluated with other settings. Give another output, or remove this file.")
    return stored["metrics"]


def evaluate_baselines(suite: Suite, task: str) -> None:
    """Evaluates the baselines of a task that are not there yet, in a process that gives the model's memory back.

    Raises CRDError if that process fails, by a lack of memory, a full disk or a kill.
    """
    missing = [name for name in suite.baselines if read_baseline(suite, task, name) is None]
    if missing:
        try:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
                executor.submit(_evaluate, suite, task, missing).result()
        except (OSError, RuntimeError) as error:  # RuntimeError: also torch's lack of memory, and a process that was killed
            raise CRDError(f"the baselines of {task} cannot be evaluated: {type(error).__name__}: {error}") from error


def _evaluate(suite: Suite, task: str, names: list[str]) -> None:
    from crd.report.pictures import save_grid

    config = task_config(suite, task)
    evaluator = _evaluator(config)
    for name in names:
        path, scale = baseline_file(suite, task, name), suite.baselines[name]
        evaluation = evaluator("pretrained", scale)
        if evaluation.metrics["failed"] > config.reward_failure_limit:
            raise CRDError(f"{evaluation.metrics['failed']:.1%} of the pictures of the baseline {name} got no reward.")
        save_grid(evaluation.pictures, config.evaluation.pictures_per_prompt, path.with_suffix(".png"))
        partial = path.with_suffix(".partial")  # renamed when whole
        stored = {"guidance_scale": scale, "metrics": evaluation.metrics, "settings": plain(config)}
        partial.write_text(json.dumps(stored, indent=1) + "\n")
        partial.replace(path)


def _evaluator(config: CRDConfig) -> Any:
    """As the trainer of this configuration has it."""
    from accelerate import Accelerator

    from crd.evaluate import Evaluator
    from crd.given import judges, named_rewards, prompt_set
    from crd.models.load import load_policy
    from crd.rewards.protocol import RewardSet

    accelerator = Accelerator()
    policy = load_policy(config.model.path, config.model, accelerator.device, names=("student",))
    rewards = RewardSet([*named_rewards(None, config), *judges(config)])
    held_out = prompt_set(config.prompts.evaluation, "prompts.evaluation").first(config.evaluation.prompts)
    return Evaluator(policy, rewards, held_out, config, accelerator)


def _decisive(config: CRDConfig) -> Any:
    """The settings that the numbers of a baseline depend on, besides its own guidance."""
    evaluation = config.evaluation.model_copy(update={"every": 1, "before": False, "guidance_scale": 1.0})
    return config.model, config.prompts.evaluation, config.rewards, evaluation, config.reference_guidance
