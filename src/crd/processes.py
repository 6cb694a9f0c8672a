"""Who does what when several processes train together, and how their parts become one whole, exactly."""

import os
import resource
import sys

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from crd.errors import CRDError


def check_launch(accelerator: Accelerator) -> None:
    """Raises CRDError if a launcher has started several processes that do not know of each other."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and accelerator.num_processes == 1:
        raise CRDError(
            f"{launched} processes were launched, but accelerate found no devices for them, so each would train by itself. "
            "Set ACCELERATE_USE_CPU=true in the environment to train on CPUs."
        )


def split(count: int, processes: int, rank: int) -> range:
    """The contiguous share of ``range(count)`` that belongs to a process; shares differ by one at most."""
    return range(count * rank // processes, count * (rank + 1) // processes)


def share_of(count: int, accelerator: Accelerator) -> range:
    """This process's share of ``range(count)``."""
    return split(count, accelerator.num_processes, accelerator.process_index)


def add_up(values: np.ndarray, ids: list[int], count: int, accelerator: Accelerator) -> np.ndarray:
    """The whole column ``(count,)`` on every process, from each process's values at its own ids. NaN stays NaN."""
    whole = torch.zeros(count, dtype=torch.float64, device=accelerator.device)
    whole[torch.tensor(ids, dtype=torch.long, device=whole.device)] = torch.as_tensor(
        values, dtype=torch.float64, device=whole.device
    )
    return accelerator.reduce(whole, "sum").cpu().numpy()


def from_main(data: bytes, accelerator: Accelerator) -> bytes:
    """The ``data`` of the main process, on every process: only that one reads the run's folder."""
    if accelerator.num_processes == 1:
        return data
    length = int(broadcast(torch.tensor([len(data)], device=accelerator.device)))
    held = torch.zeros(length, dtype=torch.uint8)
    if accelerator.is_main_process and length:
        held = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return broadcast(held.to(accelerator.device)).cpu().numpy().tobytes()


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process so far in MiB: of the GPU's allocator if there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
