"""The name by which other libraries load a model again: never that of the base alone.

trl makes reference models from ``config._name_or_path``, peft writes ``name_or_path`` into its adapters, and both would
get the plain base. So a loaded model has the name of its own directory (transformers' Auto classes load it whole, see
``auto``), and a model that was given fast weights in memory has the name of a directory that says so when it is loaded.
The base's own name is kept beside it, for adapters and for default tokenizers.
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
"""Bases of models that were attached in memory. UNSAVED/./. (so many dots) is the name of those on the second one."""


@dataclass(frozen=True)
class BaseModel:
    """Where the plain base model is: a directory or hub id, and on the hub its revision and subfolder."""

    name: str = ""
    revision: str | None = None
    subfolder: str = ""
    place: str = ""
    """A directory that holds the same, if it is known."""


def base_of(model: PreTrainedModel) -> BaseModel:
    """The base of an attached model; of another one, what its configuration says."""
    found: BaseModel | None = model.__dict__.get(BASE_MODEL)
    return _base_by_config(model) if found is None else found


def rename_attached(model: PreTrainedModel) -> None:
    """Take the base's name away from a model that was just attached in memory (no name, no change)."""
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
    """Say that a loaded model's base is where this is, and not in the directory that it was loaded from."""
    model.__dict__[BASE_MODEL] = base


def rename_detached(model: PreTrainedModel) -> None:
    """Give a model that is plain again its base's name."""
    base: BaseModel = model.__dict__.pop(BASE_MODEL)
    _set_name(model, base.place or base.name)


def base_in_memory(name: str) -> str:
    """The base of a model that has this name since it was attached. Raises UserError in another process."""
    index = name.count("/.") - 1
    if not 0 <= index < len(_bases):
        raise UserError(SAVE_FIRST)
    return _bases[index]


def _base_by_config(model: PreTrainedModel) -> BaseModel:
    return BaseModel(model.config._name_or_path or "", getattr(model.config, "_commit_hash", None))


def _set_name(model: Any, name: str) -> None:
    model.config._name_or_path = name
    model.name_or_path = name
