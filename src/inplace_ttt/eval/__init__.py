"""Evaluation of a model on held-out documents. Public names load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .nll import token_losses
    from .runner import Variant, run
    from .suites import Unit

__all__ = ["Unit", "Variant", "run", "token_losses"]


def __getattr__(name: str) -> Any:
    home = {"Unit": "suites", "Variant": "runner", "run": "runner", "token_losses": "nll"}.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)
