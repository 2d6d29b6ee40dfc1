"""Document sources: JSON lines, plain text files, Hugging Face datasets, the Python source of installed distributions.

A source is written ``kind:where``:

* ``jsonl:PATH`` one document a line, ``{"text": ..., "id": ..., "source": ..., "license": ...}`` (only ``text`` is
  needed); PATH may be a glob and may end in ``.xz`` or ``.gz``;
* ``text:PATH`` one UTF-8 file a document; PATH may be a glob (``**`` reaches into folders);
* ``hf:PLACE?split=train&text=COLUMN`` a dataset of the hub or of a folder, see `inplace_ttt.hub`;
* ``packages:SPLIT`` the installed distributions that fall into SPLIT (train, validation or test), see
  `inplace_ttt.train.packages`;
* ``library:SPLIT`` the source of Python's standard library, see `inplace_ttt.train.library`.
"""

import glob
from collections.abc import Callable, Iterator
from pathlib import Path

from inplace_ttt.errors import SourceError
from inplace_ttt.hub import HubDataset, hub_dataset
from inplace_ttt.text_files import read_json_lines, read_text
from inplace_ttt.train.document import SPLITS, Document
from inplace_ttt.train.library import library

INSTALLED = ("packages", "library")
"""Kinds of source that name a split of what is installed, not a place."""


def split_source(spec: str) -> tuple[str, str]:
    """``kind:where`` -> (kind, where). Raises SourceError for anything else."""
    kind, colon, where = spec.partition(":")
    if not colon or kind not in ("jsonl", "text", "hf", *INSTALLED) or not where:
        raise SourceError(
            f"{spec!r} is no document source: write jsonl:PATH, text:PATH, hf:DATASET, packages:SPLIT or library:SPLIT"
        )
    if kind in INSTALLED and where not in SPLITS:
        raise SourceError(f"{spec!r}: there is no split {where!r}, only {', '.join(SPLITS)}")
    return kind, where


def source_files(spec: str) -> list[Path]:
    """Local files that a source names, sorted. Raises SourceError when a jsonl: or text: source has none."""
    kind, where = split_source(spec)
    if kind in INSTALLED:
        return []
    if kind == "hf":
        return _dataset(spec).files()
    paths = [Path(where)] if Path(where).is_file() else sorted(map(Path, glob.glob(where, recursive=True)))
    files = [path for path in paths if path.is_file()]
    if not files:
        raise SourceError(f"{spec}: no such file (relative paths start at {Path.cwd()})")
    return files


def check_source(spec: str) -> None:
    """Raises SourceError when the source is misspelt or names no file. Reads nothing."""
    kind, _ = split_source(spec)
    if kind == "hf":
        _dataset(spec)
    elif kind not in INSTALLED:
        source_files(spec)


def read_source(spec: str, packages: Callable[[str], list[Document]] | None = None) -> Iterator[Document]:
    """Documents of one source, in a fixed order. ``packages`` gives the documents of a split of the distributions."""
    kind, where = split_source(spec)
    if kind == "packages":
        if packages is None:
            raise SourceError(f"{spec}: installed packages are not available here")
        yield from packages(where)
        return
    if kind == "library":
        yield from library(where)
        return
    if kind == "hf":
        yield from _rows(_dataset(spec))
        return
    for path in source_files(spec):
        yield from _json_lines(path) if kind == "jsonl" else [_text_file(path)]


def _dataset(spec: str) -> HubDataset:
    return hub_dataset(spec, split="train")


def _rows(dataset: HubDataset) -> Iterator[Document]:
    for number, row in enumerate(dataset.rows(), 1):
        label = row.get(dataset.id)
        name = f"{Path(dataset.place).name}:{number}" if label is None else str(label)
        yield Document(id=name, text=row[dataset.text], source=dataset.place)


def _json_lines(path: Path) -> Iterator[Document]:
    for number, record in read_json_lines(path):
        yield Document(
            id=str(record.get("id", f"{path.name}:{number}")),
            text=record["text"],
            source=str(record.get("source", path.name)),
            licence=str(record.get("licence", record.get("license", ""))),
        )


def _text_file(path: Path) -> Document:
    return Document(id=str(path), text=read_text(path).text, source=path.name)
