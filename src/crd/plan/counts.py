"""How many forward passes a run makes, from its settings alone: those of one process.

Of a rollout's grid, noise levels below the minimum are left out; settings alone do not say how many: see ``with_levels``.
"""

from crd.config import CRDConfig
from crd.evaluate import DRIFT_SIGMAS
from crd.micro_batch import ON_CPU, rows_per_step
from crd.noise_levels import levels_per_picture


def passes_at(guidance_scale: float) -> int:
    """Forward passes of one velocity."""
    return 1 if guidance_scale == 1 else 2


def forwards_per_row(config: CRDConfig) -> float:
    """Forward passes of the backbone per sample-timestep of training; a backward pass counts as two."""
    student = 3.0
    anchor = passes_at(config.anchor.guidance_scale) if config.anchor.strength > 0 else 0
    old = 1.0 if config.objective.policy_weight > 0 and config.algorithm in ("crd", "nft", "awm") else 0.0
    return student + anchor + old + (1.0 if _two_pass(config) else 0.0)


def _two_pass(config: CRDConfig) -> bool:
    """Whether what is centered together is larger than a micro-batch, as in ``TrainStep.two_pass``."""
    if config.algorithm != "crd" or config.objective.policy_weight == 0:
        return False
    rollout, objective, train = config.rollout, config.objective, config.train
    prompts = rollout.prompts_per_epoch // train.steps_per_epoch if objective.centering == "batch" else 1
    rows = prompts * rollout.group_size * (1 if objective.levels == "each" else levels_per_picture(config))
    return rows > (train.micro_batch or ON_CPU)


def rollout_rows(config: CRDConfig) -> int:
    """Forward passes of the backbone in one epoch's rollout, one per picture and step, two if guided."""
    pictures = config.rollout.prompts_per_epoch * config.rollout.group_size
    return pictures * config.rollout.steps * passes_at(config.rollout.guidance_scale)


def training_rows(config: CRDConfig) -> int:
    """Sample-timesteps that one epoch trains on."""
    return rows_per_step(config) * config.train.steps_per_epoch


def forwards_per_epoch(config: CRDConfig) -> float:
    """Forward passes of the backbone per epoch, rollout and training, in rows; a backward pass counts as two."""
    return rollout_rows(config) + training_rows(config) * forwards_per_row(config)


def evaluation_scales(config: CRDConfig) -> list[float]:
    """Guidance of every evaluation of a run: of the pretrained model first, unguided and as its users know it."""
    own, reference = config.evaluation.guidance_scale, config.reference_guidance
    before = list(dict.fromkeys([own, reference])) if config.evaluation.before else []
    return before + [own] * -(-config.train.epochs // config.evaluation.every)


def evaluation_rows(config: CRDConfig) -> int:
    """Forward passes of the backbone in all evaluations of a run: pictures are drawn, and their drift is measured."""
    settings, levels = config.evaluation, len(DRIFT_SIGMAS)
    reference = levels * passes_at(config.reference_guidance)
    each = [(settings.steps + levels) * passes_at(scale) + reference for scale in evaluation_scales(config)]
    return settings.prompts * settings.pictures_per_prompt * sum(each)
