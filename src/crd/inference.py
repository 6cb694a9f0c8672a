"""Drawing and scoring with a finished run or with any supported model."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator

from crd.batch import PromptGroup
from crd.config import CRDConfig, EvaluationConfig, ModelConfig
from crd.errors import CRDError
from crd.evaluate import Evaluator
from crd.models.load import load_policy
from crd.models.policy import Policy, Weights
from crd.prompts import load_prompts
from crd.report.pictures import save_grid
from crd.rewards.named import resolve_reward
from crd.rewards.protocol import NamedReward, RewardSet
from crd.rollout import Sampling, collect
from crd.run_folder import RunFolder


def open_model(model: str, accelerator: Accelerator) -> tuple[Policy, Weights, CRDConfig]:
    """The policy of a run (its student) or of a plain model (pretrained), and the settings that belong to it."""
    folder = RunFolder(Path(model))
    if not folder.settings.exists():
        config = CRDConfig(model=ModelConfig(path=model))
        return load_policy(model, config.model, accelerator.device), "pretrained", config
    config = folder.config()
    if not folder.lora.exists():
        raise CRDError(f"{model} is not finished: it has no {folder.lora.name}. Run `crd train` with its recipe again.")
    policy = load_policy(config.model.path, config.model, accelerator.device)
    policy.load_lora(folder.lora)
    return policy, "student", config


def sample_model(model: str, prompt: str, output: Path, count: int, steps: int, guidance: float, seed: int) -> None:
    """Draws ``count`` pictures of one prompt side by side into a PNG."""
    if not prompt.strip():
        raise CRDError("the prompt is empty: say what to draw.")
    if output.suffix != ".png":
        raise CRDError(f"--output: {output} must end in .png.")
    policy, name, config = open_model(model, Accelerator())
    if unknown := policy.model.unknown_words(prompt):
        print(f"note: the model does not know {', '.join(unknown)}")
    group = PromptGroup(0, prompt, {})
    with policy.using(name):
        drawn = collect(
            policy,
            RewardSet([]),
            [group] * count,
            list(range(count)),
            Sampling(seed, "sample", steps, config.rollout.batch_size, guidance),
        )
    save_grid(drawn.pictures, count, output)


def evaluate_model(
    model: str,
    prompts: str,
    rewards: list[str],
    count: int,
    pictures: int,
    steps: int,
    guidance: float,
    seed: int,
    output: Path | None,
) -> dict[str, float]:
    """Metrics of a model or run on the first ``count`` prompts; the mean of ``rewards`` is called reward."""
    accelerator = Accelerator()
    prompt_set = load_prompts(prompts)
    settings = EvaluationConfig(prompts=count, pictures_per_prompt=pictures, steps=steps, guidance_scale=guidance, seed=seed)
    policy, name, config = open_model(model, accelerator)
    configured = {r.name: r.options for r in (*config.rewards, *config.evaluation.judges)}
    named = [NamedReward(n, resolve_reward(n, configured.get(n, {})), 1 / len(rewards)) for n in rewards]
    config = config.model_copy(update={"evaluation": settings})
    with torch.no_grad():
        result = Evaluator(policy, RewardSet(named), prompt_set.first(count), config, accelerator)(name, guidance)
    if output and accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        (output / "metrics.json").write_text(json.dumps(result.metrics, indent=1) + "\n")
        save_grid(result.pictures, pictures, output / "grid.png")
    return result.metrics
