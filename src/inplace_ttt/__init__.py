"""In-Place Test-Time Training for Hugging Face causal language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config import InPlaceTTTConfig
    from .core import Rule, Target, register_rule, register_target
    from .errors import UserError
    from .hf.attach import (
        adapting_layers,
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
    from .hf.parallel import enable_context_parallel
    from .hf.release import save_release
    from .hf.sharding import Meshes, load_sharded, make_meshes, save_sharded, shard_layers
    from .session import Session, SessionPool
    from .shipped import DEFAULT_MODEL

__all__ = [
    "DEFAULT_MODEL", "DecodingGraph", "InPlaceTTTConfig", "Meshes", "Rule", "Session", "SessionPool", "Target",
    "UserError", "__version__", "adapting_layers", "attach", "configure", "detach", "detach_cache",
    "enable_context_parallel", "fast_settings", "fast_weights", "from_pretrained", "inspect", "is_attached",
    "is_trained", "layers_off", "load_sharded", "make_meshes", "register_rule", "register_target", "save_pretrained",
    "save_release", "save_sharded", "set_lr", "shard_layers", "updates_off",
]  # fmt: skip

_HOMES = {
    "config": {"InPlaceTTTConfig"},
    "core": {"Rule", "Target", "register_rule", "register_target"},
    "errors": {"UserError"},
    "hf.attach": {"adapting_layers", "attach", "configure", "detach", "fast_settings", "inspect", "is_attached"}
    | {"is_trained", "layers_off", "set_lr", "updates_off"},
    "hf.cache": {"detach_cache"},
    "hf.checkpoint": {"from_pretrained", "save_pretrained"},
    "hf.context": {"fast_weights"},
    "hf.graph": {"DecodingGraph"},
    "hf.parallel": {"enable_context_parallel"},
    "hf.release": {"save_release"},
    "hf.sharding": {"Meshes", "load_sharded", "make_meshes", "save_sharded", "shard_layers"},
    "session": {"Session", "SessionPool"},
    "shipped": {"DEFAULT_MODEL"},
}


def __getattr__(name: str) -> Any:
    """Load public names on first use, so that ``import inplace_ttt`` and the command line do not wait for torch."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
