"""Find out which modules of a model adapt, from its configuration alone: no weights are loaded."""

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from ..config import InPlaceTTTConfig
from ..core import make_target
from ..errors import UserError
from ..hf.attach import LayerInfo, adapting_layers, install, is_trained
from ..hf.auto import base_config
from ..hf.checkpoint import is_added
from ..hub import check_model


@dataclass(frozen=True)
class Preview:
    """``attached``: whether the model has fast weights, or this is what attaching would do. Bytes are per row.

    ``untrained``: whether nothing changes while it reads; False too where that cannot be seen without the weights.
    """

    model: str
    model_type: str
    attached: bool
    untrained: bool
    settings: InPlaceTTTConfig
    decoder_layers: int
    base_parameters: int
    layers: list[LayerInfo]
    pending_bytes: int

    @property
    def extra_parameters(self) -> int:
        return sum(layer.extra_parameters for layer in self.layers)

    @property
    def state_bytes(self) -> int:
        return sum(layer.state_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        totals = {"extra_parameters": self.extra_parameters, "state_bytes": self.state_bytes}
        return {**asdict(self), "settings": self.settings.to_dict(), **totals}


def preview(model: str, settings: dict[str, Any]) -> Preview:
    """Of a directory or hub id; ``settings`` are InPlaceTTTConfig's, for a plain model.

    UserError when there is no such model, it cannot adapt, or it has fast weights already and settings are given.
    """
    base, config = _stored(model)
    attached = config is not None
    if attached and settings:
        names = ", ".join(settings)
        raise UserError(f"{model} has fast weights with settings of its own: {names} can only be set for a plain model")
    config = config or InPlaceTTTConfig(**settings)
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(base)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise UserError(f"{model} is not a causal language model: {str(error).splitlines()[0][:200]}") from None
    parameters = sum(p.numel() for p in empty.parameters())
    install(empty, config)
    layers = adapting_layers(empty)
    narrow = make_target(config.objective, 1, config.objective_options, {**config.settings, "init_std": 0.02})
    width = next(empty.parameters()).element_size()
    return Preview(
        model=model,
        model_type=base.model_type,
        attached=attached,
        untrained=not _is_trained(model, empty) if attached else not narrow.is_trained,
        settings=config,
        decoder_layers=base.get_text_config().num_hidden_layers,
        base_parameters=parameters,
        layers=layers,
        pending_bytes=sum(sum(layer.shape) for layer in layers) * config.chunk_size * width,
    )


def _is_trained(model: str, empty: Any) -> bool:
    """Tell whether the targets' parameters in a directory write anything; True where it has none to look at."""
    for file in Path(model).expanduser().glob("*.safetensors"):
        with suppress(SafetensorError, RuntimeError), safe_open(file, "pt") as tensors:
            added = {name: tensors.get_tensor(name) for name in tensors.keys() if is_added(name)}  # noqa: SIM118
            empty.load_state_dict(added, strict=False, assign=True)
    return is_trained(empty)


def _stored(model: str) -> tuple[Any, InPlaceTTTConfig | None]:
    """The base model's configuration, and the settings of fast weights stored with it."""
    check_model(model)
    if Path(model).suffix == ".gguf":
        try:
            return AutoConfig.from_pretrained(Path(model).parent, gguf_file=Path(model).name), None
        except Exception as error:  # of whatever kind: the file is damaged, or of a model that transformers lacks
            raise UserError(f"{model} cannot be read: {str(error).splitlines()[0][:200]}") from None
    return base_config(model)
