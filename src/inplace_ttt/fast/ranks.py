"""The scan over a row split into slices on several ranks (section 4 of the method: context parallelism).

A row of T tokens is cut into P *pieces* of equal length. Contiguous slices: piece r lies on rank r. Head-tail slices:
two pieces a rank, r and P - 1 - r, so that causal attention costs every rank the same. A piece is read like a
separate row with an initial state: the updates of the pieces before it, in document order,

    state[p + 1] = carry[p] * state[p] + total[p],   state[0] = 0,

where ``total[p]`` [D, F] is the sum of piece p's own updates at its end and ``carry[p]`` the factor by which it scales
the incoming state (its decay; 0 when a document begins inside). ``exclusive_scan`` computes it: every rank gets a share
of F of all totals, loops over the pieces, and sends the states back. A rank sends 2 * D * F numbers per piece and row,
however many ranks there are.

Everything that depends on documents is computed from the whole row, identically on all ranks: they issue the same
collectives in the same order, and raise the same errors.

Shapes: B rows, k pieces on this rank, R = B * k (piece rows, ``b * k + j``), P pieces, M chunk slots of a piece,
U updating ones, C chunk size, D, F as elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.algebra import outer, state_dtype
from ..core.chunks import HOST, ChunkTable
from ..core.rules import Rule
from ..core.scan import Call, scan
from ..core.targets import chunked

Group = Any


@dataclass(frozen=True)
class Slices:
    """A split of a row: the pieces of each rank."""

    ranks: int
    rank: int
    head_tail: bool = True

    @property
    def own(self) -> int:
        """Return k, the number of pieces on a rank."""
        return 2 if self.head_tail and self.ranks > 1 else 1

    @property
    def pieces(self) -> int:
        """Return P, the number of pieces of a row."""
        return self.own * self.ranks

    def of(self, rank: int) -> tuple[int, ...]:
        """Return the pieces of a rank, in document order."""
        return (rank,) if self.own == 1 else (rank, self.pieces - 1 - rank)

    def where(self) -> list[tuple[int, int]]:
        """Return (rank, j) for every piece: it is the j-th piece of that rank."""
        places = {p: (rank, j) for rank in range(self.ranks) for j, p in enumerate(self.of(rank))}
        return [places[p] for p in range(self.pieces)]

    def cut(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's part of a whole row. ValueError if the length is not a multiple of the pieces."""
        if x.shape[dim] % self.pieces:
            raise ValueError(f"{x.shape[dim]} tokens cannot be cut into {self.pieces} equal pieces")
        parts = x.chunk(self.pieces, dim)
        return torch.cat([parts[p] for p in self.of(self.rank)], dim)

    def join(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """Return the whole row from every rank's part, in the order of the ranks."""
        pieces = [part.chunk(self.own, dim) for part in parts]
        return torch.cat([pieces[rank][j] for rank, j in self.where()], dim)


@dataclass(frozen=True, eq=False)
class SliceTable:
    """A table of the chunks of this rank's pieces, and the factors of states from piece to piece."""

    slices: Slices
    rows: int
    table: ChunkTable
    """Of R = B * k piece rows; the same number of slots on all ranks."""
    weights: Tensor | None
    """float64 [R, U]: factor of each slot's update at the end of its piece; None: 1 everywhere."""
    binary: bool
    """True if all weights are 0 or 1."""
    carry: Tensor
    """float64 [P, B]."""
    continues: bool
    """True if any piece starts from a state of earlier pieces."""

    def to(self, device: torch.device) -> "SliceTable":
        if self.carry.device == device:
            return self
        weights = None if self.weights is None else self.weights.to(device)
        return replace(self, table=self.table.to(device), weights=weights, carry=self.carry.to(device))

    @property
    def scan_table(self) -> ChunkTable:
        """Return the table for the scan: inside a regular piece no token sees the update of the last chunk."""
        table, last = self.table, max(self.table.tokens - 1, 0)
        return table if table.index is not None else replace(table, updates=last // table.chunk_size)

    @classmethod
    def build(
        cls, slices: Slices, rows: int, tokens: int, chunk_size: int, *, documents: Tensor | None, keep: float
    ) -> "SliceTable":
        """Build the table of ``rows`` whole rows of ``tokens``. ``keep``: the rule's.

        ``documents`` [B, T]: as ``core.document_ids`` returns them.

        Raises ValueError, with the fix, when a slice boundary lies inside a chunk that updates.
        """
        C, P, k = chunk_size, slices.pieces, slices.own
        if tokens % P:
            raise ValueError(
                f"rows of {tokens:,} tokens cannot be cut into {P} equal pieces ({slices.ranks} ranks, {k} each): "
                f"use a multiple of {P * C:,} (pieces x chunk_size)"
            )
        length = tokens // P
        if documents is None:
            return cls._regular(slices, rows, length, C, keep)
        _check_cuts(ChunkTable.build(rows, tokens, C, documents=documents), length)
        return cls._irregular(slices, documents, length, C, keep)

    @classmethod
    def _regular(cls, slices: Slices, rows: int, length: int, C: int, keep: float) -> "SliceTable":
        P, R = slices.pieces, rows * slices.own
        total = P * length
        if length % C and total > C:
            raise ValueError(
                f"a slice boundary lies inside a chunk: rows of {total:,} tokens on {slices.ranks} ranks make pieces "
                f"of {length:,}, no multiple of chunk_size {C:,}. Use rows of a multiple of {P * C:,} tokens"
            )
        updates = length // C if total > C else 0
        table = ChunkTable(C, R, length, steps=-(-length // C), updates=updates)
        weights = None
        if keep != 1.0 and updates:
            weights = keep ** torch.arange(updates - 1, -1, -1, dtype=torch.float64, device=HOST).expand(R, updates)
        carry = torch.full((P, rows), keep**updates, dtype=torch.float64, device=HOST)
        return cls(slices, rows, table, weights, weights is None, carry, updates > 0 and P > 1)

    @classmethod
    def _irregular(cls, slices: Slices, documents: Tensor, length: int, C: int, keep: float) -> "SliceTable":
        P, B = slices.pieces, len(documents)
        # Of all pieces, so that all ranks have the same slots; row b * P + p. A chunk that a boundary cuts does not
        # update, so the rest of its tokens may count as a chunk's first ones.
        seen = [n // C * C for n in _read_before(documents, length).flatten().tolist()]
        pieces = documents.reshape(B * P, length)
        table = ChunkTable.build(B * P, length, C, documents=pieces, seen=seen, keep_state=True)
        assert table.update is not None
        assert table.reset is not None
        weights = torch.zeros(B * P, table.updates, dtype=torch.float64, device=HOST)
        left = torch.ones(B * P, dtype=torch.float64, device=HOST)  # of a state after slot m, at the end of the piece
        for m in reversed(range(table.steps)):
            if m < table.updates:
                weights[:, m] = left * table.update[:, m]
            left = left * (1 - (1 - keep) * table.update[:, m].double()) * ~table.reset[:, m]
        own = torch.tensor([b * P + p for b in range(B) for p in slices.of(slices.rank)], device=HOST)
        carry = left.view(B, P).mT.contiguous()
        return cls(slices, B, table.select(own), weights[own], keep == 1.0, carry, table.updates > 0 and any(seen))


def _check_cuts(whole: ChunkTable, length: int) -> None:
    """Raise ValueError if a boundary of pieces lies inside a chunk that updates."""
    assert whole.index is not None
    assert whole.update is not None
    if not whole.index.numel():
        return
    piece = whole.index // length  # -1 where there is no token
    last = piece.amax(-1)
    cut = whole.update & (whole.index[..., 0] // length != last)  # such a chunk is complete
    if bool(cut.any()):
        (b, m), C = cut.nonzero()[0].tolist(), whole.chunk_size
        start, boundary = int(whole.index[b, m, 0]), int(last[b, m]) * length
        raise ValueError(
            f"a slice boundary (token {boundary:,} of row {b}) lies inside a chunk of a document (tokens {start:,} "
            f"to {start + C - 1:,}): begin documents that cross a multiple of {length:,} tokens at a multiple of "
            f"chunk_size {C:,} (pad the ones before), or use rows with fewer, longer documents"
        )


def _read_before(documents: Tensor, length: int) -> Tensor:
    """Return how many tokens of a piece's first document lie in earlier pieces, [B, P]."""
    real, place = documents >= 0, torch.arange(documents.shape[1], device=HOST).expand(documents.shape)
    known = torch.where(real, place, -1).cummax(1).values
    before = torch.nn.functional.pad(known[:, :-1], (1, 0), value=-1)  # the real token before each
    same = (before >= 0) & (documents.gather(1, before.clamp(min=0)) == documents)
    count = real.long().cumsum(1) - 1
    position = count - torch.where(real & ~same, count, 0).cummax(1).values
    pieces = real.view(len(real), -1, length)
    first = pieces.int().argmax(-1, keepdim=True)
    found = position.view(pieces.shape).gather(2, first).squeeze(2)
    return torch.where(pieces.any(-1), found, 0)


def scan_slice(
    z_RNF: Tensor,
    v_RND: Tensor | None,
    table: SliceTable,
    group: Group,
    *,
    rule: Rule,
    width: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    slow: Tensor | None = None,
) -> Tensor:
    """Run this rank's pieces of the rows as if the rows were whole; outputs [R, T / P, D].

    z_RNF: inputs of the projection, piece by piece. v_RND: targets of ``table.table`` as they are written; None when no
    chunk updates. Others as ``core.scan.Call``; the rule must be additive. All ranks of ``group`` call it and its
    backward together; only ``exclusive_scan`` communicates, and not at all if no document crosses a piece boundary.
    """
    rule.need("additive", "a row cut over processes")
    scan_table, state = table.scan_table, None
    if v_RND is not None and table.continues:
        totals = piece_totals(chunked(z_RNF, None, table.table), v_RND, table, rule, slow)
        state = {"S": exclusive_scan(totals, table, group)}
    seen = None if v_RND is None or not scan_table.updates else v_RND[:, : scan_table.updates * scan_table.chunk_size]
    return scan(Call(rule, scan_table, z_RNF, seen, width, None, weight, bias, slow, state)).out


def piece_totals(
    z_RNF: Tensor, v_RND: Tensor, table: SliceTable, rule: Rule | None = None, slow: Tensor | None = None
) -> Tensor:
    """Return the sum of each piece's own updates at its end, [R, D, F] in the state's precision. N = U * C tokens.

    ``z`` and ``v``: the chunks' inputs and targets as they are written.
    """
    C, weights, v = table.table.chunk_size, table.weights, v_RND.to(z_RNF.dtype)
    if rule is not None and not rule.outer:
        parts = [weight * rule.write(z_RNF[:, span], v[:, span], slow) for span, weight in _spans(z_RNF, weights, C)]
        return torch.stack(parts).sum(0)
    if weights is not None and table.binary:
        v, weights = v * weights.to(v.dtype).repeat_interleave(C, 1)[..., None], None
    return _PieceTotals.apply(z_RNF, v, weights, C)


class _PieceTotals(torch.autograd.Function):
    """An autograd function of ``sum_m weight_m * sum_t v_t z_t^T``; a single product without weights."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, v: Tensor, weights: Tensor | None, C: int) -> Tensor:
        ctx.save_for_backward(z, v, weights)
        ctx.C = C
        with torch.autocast(z.device.type, enabled=False):
            if weights is None:
                return outer(v, z)
            total = z.new_zeros(z.shape[0], v.shape[2], z.shape[2], dtype=state_dtype(z.dtype))
            for span, weight in _spans(z, weights, C):
                total += outer(v[:, span], z[:, span]) * weight
            return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        z, v, weights = ctx.saved_tensors
        (H,) = grads
        with torch.autocast(z.device.type, enabled=False):
            if weights is None:
                H = H.to(z.dtype)
                return torch.bmm(v, H), torch.bmm(z, H.mT), None, None
            dz, dv = torch.empty_like(z), torch.empty_like(v)
            for span, weight in _spans(z, weights, ctx.C):
                H_m = (H * weight).to(z.dtype)
                dz[:, span], dv[:, span] = torch.bmm(v[:, span], H_m), torch.bmm(z[:, span], H_m.mT)
        return dz, dv, None, None


def _spans(z: Tensor, weights_RU: Tensor | None, C: int) -> list[tuple[slice, Tensor]]:
    """Return each updating slot's tokens and its weight [R, 1, 1]."""
    dtype, count = state_dtype(z.dtype), z.shape[1] // C
    weights = z.new_ones(z.shape[0], count, dtype=dtype) if weights_RU is None else weights_RU.to(dtype)
    return [(slice(m * C, (m + 1) * C), weights[:, m, None, None]) for m in range(count)]


def exclusive_scan(totals_RDF: Tensor, table: SliceTable, group: Group) -> Tensor:
    """Return the initial state of each of this rank's pieces, [R, D, F]; differentiable. All ranks call it."""
    return _ExclusiveScan.apply(totals_RDF, table, group)


class _ExclusiveScan(torch.autograd.Function):
    """An autograd function of ``exclusive_scan``; backward is the same scan, from the last piece to the first."""

    @staticmethod
    def forward(ctx: Any, totals: Tensor, table: SliceTable, group: Group) -> Tensor:
        ctx.table, ctx.group = table, group
        return _scan(totals, table, group, reverse=False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _scan(grads[0], ctx.table, ctx.group, reverse=True), None, None


def _scan(x_RDF: Tensor, table: SliceTable, group: Group, reverse: bool) -> Tensor:
    slices, k = table.slices, table.slices.own
    R, D, F = x_RDF.shape
    sizes = [F // slices.ranks + (j < F % slices.ranks) for j in range(slices.ranks)]
    mine = sizes[slices.rank]
    sent = torch.cat([part.reshape(-1) for part in torch.split(x_RDF, sizes, 2)])
    here = exchange(sent, [R * D * f for f in sizes], [R * D * mine] * slices.ranks, group)
    parts = here.view(slices.ranks, R // k, k, D, mine)
    running = parts.new_zeros(R // k, D, mine)
    order = list(enumerate(slices.where()))
    for p, (rank, j) in reversed(order) if reverse else order:
        own = parts[rank, :, j].clone()
        parts[rank, :, j] = running
        running = own.add_(running * table.carry[p].to(running.dtype)[:, None, None])
    back = exchange(here, [R * D * mine] * slices.ranks, [R * D * f for f in sizes], group)
    pieces = torch.split(back, [R * D * f for f in sizes])
    return torch.cat([piece.view(R, D, f) for piece, f in zip(pieces, sizes, strict=True)], 2)


def exchange(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """Run all-to-all on a flat tensor: ``sent[j]`` elements to rank j, ``received[j]`` from it."""
    out = x.new_empty(sum(received))
    dist.all_to_all_single(out, x, received, sent, group=group)
    return out
