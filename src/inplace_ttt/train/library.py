"""The source of the running Python's standard library as documents, one a file: text that every machine has.

Files of one top-level module or package go to one split (a hash of its name decides), so that validation and test are
unknown text. Left out: what `inplace_ttt.train.packages` leaves out of installed distributions (tests, generated files,
files above 1 MiB or with very long lines), installed distributions themselves, and files below 2 KiB.
"""

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from inplace_ttt.errors import SourceError
from inplace_ttt.train.document import Document
from inplace_ttt.train.packages import is_source, read_text

HELD_OUT_PERCENT = 10
"""Of the modules, for validation and for test each."""
MIN_BYTES = 2 << 10


def library(split: str) -> Iterator[Document]:
    """The documents of a split, sorted by path. Raises SourceError where Python has no source files."""
    folder, found = Path(sysconfig.get_path("stdlib")), False
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if parts[0] in ("site-packages", "dist-packages") or not is_source(parts) or split_of(parts[0]) != split:
            continue
        text = read_text(path)
        if text is not None and len(text.encode()) >= MIN_BYTES:
            found = True
            yield Document("/".join(parts), text, f"Python {platform.python_version()}", "PSF-2.0")
    if not found:
        raise SourceError(f"library:{split}: this Python's standard library has no source files in {folder}")


def split_of(module: str) -> str:
    """The split of a top-level module, by its file's or folder's name."""
    percent = int(hashlib.sha256(module.removesuffix(".py").encode()).hexdigest()[:8], 16) / 2**32 * 100
    if percent < HELD_OUT_PERCENT:
        return "test"
    return "validation" if percent < 2 * HELD_OUT_PERCENT else "train"
