"""Every setting of a run: one typed tree. The descriptions are the help texts; unknown keys are errors."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crd.errors import CRDError
from crd.schedules import DecaySchedule

Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class ModelConfig(Section):
    path: str = "nano"
    """'nano' (the embedded model), a local diffusers folder, or a hub id"""
    height: int | None = Field(None, gt=0)
    """height of the pictures in pixels; none: the model's own"""
    width: int | None = Field(None, gt=0)
    """width of the pictures in pixels; none: the model's own"""
    max_sequence_length: int | None = Field(None, ge=1, le=512)
    """tokens of the T5 part of a prompt, as the pipeline's argument; none: its default of 256, but 1 for nano"""
    lora_rank: int = Field(32, ge=1)
    """rank of the LoRA weights"""
    lora_alpha: float = Field(64, gt=0)
    """LoRA scale is alpha / rank"""
    lora_targets: tuple[str, ...] | None = None
    """endings of the names of the modules that get LoRA weights; none: the attention projections"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the frozen weights and of autocast; auto: bfloat16 on a GPU that has it, else float32"""

    @property
    def t5_tokens(self) -> int:
        """``max_sequence_length``, or what it is if it is left open."""
        return self.max_sequence_length or (1 if self.path == "nano" else 256)


class PromptConfig(Section):
    train: str = "nano/text/train"
    """prompts to train on: a .txt file (one a line), a .jsonl file ({"prompt": ..., metadata}), or nano/TASK/SPLIT"""
    evaluation: str = "nano/text/heldout"
    """prompts to evaluate on, never trained on"""


class RewardConfig(Section):
    name: str
    """ocr, ocr_exact, blue, package.module:function, or file.py:function"""
    weight: float = 1.0
    """weight in the sum of rewards"""
    options: dict[str, Any] = {}
    """arguments of a built-in reward, e.g. {detect: false} for ocr"""


class RolloutConfig(Section):
    prompts_per_epoch: int = Field(48, ge=1)
    """prompt groups per epoch"""
    group_size: int = Field(24, ge=2)
    """K, pictures per prompt and epoch; at least 2, since rewards are centered within a prompt"""
    steps: int = Field(10, ge=1)
    """solver steps of a rollout"""
    guidance_scale: float = Field(1.0, ge=1)
    """classifier-free guidance of rollouts; 1: none, as published"""
    batch_size: int = Field(32, ge=1)
    """pictures drawn, decoded and scored together"""


class AdvantageConfig(Section):
    clip: float = Field(5.0, gt=0)
    """advantages are clipped to plus or minus this"""
    spread_of: Literal["rollout", "prompt"] = "rollout"
    """rewards are divided by their standard deviation over the whole rollout, or over the prompt"""


class ObjectiveConfig(Section):
    policy_weight: float = Field(1.0, ge=0)
    """weight of the reward term; 0 leaves the anchor alone (a control, not a method)"""
    beta: float = Field(1.0, gt=0)
    """scale of the implicit reward"""
    loss: Literal["squared", "cross_entropy"] = "squared"
    """squared error of the centered rewards, or cross-entropy of their sigmoids"""
    error: Literal["adaptive", "plain", "likelihood"] = "adaptive"
    """squared velocity error: divided by its detached mean absolute error, plain mean, or exact likelihood weighting"""
    weighting: Literal["uniform", "softmax", "hard"] = "uniform"
    """weights of the samples in the group mean"""
    temperature: float = Field(0.1, gt=0)
    """of the softmax weighting, in units of the normalised reward"""
    average_levels: bool = False
    """average the implicit reward over noise levels before squaring (published: square at each level)"""
    baseline_gradient: bool = True
    """let gradients pass through the group mean (makes a difference for softmax and hard only)"""


class NoiseConfig(Section):
    levels: int = Field(10, ge=1)
    """noise levels per picture and optimiser step"""
    source: Literal["rollout", "continuous"] = "rollout"
    """levels of the rollout's own grid without replacement, or stratified over (0, 1)"""
    minimum: float = Field(0.01, gt=0, lt=1)
    """lower noise levels are left out"""
    shared: bool = False
    """give all pictures of a group the same noise"""


class AnchorConfig(Section):
    strength: float = Field(0.1, ge=0)
    """lambda, weight of the distance to the pretrained model; 0 makes no pretrained forward pass in training"""
    minimum: float = Field(1e-4, ge=0)
    """lambda of the worst picture, if adaptive"""
    guidance_scale: float = Field(4.5, ge=1)
    """classifier-free guidance of the pretrained model that anchors; 1: unguided"""
    adaptation: Literal["adaptive", "constant", "reversed"] = "adaptive"
    """lambda rises with a picture's reward, is constant, or falls with it"""


class OptimizerConfig(Section):
    epochs: int = Field(100, ge=1)
    """epochs: one rollout and its optimiser steps each"""
    steps_per_epoch: int = Field(2, ge=1)
    """optimiser steps per epoch; must divide rollout.prompts_per_epoch"""
    learning_rate: float = Field(3e-4, gt=0)
    """of AdamW"""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = Field(1e-4, ge=0)
    """of AdamW"""
    clip_norm: float = Field(1.0, gt=0)
    """the gradient's norm is clipped to this"""
    micro_batch: int = Field(8, ge=1)
    """sample-timesteps per forward pass; a group that does not fit is trained in two passes, with the same gradient"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""


class EvaluationConfig(Section):
    every: int = Field(10, ge=1)
    """epochs between evaluations (there is always one before and one after)"""
    prompts: int = Field(16, ge=1)
    """held-out prompts, the first ones of the set"""
    pictures_per_prompt: int = Field(4, ge=1)
    """pictures of each; 2 or more for diversity"""
    steps: int = Field(40, ge=1)
    """solver steps"""
    guidance_scale: float = Field(1.0, ge=1)
    """classifier-free guidance of the evaluated student"""
    seed: int = 1234
    """of the pictures: the same ones at every evaluation and in every run"""
    judges: tuple[RewardConfig, ...] = ()
    """further scores shown beside the reward and never trained on"""


class CheckpointConfig(Section):
    every: int = Field(1, ge=1)
    """epochs between checkpoints"""
    keep: int = Field(2, ge=1)
    """checkpoints kept"""


class CRDConfig(Section):
    """A run. Defaults are the published settings for SD3.5-Medium on OCR (theory, section 8), per process count of one."""

    output_dir: Path = Path("runs/run")
    """folder of the run: settings, record, checkpoints, pictures, result"""
    seed: int = 0
    """every random draw of the run follows from it"""
    model: ModelConfig = ModelConfig()
    prompts: PromptConfig = PromptConfig()
    rewards: tuple[RewardConfig, ...] = (RewardConfig(name="ocr"),)
    """what is trained on: the weighted sum of these, each with name, weight and options"""
    reward_failure_limit: float = Field(0.1, ge=0, le=1)
    """share of an epoch's pictures that may fail to get a reward before the run stops"""
    rollout: RolloutConfig = RolloutConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    noise: NoiseConfig = NoiseConfig()
    anchor: AnchorConfig = AnchorConfig()
    old: DecaySchedule = DecaySchedule(start=0.25, slope=0.005, end=0.999)
    """decay of the moving reference"""
    sampler: DecaySchedule = DecaySchedule(delay=75, slope=0.0075, end=0.999)
    """decay of the weights that draw rollouts"""
    train: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """besides metrics.jsonl, which is always written"""

    @model_validator(mode="after")
    def _consistent(self) -> "CRDConfig":
        if self.rollout.prompts_per_epoch % self.train.steps_per_epoch:
            raise ValueError(
                f"train.steps_per_epoch ({self.train.steps_per_epoch}) must divide "
                f"rollout.prompts_per_epoch ({self.rollout.prompts_per_epoch})"
            )
        if self.objective.policy_weight == 0 and self.anchor.strength == 0:
            raise ValueError("objective.policy_weight and anchor.strength are both 0: nothing would be trained")
        if self.anchor.minimum > self.anchor.strength > 0:
            raise ValueError(f"anchor.minimum ({self.anchor.minimum}) must not exceed anchor.strength ({self.anchor.strength})")
        names = [reward.name for reward in (*self.rewards, *self.evaluation.judges)]
        if not self.rewards or len(set(names)) < len(names):
            raise ValueError(f"rewards must name at least one reward, and with evaluation.judges each once, got {names}")
        return self


#: settings that may change between the sessions of one run
CHANGEABLE = ("output_dir", "train.epochs", "evaluation", "checkpoint", "trackers", "reward_failure_limit")


def build_config(data: dict[str, Any]) -> CRDConfig:
    """Validates a tree of plain values; raises CRDError that names every wrong key with its value."""
    try:
        return CRDConfig.model_validate(data)
    except ValidationError as error:
        raise CRDError("the configuration is not valid:\n" + "\n".join(_explain(problem) for problem in error.errors())) from None


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "settings"
    if problem["type"] == "extra_forbidden":
        return f"  {where}: there is no such setting. {_nearest(problem['loc'])}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"  {where}: {message}" + (f", got {problem['input']!r}" if problem["loc"] else "")


def _nearest(location: tuple[int | str, ...]) -> str:
    """What could have been meant: the settings beside a key that does not exist."""
    import difflib

    section: Any = CRDConfig
    for part in location[:-1]:
        field = section.model_fields.get(part) if isinstance(part, str) and issubclass(section, BaseModel) else None
        annotation = field.annotation if field else None
        section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else RewardConfig
    names = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), names, 1)
    return f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(names)}."


def load_config(path: Path, overrides: list[str]) -> CRDConfig:
    """Reads a YAML recipe and applies ``section.key=value`` overrides; raises CRDError for anything wrong."""
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise CRDError(f"there is no recipe {path}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CRDError(f"the recipe {path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CRDError(f"the recipe {path} must hold 'section: settings' lines, it holds {type(data).__name__}.")
    for override in overrides:
        _apply(data, override)
    return build_config(data)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise CRDError(f"{override!r} is no setting: write section.key=value, e.g. train.learning_rate=1e-3.")
    *sections, last = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise CRDError(f"{override!r}: {section} is not a section.")
    try:
        data[last] = _value(text)
    except yaml.YAMLError:
        raise CRDError(f"{override!r}: the value cannot be read.") from None


def _value(text: str) -> Any:
    """A YAML value; also reads 1e-3, which YAML 1.1 takes for a string."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def plain(config: CRDConfig) -> dict[str, Any]:
    """The configuration as values that YAML and JSON know."""
    return config.model_dump(mode="json")


def dump_config(config: CRDConfig) -> str:
    return yaml.safe_dump(plain(config), sort_keys=False)


def describe(section: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per setting: key, default, meaning."""
    lines = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            lines += describe(type(default), key + ".")
        else:
            if isinstance(default, tuple):
                default = [entry.model_dump() if isinstance(entry, BaseModel) else entry for entry in default]
            lines.append(f"{key} = {default}\n    {field.description or ''}")
    return lines


def differences(a: CRDConfig, b: CRDConfig) -> list[str]:
    """Settings that differ between two runs and may not, as 'key: a -> b'."""

    def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {k: v for name, part in tree.items() for k, v in flatten(part, f"{prefix}.{name}".strip(".")).items()}

    left, right = flatten(plain(a)), flatten(plain(b))
    keys = [k for k in left | right if left.get(k) != right.get(k)]
    fixed = [k for k in keys if not any(k == c or k.startswith(c + ".") for c in CHANGEABLE)]
    return [f"{k}: {left.get(k)} -> {right.get(k)}" for k in fixed]
