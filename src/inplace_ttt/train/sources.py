"""Document sources: JSON lines, plain text files, Hugging Face datasets, the source of Python's standard library.

A source is written ``kind:where``:

* ``jsonl:PATH`` one document a line, ``{"text": ..., "id": ...}`` (only ``text`` is needed); PATH may be a glob and may
  end in ``.xz`` or ``.gz``;
* ``text:PATH`` one UTF-8 file a document; PATH may be a glob (``**`` reaches into folders);
* ``hf:PLACE?split=train&text=COLUMN`` a dataset of the hub or of a folder, see `inplace_ttt.hub`;
* ``library:SPLIT`` the running Python's standard library, one document a file: text that every machine has. Files of
  one top-level module go to one split (train, validation or test), which a hash of its name decides.
"""

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from inplace_ttt.errors import SourceError, UserError
from inplace_ttt.hub import hub_dataset
from inplace_ttt.text_files import read_json_lines, read_text

SPLITS = ("train", "validation", "test")
HELD_OUT_PERCENT = 10
"""Share of the standard library's modules for validation, and for test."""
_LEFT_OUT = re.compile(r"(^|/)(tests?|(site|dist)-packages)/|/test_[^/]*$")
_GENERATED = re.compile(r"auto-?\s?generated|automatically generated|@generated|do not (edit|modify)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Document:
    """One text; domains are ordered by its ``id``, not by where it comes from."""

    id: str
    text: str


class DomainDocuments:
    """Documents of some sources that hold text, in their order, read anew at every pass, one in memory at a time.

    With ``max_bytes``: those whose identifiers hash lowest, up to that many bytes (the last one is cut), which takes
    one more pass. Raises UserError where there is no text.
    """

    def __init__(self, sources: Sequence[str], max_bytes: int | None = None) -> None:
        self.sources, self.max_bytes = sources, max_bytes

    def __iter__(self) -> Iterator[Document]:
        is_empty = True
        for i, document in enumerate(self._all()):
            is_empty = False
            if self._bytes_of is None:
                yield document
            elif i in self._bytes_of:
                yield replace(document, text=document.text.encode()[: self._bytes_of[i]].decode(errors="ignore"))
        if is_empty:
            raise UserError(f"{', '.join(self.sources)}: no text in there")

    def _all(self) -> Iterator[Document]:
        return (document for source in self.sources for document in read_source(source) if document.text)

    @cached_property
    def _bytes_of(self) -> dict[int, int] | None:
        """Bytes to keep of each document that is taken, by its number; None: take every document."""
        if self.max_bytes is None:
            return None
        found, left = {}, self.max_bytes
        for _, i, size in sorted((hash_of(d), i, len(d.text.encode())) for i, d in enumerate(self._all())):
            if left:
                found[i] = min(size, left)
                left -= found[i]
        return found


def hash_of(document: Document) -> bytes:
    """Return a number to order documents by that has nothing to do with where they come from."""
    return hashlib.sha256(document.id.encode()).digest()


def split_source(spec: str) -> tuple[str, str]:
    """Split ``kind:where`` into (kind, where). Raises SourceError for anything else."""
    kind, _, where = spec.partition(":")
    if kind not in ("jsonl", "text", "hf", "library") or not where:
        raise SourceError(
            f"{spec!r} is not a document source: write jsonl:PATH, text:PATH, hf:DATASET or library:SPLIT"
        )
    if kind == "library" and where not in SPLITS:
        raise SourceError(f"{spec!r}: there is no split {where!r}, only {', '.join(SPLITS)}")
    return kind, where


def source_files(spec: str) -> list[Path]:
    """Return the local files that a source names, sorted, and read none.

    Raises SourceError when the source is misspelt, or jsonl: or text: names no file.
    """
    kind, where = split_source(spec)
    if kind == "library":
        return []
    if kind == "hf":
        return hub_dataset(spec, split="train").files()
    paths = [Path(where)] if Path(where).is_file() else sorted(map(Path, glob.glob(where, recursive=True)))
    if not (files := [path for path in paths if path.is_file()]):
        raise SourceError(f"{spec}: no such file (relative paths start at {Path.cwd()})")
    return files


def read_source(spec: str) -> Iterator[Document]:
    """Yield the documents of one source, in a fixed order."""
    kind, where = split_source(spec)
    if kind == "library":
        yield from library(where)
    elif kind == "hf":
        dataset = hub_dataset(spec, split="train")
        for number, row in enumerate(dataset.rows(), 1):
            label = row.get(dataset.id)
            name = f"{Path(dataset.place).name}:{number}" if label is None else str(label)
            yield Document(name, row[dataset.text])
    elif kind == "text":
        for path in source_files(spec):
            yield Document(str(path), read_text(path).text)
    else:
        for path in source_files(spec):
            for number, record in read_json_lines(path):
                yield Document(str(record.get("id", f"{path.name}:{number}")), record["text"])


def library(split: str) -> Iterator[Document]:
    """Yield a split of the standard library, sorted by path. Raises SourceError where Python has no source files.

    Without tests, generated files, files below 2 KiB, above 1 MiB or with very long lines.
    """
    folder, found = Path(sysconfig.get_path("stdlib")), False
    paths: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "site-packages"]  # there can be many more files than here
        paths += [Path(place, name) for name in names if name.endswith(".py")]
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        if split_of(name.split("/")[0]) != split or _LEFT_OUT.search(name):
            continue
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            continue
        is_long = re.search(r"[^\n]{1001}", text) is not None
        if 2 << 10 <= len(text.encode()) <= 1 << 20 and not is_long and not _GENERATED.search(text[:1500]):
            found = True
            yield Document(name, text)
    if not found:
        raise SourceError(f"library:{split}: this Python's standard library has no source files in {folder}")


def split_of(module: str) -> str:
    """Return the split of a top-level module, by its file's or folder's name."""
    percent = int(hashlib.sha256(module.removesuffix(".py").encode()).hexdigest()[:8], 16) / 2**32 * 100
    if percent < HELD_OUT_PERCENT:
        return "test"
    return "validation" if percent < 2 * HELD_OUT_PERCENT else "train"
