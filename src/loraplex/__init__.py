"""Loraplex: many fine-tuned LoRA classifiers from one base model, in one call."""

from typing import TYPE_CHECKING

from loraplex.errors import ConfigurationError, LoraplexError, UnknownClassifierError
from loraplex.types import ClassifyRequest, ClassifyResult, Message, Verdict

if TYPE_CHECKING:
    from loraplex.inprocess import Loraplex

__all__ = [
    "ClassifyRequest",
    "ClassifyResult",
    "ConfigurationError",
    "Loraplex",
    "LoraplexError",
    "Message",
    "UnknownClassifierError",
    "Verdict",
    "__version__",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "Loraplex":  # imports torch, which `loraplex --help` and the types do without
        from loraplex.inprocess import Loraplex

        return Loraplex
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
