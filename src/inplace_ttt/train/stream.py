"""Rows made while training: documents are read, tokenised and packed a window at a time, without preparation.

Documents are taken from the domain that has given the fewest tokens so far, in the order of its sources; one that ends
begins again. A *window* is the next ``WINDOW_ROWS`` rows' worth of them, and is cut, packed and shuffled like an epoch
of its own (`inplace_ttt.train.packing.plan_rows`). So row n depends on sources, tokenizer and settings alone. Each
window's start is on disk, so a resumed run skips the documents before its window without tokenising them.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from inplace_ttt.errors import UserError
from inplace_ttt.records import write_json
from inplace_ttt.train.packing import Layout, Row, TokenStore, plan_rows, row_tensors
from inplace_ttt.train.sources import Document
from inplace_ttt.train.tokenizer import encode_documents

WINDOW_ROWS = 32
_BATCH_CHARACTERS = 1 << 20  # tokenised at a time, of a domain


class StreamedRows(Dataset[dict[str, Tensor]]):
    """``rows`` rows; item n is the same whatever was asked for before. Reading in order costs the least.

    ``domains``: documents by name, iterated over anew whenever they begin again. ``notes``: a folder of its own for
    these domains and this tokenizer, in which the beginnings of windows are noted. Raises UserError, at the first item,
    for sources that cannot be read.
    """

    def __init__(
        self,
        domains: Mapping[str, Iterable[Document]],
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        layout: Layout,
        notes: Path,
    ) -> None:
        self.rows, self.layout = rows, layout
        self._domains, self._tokenizer = domains, tokenizer
        self._given: dict[str, tuple[int, int]] = {}
        """Documents and tokens of each domain so far, earlier passes included."""
        self._encoded: dict[str, Iterator[tuple[str, np.ndarray]]] = {}
        key = hashlib.sha256(json.dumps([asdict(layout), WINDOW_ROWS, list(domains)]).encode()).hexdigest()[:16]
        self._notes = notes / key
        self._process: int | None = None  # file handles of another process must not be used
        self._window, self._first = 0, 0
        self._store = TokenStore.build([])
        self.plan: list[Row] = []
        """The rows of the window that was read last."""

    def __len__(self) -> int:
        return self.rows

    def describe(self) -> str:
        return f"{len(self):,} rows of {self.layout.length:,} tokens, tokenised while training"

    def record(self) -> dict[str, float]:
        """Return entries for the run's record: epochs and padding are not known beforehand."""
        return {}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.rows:
            raise IndexError(index)
        is_near = self._first <= index < self._first + len(self.plan) + WINDOW_ROWS
        if not is_near or self._process != os.getpid():
            self._seek(index)
        while index >= self._first + len(self.plan):
            self._next()
        return row_tensors(self._store, self.plan[index - self._first], self.layout)

    def _seek(self, index: int) -> None:
        """Go to the last known beginning of a window at or before row ``index``."""
        self._process = os.getpid()
        if get_worker_info() is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
        known = [first for path in self._notes.glob("*.json") if (first := int(path.stem)) <= index]
        note = json.loads((self._notes / f"{max(known)}.json").read_text(encoding="utf-8")) if known else {}
        self._window, self._first, self.plan = note.get("window", 0) - 1, note.get("first", 0), []
        self._given = {name: note.get("domains", {}).get(name, (0, 0)) for name in self._domains}
        for name, (documents, _) in self._given.items():
            rest = islice(chain.from_iterable(repeat(self._domains[name])), documents, None)
            self._encoded[name] = encode_documents(self._tokenizer, rest, characters=_BATCH_CHARACTERS)

    def _next(self) -> None:
        self._first += len(self.plan)
        self._window += 1
        documents: list[tuple[str, np.ndarray]] = []
        missing = max(WINDOW_ROWS, 4 * self.layout.group) * self.layout.length
        while missing > 0:
            name = min(self._given, key=lambda name: self._given[name][1])  # the first of equal ones
            documents.append(next(self._encoded[name]))
            (number, tokens), size = self._given[name], len(documents[-1][1])
            self._given[name] = number + 1, tokens + size
            missing -= size
        self._store = TokenStore.build(documents)
        self.plan, _ = plan_rows(self._store.offsets, self.layout, self._window)
        if not self.plan:
            raise UserError("there is no text to train on: every document is empty")
        # The start of the next window; the first process writes it, all would write the same.
        first = self._first + len(self.plan)
        if not (path := self._notes / f"{first}.json").exists():
            write_json(path, {"window": self._window + 1, "first": first, "domains": self._given})
