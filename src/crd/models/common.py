"""What several families do alike."""

from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from crd.config import ModelConfig
from crd.errors import CRDError

#: the attention projections of both streams of a transformer with two, as published for SD3.5
LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


def picture_size(config: ModelConfig, default: int, multiple: int) -> tuple[int, int]:
    """Height and width in pixels, ``default`` where the recipe says none; raises CRDError if the model cannot draw them."""
    height, width = config.height or default, config.width or default
    for name, pixels in (("model.height", height), ("model.width", width)):
        if pixels % multiple:
            raise CRDError(f"{name} is {pixels}, but this model needs a multiple of {multiple} pixels.")
    return height, width


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """Words that a tokenizer maps to its unknown token (tokenizers with byte fallback have none)."""
    if tokenizer.unk_token_id in (None, tokenizer.eos_token_id):
        return []
    words = prompt.replace('"', " ").split()
    return [w for w in words if tokenizer.unk_token_id in tokenizer(w, add_special_tokens=False).input_ids]


def flow_scheduler(scheduler: FlowMatchEulerDiscreteScheduler, shift: float | None) -> FlowMatchEulerDiscreteScheduler:
    """The pipeline's scheduler, or one like it with another time shift."""
    if shift is None:
        return scheduler
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=shift, use_dynamic_shifting=False)


def image_shift(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int) -> float:
    """``mu`` of FLUX.1 and Qwen-Image: logarithm of the time shift, linear in the number of the picture's tokens."""
    config = scheduler.config
    return calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)


def even_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, steps: int, shift: float | None, mu: float) -> Tensor:
    """Noise levels float32 ``(steps + 1,)`` of pipelines that hand their scheduler an even grid from 1 to ``1 / steps``.

    Schedulers with dynamic shifting move them by ``mu``, others by their own time shift; ``shift`` replaces either.
    Raises CRDError for one step where the scheduler sets its last level apart from the first.
    """
    if steps == 1 and scheduler.config.get("shift_terminal"):
        raise CRDError(
            "1 solver step was asked for, but this model's noise levels run from 1 to "
            f"{scheduler.config.shift_terminal:g} and need at least 2. Raise rollout.steps or evaluation.steps."
        )
    scheduler = flow_scheduler(scheduler, shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), mu=mu)
    return scheduler.sigmas.float()


def no_distilled_guidance(config: ModelConfig, pipeline: Any) -> None:
    """Raises CRDError if a guidance is given that this model's backbone cannot be told."""
    if config.distilled_guidance is not None:
        raise CRDError(
            f"model.distilled_guidance is {config.distilled_guidance:g}, but the backbone of this {type(pipeline).__name__} "
            "takes no guidance as a number (of the supported models, FLUX.1-dev does). Leave it out."
        )


def check_unet(pipeline: Any, config: ModelConfig) -> None:
    """Raises CRDError if settings do not fit a pipeline with a UNet and CLIP text encoders, or if the UNet is distilled."""
    no_distilled_guidance(config, pipeline)
    if pipeline.unet.config.time_cond_proj_dim is not None:
        raise CRDError(
            f"model.path: the UNet of {config.path} takes guidance as a number (a latent consistency model), which is not "
            "supported. Use the model that it was distilled from."
        )
    tokens = pipeline.tokenizer.model_max_length
    if config.max_sequence_length not in (None, tokens):
        raise CRDError(
            f"model.max_sequence_length is {config.max_sequence_length}, but the CLIP text encoders of "
            f"{type(pipeline).__name__} always take {tokens} tokens. Leave it out."
        )
