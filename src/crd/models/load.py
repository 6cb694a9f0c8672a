"""From a name, a folder or a loaded pipeline to a policy."""

import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import httpx2
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError

from crd.config import ModelConfig
from crd.errors import CRDError
from crd.models.families import open_family
from crd.models.family import Family
from crd.models.full_sets import FullSets
from crd.models.lora_sets import LoraSets
from crd.models.policy import Policy
from crd.models.prompt_cache import PromptCache, fingerprint
from crd.models.quantize import quantize
from crd.models.weights import TRAINING_SETS, Weights, WeightSets

COMPILED_VARIANTS = 96  # dynamo's own limit of 8 is below kinds of blocks x sets of weights x gradients on and off


def nano_folder() -> Path:
    """Where the embedded base model lies."""
    return Path(str(files("crd.nano") / "weights"))


def load_precision(setting: str, device: torch.device) -> torch.dtype:
    """float32, or bfloat16 where the device has it and the setting allows."""
    if setting == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return torch.float32 if setting == "float32" else torch.bfloat16


def absent_components(place: str) -> dict[str, None]:
    """Components that a pipeline was saved without, such as T5; diffusers wants to be told so again on loading."""
    index = DiffusionPipeline.load_config(place)
    return {name: None for name, entry in index.items() if entry == [None, None]}


def load_pipeline(path: str, dtype: torch.dtype) -> DiffusionPipeline:
    """Loads a diffusers pipeline; raises CRDError if there is none at that place."""
    folder = nano_folder() if path == "nano" else Path(path).expanduser()
    looks_local = path == "nano" or path.startswith((".", "/", "~")) or folder.exists()
    if looks_local and not (folder / "model_index.json").is_file():
        raise CRDError(f"model.path: {folder.resolve()} is no diffusers pipeline: it has no model_index.json.")
    if not looks_local:
        _check_hub(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of diffusers about tokenizer classes; nothing a user could act on
            place = str(folder) if looks_local else path
            return DiffusionPipeline.from_pretrained(place, torch_dtype=dtype, use_safetensors=True, **absent_components(place))
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise CRDError(f"model.path: {path!r} cannot be loaded as a diffusers pipeline: {error}") from error


def _check_hub(path: str) -> None:
    """Raises CRDError that says which it is, if a name is no pipeline of the hub: misspelt, gated, or the hub out of reach."""
    try:
        hf_hub_download(path, "model_index.json")
    except HFValidationError as error:
        raise CRDError(f"model.path: {path!r} is neither a folder nor the name of a model on the hub (OWNER/NAME).") from error
    except GatedRepoError as error:
        raise CRDError(
            f"model.path: {path} is gated: accept its licence on its page of the hub, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise CRDError(
            f"model.path: there is no folder {path!r}, and the hub knows no model of that name. Check the spelling; "
            "if it is private, log in with `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        reason = f" ({error.__cause__})" if error.__cause__ else ""
        raise CRDError(
            f"model.path: there is no folder {path!r}, no model of that name has been downloaded to this machine, and the "
            f"hub cannot be reached{reason}. Connect (unset HF_HUB_OFFLINE if it is set), or give the folder of the model."
        ) from error
    except EntryNotFoundError as error:
        raise CRDError(f"model.path: {path} on the hub is no diffusers pipeline: it has no model_index.json.") from error
    except (OSError, httpx2.HTTPError) as error:
        raise CRDError(f"model.path: the hub does not give {path}: {error}") from error


def cache_folder(family: Family, config: ModelConfig) -> Path | None:
    """Where prompt embeddings of these text encoders are kept; each kind has a folder of its own."""
    return config.prompt_cache_folder.expanduser() / fingerprint(family) if config.prompt_cache_folder else None


def load_policy(
    model: str | Path | DiffusionPipeline, config: ModelConfig, device: torch.device, names: Sequence[Weights] = TRAINING_SETS
) -> Policy:
    """The policy over a pipeline of a supported class, with these sets of weights; the student must be among them."""
    named = isinstance(model, str | Path)
    pipeline = load_pipeline(str(model), load_precision(config.precision, device)) if named else model
    family = open_family(pipeline, config)
    dtype = family.backbone.dtype  # of a pipeline that was handed over, its own
    if dtype == torch.float16 and "old" in names:  # only training keeps it
        raise CRDError(
            "the pipeline is in float16, in which the gradients of the loss (1e-9 per number) are zero. "
            "Load it with torch_dtype=torch.bfloat16, or torch.float32."
        )
    for component in family.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    if config.int8:
        quantize(family.backbone)
    policy = Policy(
        family,
        _weight_sets(family, config, device, names),
        device=device,
        prompts=PromptCache(device, config.prompt_cache_MiB * 2**20, cache_folder(family, config)),
        idle_on_host=config.idle_on_host and device.type != "cpu",
        autocast=dtype if dtype in (torch.bfloat16, torch.float16) else None,
    )
    if config.compile:
        compile_blocks(policy)
    return policy


def _weight_sets(family: Family, config: ModelConfig, device: torch.device, names: Sequence[Weights]) -> WeightSets:
    if config.tuning == "full":
        return FullSets(family, names, device=device)
    targets = config.lora_targets or family.lora_targets
    return LoraSets(family, names, rank=config.lora_rank, alpha=config.lora_alpha, targets=targets, device=device)


def compile_blocks(policy: Policy) -> None:
    """Compiles the backbone's repeated blocks; each set of named weights, with and without gradient, is a variant of its own."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)
    for stack in [child for backbone in policy.sets.backbones() for child in backbone.children()]:
        if isinstance(stack, torch.nn.ModuleList):
            for block in stack:
                block.compile(dynamic=True)
