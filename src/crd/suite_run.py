"""``crd eval``: draws and scores the pictures of suites, and writes down all that it takes to do so again."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from tqdm import tqdm

from crd import __version__
from crd.config import CRDConfig
from crd.errors import CRDError
from crd.evaluate import Evaluation, Evaluator
from crd.model_source import Source
from crd.models.family import check_guidance
from crd.models.policy import Policy
from crd.models.weights import Weights
from crd.prompt_sets.write import write_atomically
from crd.report.pictures import save_grid
from crd.rewards.named import resolve_reward
from crd.rewards.protocol import NamedReward, RewardSet
from crd.suite_scores import SuiteScores, interval, task_scores
from crd.suites import Suite, noise_ids

FORMAT = 1  # of metrics.json
GRID_PROMPTS = 16  # rows of a suite's grid of pictures
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pillow", "rapidocr", "onnxruntime")


@dataclass(frozen=True)
class Drawing:
    """How the pictures of an evaluation are drawn; None: all, or as the run or the model has it."""

    count: int | None = None  # prompts of each suite, the first ones
    pictures: int = 4  # of a prompt, as GenEval has it
    steps: int = 28
    guidance: float = 1.0
    seed: int = 1234
    batch_size: int | None = None
    height: int | None = None  # pixels
    width: int | None = None


def evaluate_suites(source: Source, suites: Sequence[Suite], drawing: Drawing, output: Path | None = None) -> list[SuiteScores]:
    """Scores a model on suites.

    The main process writes ``metrics.json`` and one grid of pictures per suite into ``output``, after every suite.
    """
    accelerator = Accelerator()
    if output and accelerator.is_main_process:
        _make_folder(output)
    config = _evaluation_config(source.config, drawing)
    rewards = [_resolve(suite) for suite in suites]  # before minutes of loading and drawing
    policy = replace(source, config=config).load(accelerator.device)
    if not policy.model.has_unconditional:  # drift is then measured to the model as its users know it
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"reference_guidance_scale": 1.0})})
    check_guidance(policy.model, config)
    results: list[SuiteScores] = []
    for suite, functions in zip(suites, rewards, strict=True):
        scores, evaluation = _evaluate(policy, source.weights, suite, functions, config, drawing, accelerator)
        results.append(scores)
        if output and accelerator.is_main_process:
            report = _report(source, config, policy, accelerator, results)
            write_atomically(output / "metrics.json", json.dumps(report, indent=1) + "\n")
            save_grid(evaluation.pictures[: GRID_PROMPTS * scores.pictures], scores.pictures, output / f"{suite.name}.png")
    return results


def _make_folder(output: Path) -> None:
    """Before minutes of drawing."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CRDError(f"--output: {output} cannot be made a folder: {error}. Give another one.") from error


def _evaluate(
    policy: Policy,
    weights: Weights,
    suite: Suite,
    rewards: RewardSet,
    config: CRDConfig,
    drawing: Drawing,
    accelerator: Accelerator,
) -> tuple[SuiteScores, Evaluation]:
    prompts, pictures = suite.members(drawing.count), drawing.pictures
    update = {"prompts": len(prompts), "pictures_per_prompt": pictures}
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=update)})
    ids = noise_ids(prompts, pictures) if suite.noise_by_text else None
    evaluator = Evaluator(policy, rewards, prompts, config, accelerator, ids)
    total = -(-len(prompts) * pictures // accelerator.num_processes)
    with torch.no_grad(), tqdm(total=total, unit="picture", desc=suite.name, disable=not accelerator.is_main_process) as bar:
        evaluation = evaluator(weights, config.evaluation.guidance_scale, bar.update)
    columns = {name: values.reshape(len(prompts), pictures) for name, values in evaluation.scores.items()}
    if [reward.weight for reward in suite.rewards if reward.weight != 0] == [1]:
        del columns["reward"]  # it is that reward
    tags = [prompt.metadata.get("tag", "") for prompt in prompts]
    official = task_scores(tags, columns[suite.official]) if suite.official else None
    scores = {name: interval(values) for name, values in columns.items()}
    return SuiteScores(suite, prompts, pictures, scores, evaluation.metrics, official), evaluation


def _evaluation_config(config: CRDConfig, drawing: Drawing) -> CRDConfig:
    """The settings of the run or model with those of the drawing in their places."""
    settings = {"steps": drawing.steps, "guidance_scale": drawing.guidance, "seed": drawing.seed}
    size = {name: value for name in ("height", "width") if (value := asdict(drawing)[name])}
    batch = {"batch_size": drawing.batch_size} if drawing.batch_size else {}
    return config.model_copy(
        update={
            "evaluation": config.evaluation.model_copy(update=settings),
            "model": config.model.model_copy(update=size),
            "rollout": config.rollout.model_copy(update=batch),
        }
    )


def _resolve(suite: Suite) -> RewardSet:
    return RewardSet([NamedReward(r.name, resolve_reward(r.name, r.options), r.weight, r.applies_to) for r in suite.rewards])


def _report(
    source: Source,
    config: CRDConfig,
    policy: Policy,
    accelerator: Accelerator,
    results: Sequence[SuiteScores],
) -> dict[str, Any]:
    """What metrics.json holds."""
    family = policy.model
    return {
        "format": FORMAT,
        "model": {
            "given": source.path,
            "base": config.model.path,
            "revision": _revision(config.model.path),
            "pipeline": type(family.pipeline).__name__,
            "tuned": source.tuned and {"path": str(source.tuned), "sha256": _digest(source.tuned)},
            "dtype": str(policy.sets.frozen()[0].dtype),
            "height": family.height,
            "width": family.width,
            "max_sequence_length": family.max_sequence_length,
        },
        "settings": {
            "steps": config.evaluation.steps,
            "guidance_scale": config.evaluation.guidance_scale,
            "drift_to_guidance_scale": config.reference_guidance,
            "seed": config.evaluation.seed,
            "batch_size": config.rollout.batch_size,
            "held_out_judges": config.evaluation.held_out_judges,
        },
        "machine": {"device": str(accelerator.device), "processes": accelerator.num_processes, "system": platform.platform()},
        "versions": {"crd": __version__, "python": platform.python_version(), **_versions()},
        "suites": {scores.suite.name: scores.as_json() for scores in results},
    }


def _digest(tuned: Path) -> str:
    """Of a file, or of the files of a folder one after the other."""
    digest = hashlib.sha256()
    for path in sorted(tuned.iterdir()) if tuned.is_dir() else [tuned]:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _revision(model: str) -> str | None:
    """The commit of a model from the hub, as it lies in the local cache."""
    with suppress(HFValidationError):  # a folder
        cached = try_to_load_from_cache(model, "model_index.json")
        return Path(cached).parent.name if isinstance(cached, str) else None
    return None
