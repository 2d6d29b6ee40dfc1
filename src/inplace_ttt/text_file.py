"""A text file of the user's, checked before anything is done with it."""

import stat
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

_BYTES_PER_TOKEN = 32
"""No more of a file is read than this many bytes for each token that is wanted."""


@dataclass(frozen=True)
class Source:
    """A file's text, or its beginning. ``size`` is the whole file's bytes."""

    path: Path
    text: str
    size: int
    whole: bool


def read_text(path: Path, tokens: int) -> Source:
    """The text of a UTF-8 file, as much of it as ``tokens`` tokens can need.

    UserError when it is missing, a directory, not readable, empty, binary, or not UTF-8.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"{path} is a directory: give a text file")
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            data = file.read(max(tokens * _BYTES_PER_TOKEN, 1 << 20))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    whole = len(data) >= status.st_size
    if b"\0" in data:
        raise UserError(f"{path} is a binary file (it has NUL bytes): give a text file")
    text = _decode(path, data, whole).replace("\r\n", "\n")
    if not text.strip():
        raise UserError(f"{path} is empty")
    return Source(path, text, status.st_size, whole)


def _decode(path: Path, data: bytes, whole: bool) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not whole and error.start >= len(data) - 3:  # the cut went through a character
            return data[: error.start].decode("utf-8-sig")
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start:,} is {data[error.start]:#04x}): convert it first"
        ) from None
