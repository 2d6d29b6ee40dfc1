"""The files of a saved directory: their names, its ``config.json``, and the place of its tokenizer.

``config.json`` has a model type of this library, see ``auto``.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import UserError
from .names import SAVE_FIRST

SETTINGS, TENSORS, BASE = "inplace_ttt.json", "inplace_ttt.safetensors", "base"
MODEL_TYPE, ARCHITECTURE, CONFIG = "inplace_ttt", "InPlaceTTTForCausalLM", "config.json"
LOAD_WHOLE = "this directory has fast weights: load it with inplace_ttt.from_pretrained"
"""Stored in a field that a model's own configuration class reads as a number, so that loading fails with this text."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; UserError when it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): save the model again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged (it holds a {type(values).__name__}): save the model again")
    return values


def check_free(directory: Path) -> None:
    """Raise UserError if a directory has a plain model's ``config.json`` (the base's own?), to not overwrite it."""
    if (directory / CONFIG).is_file() and read_json(directory / CONFIG).get("model_type") != MODEL_TYPE:
        raise UserError(f"{directory} holds another model: choose another directory")


def write_config(directory: Path, **values: Any) -> None:
    """Write the ``config.json`` of a directory of this library."""
    text = json.dumps({"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], **values}, indent=2) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")


def mark_config(directory: Path) -> None:
    """Give the ``config.json`` that transformers wrote of an attached model this library's model type.

    A model type from outside transformers (remote code) is kept: only its own files can read it.
    """
    values = read_json(directory / CONFIG)
    if "inplace_ttt" in values and values.get("model_type") in CONFIG_MAPPING and "base_config" not in values:
        kept: dict[str, Any] = {name: values[name] for name in ("transformers_version", "dtype") if name in values}
        settings, kind = values.pop("inplace_ttt"), values.pop("model_type")
        kept |= {"inplace_ttt": settings, "base_model_type": kind, "base_config": values}
        write_config(directory, hidden_size=LOAD_WHOLE, **kept)


def split_config(values: dict[str, Any], path: Path) -> tuple[PretrainedConfig, dict[str, Any] | None]:
    """Split a ``config.json``, old or new form, into the base's configuration and the fast weights' settings."""
    if values.get("unsaved"):
        raise UserError(SAVE_FIRST)
    values = dict(values)
    settings = values.pop("inplace_ttt", None)
    if values.get("model_type") == MODEL_TYPE:
        values = {**(values.get("base_config") or {}), "model_type": values.get("base_model_type")}
    kind = str(values.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise UserError(f"{path} names the model type {kind!r}, which this version of transformers does not have")
    config: PretrainedConfig = CONFIG_MAPPING[kind].from_dict(values)
    return config, settings


def tokenizer_places(directory: str | Path) -> list[tuple[str, dict[str, str]]]:
    """List the places of a tokenizer of a directory or hub id, each with revision and subfolder on the hub."""
    path = Path(directory).expanduser()
    places: list[tuple[str, dict[str, str]]] = [(str(path if path.is_dir() else directory), {})]
    if (path / BASE).is_dir():
        places.append((str(path / BASE), {}))
    base = read_json(path / SETTINGS).get("base") if (path / SETTINGS).is_file() else None
    if isinstance(base, dict) and base.get("name"):
        places.append(
            (place_of_base(path, base), {key: base[key] for key in ("revision", "subfolder") if base.get(key)})
        )
    return places


def place_of_base(path: Path, base: dict[str, Any]) -> str:
    """Return the name of an adapter's base; relative paths start at the current directory or at the adapter's."""
    name = str(base["name"])
    return name if Path(name).is_dir() or not (path / name).is_dir() else str(path / name)


def find_tokenizer(*paths: str | Path) -> tuple[Any, str]:
    """Load the tokenizer of the first of these directories or hub ids with one; without any: None and the reason."""
    reason = "no tokenizer files"
    for place, where in (place for path in paths for place in tokenizer_places(path)):
        if not Path(place).is_dir() or any(Path(place).glob("tokenizer*")):
            try:
                return AutoTokenizer.from_pretrained(place, **where), ""
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
    return None, reason
