"""Reinforcement learning of plain and attached models: the Optimal Token Baseline, as functions and as a TRL trainer.

`inplace_ttt.rl.baselines` needs torch alone. ``OTBTrainer`` and ``OTBConfig`` need trl (``pip install -e
'.[rl]'`` in a clone) and load on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import OTBConfig
    from .trainer import OTBTrainer

__all__ = ["OTBConfig", "OTBTrainer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .config import OTBConfig  # first: its error names the missing trl

    if name == "OTBConfig":
        return OTBConfig
    from .trainer import OTBTrainer

    return OTBTrainer
