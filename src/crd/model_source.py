"""Which model is meant: a finished run, a plain model, either with a LoRA file of one's own."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from crd.config import CRDConfig, ModelConfig
from crd.lora_settings import find_lora, lora_settings
from crd.models.load import load_policy
from crd.models.policy import Policy
from crd.models.weights import Weights
from crd.run_folder import RunFolder


@dataclass(frozen=True)
class Source:
    """A model as the command line names it: settings, and the tuned weights that it has."""

    path: str  # as it was given
    config: CRDConfig  # of the run, or the defaults with this model
    tuned: Path | None  # LoRA file, or folder of a whole backbone

    @property
    def weights(self) -> Weights:
        return "student" if self.tuned else "pretrained"

    def load(self, device: torch.device) -> Policy:
        policy = load_policy(self.config.model.path, self.config.model, device, names=("student",))
        if self.tuned:
            policy.load(self.tuned)
        return policy


def find_model(model: str, lora: Path | None = None) -> Source:
    """A run (its student) or a plain model (pretrained), either with a LoRA file of one's own; nothing is loaded yet."""
    folder = RunFolder(Path(model))
    if folder.settings.exists() and not (folder.path / "model_index.json").exists():  # an export of a run has both
        config = folder.config()
        own = None if lora else folder.finished(config)
    else:
        config, own = CRDConfig(model=ModelConfig(path=model)), None
    if lora is None:
        return Source(model, config, own)
    path = find_lora(lora)
    fitting = config.model.model_copy(update={"tuning": "lora", **lora_settings(path)})
    return Source(model, config.model_copy(update={"model": fitting}), path)


def open_model(model: str, accelerator: Accelerator, lora: Path | None = None) -> tuple[Policy, Weights, CRDConfig]:
    """The policy of :func:`find_model`, the weights to use, and the settings that belong to it."""
    source = find_model(model, lora)
    return source.load(accelerator.device), source.weights, source.config
