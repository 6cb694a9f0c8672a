"""A pipeline with named sets of LoRA weights over one frozen backbone."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
from accelerate.utils import gather
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crd.batch import Conditioning
from crd.errors import CRDError
from crd.flow import widen
from crd.models.family import Family
from crd.models.prompt_cache import PromptCache
from crd.sharding import shard

T = TypeVar("T")

#: trained; moving reference in R; draws the rollouts; the frozen pretrained model (no adapter at all)
Weights = Literal["student", "old", "sampler", "pretrained"]
ADAPTERS: tuple[Weights, ...] = ("student", "old", "sampler")
ENCODED_TOGETHER = 32  # prompts


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
        prompts: PromptCache,
        idle_on_host: bool,
    ):
        self.model, self.device, self._autocast, self._prompts = model, device, autocast, prompts
        self._idle_on_host = idle_on_host
        model.pipeline.set_progress_bar_config(disable=True)
        for component in model.pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()
        modules = [name for name, _ in model.backbone.named_modules()]
        missing = [target for target in targets if not any(name.endswith(target) for name in modules)]
        if missing:
            raise CRDError(f"model.lora_targets: the backbone has no module whose name ends with {', '.join(missing)}.")
        self.lora_config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))
        with warnings.catch_warnings():  # several sets of weights over one backbone are the point
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # it cannot merge, nor do we
            for name in ADAPTERS:
                model.backbone.add_adapter(self.lora_config, adapter_name=name)
        for name in ADAPTERS:
            for _, parameter in self.parameters(name):  # peft gave them the backbone's precision
                parameter.data = widen(parameter.data)
        self._layers = [m for m in model.backbone.modules() if isinstance(m, BaseTunerLayer)]
        self._place()
        for name in ("old", "sampler"):
            self.blend(name, 0.0)
        self._activate("student")
        self._active: Weights = "student"

    def _place(self) -> None:
        """Puts everything onto the device, or lets it wait on the host; cuts the backbone if accelerate was told so."""
        lora = [module for layer in self._layers for module in (layer.lora_A, layer.lora_B)]
        self.sharded = shard(self.model.backbone, lora)
        for module in lora if self.sharded else [self.model.backbone]:
            module.to(self.device)
        if self._idle_on_host:
            return
        for component in self.model.pipeline.components.values():
            if isinstance(component, torch.nn.Module) and component is not self.model.backbone:
                component.to(self.device)

    def in_step(self, parts: Sequence[T]) -> list[T | None]:
        """``parts``, and None for each that another process has more of, if the backbone is sharded.

        It then takes all processes to make a forward or backward pass, so this one must make as many as they do.
        """
        if not self.sharded:
            return list(parts)
        most = int(gather(torch.tensor([len(parts)], device=self.device)).max())
        return [*parts, *[None] * (most - len(parts))]

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

    def encode(self, prompts: Sequence[str], ahead: Sequence[str] = ()) -> Conditioning:
        """Conditioning of the prompts, in their order; each distinct prompt is encoded once.

        If encoders must be fetched, they also encode what is asked for next, ``ahead``, as far as the cache has room.
        """
        rows = {prompt: self._prompts.get(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, row in rows.items() if row is None]
        if missing:
            missing += [prompt for prompt in dict.fromkeys(ahead) if prompt not in rows and not self._prompts.has(prompt)]
        with self._awake(*self.model.text_encoders) if missing else contextlib.nullcontext():
            for start in range(0, len(missing), ENCODED_TOGETHER):
                batch = missing[start : start + ENCODED_TOGETHER]
                if rows.keys().isdisjoint(batch) and start + len(batch) > self._prompts.room:
                    break
                encoded = self.model.encode(batch)
                for i, prompt in enumerate(batch):
                    row = encoded.select(torch.tensor([i], device=self.device)).trimmed()
                    if prompt in rows:
                        rows[prompt] = row
                    self._prompts.put(prompt, row)
        return Conditioning.cat([known for prompt in prompts if (known := rows[prompt])])

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents ``(n, ...)`` to pictures."""
        with self._awake("vae"):
            return self.model.decode(latents)

    @contextlib.contextmanager
    def _awake(self, *components: str) -> Iterator[None]:
        """Components of the pipeline that wait in host memory are on the device within this scope."""
        modules = [self.model.pipeline.components[name] for name in components] if self._idle_on_host else []
        modules = [module.to("cpu") for module in modules if module is not None]
        waiting = [[tensor.data for tensor in (*module.parameters(), *module.buffers())] for module in modules]
        for module in modules:
            module.to(self.device)
        try:
            yield
        finally:  # frozen: what lies in host memory is still right and need not be copied back
            for module, values in zip(modules, waiting, strict=True):
                for tensor, value in zip((*module.parameters(), *module.buffers()), values, strict=True):
                    tensor.data = value

    # ------------------------------------------------------------------------------------ velocity

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0) -> Tensor:
        """Float32 velocity of the weights in use at ``x (b, ...)``, ``sigma (b,)``; two passes if guided."""
        conditional = self._forward(x, sigma, conditioning)
        if guidance_scale == 1.0:
            return conditional
        empty = self.encode([""]).select(torch.zeros(len(x), dtype=torch.long, device=x.device))
        return self.model.guide(self._forward(x, sigma, empty), conditional, guidance_scale)

    def _forward(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with torch.autocast(self.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            return widen(self.model.velocity(x, sigma, conditioning))

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
        try:  # every name in the file begins with the backbone's: transformer or unet
            layers = {key.partition(".")[2]: value for key, value in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise CRDError(f"{path} cannot be read: {error}") from error
        own = self._layers_of(name)
        if own.keys() != layers.keys() or any(own[k].shape != layers[k].shape for k in own):
            raise CRDError(f"the LoRA weights in {path} do not fit this model (other rank, targets or backbone).")
        for key, value in own.items():
            value.copy_(layers[key])

    def _layers_of(self, name: Weights) -> dict[str, Tensor]:
        """One set of weights under the names of LoRA files. It leaves the backbone's own weights alone: they may be in pieces."""
        lora = {key: p.detach() for key, p in self.model.backbone.named_parameters() if f".{name}." in key and "lora_" in key}
        return get_peft_model_state_dict(self.model.backbone, lora, adapter_name=name, save_embedding_layers=False)

    def save_lora(self, folder: str, name: Weights = "student") -> None:
        """Writes one set of weights as a standard diffusers LoRA file."""
        layers = self._layers_of(name)
        metadata = self.lora_config.to_dict()
        metadata["target_modules"] = sorted(metadata["target_modules"])  # a set, in another order in every process
        self.model.save_lora(folder, layers, metadata)
