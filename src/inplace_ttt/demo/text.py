"""The text that the demo reads: the user's file or one of Python's own, checked, and cut into tokens."""

import stat
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

LIBRARY_FILES = (
    "argparse.py",
    "tarfile.py",
    "inspect.py",
    "typing.py",
    "turtle.py",
    "subprocess.py",
    "difflib.py",
    "mailbox.py",
)
"""Modules of the standard library, all in Python 3.11 to 3.14: the first one that this Python has in full is read."""
LIBRARY_BYTES = 60_000
_BYTES_PER_TOKEN = 32
"""No more of a file is read than this many bytes for each token that the demo wants."""


@dataclass(frozen=True)
class Source:
    """A file's text, or its beginning. ``size`` is the whole file's bytes."""

    path: Path
    text: str
    size: int
    whole: bool


@dataclass(frozen=True)
class Tokens:
    """Token ids [n] and each one's span of characters in ``text``. ``total`` counts the tokens before the cut."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    total: int


def library_file() -> Path:
    """A long module of the running Python's standard library. UserError when it has none as source."""
    folder = Path(sysconfig.get_path("stdlib"))
    for name in LIBRARY_FILES:
        path = folder / name
        if path.is_file() and path.stat().st_size > LIBRARY_BYTES:
            return path
    raise UserError(f"this Python's standard library has no long source file in {folder}: give a file of your own")


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


def tokenize(source: Source, tokenizer: Any, chunk_size: int, most: int) -> Tokens:
    """The first ``most + 1`` tokens: ``most`` are read, each is asked for the next one.

    UserError when too few are there for one update and something read after it.
    """
    encoded = tokenizer(source.text, return_offsets_mapping=True, split_special_tokens=True, verbose=False)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    needed = chunk_size + 2
    if most < needed - 1:
        raise UserError(
            f"--max-tokens {most} is too small: this model updates after every {chunk_size:,} tokens, "
            f"so at least {needed - 1:,} must be read"
        )
    if len(ids) < needed:
        raise UserError(
            f"{source.path} is too short: it has {len(ids):,} tokens, and at least {needed:,} are needed because this "
            f"model updates after every {chunk_size:,}"
        )
    cut = slice(0, most + 1)
    return Tokens(source.text, ids[cut], [(int(a), int(b)) for a, b in spans[cut]], len(ids))
