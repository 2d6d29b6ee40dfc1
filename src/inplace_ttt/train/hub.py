"""Hugging Face datasets as document sources: ``hf:PLACE?setting=value&...``.

PLACE is a dataset's id on the hub, a folder of data files, or a folder that ``save_to_disk`` wrote. Settings:

* ``split`` (train), ``name`` (the configuration), ``revision``: as ``datasets.load_dataset`` has them;
* ``text`` (text): the column of the documents; ``id``: a column that names them (else their number does);
* ``streaming`` (true): false downloads all of it first.
"""

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from inplace_ttt.train.sources import Document, SourceError

SETTINGS = {"split": "train", "name": "", "revision": "", "text": "text", "id": "", "streaming": "true"}


def parse_hub(spec: str) -> tuple[str, dict[str, str]]:
    """PLACE and all settings. Raises SourceError for an unknown or misspelt setting and for a missing folder."""
    place, _, query = spec.partition(":")[2].partition("?")
    try:
        given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise SourceError(f"{spec}: write settings as ?split=train&text=content") from None
    for name in given:
        if name not in SETTINGS:
            raise SourceError(f"{spec}: no setting {name!r}, only {', '.join(SETTINGS)}")
    settings = SETTINGS | given
    if settings["streaming"] not in ("true", "false"):
        raise SourceError(f"{spec}: streaming is true or false, not {settings['streaming']!r}")
    if (place.startswith((".", "/", "~")) or place.count("/") > 1) and not Path(place).expanduser().is_dir():
        raise SourceError(f"{spec}: there is no directory {place}")
    return place, settings


def check_hub(spec: str) -> None:
    """Raises SourceError when the source is misspelt, or the datasets library is missing. Reads nothing."""
    parse_hub(spec)
    if find_spec("datasets") is None:
        raise SourceError(f"{spec}: needs the datasets library: pip install datasets")


def hub_files(spec: str) -> list[Path]:
    """The files of a local dataset, sorted; none for one on the hub."""
    place = Path(parse_hub(spec)[0]).expanduser()
    return sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else []


def read_hub(spec: str) -> Iterator[Document]:
    """The documents in the order of the dataset. Raises SourceError where it, its split or its column is missing."""
    check_hub(spec)
    place, settings = parse_hub(spec)
    name, column = Path(place).name, settings["text"]
    number = 0
    try:
        for number, row in enumerate(_rows(spec, place, settings), 1):
            text = row.get(column)
            if not isinstance(text, str):
                found = f"it has {', '.join(row)}" if column not in row else f"it holds {type(text).__name__}"
                raise SourceError(f"{spec}, row {number}: no text in column {column!r} ({found})")
            label = row.get(settings["id"]) if settings["id"] else None
            yield Document(id=f"{name}:{number}" if label is None else str(label), text=text, source=place)
    except SourceError:
        raise
    except Exception as error:  # of many kinds: the network's, parsers', pyarrow's, the library's own
        raise SourceError(f"{spec}, after row {number}: {_line(error)}") from None


def _rows(spec: str, place: str, settings: dict[str, str]) -> Iterable[dict[str, Any]]:
    import datasets

    folder, split = Path(place).expanduser(), settings["split"]
    datasets.utils.logging.disable_progress_bar()
    if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(str(folder))
        if not isinstance(saved, datasets.DatasetDict):
            return saved  # type: ignore[no-any-return]
        if split not in saved:
            raise SourceError(f"{spec}: there is no split {split!r}, only {', '.join(saved)}")
        return saved[split]  # type: ignore[no-any-return]
    rows: Iterable[dict[str, Any]] = datasets.load_dataset(
        str(folder) if folder.is_dir() else place,
        settings["name"] or None,
        split=split,
        revision=settings["revision"] or None,
        streaming=settings["streaming"] == "true",
    )
    return rows


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
