"""Inputs of a session: texts, files and token ids."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from ..errors import UserError

Readable = str | Path | IO[Any] | Iterable[str] | Sequence[int] | np.ndarray | Tensor
BLOCK = 1 << 18
"""Maximum number of characters tokenised at once, to bound memory."""


def token_ids(source: Any) -> list[int] | None:
    """Return the ids in ``source``, a flat sequence, an array or a tensor [n] or [1, n]; None when it holds texts.

    Raises UserError for what is neither, or looks like ids and is something else.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        raise UserError(f"expected text, got {type(source).__name__}: decode it first")
    if isinstance(source, Mapping):
        raise UserError(f"expected text or token ids, got a {type(source).__name__}: pass its input_ids")
    if isinstance(source, np.ndarray | Tensor):
        if isinstance(source, Tensor) and source.is_floating_point():
            source = source.float()  # numpy has no bfloat16; refused below
        array = source if isinstance(source, np.ndarray) else source.numpy(force=True)
        if array.dtype.kind not in "iu" or array.ndim > 2 or (array.ndim == 2 and len(array) != 1):
            raise UserError(f"token ids must be integers in one row, got {array.shape} {array.dtype}")
        return [int(i) for i in array.flatten()]
    ids = isinstance(source, Sequence) and not isinstance(source, str)
    if ids and all(isinstance(i, Integral) and not isinstance(i, bool) for i in source):
        return [int(i) for i in source]
    return None


def texts(source: Any) -> Iterator[str]:
    """Yield a text, a file (by ``Path`` or open in text mode) or an iterable of texts, in parts.

    Raises UserError for anything that is not text.
    """
    if isinstance(source, str):
        for at in range(0, len(source), BLOCK):
            yield source[at : at + BLOCK]
    elif isinstance(source, Path):
        try:
            with open(source, encoding="utf-8-sig") as file:
                yield from texts(file)
        except UnicodeDecodeError as error:
            raise UserError(f"{source} is not UTF-8 text ({error.reason})") from None
    elif hasattr(source, "read"):
        while block := source.read(BLOCK):
            yield _text(block)
    elif isinstance(source, Iterable):
        for block in source:
            yield from texts(_text(block))
    else:
        raise UserError(f"expected text or token ids, got {type(source).__name__}")


def _text(block: Any) -> str:
    if not isinstance(block, str):
        raise UserError(f"expected text, got {type(block).__name__}: open files in text mode, pass ids as a list")
    return block
