"""Centered Reward Distillation: fine-tune diffusion and flow models with rewards.

    from crd import CRDConfig, CRDTrainer

Heavy imports happen on first use, so that ``crd --help`` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crd.config import CRDConfig
    from crd.errors import CRDError
    from crd.trainer import CRDTrainer

__all__ = ["CRDConfig", "CRDError", "CRDTrainer"]
__version__ = "0.1.0"

_HOMES = {"CRDConfig": "crd.config", "CRDError": "crd.errors", "CRDTrainer": "crd.trainer"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return vars(import_module(_HOMES[name]))[name]
    raise AttributeError(f"module 'crd' has no attribute {name!r}")
