"""One LoRA file with the names that ComfyUI's LoRA loader knows.

Facts about that loader: it looks names up in a table made for the loaded model. The tables for transformers have
``transformer.MODULE`` with MODULE as diffusers names it; where ComfyUI's own model has one fused projection for query, key
and value, the table says which rows are whose, so nothing has to be fused here. The table for UNets has
``lora_unet_MODULE`` with underscores for dots. The scale is alpha / rank with alpha from a scalar ``NAME.alpha``, and
1 where that is missing: the LoRA settings in the file's metadata are not read.
"""

import torch
from torch import Tensor

from crd.errors import CRDError
from crd.export.lora_file import LoraLayers

#: classes of diffusers whose module names ComfyUI has a table for
MAPPED = (
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "QwenImageTransformer2DModel",
    "ZImageTransformer2DModel",
    "PixArtTransformer2DModel",
    "AuraFlowTransformer2DModel",
    "UNet2DConditionModel",
)


def check_mapped(kind: str | None) -> None:
    """Raises CRDError if ComfyUI has no names for this class of backbone."""
    if kind not in MAPPED:
        raise CRDError(
            f"--to comfyui: ComfyUI's LoRA loader has no names for {kind or 'an unknown class of backbone'}; it has for "
            f"{', '.join(MAPPED)}. Use --to lora or --to merged."
        )


def comfyui_tensors(lora: LoraLayers) -> dict[str, Tensor]:
    """The tensors of the file, keyed as ComfyUI expects."""
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in lora.layers.items():
        if lora.backbone == "unet":
            name, down_key, up_key = f"lora_unet_{module.replace('.', '_')}", "lora_down", "lora_up"
        else:
            name, down_key, up_key = f"transformer.{module}", "lora_A", "lora_B"
        tensors[f"{name}.{down_key}.weight"] = down
        tensors[f"{name}.{up_key}.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(lora.alpha)
    return tensors
