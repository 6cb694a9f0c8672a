"""A pipeline, its named weights and its prompts: everything that training asks of a model."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.utils import gather
from PIL import Image
from torch import Tensor, nn

from crd.batch import Conditioning
from crd.errors import CRDError
from crd.flow import widen
from crd.models.family import Family
from crd.models.prompt_cache import PromptCache
from crd.models.weights import Weights, WeightSets
from crd.sharding import here, put, whole_on_main

T = TypeVar("T")

ENCODED_TOGETHER = 32  # prompts


class Policy:
    """Named weights over a backbone.

    Every set of weights stays on the device; choosing one is a scope that copies nothing.
    Outside of any scope the student speaks. Prompts are encoded once each, the empty prompt once per run.
    """

    def __init__(
        self,
        model: Family,
        sets: WeightSets,
        *,
        device: torch.device,
        autocast: torch.dtype | None,
        prompts: PromptCache,
        idle_on_host: bool,
    ):
        self.model, self.sets, self.device, self._autocast, self._prompts = model, sets, device, autocast, prompts
        self._idle_on_host = idle_on_host
        model.pipeline.set_progress_bar_config(disable=True)
        if not idle_on_host:
            for component in model.pipeline.components.values():
                if isinstance(component, nn.Module) and component not in sets.backbones():
                    component.to(device)
        sets.activate("student")
        self._active: Weights = "student"

    @property
    def sharded(self) -> bool:
        """Whether processes hold pieces of the backbone."""
        return self.sets.sharded

    def in_step(self, parts: Sequence[T]) -> list[T | None]:
        """``parts``, and None for each that another process has more of, if the backbone is sharded.

        It then takes all processes to make a forward or backward pass, so this one must make as many as they do.
        """
        if not self.sharded:
            return list(parts)
        most = int(gather(torch.tensor([len(parts)], device=self.device)).max())
        return [*parts, *[None] * (most - len(parts))]

    # ------------------------------------------------------------------------------- named weights

    def parameters(self, name: Weights) -> list[tuple[str, nn.Parameter]]:
        """Named parameters of one set of weights, in a fixed order; names do not contain the set's name."""
        return self.sets.parameters(name)

    @contextlib.contextmanager
    def using(self, name: Weights) -> Iterator[None]:
        """Within this scope the named weights speak; on leaving it the previous ones do again."""
        previous = self._active
        self.sets.activate(name)
        self._active = name
        try:
            yield
        finally:
            self.sets.activate(previous)
            self._active = previous

    @torch.no_grad()
    def blend(self, name: Weights, decay: float) -> None:
        """``weights <- decay * weights + (1 - decay) * student`` (theory, section 5)."""
        snapshot = [here(p) for _, p in self.parameters(name)]
        student = [here(p) for _, p in self.parameters("student")]
        torch._foreach_lerp_(snapshot, student, 1.0 - decay)
        self.sets.changed(name)

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
        # a weight is used once a pass: keeping its cast would only hold memory, beyond gradient checkpointing and FSDP2
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None, cache_enabled=False):
            return widen(self.model.velocity(x, sigma, conditioning))

    # --------------------------------------------------------------------------------------- files

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """All named weights, keyed ``student/...``, ``old/...``, ``sampler/...``.

        If they are in pieces, all processes must call it, and only the main one gets them.
        """
        whole = {key: whole_on_main(parameter) for key, parameter in self._all_parameters().items()}
        return {key: tensor.detach() for key, tensor in whole.items() if tensor is not None}

    @torch.no_grad()
    def load_state(self, shapes: Mapping[str, Sequence[int]], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Restores what :meth:`state` returned, tensor by tensor; raises CRDError at once if names or shapes differ."""
        own = self._all_parameters()
        if own.keys() != shapes.keys() or any(list(own[k].shape) != list(shapes[k]) for k in own):
            raise CRDError(
                "the checkpoint's weights do not fit this model (other LoRA rank, targets or backbone). "
                "Give another output_dir, or the model settings of its run."
            )
        for key, tensor in tensors:
            put(own[key], tensor)
        for name in self.sets.names:
            self.sets.changed(name)

    def _all_parameters(self) -> dict[str, nn.Parameter]:
        return {f"{name}/{key}": p for name in self.sets.names for key, p in self.parameters(name)}

    def save(self, folder: Path) -> None:
        """Writes the student as diffusers loads it; all processes call it, and the main one writes."""
        self.sets.save(folder)

    def load(self, path: Path) -> None:
        """Reads into the student what :meth:`save` wrote; raises CRDError if it does not fit."""
        self.sets.load(path)
