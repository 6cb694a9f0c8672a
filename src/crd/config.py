"""Every setting of a run: one typed tree. The descriptions are the help texts; unknown keys are errors (see recipe.py)."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from crd.schedules import OldSchedule, SamplerSchedule

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
    max_sequence_length: int | None = Field(None, ge=1, le=1024)
    """tokens of the long part of a prompt, the pipeline's argument of that name; none: its own default, but 1 for nano"""
    distilled_guidance: float | None = Field(None, ge=0)
    """guidance that a guidance-distilled backbone is told as a number (FLUX.1-dev); none: its pipeline's default"""
    tuning: Literal["lora", "full"] = "lora"
    """what is trained: LoRA weights, or the whole backbone (26 bytes a parameter in bfloat16; docs/machines.md)"""
    lora_rank: int = Field(32, ge=1)
    """rank of the LoRA weights"""
    lora_alpha: float = Field(64, gt=0)
    """LoRA scale is alpha / rank"""
    lora_targets: tuple[str, ...] | None = None
    """endings of the names of the modules that get LoRA weights; none: the attention projections"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the frozen weights and of autocast; auto: bfloat16 on a GPU that has it, else float32"""
    int8: bool = False
    """keep the frozen matrices of the backbone's blocks in 8 bits (torchao): half the memory; needs gradient_checkpointing"""
    compile: bool = False
    """compile the backbone's blocks (torch.compile): a minute at the start, faster steps on a GPU"""
    idle_on_host: bool = True
    """on a GPU: text encoders and VAE wait in host memory while they are not used"""
    prompt_cache_MiB: int = Field(1024, ge=1)
    """prompt embeddings kept on the device, MiB; the least recently used leave first"""
    prompt_cache_folder: Path | None = None
    """folder that keeps prompt embeddings of big sets (SD3: 3 MB each in bfloat16); none: they are encoded again if needed"""

    def sequence_length(self, default: int) -> int:
        """``max_sequence_length``, or a family's default if it is left open."""
        return self.max_sequence_length or (1 if self.path == "nano" else default)


class PromptConfig(Section):
    train: str = "nano/text/train"
    """prompts to train on: a .txt file (one a line), a .jsonl file ({"prompt": ..., metadata}), or nano/TASK/SPLIT"""
    evaluation: str = "nano/text/heldout"
    """prompts to evaluate on, never trained on"""


class RewardConfig(Section):
    name: str
    """a built-in one (docs/rewards.md), package.module:function, file.py:function, or the address of a server, http://HOST:PORT/NAME"""
    weight: float = 1.0
    """weight in the sum of rewards"""
    applies_to: str | None = None
    """prompts to score: 'quoted' (with a text in double quotes), or a metadata key that they must have; none: all"""
    options: dict[str, Any] = {}
    """arguments of a built-in or remote reward, e.g. {detect: false} for ocr"""


class RolloutConfig(Section):
    prompts_per_epoch: int = Field(48, ge=1)
    """prompt groups per epoch"""
    group_size: int = Field(24, ge=2)
    """K, pictures per prompt and epoch; at least 2, since rewards are centered within a prompt"""
    steps: int = Field(10, ge=1)
    """solver steps of a rollout"""
    solver: Literal["euler", "dpmsolver++", "unipc"] = "euler"
    """of rollouts, on the noise levels of the pipeline's own scheduler: first order, or second order of diffusers"""
    shift: float | None = Field(None, gt=0)
    """time shift of the rollout's noise levels (flow schedulers only); none: the pipeline's own"""
    guidance_scale: float = Field(1.0, ge=1)
    """classifier-free guidance of rollouts; 1: none, as published"""
    batch_size: int = Field(32, ge=1)
    """pictures drawn, decoded and scored together"""


class AdvantageConfig(Section):
    clip: float = Field(5.0, gt=0)
    """advantages are clipped to plus or minus this"""
    spread_of: Literal["rollout", "prompt"] = "rollout"
    """rewards are divided by their standard deviation over the whole rollout, or over the prompt"""
    combine: Literal["rewards", "advantages"] = "rewards"
    """several rewards: add the weighted rewards, or each reward's own advantage (then no scale drowns another)"""


class ObjectiveConfig(Section):
    policy_weight: float = Field(1.0, ge=0)
    """weight of the reward term, of every algorithm; 0 leaves the anchor alone (a control, not a method)"""
    error: Literal["adaptive", "plain", "likelihood"] = "adaptive"
    """squared velocity error: divided by its detached mean absolute error, plain mean, or exact likelihood weighting"""
    beta: float = Field(1.0, gt=0)
    """scale of the implicit reward"""
    loss: Literal["squared", "cross_entropy"] = "squared"
    """squared error of the centered rewards, or cross-entropy of their sigmoids"""
    centering: Literal["prompt", "batch"] = "prompt"
    """rewards and implicit rewards are centered within each prompt, or over a whole optimiser step (an ablation: Z(c) stays)"""
    weighting: Literal["uniform", "softmax", "hard"] = "uniform"
    """weights of the samples in the group mean"""
    temperature: float = Field(0.1, gt=0)
    """of the softmax weighting, in units of the normalised reward"""
    levels: Literal["each", "average", "halves"] = "each"
    """square at each noise level (published), or the average of R over them, or multiply two halves' averages (unbiased)"""
    baseline_gradient: bool = True
    """let gradients pass through the group mean (makes a difference for softmax and hard only)"""


class NFTConfig(Section):
    beta: float = Field(1.0, gt=0)
    """how far the two implicit policies lie from the moving reference, towards and away from the student"""


class AWMConfig(Section):
    ratio_clip: float = Field(1e-2, gt=0, lt=1)
    """the likelihood ratio of student and moving reference is clipped to one plus or minus this"""
    reference_weight: float = Field(0.1, ge=0)
    """weight of the squared velocity distance to the moving reference"""


class FlowGRPOConfig(Section):
    ratio_clip: float = Field(1e-4, gt=0, lt=1)
    """the likelihood ratio of a denoising step is clipped to one plus or minus this"""
    noise_scale: float = Field(0.7, gt=0)
    """of the noise that the sampler adds at every step; evaluation adds none"""


class RWRConfig(Section):
    temperature: float = Field(1.0, gt=0)
    """pictures are weighted by softmax(advantage / temperature) within their prompt"""


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
    micro_batch: int = Field(0, ge=0)
    """sample-timesteps per forward pass, 0: as many as fit; a group that does not is trained in two passes, same gradient"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""


class EvaluationConfig(Section):
    before: bool = True
    """evaluate the pretrained model before training, as the student starts and as guided as the anchor is"""
    every: int = Field(10, ge=1)
    """epochs between evaluations (there is always one at the end)"""
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
    reference_guidance_scale: float | None = Field(None, ge=1)
    """guidance of the pretrained model that drift is measured to; none: the anchor's. Set it to compare different anchors"""
    held_out_judges: bool = True
    """score with judges of other families that fit the prompts: another reader, another detector, alignment, statistics"""
    judges: tuple[RewardConfig, ...] = ()
    """further scores shown beside the reward and never trained on"""


class AlarmConfig(Section):
    action: Literal["flag", "stop", "roll_back"] = "flag"
    """on signs of reward hacking: say so; or also stop; or also return to the evaluation that held-out judges liked best"""
    judges: tuple[str, ...] | None = None
    """judges that the alarm goes by; none: those of tesseract, geneval_net and alignment that are evaluated and not trained on"""
    judge_fall: float = Field(0.05, gt=0)
    """a judge falls if it lies this far below its best evaluation so far ..."""
    reward_rise: float = Field(0.02, ge=0)
    """... and the reward rises if it lies this far above what it was there"""
    diversity_ratio: float = Field(0.5, ge=0, lt=1)
    """pictures of a prompt are too alike below this share of the guided pretrained model's diversity; 0: never"""


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
    algorithm: Literal["crd", "nft", "awm", "flow_grpo", "rwr"] = "crd"
    """centered reward distillation; or DiffusionNFT, advantage weighted matching, Flow-GRPO, reward-weighted regression"""
    objective: ObjectiveConfig = ObjectiveConfig()
    nft: NFTConfig = NFTConfig()
    awm: AWMConfig = AWMConfig()
    flow_grpo: FlowGRPOConfig = FlowGRPOConfig()
    rwr: RWRConfig = RWRConfig()
    noise: NoiseConfig = NoiseConfig()
    anchor: AnchorConfig = AnchorConfig()
    old: OldSchedule = OldSchedule()
    """decay of the moving reference"""
    sampler: SamplerSchedule = SamplerSchedule()
    """decay of the weights that draw rollouts"""
    train: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    alarm: AlarmConfig = AlarmConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """besides metrics.jsonl, which is always written"""

    @property
    def reference_guidance(self) -> float:
        """Guidance of the pretrained model as its users know it: what drift is measured to."""
        return self.evaluation.reference_guidance_scale or self.anchor.guidance_scale

    @model_validator(mode="after")
    def _consistent(self) -> "CRDConfig":
        if self.rollout.prompts_per_epoch % self.train.steps_per_epoch:
            raise ValueError(
                f"train.steps_per_epoch ({self.train.steps_per_epoch}) must divide "
                f"rollout.prompts_per_epoch ({self.rollout.prompts_per_epoch})"
            )
        if self.model.int8 and not self.train.gradient_checkpointing:
            raise ValueError(
                "model.int8 needs train.gradient_checkpointing: without it every 8-bit matrix is kept in full precision for the "
                "backward pass, which takes more memory than no int8 at all"
            )
        if self.model.lora_targets and self.model.tuning == "full":
            raise ValueError("model.lora_targets is for LoRA weights, but model.tuning full has none: choose one")
        if self.model.int8 and self.model.tuning == "full":
            raise ValueError("model.int8 is for frozen matrices, but model.tuning full trains them: choose one")
        if self.objective.policy_weight == 0 and self.anchor.strength == 0:
            raise ValueError("objective.policy_weight and anchor.strength are both 0: nothing would be trained")
        if self.algorithm == "flow_grpo" and (self.noise.source != "rollout" or self.rollout.guidance_scale != 1):
            raise ValueError(
                "algorithm flow_grpo trains on the steps of its own unguided rollouts: it needs noise.source rollout and "
                f"rollout.guidance_scale 1, got {self.noise.source} and {self.rollout.guidance_scale}"
            )
        if self.algorithm == "flow_grpo" and self.rollout.solver != "euler":
            raise ValueError(
                f"rollout.solver is {self.rollout.solver}, but algorithm flow_grpo takes stochastic steps: leave it out"
            )
        if self.objective.levels == "halves" and (self.objective.loss != "squared" or self.noise.levels < 2):
            raise ValueError(
                "objective.levels halves is a product of two residuals: it needs objective.loss squared and at least 2 "
                f"noise.levels, got {self.objective.loss} and {self.noise.levels}"
            )
        if self.anchor.minimum > self.anchor.strength > 0:
            raise ValueError(f"anchor.minimum ({self.anchor.minimum}) must not exceed anchor.strength ({self.anchor.strength})")
        names = [reward.name for reward in (*self.rewards, *self.evaluation.judges)]
        if not self.rewards or len(set(names)) < len(names):
            raise ValueError(f"rewards must name at least one reward, and with evaluation.judges each once, got {names}")
        return self
