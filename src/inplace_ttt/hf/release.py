"""The authors' checkpoint format: the base model's own ``model_type`` with ``ttt_*`` fields and tensors."""

from pathlib import Path
from typing import Any

from torch import nn

from ..config import InPlaceTTTConfig
from ..errors import UserError
from .attach import plain_config, runtime_of, unwrap_to_save

FAMILIES = ("llama", "qwen3")
DEFAULTS = {"ttt_chunk": 8192, "ttt_lr": 0.3, "ttt_proj": True, "ttt_target": "hidden_states"}


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
    count = config["num_hidden_layers"]
    named = list(config.get("ttt_layers") or [])
    values = {k: config.get(k, default) for k, default in DEFAULTS.items()}
    return (
        InPlaceTTTConfig(
            layers=tuple(i for i in named if i < count),
            chunk_size=values["ttt_chunk"],
            lr=values["ttt_lr"],
            projection=values["ttt_proj"],
            target=values["ttt_target"],
        ),
        [i for i in named if i >= count],
    )


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
    fields = {
        "ttt_mode": True,
        "ttt_layers": [site.index for site in runtime.sites],
        "ttt_chunk": config.chunk_size,
        "ttt_lr": config.lr,
        "ttt_proj": config.projection,
        "ttt_target": config.target,
    }
    with plain_config(root):
        for name, value in fields.items():
            setattr(root.config, name, value)
        try:
            type(root).save_pretrained(root, directory, **kwargs)
        finally:
            for name in fields:
                delattr(root.config, name)
