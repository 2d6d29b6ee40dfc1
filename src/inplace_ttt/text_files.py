"""Text files, plain or as JSON lines. Every error in them is a message of one line."""

import gzip
import json
import lzma
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import SourceError

_BYTES_PER_TOKEN = 32
"""Maximum number of bytes read for each token wanted."""


@dataclass(frozen=True)
class Source:
    """A text file's content, or its beginning. ``size`` is the whole file's bytes."""

    path: Path
    text: str
    size: int
    whole: bool


def read_text(path: Path, tokens: int | None = None) -> Source:
    """Read the text of a UTF-8 file, as much of it as ``tokens`` tokens can need (None: all).

    SourceError when it is missing, a directory, not readable, empty, binary, or not UTF-8.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise SourceError(f"{path} is a directory: give a text file")
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            data = file.read(None if tokens is None else max(tokens * _BYTES_PER_TOKEN, 1 << 20))
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    whole = len(data) >= status.st_size
    text = decode_text(path, data, whole).replace("\r\n", "\n")
    if not text.strip():
        raise SourceError(f"{path} is empty")
    return Source(path, text, status.st_size, whole)


def decode_text(place: str | Path, data: bytes, whole: bool = True) -> str:
    """Decode UTF-8 text of ``place``, all of it or its beginning. Raises SourceError for anything else."""
    if b"\0" in data:
        raise SourceError(f"{place} is a binary file (it has NUL bytes): give a text file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not whole and error.start >= len(data) - 3:  # cut inside a character
            return data[: error.start].decode("utf-8-sig")
        raise SourceError(
            f"{place} is not UTF-8 text (byte {error.start:,} is {data[error.start]:#04x}): convert it first"
        ) from None


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of each line of a ``.jsonl``, ``.jsonl.xz`` or ``.jsonl.gz`` file; none if blank.

    Raises SourceError where the file cannot be read or is not UTF-8, or a line is not an object with a "text".
    """
    number = 0
    opened: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    try:
        with opened(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _object(f"{path}, line {number}", line)
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise SourceError(f"{path}, after line {number}: not UTF-8 text") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"{path}, after line {number}: cannot be read ({reason})") from None


def _object(where: str, line: str) -> dict[str, Any]:
    if "\0" in line:
        raise SourceError(f"{where}: binary data (NUL bytes), not JSON lines")
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"{where}: not JSON ({getattr(error, 'msg', 'too deeply nested')})") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise SourceError(f'{where}: no "text" (each line must be an object with a string "text")')
    return record
