"""What several families do alike."""

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from crd.config import ModelConfig
from crd.errors import CRDError


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
