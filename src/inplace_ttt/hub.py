"""Hugging Face datasets, named alike for training and evaluation: ``hf:PLACE?setting=value&...``.

PLACE is a dataset's id on the hub, a folder of data files, or a folder that ``save_to_disk`` wrote. Settings:

* ``split`` (train; evaluation: test), ``name`` (the configuration), ``revision``: as ``datasets.load_dataset`` has
  them;
* ``text`` (text): the column of the documents; ``id`` (none; evaluation: id): a column that names them (else their
  number);
* ``streaming`` (true): false downloads all of it first.

Also checks of model names before anything loads.
"""

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


SETTINGS = tuple(field.name for field in fields(HubDataset) if field.kw_only)


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
        if setting not in SETTINGS:
            raise SourceError(f"{spec}: no setting {setting!r}, only {', '.join(SETTINGS)}")
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


def check_model(name: str | Path) -> None:
    """Raise UserError where no model can be: no such directory or GGUF file here, and no id of the hub either."""
    if name == SHIPPED or Path(name).expanduser().is_dir():
        return
    if Path(name).suffix == ".gguf":
        check_gguf(name)
    else:
        require_hub_id(str(name))


def require_hub_id(name: str) -> None:
    """Raise UserError unless a name that is not a directory here can be a hub id (OWNER/NAME)."""
    if Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"no model directory at {name}")


def check_gguf(file: str | Path) -> None:
    """Raise UserError when there is no such file, it is of another kind, or the package that reads it is missing."""
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file")
    with open(file, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise UserError(f"{file} is not a GGUF file: its first bytes are others")
    if find_spec("gguf") is None:
        raise UserError("reading a GGUF file needs the package gguf: pip install gguf")
