"""Every random draw is a function of (seed, step, purpose, global sample index), and of nothing else.

So results do not depend on the number of processes, on how a batch is cut into tiles, on workers, or on
where a run was resumed.
"""

import hashlib
import random

import torch
from torch import Tensor


def derive_seed(seed: int, *path: int | str) -> int:
    """A 63-bit seed for one place in the run, e.g. ``derive_seed(seed, step, "rollout-noise", index)``."""
    text = "/".join([str(seed), *map(str, path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *path: int | str) -> torch.Generator:
    """A CPU generator for one place in the run (CPU, so that every device sees the same draws)."""
    return torch.Generator("cpu").manual_seed(derive_seed(seed, *path))


def python_rng(seed: int, *path: int | str) -> random.Random:
    """As :func:`generator`, for Python's own random numbers."""
    return random.Random(derive_seed(seed, *path))


def noise(shape: tuple[int, ...], seed: int, step: int, purpose: str, indices: list[int]) -> Tensor:
    """Standard normal noise ``(len(indices), *shape)`` in float32, one independent draw per global sample index."""
    return torch.stack([torch.randn(shape, generator=generator(seed, step, purpose, i)) for i in indices])
