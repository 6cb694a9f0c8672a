"""The frozen matrices of a backbone in 8 bits, under LoRA weights in full precision (torchao)."""

import torch

from crd.errors import CRDError


def quantize(backbone: torch.nn.Module) -> None:
    """Replaces the weights of all linear layers within blocks by 8-bit ones, one scale per row; in place.

    Half the memory of bfloat16. The layers outside of blocks (embeddings, the last projection) keep their precision:
    they are small, and errors there are errors of the velocity. Train with gradient checkpointing: without it every matrix is
    kept in full precision from the forward to the backward pass.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise CRDError("model.int8 needs torchao: pip install 'crd-diffusion[int8]'.") from error
    quantize_(backbone, Int8WeightOnlyConfig(version=2), filter_fn=_within_a_block)
    for name, module in backbone.named_modules():
        if _within_a_block(module, name):
            module.register_forward_pre_hook(_narrow)


def _narrow(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """torchao multiplies in the input's precision before autocast is asked, which after a norm on a GPU is float32."""
    kind = inputs[0].device.type
    return (inputs[0].to(torch.get_autocast_dtype(kind)),) if torch.is_autocast_enabled(kind) else inputs


def _within_a_block(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, torch.nn.Linear) and "blocks." in name
