"""The end of an optimiser step: the gradients of all processes become one, which is clipped, and AdamW applies it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crd.config import OptimizerConfig
from crd.sharding import here, like, whole_on_main

GRADIENT_MESSAGE = 2**26  # numbers; the gradient of a LoRA is one message


class Update(Protocol):
    """What becomes of the gradients that backward passes have left on the trained parameters."""

    def clear(self) -> None:
        """Drops the gradients."""
        ...

    def gradient_norm(self) -> Tensor:
        """A norm, the same on all processes, which is finite if the gradient is; makes ready for :meth:`apply`."""
        ...

    def apply(self, norm: float) -> float:
        """Takes the step; returns the norm of the gradient before clipping."""
        ...

    def state(self) -> dict[str, Tensor]:
        """AdamW's state as ``optimizer/INDEX/NAME``, whole, on the main process at least; all processes must call it."""
        ...

    def load_state(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Inverse of :meth:`state`, in place, of the same tensors on all processes; to be called after weights are restored."""
        ...


def make_update(parameters: Sequence[nn.Parameter], settings: OptimizerConfig, accelerator: Accelerator) -> Update:
    """The update that accelerate was told to make: plain, or by DeepSpeed."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=accelerator.device.type == "cuda",  # no temporary as large as the weights
    )
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and accelerator.num_processes > 1:
        from crd.zero import ZeroUpdate

        return ZeroUpdate(parameters, optimizer, settings.clip_norm, accelerator)
    return PlainUpdate(parameters, optimizer, settings.clip_norm, accelerator)


class PlainUpdate:
    """Gradients travel once per optimiser step; those of weights in FSDP2's pieces have done so in the backward passes."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, clip_norm: float, accelerator: Accelerator
    ):
        self.parameters, self.optimizer, self.clip_norm, self.accelerator = parameters, optimizer, clip_norm, accelerator

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def gradient_norm(self) -> Tensor:
        """The norm before clipping of the gradient, which is then clipped."""
        gradients = filled(self.parameters)
        processes = self.accelerator.num_processes
        if any(isinstance(gradient, DTensor) for gradient in gradients):  # FSDP2 has taken the mean
            torch._foreach_mul_([here(gradient) for gradient in gradients], processes)
        elif processes > 1:
            for bucket in buckets(gradients, GRADIENT_MESSAGE):
                flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in bucket]), "sum")
                for gradient, total in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                    gradient.copy_(total.view_as(gradient))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def apply(self, norm: float) -> float:
        self.optimizer.step()
        return norm

    def state(self) -> dict[str, Tensor]:
        """On the main process only, if the weights are in pieces."""
        state = self.optimizer.state_dict()["state"]
        whole = {f"optimizer/{i}/{name}": whole_on_main(value) for i, entry in state.items() for name, value in entry.items()}
        return {key: value for key, value in whole.items() if value is not None}

    def load_state(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Moments are cut as their parameters are."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors:
            _, index, name = key.split("/")
            parameter = self.parameters[int(index)]
            state.setdefault(int(index), {})[name] = like(parameter, value) if value.shape == parameter.shape else value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def filled(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients; zeros where no backward pass has come by, so that every process has all of them."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def buckets(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Runs of tensors of at most ``size`` elements; one that is larger is by itself."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and held + tensor.numel() > size:
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    yield bucket
