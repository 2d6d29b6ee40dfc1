"""Documents from a Hugging Face dataset, ``hf:NAME[@CONFIG][:SPLIT[:COLUMN]]``. Needs the package ``datasets``."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import UserError

PREFIX = "hf:"
MOST_ROWS = 1000
"""Rows that are looked at: an evaluation needs a few long documents, and a dataset can have millions of short ones."""


def dataset_texts(source: str, domain: str) -> Iterator[tuple[str, str, str]]:
    """Name, domain and text of the first ``MOST_ROWS`` rows, empty ones left out.

    NAME: a dataset on the hub, read as a stream, or a directory written by ``save_to_disk``. SPLIT: else "test";
    COLUMN: the text, else "text"; columns "id" and "domain" are used where there are any.

    UserError when ``datasets`` is not installed, or the dataset, split or column cannot be had.
    """
    name, split, column = _parts(source)
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: this needs the package datasets: pip install datasets") from None
    try:
        rows = _open(datasets, name, split)
        for number, row in enumerate(islice(rows, MOST_ROWS)):
            if not isinstance(row.get(column), str):
                raise UserError(f"{source}: no column {column!r} of text, only {', '.join(row)}")
            if row[column].strip():
                where = str(row.get("domain", domain))
                yield str(row.get("id", f"{name}:{split}:{number}")), where, row[column]
    except (OSError, ValueError, KeyError) as error:  # no network, no such dataset, no such split
        reason = str(error).strip("'\"").splitlines() or [type(error).__name__]
        raise UserError(f"{source}: this dataset cannot be read ({reason[0]})") from None


def _parts(source: str) -> tuple[str, str, str]:
    parts = source.removeprefix(PREFIX).split(":")
    if not parts[0] or len(parts) > 3 or not all(parts):
        raise UserError(f"{source}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:COLUMN")
    name, split, column = (*parts, *("test", "text")[len(parts) - 1 :])
    return name, split, column


def _open(datasets: Any, name: str, split: str) -> Any:
    if not Path(name).is_dir():
        path, _, config = name.partition("@")
        return datasets.load_dataset(path, config or None, split=split, streaming=True)
    found = datasets.load_from_disk(name)
    return found[split] if isinstance(found, dict) else found
