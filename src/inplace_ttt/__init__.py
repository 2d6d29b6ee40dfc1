"""In-Place Test-Time Training for Hugging Face causal language models."""

from .config import InPlaceTTTConfig
from .errors import UserError
from .hf.attach import attach, detach, inspect, is_attached, set_lr, updates_off
from .hf.checkpoint import from_pretrained, save_pretrained
from .hf.context import fast_weights
from .hf.release import save_release

__all__ = [
    "InPlaceTTTConfig",
    "UserError",
    "attach",
    "detach",
    "fast_weights",
    "from_pretrained",
    "inspect",
    "is_attached",
    "save_pretrained",
    "save_release",
    "set_lr",
    "updates_off",
]
