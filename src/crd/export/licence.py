"""The licence of the base model, which goes with whatever was trained from it."""

from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from crd.export.base_model import base_file, hub_id

#: keys by which a model card on the hub states its licence
KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Licence:
    """``front_matter`` for the model card's head, and a sentence for its readers."""

    front_matter: dict[str, Any]
    sentence: str


def base_licence(path: str) -> Licence:
    """The licence that the base model's card states; "other" if it states none or cannot be had."""
    if path == "nano":  # its card is text without a head
        return Licence({"license": "apache-2.0"}, "The base model's licence is apache-2.0.")
    stated = _head(path)
    if not stated.get("license"):
        unknown = {"license": "other", "license_name": "licence-of-the-base-model"}
        return Licence(unknown, "The licence of the base model applies; it was not found in a model card of the base.")
    front_matter = {key: stated[key] for key in KEYS if stated.get(key)}
    link = str(front_matter.get("license_link", ""))
    if link and "://" not in link:  # a file of the base's repository; of a folder nobody else has it
        del front_matter["license_link"]
        if hub_id(path):
            front_matter["license_link"] = f"https://huggingface.co/{path}/blob/main/{link}"
    name = front_matter.get("license_name", front_matter["license"])
    name = ", ".join(map(str, name)) if isinstance(name, list) else name
    where = f" ({front_matter['license_link']})" if "license_link" in front_matter else ""
    return Licence(front_matter, f"The base model's licence applies: {name}{where}.")


def _head(path: str) -> dict[str, Any]:
    card = base_file(path, "README.md")
    try:
        return (metadata_load(card) if card else None) or {}
    except (OSError, ValueError, yaml.YAMLError):  # a damaged card states nothing
        return {}
