"""A model's name, by which other libraries load it again: never that of the base alone.

trl makes reference models from ``config._name_or_path``, peft writes ``name_or_path`` into its adapters, and both would
load the plain base. So a loaded model has the name of its own directory (transformers' Auto classes load it whole, see
``auto``), and a model attached in memory has the name of a directory whose loading fails with an explanation. The
base's own name is kept beside it, for adapters and for default tokenizers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..errors import UserError

BASE_MODEL = "_inplace_ttt_base"
UNSAVED = Path(__file__).with_name("unsaved")
SAVE_FIRST = (
    "this model was given fast weights in memory, so its name cannot load it again: call inplace_ttt.save_pretrained "
    "and inplace_ttt.from_pretrained first, or pass the object that is wanted (a reference model, a tokenizer)"
)
_bases: list[str] = []
"""Bases of models that were attached in memory. UNSAVED/./. (number of dots) names models on the second one."""


@dataclass(frozen=True)
class BaseModel:
    """A reference to the plain base model: a directory or hub id, and on the hub its revision and subfolder."""

    name: str = ""
    revision: str | None = None
    subfolder: str = ""
    place: str = ""
    """A directory with the same model, if known."""


def base_of(model: PreTrainedModel) -> BaseModel:
    """Return the base of an attached model; of another model, that of its configuration."""
    found: BaseModel | None = model.__dict__.get(BASE_MODEL)
    return _base_by_config(model) if found is None else found


def rename_attached(model: PreTrainedModel) -> None:
    """Replace the base's name of a model that was just attached in memory (no name: no change)."""
    base = _base_by_config(model)
    model.__dict__[BASE_MODEL] = base
    if base.name:
        if base.name not in _bases:
            _bases.append(base.name)
        _set_name(model, str(UNSAVED) + "/." * (_bases.index(base.name) + 1))


def rename_loaded(model: PreTrainedModel, name: str, base: BaseModel) -> None:
    """Give an attached model the name of the directory or hub id that holds it whole."""
    model.__dict__[BASE_MODEL] = base
    _set_name(model, name)


def keep_base(model: PreTrainedModel, base: BaseModel) -> None:
    """Set a loaded model's base to this one, in place of the directory that the model was loaded from."""
    model.__dict__[BASE_MODEL] = base


def rename_detached(model: PreTrainedModel) -> None:
    base: BaseModel = model.__dict__.pop(BASE_MODEL)
    _set_name(model, base.place or base.name)


def base_in_memory(name: str) -> str:
    """Return the base of a model that got this name from ``attach``. Raises UserError in another process."""
    index = name.count("/.") - 1
    if not 0 <= index < len(_bases):
        raise UserError(SAVE_FIRST)
    return _bases[index]


def _base_by_config(model: PreTrainedModel) -> BaseModel:
    return BaseModel(model.config._name_or_path or "", getattr(model.config, "_commit_hash", None))


def _set_name(model: Any, name: str) -> None:
    model.config._name_or_path = name
    model.name_or_path = name
