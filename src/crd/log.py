"""The package's logger, and the record of a run: one JSON object a line."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from crd.errors import CRDError

logger = logging.getLogger("crd")


class Record:
    """Append-only ``*.jsonl``; on resume it is cut back to the length that the checkpoint remembers."""

    def __init__(self, path: Path, length: int = 0):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if file.tell() < length:  # truncating would fill it up with zero bytes
                raise CRDError(
                    f"{path} has {file.tell()} bytes, but had {length} when the newest checkpoint was written. "
                    "Put the lost rows back, or give another output_dir."
                )
            file.truncate(length)

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def length(self) -> int:
        """Bytes on disk, after making sure that they are there."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)


def read_record(path: Path) -> list[dict[str, Any]]:
    """All complete rows of a record; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except json.JSONDecodeError as error:
        raise CRDError(f"{path} is damaged: {error}: {error.doc!r}. Remove this row.") from error
