"""The name by which other libraries load a model again: never that of the base alone.

trl makes reference models from ``config._name_or_path``, peft writes ``name_or_path`` into its adapters, and both would
get the plain base. So a loaded model has the name of its own directory (transformers' Auto classes load it whole, see
``auto``), and a model that was given fast weights in memory has the name of a directory that says so when it is loaded.
The base's own name is kept beside it, for adapters and for default tokenizers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

from transformers import PreTrainedModel

from ..errors import UserError

BASE_MODEL = "_inplace_ttt_base"
UNSAVED = Path(__file__).with_name("unsaved")
SAVE_FIRST = (
    "this model was given fast weights in memory, so its name cannot load it again: call inplace_ttt.save_pretrained and "
    "inplace_ttt.from_pretrained first, or pass the object that is wanted (a reference model, a tokenizer)"
)
_in_memory: "WeakSet[PreTrainedModel]" = WeakSet()


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
        _set_name(model, str(UNSAVED))
        _in_memory.add(model)


def rename_loaded(model: PreTrainedModel, name: str, base: BaseModel) -> None:
    """Give an attached model the name of the directory or hub id that holds it whole."""
    model.__dict__[BASE_MODEL] = base
    _set_name(model, name)
    _in_memory.discard(model)


def rename_detached(model: PreTrainedModel) -> None:
    """Give a model that is plain again its base's name."""
    base: BaseModel = model.__dict__.pop(BASE_MODEL)
    _set_name(model, base.place or base.name)
    _in_memory.discard(model)


def base_in_memory() -> str:
    """The name of the base of the models that were attached in memory. Raises UserError unless it is one name."""
    names = {base_of(model).name for model in _in_memory}
    if len(names) != 1:
        raise UserError(SAVE_FIRST)
    return names.pop()


def _base_by_config(model: PreTrainedModel) -> BaseModel:
    return BaseModel(model.config._name_or_path or "", getattr(model.config, "_commit_hash", None))


def _set_name(model: Any, name: str) -> None:
    model.config._name_or_path = name
    model.name_or_path = name
