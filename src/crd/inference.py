"""Drawing and scoring with a finished run or with any supported model."""

from pathlib import Path

from accelerate import Accelerator

from crd.batch import PromptGroup
from crd.config import RewardConfig
from crd.errors import CRDError
from crd.model_source import find_model, open_model
from crd.report.pictures import save_grid
from crd.rewards.protocol import RewardSet
from crd.rollout import Sampling, collect
from crd.suite_run import Drawing, evaluate_suites
from crd.suites import own_suite


def sample_model(
    model: str, lora: Path | None, prompt: str, output: Path, count: int, steps: int, guidance: float, seed: int
) -> None:
    """Draws ``count`` pictures of one prompt side by side into a PNG; raises CRDError if the model cannot be guided so."""
    if not prompt.strip():
        raise CRDError("the prompt is empty: say what to draw.")
    if output.suffix != ".png":
        raise CRDError(f"--output: {output} must end in .png.")
    policy, name, config = open_model(model, Accelerator(), lora)
    if guidance != 1 and not policy.model.has_unconditional:
        raise CRDError(f"--guidance is {guidance:g}, but this model has no unconditional branch. Leave it at 1.")
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
    suite = own_suite(prompts, [RewardConfig(name=name, weight=1 / len(rewards)) for name in rewards])
    drawing = Drawing(count, pictures, steps, guidance, seed)
    (scores,) = evaluate_suites(find_model(model), [suite], drawing, output)
    return scores.metrics
