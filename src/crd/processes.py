"""Who does what when several processes train together, and how their parts become one whole, exactly."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from crd.errors import CRDError


def launched(trackers: Sequence[str], folder: Path) -> Accelerator:
    """This process's place among those that a launcher has started.

    Raises:
        CRDError: if they do not know of each other, or accelerate was told to use something that is not installed.
    """
    try:
        accelerator = Accelerator(log_with=list(trackers) or None, project_dir=folder)
    except ImportError as error:  # DeepSpeed
        raise CRDError(f"accelerate cannot start: {error}") from error
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and accelerator.num_processes == 1:
        raise CRDError(
            f"{started} processes were launched, but accelerate found no devices for them, so each would train by itself. "
            "Set ACCELERATE_USE_CPU=true in the environment to train on CPUs."
        )
    return accelerator


def split(count: int, processes: int, rank: int) -> range:
    """The contiguous share of ``range(count)`` that belongs to a process; shares differ by one at most."""
    return range(count * rank // processes, count * (rank + 1) // processes)


def share_of(count: int, accelerator: Accelerator) -> range:
    """This process's share of ``range(count)``."""
    return split(count, accelerator.num_processes, accelerator.process_index)


def add_up(values: np.ndarray, ids: list[int], count: int, accelerator: Accelerator) -> np.ndarray:
    """The whole column ``(count,)`` on every process, from each process's values at its own ids. NaN stays NaN."""
    whole = np.zeros(count)
    whole[ids] = values
    if accelerator.num_processes == 1:  # also on a device without float64, as Apple's
        return whole
    return accelerator.reduce(torch.from_numpy(whole).to(accelerator.device), "sum").cpu().numpy()


def from_main(data: bytes, accelerator: Accelerator) -> bytes:
    """The ``data`` of the main process, on every process: only that one reads the run's folder."""
    if accelerator.num_processes == 1:
        return data
    length = int(broadcast(torch.tensor([len(data)], device=accelerator.device)))
    held = torch.zeros(length, dtype=torch.uint8)
    if accelerator.is_main_process and length:
        held = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return broadcast(held.to(accelerator.device)).cpu().numpy().tobytes()


def tensors_from_main(
    tensors: dict[str, Tensor], accelerator: Accelerator
) -> tuple[dict[str, list[int]], Iterator[tuple[str, Tensor]]]:
    """Shapes of the main process's tensors, and the tensors one by one as they arrive: no other process holds all of them."""
    described = {key: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for key, tensor in tensors.items()}
    described = json.loads(from_main(json.dumps(described).encode(), accelerator))

    def arriving() -> Iterator[tuple[str, Tensor]]:
        for key, (shape, dtype) in described.items():
            held = tensors[key] if accelerator.is_main_process else torch.empty(shape, dtype=getattr(torch, dtype))
            yield key, broadcast(held.to(accelerator.device)) if accelerator.num_processes > 1 else held

    return {key: shape for key, (shape, _) in described.items()}, arriving()


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process so far in MiB: of the GPU's allocator if there is one, else resident memory (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return 0.0
    import resource  # here, since Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
