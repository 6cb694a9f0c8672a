"""The frozen matrices of a backbone in 8 bits, under LoRA weights in full precision (torchao)."""

import torch

from crd.errors import CRDError


def quantize(backbone: torch.nn.Module) -> None:
    """Replaces the weights of all linear layers within blocks by 8-bit ones, one scale per row; in place.

    Half the memory of bfloat16. The layers outside of blocks (embeddings, the last projection) keep their precision:
    they are small, and errors there are errors of the velocity.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise CRDError("model.int8 needs torchao: pip install 'crd-diffusion[int8]'.") from error
    quantize_(backbone, Int8WeightOnlyConfig(version=2), filter_fn=_within_a_block)


def _within_a_block(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, torch.nn.Linear) and "blocks." in name
