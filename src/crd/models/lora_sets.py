"""Named weights as LoRA adapters over one frozen backbone: three small sets, and the pretrained model with none of them."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from crd.errors import CRDError
from crd.flow import widen
from crd.lora_settings import FILE_NAME
from crd.models.family import Family
from crd.models.weights import TRAINING_SETS, Weights
from crd.sharding import shard


class LoraSets:
    """LoRA weights of rank ``rank`` and scale ``alpha / rank`` on the modules that ``targets`` name: wholly, or after a dot.

    All sets begin as the same weights, with which the backbone is the pretrained one. Raises CRDError if a target is in no name.
    """

    def __init__(
        self, model: Family, names: Sequence[Weights], *, rank: int, alpha: float, targets: Sequence[str], device: torch.device
    ):
        self.model, self.names = model, tuple(names)
        backbone = model.backbone
        modules = [name for name, _ in backbone.named_modules()]
        missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in modules)]  # peft's rule
        if missing:
            raise CRDError(
                f"model.lora_targets: the backbone has no module whose name ends with {', '.join(missing)}. "
                "Names count from dot to dot: to_q is found in attn.to_q, o_q is not."
            )
        self.settings = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))
        with warnings.catch_warnings():  # several sets of weights over one backbone are the point
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # it cannot merge, nor do we
            warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
            backbone.delete_adapters(list(TRAINING_SETS))  # of a run before this one with the same pipeline
            for name in names:
                backbone.add_adapter(self.settings, adapter_name=name)
        student = [parameter for _, parameter in self.parameters("student")]
        for name in names:
            for (_, parameter), start in zip(self.parameters(name), student, strict=True):
                parameter.data = widen(start.data).clone()  # peft gave them the backbone's precision
        self._tuned = [m for m in backbone.modules() if isinstance(m, BaseTunerLayer)]
        lora = [module for layer in self._tuned for module in (layer.lora_A, layer.lora_B)]
        self.sharded = shard(backbone, lora)
        for module in lora if self.sharded else [backbone]:
            module.to(device)

    def activate(self, name: Weights) -> None:
        adapters = [] if name == "pretrained" else [name]
        for layer in self._tuned:
            layer.set_adapter(adapters, inference_mode=name != "student")

    def changed(self, name: Weights) -> None:
        """Nothing to do: LoRA weights are whole on every process."""

    def parameters(self, name: Weights) -> list[tuple[str, nn.Parameter]]:
        marker = f".{name}."
        return [(k.replace(marker, "."), p) for k, p in self.model.backbone.named_parameters() if marker in k and "lora_" in k]

    def frozen(self) -> list[nn.Parameter]:
        lora = {id(parameter) for name in self.names for _, parameter in self.parameters(name)}
        return [parameter for parameter in self.model.backbone.parameters() if id(parameter) not in lora]

    def backbones(self) -> list[nn.Module]:
        return [self.model.backbone]

    def save(self, folder: Path) -> None:
        """Writes a standard LoRA file of diffusers; the main process has all of it."""
        if not PartialState().is_main_process:
            return
        metadata = self.settings.to_dict()
        metadata["target_modules"] = sorted(metadata["target_modules"])  # a set, in another order in every process
        self.model.save_lora(str(folder), self._layers(), metadata)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Reads a LoRA file, or the one in a folder."""
        path = path / FILE_NAME if path.is_dir() else path
        try:  # every name in the file begins with the backbone's: transformer or unet
            layers = {key.partition(".")[2]: value for key, value in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise CRDError(f"{path} cannot be read: {error}") from error
        own = self._layers()
        if own.keys() != layers.keys() or any(own[k].shape != layers[k].shape for k in own):
            raise CRDError(f"the LoRA weights in {path} do not fit this model (other rank, targets or backbone).")
        for key, value in own.items():
            value.copy_(layers[key])

    def _layers(self) -> dict[str, Tensor]:
        """The student under the names of LoRA files. It leaves the backbone's own weights alone: they may be in pieces."""
        lora = {key: p.detach() for key, p in self.model.backbone.named_parameters() if ".student." in key and "lora_" in key}
        return get_peft_model_state_dict(self.model.backbone, lora, adapter_name="student", save_embedding_layers=False)
