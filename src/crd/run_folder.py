"""The folder of a run: what lies where, and whether it may be written to by this configuration."""

from pathlib import Path

import yaml

from crd.config import CRDConfig
from crd.errors import CRDError
from crd.lora_settings import FILE_NAME
from crd.recipe import build_config, differences, dump_config

FULL = "backbone"  # folder of a fully tuned backbone, as diffusers saves a model


class RunFolder:
    """``config.yaml``, ``metrics.jsonl``, ``timing.jsonl``, ``checkpoints/``, ``pictures/`` and the result."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.settings = self.path / "config.yaml"
        self._partial = self.path / "config.yaml.partial"
        self.metrics = self.path / "metrics.jsonl"
        self.timing = self.path / "timing.jsonl"
        self.found = self.path / "found.json"  # what the settings leave open: rows per forward pass, the grid of noise levels
        self.checkpoints = self.path / "checkpoints"
        self.pictures = self.path / "pictures"
        self.summary = self.path / "summary.json"
        self.best = self.path / "best"  # weights of the evaluation that held-out judges liked best

    def result(self, config: CRDConfig) -> Path:
        """The trained weights: a LoRA file, or a folder with the whole backbone. They are there when the run is finished."""
        return self.path / (FULL if config.model.tuning == "full" else FILE_NAME)

    def finished(self, config: CRDConfig) -> Path:
        """:meth:`result`, if it is there; raises CRDError if it is not."""
        result = self.result(config)
        if not result.exists():
            raise CRDError(f"{self.path} is not finished: it has no {result.name}. Run `crd train` with its recipe again.")
        return result

    def open(self, config: CRDConfig, *, write: bool) -> None:
        """Makes the folder, or checks that it belongs to this configuration; raises CRDError otherwise."""
        if self.settings.exists():
            other = self.config()
            if changed := differences(other, config):
                raise CRDError(
                    f"{self.path} holds a run with other settings:\n  " + "\n  ".join(changed) + "\n"
                    "Give another output_dir, or the same settings to resume it."
                )
        elif self.path.exists() and self._is_foreign():
            raise CRDError(f"output_dir: {self.path} exists and is not the folder of a run. Give another output_dir.")
        if not write:
            return
        try:
            # the settings come first and by a rename: a folder with anything else in it always has them whole
            self.path.mkdir(parents=True, exist_ok=True)
            self._partial.write_text(dump_config(config))
            self._partial.replace(self.settings)
            self.pictures.mkdir(exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise CRDError(f"output_dir: {self.path} cannot be written: {error}. Give an output_dir that can be.") from error

    def _is_foreign(self) -> bool:
        """Whether something lies there that no run has left; a run killed at its very start leaves half its settings."""
        return not self.path.is_dir() or any(entry != self._partial for entry in self.path.iterdir())

    def config(self) -> CRDConfig:
        """The settings that the run was started with; raises CRDError if this is no run."""
        try:
            settings = yaml.safe_load(self.settings.read_text())
        except FileNotFoundError:
            raise CRDError(f"{self.path} is not the folder of a run: it has no config.yaml.") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise CRDError(f"{self.settings} cannot be read: {error}.") from error
        try:
            return build_config(settings)
        except CRDError as error:
            raise CRDError(f"{self.settings}: {error}") from None
