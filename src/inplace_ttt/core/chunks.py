"""The chunk table of a call: the tokens of each chunk, its document and its row.

The chunk grid of a document is anchored at its first real token, so padding, packing and the way a text is cut into
calls never change which chunk a token belongs to.

A call sees, per row, the tokens still *pending* from earlier calls (fewer than C) and T new ones. Positions in that
joint sequence are called *extended*: 0 .. P-1 for pending tokens, P + t for new token t.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import UserError

HOST = "cpu"
"""Device on which tables are built, whatever PyTorch's default device is."""


def document_ids(
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    rows: int,
    tokens: int,
) -> Tensor | None:
    """Return each token's document number, int64 [B, T], -1 for padding; None if every row is one unpadded document.

    Documents come from ``seq_idx`` [B, T] (any numbering), else ``cu_seqlens`` [n + 1] (one row, flattened batch), else
    from the steps of ``position_ids`` [B, T] or [1, T]: a step other than +1 starts a document. Padding comes from the
    last T columns of ``attention_mask`` [B, >= T], nonzero for real tokens; with a mask, position_ids are not read (a
    padded row's positions jump without a new document).
    """
    given = (attention_mask, position_ids, seq_idx, cu_seqlens)
    return None if all(x is None for x in given) else _document_ids(given, rows, tokens)


# Reads tensors on the host: one graph break under torch.compile, before the first layer.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _document_ids(given: tuple[Tensor | None, ...], rows: int, tokens: int) -> Tensor | None:
    attention_mask, position_ids, seq_idx, cu_seqlens = given
    documents = None
    if seq_idx is not None:
        documents = seq_idx.detach().reshape(-1, tokens).to("cpu", torch.int64)
    elif cu_seqlens is not None:
        bounds = cu_seqlens.detach().to("cpu", torch.int64)
        if rows != 1 or int(bounds[-1]) != tokens or int(bounds[0]) != 0:
            raise ValueError(
                f"cu_seqlens must run from 0 to the {tokens} tokens of a single row, "
                f"got {int(bounds[0])} .. {int(bounds[-1])} for {rows} rows"
            )
        documents = torch.bucketize(torch.arange(tokens, device=HOST), bounds[1:-1], right=True).view(1, tokens)
    elif position_ids is not None and attention_mask is None and tokens > 1:
        positions = position_ids.detach().reshape(-1, tokens).to("cpu", torch.int64)
        starts = torch.zeros_like(positions)
        starts[:, 1:] = (positions[:, 1:] - positions[:, :-1]) != 1
        documents = starts.cumsum(-1) if bool(starts.any()) else None
    if documents is not None:
        documents = documents.expand(rows, tokens)
        if bool((documents == documents[:, :1]).all()) and bool((documents >= 0).all()):
            documents = None
    if attention_mask is not None:
        mask = attention_mask.detach()[:, -tokens:].to("cpu")
        real = mask.bool()
        if mask.dtype != torch.bool and bool((mask != real).any()):
            raise UserError(
                "attention_mask holds numbers other than 0 and 1. To pack documents pass position_ids that begin at 0 "
                "in each, or seq_idx, and no mask"
            )
        if real.shape != (rows, tokens):
            raise ValueError(
                f"attention_mask must cover the call's {rows} x {tokens} tokens, got {tuple(attention_mask.shape)}"
            )
        if not bool(real.all()):
            documents = torch.zeros(rows, tokens, dtype=torch.int64, device=HOST) if documents is None else documents
            documents = documents.masked_fill(~real, -1)
    return documents


@dataclass(frozen=True, eq=False)
class ChunkTable:
    """A table of the chunks of one call.

    *Regular* (``index`` is None): T real tokens of one document in every row, and chunk m is extended positions
    m*C .. (m+1)*C - 1, cut at P + T, in all of them. Otherwise ``index`` lists the positions.

    Only chunks with an effect are listed: a chunk that sees the initial state and whose update is never used is left
    out, unless that state adds to the output (``from_zero`` is False).
    """

    chunk_size: int
    rows: int
    tokens: int
    prefix: int = 0
    """P: pending tokens that precede the new ones (the largest count over rows; a row's own come first)."""
    steps: int = 0
    """M: chunk slots in a row."""
    updates: int = 0
    """Slots 0 .. updates-1 may change S."""
    keep_state: bool = False
    """True if the state after the call is needed."""
    seen: tuple[int, ...] = ()
    """Tokens read of each row's current document after this call; seen % C of them are pending."""
    restarted: tuple[bool, ...] = ()
    """Rows whose current document began inside this call."""
    index: Tensor | None = None
    """int64 [B, M, C] extended positions, -1 where a slot has no token."""
    update: Tensor | None = None
    """bool [B, M]: the slot is a complete chunk and changes S."""
    reset: Tensor | None = None
    """bool [B, M]: the slot begins a document: S = 0 before it."""
    tail: Tensor | None = None
    """int64 [B, C] extended positions of the tokens pending after the call, -1 where none."""
    outside_slots: Tensor | None = None
    """int64 [R]: new tokens b * T + t in no slot (S = 0 for them, and no update that matters)."""
    real: Tensor | None = None
    """bool [B, T] on the CPU: which new tokens are real; None: all."""

    @property
    def is_pending_only(self) -> bool:
        """Tell if the call only adds to the pending tokens: it completes no chunk and has no padding."""
        return self.index is None and self.prefix + self.tokens < self.chunk_size

    @property
    def changes_state(self) -> bool:
        """Tell if S after the call differs from S before it."""
        return self.updates > 0 or (self.reset is not None and self.steps > 0)

    @property
    def pending(self) -> tuple[int, ...]:
        """Return the number of pending tokens of each row after this call."""
        return tuple(n % self.chunk_size for n in self.seen)

    def to(self, device: torch.device) -> "ChunkTable":
        """Return the same table with its tensors on ``device``."""
        if self.index is None or self.index.device == device:
            return self
        moved = {name: getattr(self, name) for name in ("index", "update", "reset", "tail", "outside_slots")}
        return replace(self, **{name: value.to(device) for name, value in moved.items() if value is not None})

    def select(self, rows: Tensor) -> "ChunkTable":
        """Return an irregular table's part for some rows, without a state afterwards."""
        assert self.index is not None
        assert self.update is not None
        assert self.reset is not None
        assert self.outside_slots is not None
        alone = torch.zeros(self.rows * self.tokens, dtype=torch.bool, device=self.outside_slots.device)
        alone[self.outside_slots] = True
        return ChunkTable(
            *(self.chunk_size, len(rows), self.tokens, self.prefix, self.steps, self.updates),
            index=self.index[rows],
            update=self.update[rows],
            reset=self.reset[rows],
            outside_slots=alone.view(self.rows, self.tokens)[rows].flatten().nonzero().flatten(),
        )

    @classmethod
    def build(
        cls,
        rows: int,
        tokens: int,
        chunk_size: int,
        *,
        documents: Tensor | None = None,
        seen: Sequence[int] | None = None,
        keep_state: bool = False,
        from_zero: bool = True,
    ) -> "ChunkTable":
        """Build the table of a call of ``rows`` x ``tokens``.

        ``documents``: as ``document_ids`` gives them. ``seen``: tokens already read of each row's current document
        (None: nothing); a row's first document in the call continues it. ``from_zero``: the initial state adds nothing
        to the output (``Rule.from_zero``).
        """
        before = (0,) * rows if seen is None else tuple(seen)
        if len(before) != rows:
            raise ValueError(f"the state holds {len(before)} rows, the call has {rows}")
        C = chunk_size
        pending = [n % C for n in before]
        prefix = max(pending, default=0)
        if documents is None and (len(set(pending)) == 1 or prefix + tokens < C):
            extended = prefix + tokens
            steps, updates = -(-extended // C), (extended if keep_state else max(extended - 1, 0)) // C
            seen = tuple(n + tokens for n in before)
            return cls(C, rows, tokens, prefix, steps, updates, keep_state, seen, restarted=(False,) * rows)
        if documents is None:
            documents = torch.zeros(rows, tokens, dtype=torch.int64, device=HOST)
        table: ChunkTable = _irregular(documents, C, before, keep_state, from_zero)
        return table


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _irregular(documents: Tensor, C: int, before: tuple[int, ...], keep_state: bool, from_zero: bool) -> ChunkTable:
    B, T = documents.shape
    seen = torch.tensor(before, device=HOST)
    pending = seen % C
    P = int(pending.max())
    real = documents >= 0
    count = real.sum(1)

    # Real tokens of each row, in order, left-aligned ("compact" positions j).
    order = (~real).long().argsort(dim=1, stable=True)
    j = torch.arange(T, device=HOST).expand(B, T)
    valid = j < count[:, None]
    compact = documents.gather(1, order)
    change = valid.clone()
    change[:, 1:] &= compact[:, 1:] != compact[:, :-1]
    number = change.long().cumsum(1) - 1
    start = torch.where(change, j, 0).cummax(1).values
    position = j - start + torch.where(number == 0, seen[:, None], 0)
    chunk, offset = position // C, position % C

    # Slots: one per chunk touched; a row's first slot also holds its pending tokens.
    first = valid & ((offset == 0) | (j == 0))
    slot = first.long().cumsum(1) - 1
    slots = first.sum(1)
    M = int(slots.max()) if B else 0
    row = torch.arange(B, device=HOST)[:, None].expand(B, T)
    index = torch.full((B, M, C), -1, device=HOST)
    index[row[valid], slot[valid], offset[valid]] = P + order[valid]
    for b, p in enumerate(pending.tolist()):
        if p and slots[b]:
            index[b, 0, :p] = torch.arange(p, device=HOST)
    slot_chunk = torch.full((B, M), -1, device=HOST)
    slot_number = torch.full_like(slot_chunk, -1)
    slot_chunk[row[first], slot[first]] = chunk[first]
    slot_number[row[first], slot[first]] = number[first]
    exists = slot_chunk >= 0
    complete = (index >= 0).all(-1)
    followed = torch.zeros(B, M, dtype=torch.bool, device=HOST)
    followed[:, :-1] = slot_number[:, 1:] == slot_number[:, :-1]
    final = exists & (slot_number == number.max(1, keepdim=True).values)
    wanted = final & keep_state
    update = complete & exists & (followed | wanted)

    last = (slots - 1).clamp(min=0)
    tail = torch.full((B, C), -1, device=HOST)
    for b, p in enumerate(pending.tolist()):
        if not slots[b]:
            tail[b, :p] = torch.arange(p, device=HOST)
        elif not complete[b, last[b]]:
            tail[b] = index[b, last[b]]
    after = torch.where(count > 0, position.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0] + 1, seen)
    restarted = (count > 0) & (number.max(1).values > 0)

    # Keep the slots with an effect, in order.
    matter = exists & ((slot_chunk > 0) | update | wanted) if from_zero else exists
    place = matter.long().cumsum(1) - 1
    steps = int(matter.sum(1).max())
    rows_, slots_ = matter.nonzero(as_tuple=True)
    kept_index = torch.full((B, steps, C), -1, device=HOST)
    kept_update = torch.zeros(B, steps, dtype=torch.bool, device=HOST)
    kept_reset = torch.zeros(B, steps, dtype=torch.bool, device=HOST)
    kept_index[rows_, place[matter]] = index[rows_, slots_]
    kept_update[rows_, place[matter]] = update[rows_, slots_]
    kept_reset[rows_, place[matter]] = slot_chunk[rows_, slots_] == 0
    updating = kept_update.any(0).nonzero()
    updates = int(updating[-1]) + 1 if len(updating) else 0
    alone = torch.ones(B, P + T, dtype=torch.bool, device=HOST)
    alone[(kept_index >= 0).nonzero(as_tuple=True)[0], kept_index[kept_index >= 0]] = False
    return ChunkTable(
        chunk_size=C, rows=B, tokens=T, prefix=P, steps=steps, updates=updates, keep_state=keep_state,
        seen=tuple(after.tolist()), restarted=tuple(restarted.tolist()), index=kept_index, update=kept_update,
        reset=kept_reset, tail=tail, outside_slots=alone[:, P:].flatten().nonzero().flatten(),
        real=None if bool(real.all()) else real,
    )  # fmt: skip
