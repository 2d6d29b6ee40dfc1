"""Tokenised documents -> rows of exactly ``sequence_length`` tokens.

A document longer than a row is cut into row-long pieces, each a document of its own. Cuts fall on multiples of ``cut``
tokens of the document: with the chunk size, every piece starts a chunk of the whole document, and the piece's chunks
are those that it would have there. The remainders at both ends are packed with others, best fit first. Where
the first cut falls changes from epoch to epoch. Nothing predicts across a boundary: ``position_ids`` restart at 0 at
every document and its first token has no label.
"""

import bisect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from inplace_ttt.errors import UserError

IGNORED = -100  # label of a token that is not predicted


@dataclass(frozen=True)
class Layout:
    """Settings of packed rows: ``length`` tokens, filled up with ``pad_id``, in an order drawn from ``seed``.

    Documents begin at multiples of ``align`` in a row; long ones are cut at multiples of ``cut`` of their tokens. Rows
    are dealt in groups of ``group``, the batch size.
    """

    length: int
    seed: int = 0
    pad_id: int = 0
    group: int = 1
    align: int = 1
    cut: int = 1

    @property
    def piece(self) -> int:
        """Tokens of the pieces that a long document is cut into."""
        return self.length // self.cut * self.cut


class Piece(NamedTuple):
    """``length`` tokens of the store from ``start`` on: one document of a row."""

    start: int
    length: int


Row = tuple[Piece, ...]

# -- documents ---------------------------------------------------------------------------------------------------------


class JoinedTokens:
    """Arrays end to end, each where it is (on disk, mostly). A slice lies inside one of them, as documents do."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts, self.starts = parts, np.cumsum([0, *map(len, parts)]).tolist()

    def __getitem__(self, where: slice) -> np.ndarray:
        part = max(bisect.bisect_right(self.starts, where.start) - 1, 0)
        first = self.starts[part]
        found: np.ndarray = self.parts[part][where.start - first : where.stop - first]
        return found


@dataclass(frozen=True)
class TokenStore:
    """Documents end to end: ``tokens`` [total] of uint16 or uint32, document i at ``offsets[i] : offsets[i + 1]``."""

    tokens: np.ndarray | JoinedTokens
    offsets: np.ndarray
    names: tuple[str, ...]

    @classmethod
    def build(cls, documents: Iterable[tuple[str, np.ndarray]]) -> "TokenStore":
        """Build a store from (name, ids [n]) pairs."""
        pairs = list(documents)
        tokens = np.concatenate([np.zeros(0, np.uint16), *(ids for _, ids in pairs)])
        return cls(tokens, np.cumsum([0, *(len(ids) for _, ids in pairs)]), tuple(name for name, _ in pairs))

    @classmethod
    def join(cls, stores: Sequence["TokenStore"]) -> "TokenStore":
        """Make one store of all documents of several, in order; their tokens stay where they are."""
        lengths = np.concatenate([[0], *(store.lengths for store in stores)])
        names = tuple(name for store in stores for name in store.names)
        return cls(JoinedTokens([store.tokens for store in stores]), np.cumsum(lengths), names)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the ids [n] of a document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @classmethod
    def write(cls, stem: Path, documents: Iterable[tuple[str, np.ndarray]]) -> "TokenStore":
        """Write (name, ids [n]) pairs, one at a time and all of one dtype, for `load`, which returns them."""
        names, offsets, dtype = list[str](), [0], np.dtype(np.uint16)
        with open(f"{stem}.tokens", "wb") as file:
            for name, ids in documents:
                file.write(ids.tobytes())
                names.append(name)
                offsets.append(offsets[-1] + len(ids))
                dtype = ids.dtype
        index = {"dtype": str(dtype), "offsets": offsets, "names": names}
        Path(f"{stem}.json").write_text(json.dumps(index), encoding="utf-8")
        return cls.load(stem)

    @classmethod
    def load(cls, stem: Path) -> "TokenStore":
        """Read what `write` wrote; the tokens stay on disk until they are used."""
        index = json.loads(Path(f"{stem}.json").read_text(encoding="utf-8"))
        offsets, dtype = np.array(index["offsets"], np.int64), np.dtype(index["dtype"])
        tokens = np.memmap(f"{stem}.tokens", dtype, "r") if offsets[-1] else np.zeros(0, dtype)
        return cls(tokens, offsets, tuple(index["names"]))


# -- rows --------------------------------------------------------------------------------------------------------------


def plan_rows(offsets: np.ndarray, layout: Layout, epoch: int = 0) -> tuple[list[Row], int]:
    """Return the rows of one epoch in training order, and how many of their tokens are padding.

    Depends on these arguments only. Where a row's length is not a multiple of ``cut``, a row-long piece ends at the
    last multiple before it. Rows of one piece and rows of several are shuffled apart and dealt in groups: a batch of
    undivided rows needs no document masks, which is faster.
    """
    generator = np.random.default_rng([layout.seed, epoch])
    planned: list[Row] = []
    leftovers: list[Piece] = []
    full = layout.piece
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        length = end - start
        rows, rest = divmod(length, full) if length > layout.length or length == full else (0, length)
        head = layout.cut * int(generator.integers(0, rest // layout.cut + 1)) if rows else rest
        body = start + head
        planned += [(Piece(body + i * full, full),) for i in range(rows)]
        tail = body + rows * full
        leftovers += [piece for piece in (Piece(start, head), Piece(tail, end - tail)) if piece.length > 1]
    planned += _best_fit(leftovers, layout.length, layout.align)
    padding = sum(layout.length - sum(piece.length for piece in row) for row in planned)
    return _deal(planned, layout, generator), padding


def _best_fit(pieces: Sequence[Piece], capacity: int, align: int) -> list[Row]:
    """Pack the longest piece first, each into the row that it fills best, where it takes a multiple of ``align``."""
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


def _deal(planned: list[Row], layout: Layout, generator: np.random.Generator) -> list[Row]:
    """Shuffle undivided and divided rows apart, form groups of one kind where the numbers allow, shuffle the groups."""
    groups: list[list[Row]] = []
    mixed: list[Row] = []
    for is_undivided in (True, False):
        rows = [row for row in planned if (row[0].length == layout.length) == is_undivided]
        rows = [rows[i] for i in generator.permutation(len(rows))]
        full = len(rows) // layout.group * layout.group
        groups += [rows[i : i + layout.group] for i in range(0, full, layout.group)]
        mixed += rows[full:]
    return [row for i in generator.permutation(len(groups)) for row in groups[i]] + mixed  # so no batch is shifted


def row_tensors(store: TokenStore, row: Row, layout: Layout) -> dict[str, Tensor]:
    """Return ``input_ids``, ``position_ids``, ``labels`` of a row, int64 [length] each.

    Padding is a document of its own, without labels.
    """
    ids = np.full(layout.length, layout.pad_id, np.int64)
    positions = np.zeros(layout.length, np.int64)
    labels = np.full(layout.length, IGNORED, np.int64)
    at = 0
    for start, length in row:
        end = at + length
        ids[at:end] = store.tokens[start : start + length]
        positions[at:end] = np.arange(length)
        labels[at + 1 : end] = ids[at + 1 : end]
        at = -(-end // layout.align) * layout.align
        positions[end:at] = np.arange(at - end)
    positions[at:] = np.arange(layout.length - at)
    arrays = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class PackedRows(Dataset[dict[str, Tensor]]):
    """``rows`` packed rows, epoch after epoch: item n is the same whatever was asked for before (so runs resume).

    Up to ``group - 1`` remaining rows of an epoch are dropped, so that every epoch starts a batch.
    """

    def __init__(self, store: TokenStore, rows: int, layout: Layout) -> None:
        self.store, self.layout = store, layout
        self.plan: list[Row] = []
        self.epochs = padding = 0
        while len(self.plan) < rows:
            planned, padded = plan_rows(store.offsets, layout, self.epochs)
            if not planned:
                raise UserError("there is no text to train on: every document is empty")
            self.plan += planned[: len(planned) // layout.group * layout.group] or planned
            padding += padded
            self.epochs += 1
        self.padding = padding / (len(self.plan) * layout.length)  # share of the planned tokens
        del self.plan[rows:]

    def __len__(self) -> int:
        return len(self.plan)

    def describe(self) -> str:
        return f"{len(self):,} rows of {self.layout.length:,} tokens, {self.epochs} epochs, {self.padding:.1%} padding"

    def record(self) -> dict[str, float]:
        return {"epochs": self.epochs, "padding": self.padding}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return row_tensors(self.store, self.plan[index], self.layout)


def first_rows(store: TokenStore, rows: int, layout: Layout) -> list[dict[str, Tensor]]:
    """Return up to ``rows`` rows for validation: the beginning of each document first, then its next piece, and so on.

    Only the last row of a document that is shorter than a row is padded; the rest of a longer one is left out.
    """
    pieces: list[Piece] = []
    full = layout.piece
    for turn in range(int(store.lengths.max(initial=0)) // full + 1):
        for start, length in zip(store.offsets[:-1].tolist(), store.lengths.tolist(), strict=True):
            left = length - turn * full
            if left >= full or (turn == 0 and left > 1):
                fits = turn == 0 and left <= layout.length
                pieces.append(Piece(start + turn * full, left if fits else min(left, full)))
        if len(pieces) >= rows:
            break
    return [row_tensors(store, (piece,), layout) for piece in pieces[:rows]]


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
