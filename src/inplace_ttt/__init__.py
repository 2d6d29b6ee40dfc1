"""In-Place Test-Time Training for Hugging Face causal language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config import InPlaceTTTConfig
    from .core import Rule, Target, register_rule, register_target
    from .errors import UserError
    from .hf.attach import (
        attach,
        configure,
        detach,
        fast_settings,
        inspect,
        is_attached,
        is_trained,
        layers_off,
        set_lr,
        updates_off,
    )
    from .hf.cache import detach_cache
    from .hf.checkpoint import from_pretrained, save_pretrained
    from .hf.context import fast_weights
    from .hf.graph import DecodingGraph
    from .hf.release import save_release
    from .session import Session, SessionPool
    from .shipped import DEFAULT_MODEL

__all__ = [
    "DEFAULT_MODEL",
    "DecodingGraph",
    "InPlaceTTTConfig",
    "Rule",
    "Session",
    "SessionPool",
    "Target",
    "UserError",
    "__version__",
    "attach",
    "configure",
    "detach",
    "detach_cache",
    "fast_settings",
    "fast_weights",
    "from_pretrained",
    "inspect",
    "is_attached",
    "is_trained",
    "layers_off",
    "register_rule",
    "register_target",
    "save_pretrained",
    "save_release",
    "set_lr",
    "updates_off",
]

_HOMES = {
    "DEFAULT_MODEL": "shipped",
    "InPlaceTTTConfig": "config",
    "UserError": "errors",
    **dict.fromkeys(
        (
            "attach",
            "configure",
            "detach",
            "fast_settings",
            "inspect",
            "is_attached",
            "is_trained",
            "layers_off",
            "set_lr",
            "updates_off",
        ),
        "hf.attach",
    ),
    **dict.fromkeys(("Rule", "Target", "register_rule", "register_target"), "core"),
    **dict.fromkeys(("from_pretrained", "save_pretrained"), "hf.checkpoint"),
    "DecodingGraph": "hf.graph",
    "detach_cache": "hf.cache",
    "fast_weights": "hf.context",
    "save_release": "hf.release",
    **dict.fromkeys(("Session", "SessionPool"), "session"),
}


def __getattr__(name: str) -> Any:
    """Load public names on first use, so that ``import inplace_ttt`` and the command line do not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
