"""GPUs by name, as their makers state them."""

from dataclasses import dataclass

from crd.errors import CRDError


@dataclass(frozen=True)
class GPU:
    memory_gib: float  # that programs can use
    bf16_tflops: float  # dense matrix products in bfloat16, 10^12 operations per second


GPUS = {
    "b200": GPU(178, 2250),
    "h200": GPU(139, 989),
    "h100": GPU(79, 989),
    "h100-pcie": GPU(79, 756),
    "a100-80gb": GPU(79, 312),
    "a100-40gb": GPU(39, 312),
    "l40s": GPU(44, 362),
    "rtx-6000-ada": GPU(47, 364),
    "a6000": GPU(47, 155),
    "rtx-5090": GPU(31, 210),
    "rtx-4090": GPU(23.5, 165),
    "rtx-3090": GPU(23.5, 71),
    "l4": GPU(22, 121),
}


def find_gpu(name: str) -> GPU:
    """The GPU of that name; raises CRDError with the known ones."""
    if name.lower() not in GPUS:
        raise CRDError(f"--gpu: {name!r} is not known; known are {', '.join(GPUS)}.")
    return GPUS[name.lower()]
