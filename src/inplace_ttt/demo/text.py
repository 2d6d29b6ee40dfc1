"""The text that the demo reads: the user's file or one of Python's own, cut into tokens."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..text_files import Source

LIBRARY_FILES = (
    "argparse.py", "tarfile.py", "inspect.py", "typing.py", "turtle.py", "subprocess.py", "difflib.py", "mailbox.py",
)  # fmt: skip
"""Modules of the standard library, all in Python 3.11 to 3.14: the first one that this Python has in full is read."""
LIBRARY_BYTES = 60_000


@dataclass(frozen=True)
class Tokens:
    """Token ids [n] and each one's span of characters in ``text``. ``total`` counts the tokens before the cut."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    total: int


def library_file() -> Path:
    """Return a long module of the running Python's standard library. UserError when it has none as source."""
    folder = Path(sysconfig.get_path("stdlib"))
    for name in LIBRARY_FILES:
        path = folder / name
        if path.is_file() and path.stat().st_size > LIBRARY_BYTES:
            return path
    raise UserError(f"this Python's standard library has no long source file in {folder}: give a file of your own")


def tokenize(source: Source, tokenizer: Any, chunk_size: int, most: int) -> Tokens:
    """Return the first ``most + 1`` tokens: ``most`` are read, each is asked for the next one.

    UserError when they are too few for one update and tokens after it.
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
