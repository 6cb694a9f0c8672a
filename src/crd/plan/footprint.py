"""What a policy weighs and computes, counted on its real modules without computing anything (fake tensors)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from crd.batch import Conditioning
from crd.models.policy import Policy
from crd.models.weights import TRAINING_SETS


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    return sdpa_flop_count(query, key, value)


#: the counter knows the attention of GPUs only
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
TRANSIENT = 3  # largest tensors alive at once in a pass whose results are not kept


@dataclass(frozen=True)
class Footprint:
    """Bytes and operations of one process."""

    backbone_parameters: int
    trained_parameters: int  # of one set of weights
    backbone_bytes: int  # the frozen one
    trained_bytes: int  # three sets, gradients and two moments of the student
    encoder_bytes: int
    vae_bytes: int
    latent_bytes: int  # of one picture
    prompt_bytes: int  # of one prompt's conditioning
    pass_bytes: int  # kept by a pass however many rows it has: trained weights as autocast wants them
    row_bytes: int  # kept by one sample-timestep for its backward pass
    checkpointed_row_bytes: int  # the same with gradient checkpointing
    transient_bytes: int  # of one row in a pass whose results are not kept
    decode_bytes: int  # of one picture while it is decoded
    row_flops: float  # of one forward pass of one row; a backward pass costs twice that


def footprint(policy: Policy) -> Footprint:
    """Counts a policy; nothing is computed but the conditioning of the empty prompt.

    Draw or train with another one afterwards: some backbones (Qwen-Image) keep tables of the pass, which held no numbers.
    """
    model, pipeline = policy.model, policy.model.pipeline
    frozen, student = policy.sets.frozen(), [parameter for _, parameter in policy.parameters("student")]
    encoders = [module for name in model.text_encoders if (module := pipeline.components[name]) is not None]
    sizes = {
        "backbone_parameters": sum(parameter.numel() for parameter in frozen),
        "trained_parameters": sum(parameter.numel() for parameter in student),
        "backbone_bytes": sum(_bytes(parameter) for parameter in frozen),
        "trained_bytes": sum(map(_bytes, student)) * (len(TRAINING_SETS) + 3),
        "encoder_bytes": sum(_bytes(parameter) for module in encoders for parameter in module.parameters()),
        "vae_bytes": sum(_bytes(parameter) for parameter in pipeline.vae.parameters()),
        "latent_bytes": 4 * math.prod(policy.model.latent_shape),
    }
    conditioning = policy.encode([""])
    sizes["prompt_bytes"] = sum(_bytes(tensor) for tensor in vars(conditioning).values() if tensor is not None)
    return Footprint(**sizes, **_pass(policy, conditioning), decode_bytes=_decode(policy))


class _Counted(Exception):
    """Ends the call of what was counted."""


@contextmanager
def _faked(module: torch.nn.Module) -> Iterator[None]:
    """The module computes nothing within this scope; it knows its device, so attention takes the kernel that it would take there.

    Its weights are replaced, or else every use of one would count as a tensor of its own.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    places = [
        (part, name, weight) for part in module.modules() for name, weight in part._parameters.items() if weight is not None
    ]
    try:
        for part, name, weight in places:
            part._parameters[name] = torch.nn.Parameter(fake.from_tensor(weight.detach()), weight.requires_grad)
        with fake:
            yield
    finally:
        for part, name, weight in places:
            part._parameters[name] = weight


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Meter:
    """Listens to one pass through a backbone: what is kept for the backward pass, what blocks are given, the largest result."""

    def __init__(self) -> None:
        self.weights: set[int] = set()  # storages that are there anyway
        self.kept: dict[int, tuple[Tensor, int]] = {}  # by storage; tensors are held, or a new one might get an old one's number
        self.inputs = self.largest = 0

    @property
    def saved(self) -> int:
        return sum(size for _, size in self.kept.values())

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.kept[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    def enter(self, module: Any, arguments: Any, named: Any) -> None:
        self.inputs += sum(map(_bytes, _tensors((*arguments, *named.values()))))

    def leave(self, module: Any, arguments: Any, result: Any) -> None:
        self.largest = max(self.largest, *map(_bytes, _tensors(result)), 0)


@contextmanager
def _counting(module: torch.nn.Module, meter: _Meter, counter: FlopCounterMode) -> Iterator[None]:
    """Within this scope a call of the module is counted instead of computed, and ends whatever called it.

    Only the module is faked: what is made around it may be kept for later, and must be real.
    """
    forward = module.forward

    def count(*arguments: Any, **named: Any) -> None:
        with _faked(module), counter, torch.autograd.graph.saved_tensors_hooks(meter.keep, lambda tensor: tensor):
            meter.weights.update(parameter.untyped_storage()._cdata for parameter in module.parameters())
            result = forward(*arguments, **named)  # kept until all is counted
            del result
        raise _Counted

    handles = [part.register_forward_hook(meter.leave) for part in module.modules()]
    module.forward = count
    try:
        yield
    except _Counted:
        pass
    finally:
        del module.forward
        for handle in handles:
            handle.remove()


def _pass(policy: Policy, conditioning: Conditioning) -> dict[str, Any]:
    """Operations of a forward pass of one row, and the bytes that it keeps for its backward pass."""
    blocks = [b for stack in policy.model.backbone.children() if isinstance(stack, torch.nn.ModuleList) for b in stack]
    two, flops = _pass_of(policy, conditioning, 2, blocks)  # a single row is spared a copy here and there
    three, _ = _pass_of(policy, conditioning, 3, blocks)
    row = three.saved - two.saved
    return {
        "row_flops": flops / 2,
        "pass_bytes": max(0, two.saved - 2 * row),
        "row_bytes": row,
        # the inputs of all blocks, and one block at a time as if it were not checkpointed
        "checkpointed_row_bytes": min(row, two.inputs // 2 + row // max(1, len(blocks))),
        "transient_bytes": TRANSIENT * two.largest // 2,
    }


def _pass_of(policy: Policy, conditioning: Conditioning, rows: int, blocks: list[torch.nn.Module]) -> tuple[_Meter, float]:
    """What a pass of the student keeps, and its operations."""
    meter, counter = _Meter(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    handles = [block.register_forward_pre_hook(meter.enter, with_kwargs=True) for block in blocks]
    x = torch.zeros(rows, *policy.model.latent_shape, device=policy.device)
    same = conditioning.select(torch.zeros(rows, dtype=torch.long, device=policy.device))
    with _counting(policy.model.backbone, meter, counter):
        policy.velocity(x, torch.full((rows,), 0.5, device=policy.device), same)
    for handle in handles:
        handle.remove()
    return meter, float(counter.get_total_flops())


def _decode(policy: Policy) -> int:
    """Bytes of one picture while the VAE decodes it: its largest tensors, of which some live at once."""
    meter = _Meter()
    with _counting(policy.model.pipeline.vae.decoder, meter, FlopCounterMode(display=False)):
        policy.model.decode(torch.zeros(1, *policy.model.latent_shape, device=policy.device))
    return TRANSIENT * meter.largest


def _tensors(result: Any) -> list[Tensor]:
    return [value for value in (result if isinstance(result, tuple | list) else [result]) if isinstance(value, Tensor)]
