"""Which class of pipeline belongs to which family."""

from collections.abc import Callable
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from crd.config import ModelConfig
from crd.errors import CRDError
from crd.models.family import Family
from crd.models.flux import Flux
from crd.models.flux2_klein import Flux2Klein
from crd.models.qwen_image import QwenImage
from crd.models.sana import Sana
from crd.models.sd import StableDiffusion
from crd.models.sd3 import SD3
from crd.models.sdxl import SDXL
from crd.models.zimage import ZImage

FAMILIES: dict[type[DiffusionPipeline], Callable[[Any, ModelConfig], Family]] = {
    diffusers.StableDiffusion3Pipeline: SD3,
    diffusers.FluxPipeline: Flux,
    diffusers.Flux2KleinPipeline: Flux2Klein,
    diffusers.QwenImagePipeline: QwenImage,
    diffusers.StableDiffusionPipeline: StableDiffusion,
    diffusers.StableDiffusionXLPipeline: SDXL,
    diffusers.ZImagePipeline: ZImage,
    diffusers.SanaPipeline: Sana,
}


def open_family(pipeline: DiffusionPipeline, config: ModelConfig) -> Family:
    """The family of a pipeline; raises CRDError if there is none, or if the settings do not fit it."""
    make = FAMILIES.get(type(pipeline))
    if make is None:
        known = ", ".join(kind.__name__ for kind in FAMILIES)
        raise CRDError(f"model.path: {type(pipeline).__name__} is not supported; supported are {known}.")
    return make(pipeline, config)
