"""The files of a saved directory: their names, its ``config.json``, the place of its tokenizer, and the hub.

``config.json`` has a model type of this library, see ``auto``.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import UserError, in_one_line
from ..hub import CONFIG as CONFIG
from ..hub import SETTINGS as SETTINGS
from ..hub import read_json as read_json
from ..hub import require_hub_id
from .names import SAVE_FIRST

TENSORS, BASE = "inplace_ttt.safetensors", "base"
MODEL_TYPE, ARCHITECTURE = "inplace_ttt", "InPlaceTTTForCausalLM"
FETCHING = ("revision", "token", "cache_dir", "local_files_only", "force_download")
UPLOADING = ("repo_id", "token", "private", "commit_message", "revision", "create_pr")
LOAD_WHOLE = "this directory has fast weights: load it with inplace_ttt.from_pretrained"
"""Stored in a field that a model's own configuration class reads as a number, so that loading fails with this text."""


def read_settings(directory: Path) -> dict[str, Any]:
    """Read the settings of a directory of this library; UserError when they are missing or damaged."""
    path = directory / SETTINGS
    if not path.is_file():
        raise UserError(f"{directory} lacks {SETTINGS}: save or download the model again")
    settings = read_json(path)
    kinds = {"inplace_ttt": dict, "kind": str, "base": dict, "fingerprint": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(settings.get(key), kind)]:
        raise UserError(f"{path} is damaged (no {', '.join(wrong)}): save the model again")
    return settings


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


# -- on the hub --------------------------------------------------------------------------------------------------------


def take(kwargs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Take the keywords with these names out of ``kwargs``."""
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def fetch(directory: str | Path, subfolder: str = "", **hub: Any) -> Path:
    """Return the local directory of a model: ``directory`` itself, or a copy of that hub id; in it, ``subfolder``.

    ``hub``: the keywords in ``FETCHING``, as huggingface_hub has them. Raises UserError when there is none.
    """
    path = Path(directory).expanduser()
    if path.is_dir():
        if hub.get("revision") not in (None, "main"):
            raise UserError(f"{directory} is a local directory, which has no revision {hub['revision']!r}")
    else:
        require_hub_id(str(directory))
        from huggingface_hub import snapshot_download

        if subfolder:
            hub["allow_patterns"] = [f"{subfolder.strip('/')}/*"]
        try:
            path = Path(snapshot_download(str(directory), **hub))
        except Exception as error:
            raise UserError(
                f"{directory} is not a local directory and could not be fetched from the hub ({in_one_line(error)})"
            ) from None
    if not (path / subfolder).is_dir():
        raise UserError(f"{directory} has no directory {subfolder}")
    return path / subfolder


def upload(
    directory: Path, *, repo_id: str | None = None, token: Any = None, private: bool | None = None, **how: Any
) -> None:
    """Upload a directory to the hub; ``repo_id`` None: its own name. ``how``: further keywords of ``UPLOADING``."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id or directory.resolve().name, private=private, exist_ok=True).repo_id
    how["commit_message"] = how.get("commit_message") or "Upload model with fast weights"
    api.upload_folder(repo_id=repo, folder_path=directory, **how)
