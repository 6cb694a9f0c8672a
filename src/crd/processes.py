"""Who does what when several processes train together, and how their parts become one whole, exactly."""

import resource
import sys

import numpy as np
import torch
from accelerate import Accelerator


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


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process so far in MiB: of the GPU's allocator if there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
