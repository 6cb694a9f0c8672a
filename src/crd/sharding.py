"""FSDP2: every process keeps a piece of the backbone, and blocks are put together for a pass and taken apart again.

How, is said to accelerate (``accelerate launch --config_file``, see docs/machines.md); this file hands the backbone over.
Backbones are sharded, and with them the gradient and moments of one that is trained. LoRA weights, text encoders and the
autoencoder stay whole on every process: they are small, or at work for moments.
"""

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model, parse_flag_from_env
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from crd.errors import CRDError


def shard(backbone: torch.nn.Module, whole: list[torch.nn.Module]) -> bool:
    """Shards the backbone onto the device if accelerate was told so; whether it did. ``whole`` are parts that stay out of it.

    A block is moved to the device, cut and freed before the next one, so the device never holds the whole backbone.

    Raises:
        CRDError: for settings of accelerate that have no meaning here.
    """
    accelerator = Accelerator()  # of this process: accelerate keeps one state for all of them
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise CRDError(
            "accelerate's distributed_type is MEGATRON_LM, which is not supported. "
            "Use MULTI_GPU, or FSDP if the backbone is too large for one device; see docs/machines.md."
        )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP") or accelerator.num_processes == 1:
        return False
    plugin = FullyShardedDataParallelPlugin()  # what accelerate was told
    _check(plugin, accelerator)
    plugin.ignored_modules = whole
    accelerator.state.fsdp_plugin = plugin  # of its own accord accelerate keeps it for GPUs only
    try:
        # the part of Accelerator.prepare() that shards: the rest of it wants an optimiser of the sharded weights
        fsdp2_prepare_model(accelerator, backbone)
    except ValueError as error:  # of names of blocks
        raise CRDError(f"accelerate cannot shard {type(backbone).__name__}: {error}") from error
    return True


def _check(plugin: FullyShardedDataParallelPlugin, accelerator: Accelerator) -> None:
    wanted = {
        "fsdp_version": (plugin.fsdp_version, 2, "FSDP1 is not supported"),
        "fsdp_auto_wrap_policy": (
            "TRANSFORMER_BASED_WRAP" if plugin.auto_wrap_policy else "NO_WRAP",
            "TRANSFORMER_BASED_WRAP",
            "otherwise the whole backbone is put together at once, and no memory is saved",
        ),
        "fsdp_cpu_ram_efficient_loading": (
            bool(plugin.cpu_ram_efficient_loading),
            False,
            "otherwise text encoders come without their weights on all processes but the first",
        ),
        "fsdp_offload_params": (isinstance(plugin.cpu_offload, CPUOffloadPolicy), False, "it is not supported"),
        "fsdp_activation_checkpointing": (plugin.activation_checkpointing, False, "train.gradient_checkpointing does this"),
        "mixed_precision": (accelerator.mixed_precision, "no", "model.precision does this"),
    }
    for setting, (value, expected, why) in wanted.items():
        if value != expected:
            raise CRDError(
                f"accelerate's {setting} is {str(value).lower()}, expected {str(expected).lower()}: {why}. "
                "Change it in accelerate's configuration; docs/machines.md has one that works."
            )


# ---------------------------------------------------------------------------------- weights in pieces


def take_apart(module: torch.nn.Module) -> None:
    """Frees what processes have put together of a module and kept: what is outside of its blocks stays after a forward pass."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole_on_main(tensor: Tensor) -> Tensor | None:
    """The tensor put together, in host memory of the main process; None elsewhere. One that is whole is returned as it is.

    All processes must call it for the same tensors in the same order.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.detach().full_tensor()
    return whole.cpu() if PartialState().is_main_process else None


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """``value``, the same on every process, cut and placed as ``parameter`` is."""
    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else value


def put(parameter: Tensor, value: Tensor) -> None:
    """Writes ``value``, the same on every process, into a parameter that may be in pieces."""
    here(parameter).copy_(here(like(parameter, value)))


def here(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
