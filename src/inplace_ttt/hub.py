"""Hugging Face datasets, named alike for training and evaluation: ``hf:PLACE?setting=value&...``.

PLACE is a dataset's id on the hub, a folder of data files, or a folder that ``save_to_disk`` wrote. Settings:

* ``split`` (train; evaluation: test), ``name`` (the configuration), ``revision``: as ``datasets.load_dataset`` has
  them;
* ``text`` (text): the column of the documents; ``id`` (none; evaluation: id): a column that names them (else their
  number);
* ``streaming`` (true): false downloads all of it first.

Also checks of models and of session files before anything loads: nothing here imports torch or transformers.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from .errors import SourceError, UserError, in_one_line
from .shipped import SHIPPED

PREFIX = "hf:"


@dataclass(frozen=True, slots=True)
class HubDataset:
    """The dataset that ``spec`` names: where it is, and all settings."""

    spec: str
    place: str
    _: KW_ONLY
    split: str
    name: str = ""
    revision: str = ""
    text: str = "text"
    id: str = ""
    streaming: str = "true"

    @property
    def folder(self) -> Path:
        """Return PLACE as a folder; it does not exist for a dataset of the hub."""
        return Path(self.place).expanduser()

    def files(self) -> list[Path]:
        """Return the files of a local dataset, sorted; none for one on the hub."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file()) if self.folder.is_dir() else []

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows in the order of the dataset, each with a string in the column ``text``.

        Raises SourceError where the dataset, its split or its column is missing.
        """
        number = 0
        try:
            for number, row in enumerate(self._open(), 1):
                if not isinstance(row.get(self.text), str):
                    has = f"holds {type(row[self.text]).__name__}" if self.text in row else f"has {', '.join(row)}"
                    raise SourceError(f"{self.spec}, row {number}: no text in column {self.text!r} (it {has})")
                yield row
        except SourceError:
            raise
        except Exception as error:  # of many kinds: the network's, parsers', pyarrow's, the library's own
            reason = f"{type(error).__name__}: {in_one_line(error)}"
            raise SourceError(f"{self.spec}, after row {number}: {reason}") from None

    def _open(self) -> Iterable[dict[str, Any]]:
        import datasets

        datasets.utils.logging.disable_progress_bar()
        if any((self.folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(str(self.folder))
            if not isinstance(saved, datasets.DatasetDict):
                return saved  # type: ignore[no-any-return]
            if self.split not in saved:
                raise SourceError(f"{self.spec}: there is no split {self.split!r}, only {', '.join(saved)}")
            return saved[self.split]  # type: ignore[no-any-return]
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(
            str(self.folder) if self.folder.is_dir() else self.place,
            self.name or None,
            split=self.split,
            revision=self.revision or None,
            streaming=self.streaming == "true",
        )
        return rows


OPTIONS = tuple(field.name for field in fields(HubDataset) if field.kw_only)


def hub_dataset(spec: str, **defaults: str) -> HubDataset:
    """Return the dataset ``spec``, with ``defaults`` (a split at least) for what it leaves out. Reads nothing.

    Raises SourceError for an invalid spelling, an unknown setting, a missing folder, or a missing datasets library.
    """
    place, _, query = spec.removeprefix(PREFIX).partition("?")
    try:  # a + is literal, not a space: train+test, C++
        given = dict(parse_qsl(query.replace("+", "%2B"), keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise SourceError(f"{spec}: write settings as ?split=train&text=content") from None
    for setting in given:
        if setting not in OPTIONS:
            raise SourceError(f"{spec}: no setting {setting!r}, only {', '.join(OPTIONS)}")
    dataset = HubDataset(spec, place, **(defaults | given))
    if dataset.streaming not in ("true", "false"):
        raise SourceError(f"{spec}: streaming is true or false, not {dataset.streaming!r}")
    on_hub = not dataset.folder.is_dir()
    if not place or (on_hub and (":" in place or "@" in place)):  # as in hf:NAME@CONFIG:SPLIT, an old spelling
        raise SourceError(f"{spec}: no such dataset, write hf:DATASET?name=CONFIG&split=SPLIT&text=COLUMN")
    if on_hub and (place.startswith((".", "/", "~")) or place.count("/") > 1):
        raise SourceError(f"{spec}: there is no directory {place}")
    if find_spec("datasets") is None:
        raise SourceError(f"{spec}: needs the datasets library: pip install datasets")
    return dataset


# -- models ------------------------------------------------------------------------------------------------------------

SETTINGS, CONFIG = "inplace_ttt.json", "config.json"
"""Files of a saved model: this library's, and transformers'."""


def check_model(name: str | Path) -> None:
    """Raise UserError where no model can be: here no such directory or GGUF file, and no id of the hub either.

    The configuration in a directory must be readable; only transformers knows whether it has that model type.
    """
    folder = Path(name).expanduser()
    if name == SHIPPED:
        return
    if folder.is_dir():
        file = next((folder / file for file in (SETTINGS, CONFIG) if (folder / file).is_file()), None)
        if file is None:
            raise UserError(f"{folder} holds no model: it has neither {SETTINGS} nor {CONFIG}")
        if "model_type" not in read_json(file) and file.name == CONFIG:
            raise UserError(f"{file} names no model_type: save the model again with save_pretrained")
    elif folder.suffix == ".gguf":
        check_gguf(name)
    else:
        require_hub_id(str(name))


def require_hub_id(name: str) -> None:
    """Raise UserError unless a name that is not a directory here can be a hub id (OWNER/NAME)."""
    if Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"no model directory at {name}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; UserError when it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): save the model again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged (it holds a {type(values).__name__}): save the model again")
    return values


def check_conversion(source: Path, out: Path, base: str | None, config: Path | None) -> tuple[Path, Path] | None:
    """Raise UserError where ``hf.convert.convert`` could not begin.

    Of a sharded checkpoint: returns its directory, ``source`` itself or one inside it, and where the configuration of
    its model is.
    """
    if out.exists():
        raise UserError(f"{out} exists already: choose another directory")
    for name in (base, config):
        if name is not None:
            check_model(name)
    found = [source, source / "sharded", *sorted(source.glob("pytorch_model_fsdp_*"))]
    shards = next((path for path in found if (path / ".metadata").is_file()), None)
    if shards is None:
        check_model(source)
        return None
    places = [config] if config is not None else [shards, shards.parent]
    place = next((x for x in places if (x / SETTINGS).is_file() or (x / CONFIG).is_file()), None)
    if place is None:
        raise UserError(f"{shards} holds tensors only: name a saved model of the same shape with --config")
    return shards, place


def check_gguf(file: str | Path) -> None:
    """Raise UserError when there is no such file, it is of another kind, or the package that reads it is missing."""
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file")
    with open(file, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise UserError(f"{file} is not a GGUF file: its first bytes are others")
    if find_spec("gguf") is None:
        raise UserError("reading a GGUF file needs the package gguf: pip install gguf")


# -- session files -----------------------------------------------------------------------------------------------------

SESSION, SESSION_VERSION = "inplace_ttt_session", 2
_READABLE = (1, 2)


def session_header(path: str | Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the metadata of a session file and the header in it; no tensor is read.

    Raises UserError, with the reason, for another file and for a version that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a session file")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    reason = f"{path} is not a complete session file (cut off, damaged, or of another kind"
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise UserError(f"{reason}: its header is cut off)")
            metadata: dict[str, str] = json.loads(file.read(size)).get("__metadata__") or {}
        if metadata.get("format") != SESSION:
            raise UserError(f"{path} is not a session file: it is a safetensors file of something else")
        version = metadata.get("version", "")
        if not version.isdecimal():
            raise UserError(f"{path} is damaged: its format version is {version!r}")
        if int(version) not in _READABLE:
            newer = int(version) > SESSION_VERSION
            advice = "update inplace-ttt" if newer else "no version of inplace-ttt wrote such files"
            raise UserError(f"{path} has format version {version}, this inplace-ttt reads {SESSION_VERSION}: {advice}")
        header = json.loads(metadata.get("header", ""))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"{reason}: {error})") from None
    if not isinstance(header, dict):
        raise UserError(f"{path} is damaged: its header is a {type(header).__name__}")
    return metadata, header
