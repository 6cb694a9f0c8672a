"""Conditioning of prompts, encoded once each: the newest on the device, all of them in a folder if the recipe names one."""

import hashlib
import json
import os
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crd.batch import Conditioning
from crd.models.family import Family

PROBE = 8  # values of every parameter that the fingerprint looks at


class PromptCache:
    """Conditioning of single prompts, at most ``limit_bytes`` of it on the device (the least recently used leaves first)."""

    def __init__(self, device: torch.device, limit_bytes: int, folder: Path | None):
        self.device, self.limit_bytes, self.folder = device, limit_bytes, folder
        self._kept: OrderedDict[str, Conditioning] = OrderedDict()
        self._bytes = 0

    def get(self, prompt: str) -> Conditioning | None:
        """The conditioning of a prompt that was encoded before, one row."""
        if prompt in self._kept:
            self._kept.move_to_end(prompt)
            return self._kept[prompt]
        found = self._read(prompt)
        if found is not None:
            self._keep(prompt, found)
        return found

    def has(self, prompt: str) -> bool:
        """Whether the prompt need not be encoded."""
        return prompt in self._kept or (self.folder is not None and self._file(prompt).exists())

    @property
    def room(self) -> int:
        """Prompts of the newest one's size that are kept at once."""
        return self.limit_bytes // _size(next(reversed(self._kept.values()))) if self._kept else 1

    def put(self, prompt: str, conditioning: Conditioning) -> None:
        self._keep(prompt, conditioning)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self._file(prompt).with_suffix(f".{os.getpid()}.partial")  # several processes may write the same prompt
            save_file({name: tensor.contiguous() for name, tensor in _tensors(conditioning).items()}, partial)
            partial.replace(self._file(prompt))

    def _keep(self, prompt: str, conditioning: Conditioning) -> None:
        self._kept[prompt] = conditioning
        self._bytes += _size(conditioning)
        while self._bytes > self.limit_bytes and len(self._kept) > 2:
            oldest = next(prompt for prompt in self._kept if prompt)  # the empty one stays: guided passes ask for it in a step
            self._bytes -= _size(self._kept.pop(oldest))

    def _file(self, prompt: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()}.safetensors"

    def _read(self, prompt: str) -> Conditioning | None:
        if self.folder is None or not self._file(prompt).exists():
            return None
        try:
            return Conditioning(**load_file(self._file(prompt), device=str(self.device)))
        except (OSError, SafetensorError, TypeError):  # damaged: encoded again, and written over
            return None


def fingerprint(family: Family) -> str:
    """Tells apart encoders, precisions and lengths whose embeddings must not be mixed; looks at a few values of every weight."""
    digest = hashlib.blake2b(f"{type(family).__name__} {family.max_sequence_length}".encode(), digest_size=12)
    for name in family.text_encoders:
        encoder = family.pipeline.components[name]
        if encoder is None:
            continue
        digest.update(json.dumps([name, str(encoder.dtype), encoder.config.to_dict()], sort_keys=True, default=str).encode())
        for key, parameter in encoder.named_parameters():
            values = parameter.detach().flatten()[:PROBE].float().tolist()
            digest.update(f"{key}{tuple(parameter.shape)}{values}".encode())
    return digest.hexdigest()


def _tensors(conditioning: Conditioning) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in vars(conditioning).items() if tensor is not None}


def _size(conditioning: Conditioning) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(conditioning).values())
