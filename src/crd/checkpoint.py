"""Everything that has state, written atomically: a kill at any moment leaves a loadable checkpoint.

A checkpoint is a folder ``step-000010`` with ``state.safetensors`` and ``state.json``. It is written
under another name, flushed to disk and renamed; a name that starts with ``step-`` is complete.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crd.errors import CRDError

FORMAT = 1


def save(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], keep: int) -> Path:
    """Writes ``folder/step-NNNNNN`` and removes all but the newest ``keep``; raises CRDError if the disk refuses."""
    final, partial = folder / f"step-{step:06d}", folder / f"partial-{step:06d}"
    if final.exists():  # of the same run at the same step: the same state
        return final
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, partial / "state.safetensors")
        facts = {"format": FORMAT, "step": step, **facts}
        facts["digest"] = _digest(partial / "state.safetensors", facts)
        (partial / "state.json").write_text(json.dumps(facts, indent=1))
        for path in (*partial.iterdir(), partial):
            _flush(path)
        partial.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CRDError(
            f"the checkpoint {final} cannot be written: {error}. Earlier checkpoints are untouched; "
            "free some disk space or mend the permissions, then run the same command again."
        ) from error
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of one checkpoint; raises CRDError if it is damaged or of another make."""
    hint = f"Remove {path} to go on from the one before it (or from the beginning)."
    try:
        facts = json.loads((path / "state.json").read_text())
        if facts["format"] != FORMAT:
            raise CRDError(
                f"the checkpoint {path} has format {facts['format']}, this version of crd reads {FORMAT}. "
                "Go on with the version that wrote it, or give another output_dir."
            )
        if facts.pop("digest") != _digest(path / "state.safetensors", facts):
            raise CRDError(f"the checkpoint {path} is damaged: its checksum does not match. {hint}")
        return load_file(path / "state.safetensors"), facts
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CRDError(f"the checkpoint {path} cannot be read: {type(error).__name__}: {error}. {hint}") from error


def _digest(path: Path, facts: dict[str, Any]) -> str:
    """Of the facts and the file of tensors together."""
    begun = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode())
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: begun).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
