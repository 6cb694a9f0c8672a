"""Where a reward model runs, in which precision, on how many pictures at once."""

import os
from dataclasses import dataclass

import torch

from crd.errors import CRDError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """Of one reward model; made by :func:`make_placement`."""

    device: torch.device
    dtype: torch.dtype
    batch_size: int  # pictures, or prompts, in one forward pass

    def batches(self, count: int) -> list[slice]:
        """``range(count)`` in consecutive pieces."""
        return [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)]


def make_placement(reward: str, device: str | None, dtype: str, batch_size: int) -> Placement:
    """Checks the three options.

    Args:
        reward: its name, for messages.
        device: of torch, such as "cpu" or "cuda:1"; None: this process's GPU if there is one, else the CPU.
        dtype: "float32", "bfloat16" or "float16".
        batch_size: at least 1.
    """
    if dtype not in PRECISIONS:
        raise CRDError(f"rewards: {reward}: options.dtype is {dtype!r}; use one of {', '.join(PRECISIONS)}.")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise CRDError(f"rewards: {reward}: options.batch_size is {batch_size!r}; expected a whole number of at least 1.")
    return Placement(_device(reward, device), PRECISIONS[dtype], batch_size)


def _device(reward: str, device: str | None) -> torch.device:
    if device is None:  # rewards are made before the processes meet, so that the launcher's variable has to tell the GPU
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise CRDError(
            f"rewards: {reward}: options.device is {device!r}, which cannot be used: {reason}. Use cpu, cuda or cuda:N, "
            "or leave it out for the GPU of this process, or the CPU if it has none."
        ) from error
    return chosen
