"""A pipeline with named sets of LoRA weights over one frozen backbone."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crd.batch import Conditioning
from crd.errors import CRDError
from crd.flow import widen
from crd.models.family import Family

#: trained; moving reference in R; draws the rollouts; the frozen pretrained model (no adapter at all)
Weights = Literal["student", "old", "sampler", "pretrained"]
ADAPTERS: tuple[Weights, ...] = ("student", "old", "sampler")


class Policy:
    """Named weights over a backbone.

    Every set of weights stays on the device; choosing one is a scope that flips flags and copies nothing.
    Outside of any scope the student speaks. Prompts are encoded once each, the empty prompt once per run.
    """

    def __init__(
        self,
        model: Family,
        *,
        rank: int,
        alpha: float,
        targets: Sequence[str],
        device: torch.device,
        autocast: torch.dtype | None,
    ):
        self.model, self.device, self._autocast = model, device, autocast
        model.pipeline.to(device)
        model.pipeline.set_progress_bar_config(disable=True)
        for component in (model.backbone, model.pipeline.vae):
            component.requires_grad_(False).eval()
        modules = [name for name, _ in model.backbone.named_modules()]
        missing = [target for target in targets if not any(name.endswith(target) for name in modules)]
        if missing:
            raise CRDError(f"model.lora_targets: the backbone has no module whose name ends with {', '.join(missing)}.")
        self.lora_config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))
        with warnings.catch_warnings():  # several sets of weights over one backbone are the point
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            for name in ADAPTERS:
                model.backbone.add_adapter(self.lora_config, adapter_name=name)
        for name in ADAPTERS:
            for _, parameter in self.parameters(name):  # peft gave them the backbone's precision
                parameter.data = widen(parameter.data)
        self._layers = [m for m in model.backbone.modules() if isinstance(m, BaseTunerLayer)]
        for name in ("old", "sampler"):
            self.blend(name, 0.0)
        self._activate("student")
        self._active: Weights = "student"
        self._prompts: dict[str, Conditioning] = {}

    # ------------------------------------------------------------------------------- named weights

    def parameters(self, name: Weights) -> list[tuple[str, torch.nn.Parameter]]:
        """Named LoRA parameters of one set of weights, in a fixed order; names do not contain the set's name."""
        marker = f".{name}."
        return [(k.replace(marker, "."), p) for k, p in self.model.backbone.named_parameters() if marker in k and "lora_" in k]

    def _activate(self, name: Weights) -> None:
        adapters = [] if name == "pretrained" else [name]
        for layer in self._layers:
            layer.set_adapter(adapters, inference_mode=name != "student")

    @contextlib.contextmanager
    def using(self, name: Weights) -> Iterator[None]:
        """Within this scope the named weights speak; on leaving it the previous ones do again."""
        previous = self._active
        self._activate(name)
        self._active = name
        try:
            yield
        finally:
            self._activate(previous)
            self._active = previous

    @torch.no_grad()
    def blend(self, name: Weights, decay: float) -> None:
        """``weights <- decay * weights + (1 - decay) * student`` (theory, section 5)."""
        snapshot = [p for _, p in self.parameters(name)]
        student = [p for _, p in self.parameters("student")]
        torch._foreach_lerp_(snapshot, student, 1.0 - decay)

    # ------------------------------------------------------------------------------------- prompts

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of the prompts, in their order; each distinct prompt is encoded once per run."""
        new = list(dict.fromkeys(p for p in prompts if p not in self._prompts))
        for start in range(0, len(new), 32):
            batch = new[start : start + 32]
            encoded = self.model.encode(batch)
            for i, prompt in enumerate(batch):
                self._prompts[prompt] = encoded.select(torch.tensor([i], device=self.device))
        return Conditioning.cat([self._prompts[p] for p in prompts])

    # ------------------------------------------------------------------------------------ velocity

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0) -> Tensor:
        """Float32 velocity of the weights in use at ``x (b, ...)``, ``sigma (b,)``; two passes if guided."""
        with torch.autocast(self.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            conditional = widen(self.model.velocity(x, sigma, conditioning))
            if guidance_scale == 1.0:
                return conditional
            empty = self.encode([""]).select(torch.zeros(len(x), dtype=torch.long, device=x.device))
            unconditional = widen(self.model.velocity(x, sigma, empty))
        return self.model.guide(unconditional, conditional, guidance_scale)

    # --------------------------------------------------------------------------------------- files

    def state(self) -> dict[str, Tensor]:
        """All named weights, keyed ``student/...``, ``old/...``, ``sampler/...``."""
        return {f"{name}/{key}": p.detach() for name in ADAPTERS for key, p in self.parameters(name)}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what :meth:`state` returned; raises CRDError if names or shapes differ."""
        own = {f"{name}/{key}": p for name in ADAPTERS for key, p in self.parameters(name)}
        if own.keys() != tensors.keys() or any(own[k].shape != tensors[k].shape for k in own):
            raise CRDError(
                "the checkpoint's LoRA weights do not fit this model (other rank, targets or backbone). "
                "Give another output_dir, or the model settings of its run."
            )
        for key, parameter in own.items():
            parameter.copy_(tensors[key])

    def load_lora(self, path: Path, name: Weights = "student") -> None:
        """Reads a LoRA file that :meth:`save_lora` wrote; raises CRDError if it does not fit."""
        prefix = "transformer."
        try:
            layers = {key.removeprefix(prefix): value for key, value in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise CRDError(f"{path} cannot be read: {error}") from error
        own = get_peft_model_state_dict(self.model.backbone, adapter_name=name)
        if own.keys() != layers.keys() or any(own[k].shape != layers[k].shape for k in own):
            raise CRDError(f"the LoRA weights in {path} do not fit this model (other rank, targets or backbone).")
        set_peft_model_state_dict(self.model.backbone, layers, adapter_name=name)

    def save_lora(self, folder: str, name: Weights = "student") -> None:
        """Writes one set of weights as a standard diffusers LoRA file."""
        layers = get_peft_model_state_dict(self.model.backbone, adapter_name=name)
        metadata = self.lora_config.to_dict()
        metadata["target_modules"] = sorted(metadata["target_modules"])  # a set, in another order in every process
        self.model.save_lora(folder, layers, metadata)
