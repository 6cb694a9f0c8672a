"""Models, tokenizers and weight files from a hub id or a local place; whatever is missing is named in a CRDError."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil

from crd.errors import CRDError
from crd.rewards.preference.placement import Placement

LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Source:
    """What an option of a reward points at, and how a user gets the published one."""

    reward: str  # the reward's name
    option: str  # the option's name
    place: str  # hub id, folder or file, as the user or the default has it
    published: str  # hub id
    file: str = ""  # the one file that is needed of it; empty: the whole of it

    @property
    def local(self) -> str:
        """The place with ``~`` written out; raises CRDError if it is no text, or a path where nothing lies."""
        if not isinstance(self.place, str | Path) or not str(self.place):
            raise self.failure(TypeError("it is no text"))
        if str(self.place).startswith((".", "/", "~")) and not Path(self.place).expanduser().exists():
            raise self.failure(FileNotFoundError("there is no such file or folder"))
        return str(Path(self.place).expanduser()) if str(self.place).startswith("~") else str(self.place)

    def failure(self, error: Exception) -> CRDError:
        """What a user reads: the setting, its value, the reason, and how to get the published one without a network."""
        download = f"hf download {self.published} {self.file}".strip()
        wanted = self.file or "config.json, model.safetensors, the tokenizer's and the image processor's files"
        return CRDError(
            f"rewards: {self.reward}: options.{self.option} is {self.place!r}, which cannot be loaded: {error}\n"
            f"Expected a hub id, or a local folder with {wanted}{' (or that file itself)' if self.file else ''}. The published "
            f"one is {self.published}. Where there is no network, run `{download} --local-dir FOLDER` where there is one, "
            f"bring FOLDER here, and set options: {{{self.option}: FOLDER}}."
        )


def load_model(kind: Any, source: Source, place: Placement) -> Any:
    """A frozen transformers model of class ``kind``; rewards that name the same one share it."""
    try:
        return _pretrained(kind, source.local, place.dtype, place.device)
    except LOAD_ERRORS as error:
        raise source.failure(error) from error


@functools.cache  # CLIPScore and the aesthetic reward are built on the same 1.7 GB
def _pretrained(kind: Any, where: str, dtype: torch.dtype, device: torch.device) -> Any:
    model, info = kind.from_pretrained(where, dtype=dtype, use_safetensors=True, output_loading_info=True)
    if info["missing_keys"]:  # transformers would fill them with random numbers
        raise ValueError(f"it is no complete {kind.__name__}, it lacks {_first(info['missing_keys'])}")
    return model.to(device).eval().requires_grad_(False)


def build_model(kind: Any, config: Any, state: dict[str, torch.Tensor], place: Placement, **arguments: Any) -> Any:
    """A frozen model from converted weights; raises ValueError unless they are exactly those that it needs."""
    model, info = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=place.dtype, output_loading_info=True, **arguments
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise ValueError(f"it does not fit {kind.__name__}: {problem.replace('_', ' ')} {_first(info[problem])}")
    return model.to(place.device).eval().requires_grad_(False)


def _first(keys: Any) -> str:
    names = sorted(map(str, keys))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_tokenizer(kind: Any, source: Source, vocabulary: int) -> Any:
    """A tokenizer of class ``kind`` whose ids fit a model with that many."""
    try:
        tokenizer = kind.from_pretrained(source.local)
        # transformers answers a missing vocabulary with a tokenizer that knows its special tokens alone
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ValueError("there are no tokenizer files")
        if max(tokenizer.get_vocab().values()) >= vocabulary:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens and the model {vocabulary}: they do not belong together")
    except LOAD_ERRORS as error:
        raise source.failure(error) from error
    return tokenizer


def load_image_processor(source: Source) -> CLIPImageProcessorPil:
    """CLIP's preprocessing with Pillow's resampling, which published scores are made with; torchvision's differs."""
    try:
        return CLIPImageProcessorPil.from_pretrained(source.local)
    except LOAD_ERRORS as error:
        raise source.failure(error) from error


def find_file(source: Source, name: str) -> Path:
    """``name`` in the source's folder or hub repository; of a source that is a file, itself or what lies beside it."""
    path = Path(source.local)
    if path.is_file():
        path = path if name == source.file else path.parent / name
    elif path.is_dir():
        path = path / name
    else:
        try:
            path = Path(hf_hub_download(source.local, name))
        except LOAD_ERRORS as error:
            raise source.failure(error) from error
    if not path.is_file():
        raise source.failure(FileNotFoundError(f"there is no file {path}"))
    return path


def read_tensors(source: Source, path: Path) -> dict[str, torch.Tensor]:
    """A state dict from safetensors, or from a PyTorch file, of which only tensors and plain values are read."""
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or unsafe file makes torch raise about anything
        raise source.failure(error) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise source.failure(ValueError(f"{path.name} holds no weights by name"))
    return state
