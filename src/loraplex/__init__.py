"""Loraplex serves many fine-tuned LoRA classifiers from one base model, in one call."""

import importlib
from typing import TYPE_CHECKING

from loraplex.errors import ConfigurationError, LoraplexError, UnknownClassifierError
from loraplex.types import ClassifyRequest, ClassifyResult, Message, Question, Verdict

if TYPE_CHECKING:
    from loraplex.client import AsyncClient, Client
    from loraplex.inprocess import Loraplex

__all__ = [
    "AsyncClient",
    "ClassifyRequest",
    "ClassifyResult",
    "Client",
    "ConfigurationError",
    "Loraplex",
    "LoraplexError",
    "Message",
    "Question",
    "UnknownClassifierError",
    "Verdict",
    "__version__",
]
__version__ = "0.1.0"
# Imported on first use: these import torch or httpx, which `loraplex --help` and the types do not need.
_LATE = {"AsyncClient": "loraplex.client", "Client": "loraplex.client", "Loraplex": "loraplex.inprocess"}


def __getattr__(name: str) -> object:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
