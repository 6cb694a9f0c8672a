"""Named weights as whole backbones: what full fine-tuning trains, and what it is compared with.

With P parameters, the frozen one takes 2 P bytes in bfloat16; student, moving reference and sampler 4 P each, as a slow
average in bfloat16 would stand still; gradient and AdamW 12 P. With FSDP2 every process holds its share of all of them.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState, init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn

from crd.errors import CRDError
from crd.flow import widen
from crd.models.family import Family
from crd.models.weights import Weights
from crd.run_folder import FULL
from crd.sharding import put, shard, take_apart, whole_on_main


class FullSets:
    """Copies of the pretrained backbone in float32; choosing one hands the family another module."""

    def __init__(self, model: Family, names: Sequence[Weights], *, device: torch.device):
        self.model, self.names = model, tuple(names)
        self._class = type(model.backbone)  # sharding changes it
        self._modules: dict[Weights, nn.Module] = {}
        for name in names:  # one after the other, so that the host never holds more than one copy
            module = copy.deepcopy(model.backbone)
            for parameter in module.parameters():
                parameter.data = widen(parameter.data)
            self._modules[name] = module.requires_grad_(name == "student")
            self._place(module, device)
        self._modules["pretrained"] = model.backbone
        self.sharded = self._place(model.backbone, device)
        # listed once: while a sharded block is at work, its module shows other tensors than those that are kept
        self._parameters = {name: list(module.named_parameters()) for name, module in self._modules.items()}

    @staticmethod
    def _place(module: nn.Module, device: torch.device) -> bool:
        """Puts a module onto the device, in pieces if accelerate was told so; whether it was."""
        sharded = shard(module, [])
        if not sharded:
            module.to(device)
        return sharded

    def activate(self, name: Weights) -> None:
        self.model.backbone = self._modules[name]

    def changed(self, name: Weights) -> None:
        if self.sharded:
            take_apart(self._modules[name])

    def parameters(self, name: Weights) -> list[tuple[str, nn.Parameter]]:
        return self._parameters[name]

    def frozen(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self._parameters["pretrained"]]

    def backbones(self) -> list[nn.Module]:
        return list(self._modules.values())

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Writes ``backbone/`` as diffusers saves a model, in the precision of the frozen one."""
        dtype, module = self.frozen()[0].dtype, self._modules["student"]
        trained: dict[str, Tensor] = {}
        for key, parameter in self._parameters["student"]:
            whole = whole_on_main(parameter)
            if whole is not None and PartialState().is_main_process:
                trained[key] = whole.to("cpu", dtype)
        if not trained:
            return
        with init_empty_weights(include_buffers=True):
            plain = self._class.from_config(module.config)
        buffers = {key: value for key, value in module.state_dict().items() if key not in trained}
        plain.load_state_dict({**buffers, **trained}, assign=True)
        plain.save_pretrained(folder / FULL)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Reads a ``backbone/`` folder; every process by itself."""
        try:
            found = self._class.from_pretrained(path, torch_dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CRDError(f"the weights in {path} cannot be read as a {self._class.__name__}: {error}") from error
        values = dict(found.named_parameters())
        own = dict(self._parameters["student"])
        if own.keys() != values.keys() or any(own[key].shape != value.shape for key, value in values.items()):
            raise CRDError(f"the weights in {path} do not fit this model: another backbone was tuned there.")
        for key, parameter in own.items():
            put(parameter, values[key])
        self.changed("student")
