"""Leaving with the result of a run: as a LoRA file, as a whole pipeline, or as one file for ComfyUI."""

from enum import StrEnum


class Form(StrEnum):
    """What a run is exported as."""

    LORA = "lora"
    MERGED = "merged"
    COMFYUI = "comfyui"
