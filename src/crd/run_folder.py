"""The folder of a run: what lies where, and whether it may be written to by this configuration."""

from pathlib import Path

import yaml

from crd.config import CRDConfig, build_config, differences, dump_config
from crd.errors import CRDError


class RunFolder:
    """``config.yaml``, ``metrics.jsonl``, ``timing.jsonl``, ``checkpoints/``, ``pictures/`` and the result."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.settings = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.timing = self.path / "timing.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.pictures = self.path / "pictures"
        self.summary = self.path / "summary.json"
        self.lora = self.path / "pytorch_lora_weights.safetensors"

    def open(self, config: CRDConfig, *, write: bool) -> None:
        """Makes the folder, or checks that it belongs to this configuration; raises CRDError otherwise."""
        if self.settings.exists():
            other = self.config()
            if changed := differences(other, config):
                raise CRDError(
                    f"{self.path} holds a run with other settings:\n  " + "\n  ".join(changed) + "\n"
                    "Give another output_dir, or the same settings to resume it."
                )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise CRDError(f"output_dir: {self.path} exists and is not the folder of a run. Give another output_dir.")
        if not write:
            return
        try:
            self.pictures.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self.settings.write_text(dump_config(config))
        except OSError as error:
            raise CRDError(f"output_dir: {self.path} cannot be written: {error}.") from error

    def config(self) -> CRDConfig:
        """The settings that the run was started with; raises CRDError if this is no run."""
        try:
            return build_config(yaml.safe_load(self.settings.read_text()))
        except FileNotFoundError:
            raise CRDError(f"{self.path} is not the folder of a run: it has no config.yaml.") from None
        except (OSError, yaml.YAMLError) as error:
            raise CRDError(f"{self.settings} cannot be read: {error}.") from error
