"""The package's logger, and the record of a run: one JSON object a line."""

import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger("crd")


class Record:
    """Append-only ``*.jsonl``; on resume it is cut back to the length that the checkpoint remembers."""

    def __init__(self, path: Path, length: int = 0):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
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
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
