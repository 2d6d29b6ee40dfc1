"""Models with decoder layers below the base model: a language model beside a vision tower."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .context import Runtime
from .sites import CONTEXT

_HUB = ("gguf_file", "revision", "token", "subfolder", "cache_dir", "local_files_only", "trust_remote_code")


def auto_class(path: Path | str, kwargs: dict[str, Any], model_type: str | None = None) -> Any:
    """Return transformers' auto class for a checkpoint: with its other modalities if it was saved with them.

    ``model_type``: of the requested model; a text model inside another type of model is loaded alone. ``kwargs``: those
    for ``from_pretrained``. Raises the errors of ``AutoConfig.from_pretrained``.
    """
    config: Any = kwargs.get("config")
    if not hasattr(config, "model_type"):
        config = AutoConfig.from_pretrained(path, **{k: v for k, v in kwargs.items() if k in _HUB})
    saved = (getattr(config, "architectures", None) or [None])[0]
    several = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    if several is not None and several == saved and model_type in (None, config.model_type):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


class NestedText:
    """A pair of hooks that pass a call's context to the language model inside a model of several modalities.

    The whole model sees the caller's mask, positions and cache; the language model sees the embeddings that it reads,
    in which image features replace placeholder tokens. The vision tower does not see the context.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the context without passing it as a keyword argument."""
        args, kwargs = self.runtime.before_model(module, args, kwargs)
        return args, {k: v for k, v in kwargs.items() if k != CONTEXT}

    def before_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pass the context of the call that is running, with the embeddings that the language model reads."""
        context = self.runtime.current
        if context is None:
            return None
        if kwargs.get("inputs_embeds") is not None:
            context.embeddings = kwargs["inputs_embeds"]
        return args, {**kwargs, CONTEXT: context}
