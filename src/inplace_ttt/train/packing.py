"""Tokenised documents -> rows of exactly ``sequence_length`` tokens.

A document longer than a row is cut into row-long pieces, each a document of its own. Cuts fall on multiples of ``cut``
tokens of the document: with the chunk size, every piece starts a chunk of the whole document, and the piece's chunks
are those that it would have there. What is left over at both ends is packed with other leftovers, best fit first. Where
the first cut falls changes from epoch to epoch. Nothing predicts across a boundary: ``position_ids`` restart at 0 at
every document and its first token has no label.
"""

import bisect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from inplace_ttt.errors import UserError

IGNORED = -100  # label of a token that nothing predicts


class JoinedTokens:
    """Arrays end to end, each where it is (on disk, mostly). A slice lies inside one of them, as documents do."""

    def __init__(self, parts: Sequence["np.ndarray | JoinedTokens"]) -> None:
        self.parts, self.starts = parts, np.cumsum([0, *map(len, parts)]).tolist()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        part = max(bisect.bisect_right(self.starts, where.start) - 1, 0)
        first = self.starts[part]
        found: np.ndarray = self.parts[part][where.start - first : where.stop - first]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate([np.asarray(part, dtype) for part in self.parts])


@dataclass(frozen=True)
class TokenStore:
    """Documents end to end: ``tokens`` [total] of uint16 or uint32, document i at ``offsets[i] : offsets[i + 1]``."""

    tokens: np.ndarray | JoinedTokens
    offsets: np.ndarray
    names: tuple[str, ...]

    @classmethod
    def build(cls, documents: Iterable[tuple[str, np.ndarray]]) -> "TokenStore":
        """From (name, ids [n]) pairs."""
        names, arrays = [], []
        for name, ids in documents:
            names.append(name)
            arrays.append(ids)
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.uint16)
        return cls(tokens, np.cumsum([0, *map(len, arrays)]), tuple(names))

    @classmethod
    def join(cls, stores: Sequence["TokenStore"]) -> "TokenStore":
        """One store of all documents of several, in order; their tokens stay where they are."""
        before = np.cumsum([0, *(int(store.offsets[-1]) for store in stores)])
        offsets = [store.offsets[1:] + start for store, start in zip(stores, before[:-1], strict=True)]
        names = tuple(name for store in stores for name in store.names)
        return cls(JoinedTokens([store.tokens for store in stores]), np.concatenate([[0], *offsets]), names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        """Ids [n] of a document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return np.diff(self.offsets)

    def save(self, stem: Path) -> None:
        """Writes ``stem.tokens.npy`` and ``stem.json``."""
        np.save(f"{stem}.tokens.npy", np.asanyarray(self.tokens))
        index = {"offsets": self.offsets.tolist(), "names": list(self.names)}
        Path(f"{stem}.json").write_text(json.dumps(index), encoding="utf-8")

    @classmethod
    def load(cls, stem: Path) -> "TokenStore":
        """Reads what `save` wrote; the tokens stay on disk until they are used."""
        index = json.loads(Path(f"{stem}.json").read_text(encoding="utf-8"))
        tokens = np.load(f"{stem}.tokens.npy", mmap_mode="r")
        return cls(tokens, np.array(index["offsets"], np.int64), tuple(index["names"]))


class TokenWriter:
    """Writes a store a document at a time; inside ``with``, `TokenStore.load` reads the result afterwards."""

    def __init__(self, stem: Path) -> None:
        self.stem = stem
        self.names: list[str] = []
        self.offsets = [0]
        self._dtype = np.dtype(np.uint16)

    def __enter__(self) -> "TokenWriter":
        self._raw = open(f"{self.stem}.raw", "wb")
        return self

    def add(self, name: str, ids: np.ndarray) -> None:
        """The next document's ids [n]; all documents have one dtype."""
        self._dtype = ids.dtype
        self._raw.write(ids.tobytes())
        self.names.append(name)
        self.offsets.append(self.offsets[-1] + len(ids))

    @property
    def documents(self) -> int:
        return len(self.names)

    @property
    def tokens(self) -> int:
        return self.offsets[-1]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._raw.close()
        raw = Path(f"{self.stem}.raw")
        if kind is None:
            shape = (self.tokens,)
            tokens = np.memmap(raw, self._dtype, "r", shape=shape) if self.tokens else np.zeros(0, self._dtype)
            TokenStore(tokens, np.array(self.offsets, np.int64), tuple(self.names)).save(self.stem)
        raw.unlink()


@dataclass(frozen=True)
class Piece:
    """``length`` tokens of the store from ``start`` on: one document of a row."""

    start: int
    length: int


Row = tuple[Piece, ...]


def plan_rows(
    offsets: np.ndarray, sequence_length: int, seed: int, epoch: int, group: int = 1, align: int = 1, cut: int = 1
) -> tuple[list[Row], int]:
    """Rows of one epoch in training order, and how many of their tokens are padding.

    Depends on these arguments only. Where ``sequence_length`` is no multiple of ``cut``, a row-long piece ends at the
    last multiple before it. Rows of one piece and rows of several are shuffled
    apart and dealt in groups of ``group`` rows: a batch of undivided rows needs no document masks, which is faster.
    """
    generator = np.random.default_rng([seed, epoch])
    whole: list[Row] = []
    leftovers: list[Piece] = []
    full = sequence_length // cut * cut
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        length = end - start
        rows, rest = divmod(length, full) if length > sequence_length or length == full else (0, length)
        head = cut * int(generator.integers(0, rest // cut + 1)) if rows else rest
        body = start + head
        whole += [(Piece(body + i * full, full),) for i in range(rows)]
        tail = body + rows * full
        leftovers += [Piece(at, length) for at, length in ((start, head), (tail, end - tail)) if length > 1]
    planned = whole + _best_fit(leftovers, sequence_length, align)
    padding = sum(sequence_length - sum(piece.length for piece in row) for row in planned)
    undivided = [row for row in planned if row[0].length == sequence_length]
    divided = [row for row in planned if row[0].length < sequence_length]
    return _deal(undivided, divided, group, generator), padding


def _best_fit(pieces: Sequence[Piece], capacity: int, align: int) -> list[Row]:
    """Longest piece first, each into the row that it fills best; it takes a multiple of ``align`` tokens there."""
    rows: list[list[Piece]] = []
    free: list[tuple[int, int]] = []  # (room, row), sorted
    for piece in sorted(pieces, key=lambda piece: (-piece.length, piece.start)):
        taken = -(-piece.length // align) * align
        at = bisect.bisect_left(free, (taken, -1))
        if at == len(free):
            rows.append([])
            room, row = capacity, len(rows) - 1
        else:
            room, row = free.pop(at)
        rows[row].append(piece)
        if room > taken:
            bisect.insort(free, (room - taken, row))
    return [tuple(row) for row in rows]


def _deal(undivided: list[Row], divided: list[Row], group: int, generator: np.random.Generator) -> list[Row]:
    """Shuffles both kinds, forms groups of one kind where the numbers allow, and shuffles the groups."""
    ordered = [[rows[i] for i in generator.permutation(len(rows))] for rows in (undivided, divided)]
    full = [rows[: len(rows) // group * group] for rows in ordered]
    groups = [rows[i : i + group] for rows in full for i in range(0, len(rows), group)]
    mixed = [row for rows, kept in zip(ordered, full, strict=True) for row in rows[len(kept) :]]
    dealt = [row for i in generator.permutation(len(groups)) for row in groups[i]]
    return dealt + mixed  # the odd ones last, so that no earlier batch is shifted


def row_tensors(store: TokenStore, row: Row, sequence_length: int, pad_id: int, align: int = 1) -> dict[str, Tensor]:
    """``input_ids``, ``position_ids``, ``labels`` of a row, int64 [sequence_length] each.

    Documents begin at multiples of ``align``. Padding is a document of its own, without labels.
    """
    ids = np.full(sequence_length, pad_id, np.int64)
    positions = np.zeros(sequence_length, np.int64)
    labels = np.full(sequence_length, IGNORED, np.int64)
    at = 0
    for piece in row:
        end = at + piece.length
        ids[at:end] = store.tokens[piece.start : piece.start + piece.length]
        positions[at:end] = np.arange(piece.length)
        labels[at + 1 : end] = ids[at + 1 : end]
        at = -(-end // align) * align
        positions[end:at] = np.arange(at - end)
    positions[at:] = np.arange(sequence_length - at)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "labels": torch.from_numpy(labels),
    }


class PackedRows(Dataset[dict[str, Tensor]]):
    """``rows`` packed rows, epoch after epoch: item n is the same whatever was asked for before (so runs resume).

    ``pad_id`` fills the rows that are not full. Documents begin at multiples of ``align``, long ones are cut at
    multiples of their ``cut`` tokens. ``group`` is the batch size,
    see `plan_rows`; the up to ``group - 1`` rows that an epoch has over are left out, so that every epoch starts a
    batch.
    """

    def __init__(
        self,
        store: TokenStore,
        sequence_length: int,
        rows: int,
        *,
        seed: int,
        pad_id: int,
        group: int = 1,
        align: int = 1,
        cut: int = 1,
    ) -> None:
        self.store, self.sequence_length, self.pad_id, self.align = store, sequence_length, pad_id, align
        self.plan: list[Row] = []
        self.epochs = 0
        padding = 0
        while len(self.plan) < rows:
            planned, padded = plan_rows(store.offsets, sequence_length, seed, self.epochs, group, align, cut)
            if not planned:
                raise UserError("there is no text to train on: every document is empty")
            self.plan += planned[: len(planned) // group * group] or planned
            padding += padded
            self.epochs += 1
        self.padding = padding / (len(self.plan) * sequence_length)  # share of the planned tokens
        del self.plan[rows:]

    def __len__(self) -> int:
        return len(self.plan)

    def describe(self) -> str:
        """For people."""
        return (
            f"{len(self):,} rows of {self.sequence_length:,} tokens, {self.epochs} epochs, {self.padding:.1%} padding"
        )

    def record(self) -> dict[str, float]:
        """For the run's record."""
        return {"epochs": self.epochs, "padding": self.padding}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return row_tensors(self.store, self.plan[index], self.sequence_length, self.pad_id, self.align)


def first_rows(
    store: TokenStore, sequence_length: int, rows: int, pad_id: int, align: int = 1, cut: int = 1
) -> list[dict[str, Tensor]]:
    """Up to ``rows`` rows for validation: the beginning of each document first, then its next piece, and so on.

    Only the last row of a document that is shorter than a row is padded; the rest of a longer one is left out.
    """
    chosen: list[dict[str, Tensor]] = []
    full = sequence_length // cut * cut
    for turn in range(int(store.lengths.max(initial=0)) // full + 1):
        for start, length in zip(store.offsets[:-1].tolist(), store.lengths.tolist(), strict=True):
            left = length - turn * full
            if len(chosen) == rows:
                return chosen
            if left >= full or (turn == 0 and left > 1):
                piece = Piece(start + turn * full, left if turn == 0 and left <= sequence_length else min(left, full))
                chosen.append(row_tensors(store, (piece,), sequence_length, pad_id, align))
    return chosen


def updates_seen(plan: Iterable[Row], chunk_size: int, *, is_all: bool) -> str:
    """Describe which share of the planned tokens sees an update: those behind the first chunk of their document.

    ``is_all``: the plan is that of the whole run; then UserError where no token does, since nothing would be learned.
    """
    lengths = [piece.length for row in plan for piece in row]
    seen = sum(max(length - chunk_size, 0) for length in lengths)
    if seen:
        return f"{seen / sum(lengths):.1%} of the tokens see an update"
    longest = max(lengths, default=0)
    nothing = f"has more than {longest} tokens, so with ttt.chunk_size {chunk_size} no token sees an update"
    if is_all:
        raise UserError(
            f"no document in the training rows {nothing} and nothing would adapt: make ttt.chunk_size smaller, join "
            "short documents, or leave ttt out"
        )
    return f"no document in the first {len(lengths)} {nothing}"
