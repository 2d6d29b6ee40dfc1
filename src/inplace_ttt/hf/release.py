"""The authors' checkpoint format: the base model's own ``model_type`` with ``ttt_*`` fields and tensors."""

from pathlib import Path
from typing import Any

from torch import nn

from ..config import InPlaceTTTConfig
from ..errors import UserError
from .attach import plain_config, runtime_of, unwrap_to_save

FAMILIES = ("llama", "qwen3")
FIELDS: dict[str, tuple[str, Any]] = {
    "ttt_chunk": ("chunk_size", 8192),
    "ttt_lr": ("lr", 0.3),
    "ttt_proj": ("projection", True),
    "ttt_target": ("target", "hidden_states"),
}
"""Name of a field in the format -> the setting, and its default there."""


def is_release(config: dict[str, Any]) -> bool:
    """Tell if a ``config.json`` is in the authors' format."""
    return "ttt_layers" in config or "ttt_mode" in config


def load_release(config: dict[str, Any]) -> tuple[InPlaceTTTConfig, list[int]]:
    """Return settings from a ``config.json`` in the authors' format, and the layers it names that do not exist.

    The release ignores such layers silently; its own recipes name one.
    """
    if config["model_type"] not in FAMILIES:
        raise UserError(f"the authors' format exists for {' and '.join(FAMILIES)}, not for {config['model_type']}")
    if not config.get("ttt_mode", True):
        raise UserError("this checkpoint has ttt_mode false: it is the plain model, load it with transformers")
    count, named = config["num_hidden_layers"], list(config.get("ttt_layers") or [])
    values = {setting: config.get(field, default) for field, (setting, default) in FIELDS.items()}
    there, dropped = tuple(i for i in named if i < count), [i for i in named if i >= count]
    return InPlaceTTTConfig(layers=there, **values), dropped


def save_release(model: nn.Module, directory: str | Path, **kwargs: Any) -> None:
    """Write an attached model in the authors' format.

    Raises UserError for settings that the format lacks: another family, other taps, a fixed objective, decay, clipping.
    Keywords go to transformers' ``save_pretrained``.
    """
    root, runtime = unwrap_to_save(model), runtime_of(model)
    config = runtime.config
    if root.config.model_type not in FAMILIES:
        raise UserError(f"the authors' format exists for {' and '.join(FAMILIES)}, not for {root.config.model_type}")
    default = InPlaceTTTConfig()
    for name in ("conv_kernel", "lookahead", "objective", "decay", "clip"):
        if getattr(config, name) != getattr(default, name):
            raise UserError(f"the authors' format cannot express {name}={getattr(config, name)!r}")
    fields: dict[str, Any] = {"ttt_mode": True, "ttt_layers": [site.index for site in runtime.sites]}
    fields |= {field: getattr(config, setting) for field, (setting, _) in FIELDS.items()}
    with plain_config(root):
        for name, value in fields.items():
            setattr(root.config, name, value)
        try:
            type(root).save_pretrained(root, directory, **kwargs)
        finally:
            for name in fields:
                delattr(root.config, name)
