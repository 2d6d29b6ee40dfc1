"""State between calls: the fast weights and the pending tokens, whose chunk is not complete yet."""

import copy
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .algebra import accumulate, outer
from .chunks import HOST, ChunkTable
from .rules import Rule, State, Sum
from .scan import scaled
from .targets import chunked

ROLLBACK_TOKENS = 128
"""Completed chunks are kept for at least this many tokens, so that rejected drafts can be rolled back."""


class FastWeights:
    """A state of one layer for B rows, under one rule.

    ``tensors``: the rule's state, [B, ...] each, None while every row is at the beginning of a document; pending inputs
    z [B, C, F] and u [B, C, D], of which row b's first ``seen[b] % C`` are filled; ``history``: the last completed
    chunks for ``rollback``, [B, R * C, W] each: z, u and v as written where an update can be subtracted again, else
    z, u and the states before them, [B, R, ...] under "state.NAME".

    ``snapshots``: keep states in the history even if the rule is additive (gated targets). ``form``: "dense" here;
    others are subclasses (``fast.factors``).

    All tensors are replaced, never modified in place, except the unfilled part of the pending buffers.
    """

    numbers: tuple[str, ...] = ("seen", "kept")
    """Attributes with one number per row."""
    parts: tuple[str, ...] = ("z", "u")
    """Attributes that are tensors [B, ...] or None."""

    def __init__(self, rows: int, chunk_size: int, rule: Rule | None = None, *, snapshots: bool = False) -> None:
        self.rows, self.chunk_size, self.rule = rows, chunk_size, Sum() if rule is None else rule
        self.form: str | int = "dense"
        self.snapshots = snapshots or not self.rule.additive or self.rule.keep == 0
        self.tensors: State | None = None
        self.z: Tensor | None = None
        self.u: Tensor | None = None
        self.history: dict[str, Tensor] = {}
        self.slow: Tensor | None = None
        """W0 of the last call, for undoing updates that depend on it. Not part of the state."""
        self.seen: tuple[int, ...] = (0,) * rows
        self.kept: tuple[int, ...] = (0,) * rows
        self.real: Tensor | None = None
        self.fed = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "slow": None}

    def new(self, rows: int) -> "FastWeights":
        """Return an empty state of the same kind."""
        return FastWeights(rows, self.chunk_size, self.rule, snapshots=self.snapshots)

    @property
    def S(self) -> Tensor | None:
        """Return S [B, D, F] of a linear rule; None while zero."""
        return None if self.tensors is None else self.tensors.get("S")

    def dense(self) -> Tensor | None:
        """Return S [B, D, F] of a linear rule from any form of state; None while zero. UserError for other rules."""
        self.rule.need("linear", "a matrix of fast weights")
        return self.S

    @property
    def updates(self) -> tuple[int, ...]:
        """Return the number of updates of each row's current document."""
        return tuple(n // self.chunk_size for n in self.seen)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors, all rows."""
        return sum(x.numel() * x.element_size() for x in self.all_tensors().values())

    def all_tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in self.parts if getattr(self, name) is not None}
        found |= {f"tensors.{name}": x for name, x in (self.tensors or {}).items()}
        return found | {f"history.{name}": x for name, x in self.history.items()}

    def past(self, table: ChunkTable) -> tuple[Tensor | None, Tensor | None]:
        """Return pending z [B, P, F] and u [B, P, D], P = ``table.prefix``."""
        if not table.prefix or self.z is None or self.u is None:
            return None, None
        return self.z[:, : table.prefix], self.u[:, : table.prefix]

    # -- around a call --------------------------------------------------------------------------------------------

    def begin(self, rule: Rule, table: ChunkTable, z_BTF: Tensor, v_BND: Tensor | None) -> ChunkTable:
        """Return the table to scan a call with, from ``tensors``. ``rule``: that of this call and later ones."""
        self.rule = rule
        return table

    def recall(self, table: ChunkTable, z_BTF: Tensor) -> Tensor | None:
        """Return the output of a state in another form, ``S z_t`` [B, T, D] in S's precision; None for nothing."""
        return None

    def output(self, rule: Rule, z_BTF: Tensor, width: int) -> Tensor | None:
        """Return the state's part of the output, [B, T, D], without updates between tokens; None for nothing."""
        if self.tensors is None and rule.from_zero:
            return None
        state = rule.init(self.rows, width, z_BTF.shape[-1], z_BTF) if self.tensors is None else self.tensors
        return rule.apply(state, z_BTF)

    def wanted_snapshots(self, table: ChunkTable) -> set[int]:
        """Return the slots whose preceding state goes into the history."""
        if not self.snapshots:
            return set()
        return {m for own in completed(table) for m in own[-self.reach :]}

    @property
    def reach(self) -> int:
        """Return R, the number of chunks per row that the history holds."""
        return -(-ROLLBACK_TOKENS // self.chunk_size)

    def absorb(
        self,
        table: ChunkTable,
        z_BTF: Tensor,
        u_BTD: Tensor,
        v_BND: Tensor | None,
        new: State | None,
        before: dict[int, State],
        slow: Tensor | None,
    ) -> None:
        """Update the state after a call with ``table``: the new tensors, its pending tokens, its completed chunks."""
        self.slow = slow if self.rule.additive and not self.rule.outer else None
        if new is not None and (self.tensors is not None or table.updates):
            self.tensors = new
        restarted = [b for b, again in enumerate(table.restarted) if again]
        if table.updates or restarted:
            past_z, past_u = self.past(table)
            slots, chunks = completed(table), None
            if v_BND is not None:
                chunks = {"z": chunked(z_BTF, past_z, table), "u": chunked(u_BTD, past_u, table), "v": v_BND}
            self._remember(slots, restarted, chunks, before)
            self._absorb_chunks(slots, restarted, chunks)
        self._set_pending(table, z_BTF, u_BTD)
        self.note(table.tokens, table.real, table.seen)

    def _absorb_chunks(self, slots: list[list[int]], restarted: list[int], chunks: dict[str, Tensor] | None) -> None:
        """Apply completed chunks to a state that the scan does not carry."""

    def note(self, tokens: int, real: Tensor | None, seen: tuple[int, ...]) -> None:
        """Record the positions read, and which of them are tokens (bool [B, tokens]; None: all)."""
        most = ROLLBACK_TOKENS + 2 * self.chunk_size
        if real is not None or self.real is not None:
            old = torch.ones(self.rows, self.fed, dtype=torch.bool, device=HOST) if self.real is None else self.real
            new = torch.ones(self.rows, tokens, dtype=torch.bool, device=HOST) if real is None else real
            self.real = torch.cat([old, new], 1)[:, -most:]
        self.fed = min(self.fed + tokens, most)
        self.seen = seen

    def _set_pending(self, table: ChunkTable, z_BTF: Tensor, u_BTD: Tensor) -> None:
        if table.is_pending_only:
            self.z, self.u = self._append(self.z, z_BTF), self._append(self.u, u_BTD)
        else:
            past_z, past_u = self.past(table)
            self.z, self.u = _tail(table, z_BTF, past_z), _tail(table, u_BTD, past_u)

    def _append(self, buffer: Tensor | None, x_BTW: Tensor) -> Tensor:
        """Return the pending buffer with ``x`` after each row's tokens; written in place where autograd allows."""
        B, T, W = x_BTW.shape
        if buffer is None:
            buffer = x_BTW.new_zeros(B, self.chunk_size, W)
        elif x_BTW.requires_grad or buffer.requires_grad or (buffer.is_inference() and not x_BTW.is_inference()):
            buffer = buffer.clone()
        starts = [n % self.chunk_size for n in self.seen]
        if len(set(starts)) == 1:
            buffer[:, starts[0] : starts[0] + T] = x_BTW
        else:
            where = torch.tensor(starts, device=x_BTW.device)[:, None] + torch.arange(T, device=x_BTW.device)
            buffer[torch.arange(B, device=x_BTW.device)[:, None], where] = x_BTW.to(buffer.dtype)
        return buffer

    def _remember(
        self, slots: list[list[int]], restarted: list[int], chunks: dict[str, Tensor] | None, before: dict[int, State]
    ) -> None:
        """Keep each row's last completed chunks of its current document, newest at the right."""
        C, R = self.chunk_size, self.reach
        old = [0 if b in restarted else k for b, k in enumerate(self.kept)]
        self.kept = tuple(min(k + len(own), R) for k, own in zip(old, slots, strict=True))
        if chunks is None:
            return
        # Chunk numbers in [history | new slots]: the last R of each row.
        H = 0 if not self.history else self.history["z"].shape[1] // C
        pick = []
        for own in slots:
            numbers = [*range(H), *(H + m for m in own)][-R:]
            pick.append([0] * (R - len(numbers)) + numbers)
        names = [name for name in chunks if name != "v" or not self.snapshots]
        # By name and number, [B, ...] each.
        found = {n: dict(enumerate(torch.unflatten(chunks[n], 1, (-1, C)).unbind(1), H)) for n in names}
        for m, state in before.items():
            for name, x in state.items():
                found.setdefault(f"state.{name}", {})[H + m] = x
        for name, x in self.history.items():
            kept = x if name.startswith("state.") else torch.unflatten(x, 1, (H, C))
            new = {m: y.to(x.dtype) for m, y in found.get(name, {}).items()}
            found[name] = new | dict(enumerate(kept.unbind(1)))
        self.history = {}
        for name, parts in found.items():
            like = next(iter(parts.values()))  # in places of no chunk
            # Slices, not an index from the host, for which a GPU would wait.
            x = torch.stack([parts.get(m, like)[b] for b, own in enumerate(pick) for m in own])
            x = torch.unflatten(x, 0, (self.rows, R))
            self.history[name] = x if name.startswith("state.") else x.flatten(1, 2)

    # -- one token at a time --------------------------------------------------------------------------------------

    @property
    def can_step(self) -> bool:
        """Tell if the next token can be read by a step: something was read, and S is dense (or zero)."""
        if not self.rule.linear or (self.tensors is None and not self.rule.from_zero):
            return False
        return self.z is not None and self.u is not None and self.z.shape[1] == self.chunk_size

    def end_step(self) -> list[int]:
        """Count a step's token; return the rows whose chunk it completed, for ``core.layer.complete``."""
        self.note(1, None, tuple(n + 1 for n in self.seen))
        return [b for b, n in enumerate(self.seen) if n % self.chunk_size == 0]

    def complete(
        self,
        rows: list[int],
        rule: Rule,
        chunk: dict[str, Tensor],
        slow: Tensor | None,
        keep_R1: Tensor | None = None,
        *,
        learned: bool = True,
    ) -> None:
        """Apply the update of one complete chunk of some rows.

        ``chunk``: z [R, C, F], targets v [R, C, D] and, where pending tokens are inputs, u. ``keep``: gates.
        ``learned`` False: decay only, no write.
        """
        z, v = chunk["z"], chunk["v"]
        before = {0: self._start(rule, z, v)} if self.snapshots else {}
        chunk = chunk | {"v": self._update(rows, rule, z, v, slow, keep_R1, learned)}
        if len(rows) < self.rows:
            index = torch.tensor(rows, device=z.device)
            chunk = {n: x.new_zeros(self.rows, *x.shape[1:]).index_copy(0, index, x) for n, x in chunk.items()}
        self._remember([[0] if b in rows else [] for b in range(self.rows)], [], chunk, before)

    def _start(self, rule: Rule, z: Tensor, v: Tensor) -> State:
        """Return the tensors of all rows, those of a document's beginning included."""
        if self.tensors is not None:
            return self.tensors
        return rule.init(self.rows, v.shape[-1], z.shape[-1], z)

    def _update(
        self,
        rows: list[int],
        rule: Rule,
        z: Tensor,
        v: Tensor,
        slow: Tensor | None,
        keep_R1: Tensor | None = None,
        learned: bool = True,
    ) -> Tensor:
        """Update the tensors of some rows by one chunk each; return its targets as they are written."""
        self.rule, self.slow = rule, slow if rule.additive and not rule.outer else None
        index, v = torch.tensor(rows, device=z.device), v.to(z.dtype)
        if not learned:  # decay still applies
            if rule.additive and rule.keep != 1 and self.tensors is not None:
                one = next(iter(self.tensors.values())).new_ones(self.rows)
                factor = one.index_fill(0, index, rule.keep)
                self.tensors = {name: scaled(x, factor) for name, x in self.tensors.items()}
            return v
        start = self._start(rule, z, v)
        old = {name: x.index_select(0, index) for name, x in start.items()}  # a copy: forks may share these tensors
        with torch.autocast(z.device.type, enabled=False):
            v = rule.values(z, v, slow).to(z.dtype) if rule.outer else v
            if rule.outer and keep_R1 is None:
                new = old | {"S": accumulate(None if self.tensors is None else old["S"], z, v, rule.keep)}
            else:
                shrunk = old if keep_R1 is None else {k: scaled(x, keep_R1[:, 0]) for k, x in old.items()}
                new = rule.update_as_written(shrunk, z, v, slow)
        whole = len(rows) == self.rows
        self.tensors = new if whole else {name: x.index_copy(0, index, new[name]) for name, x in start.items()}
        return v

    def add(self, rule: Rule, z_BNF: Tensor, v_BND: Tensor, slow: Tensor | None) -> None:
        """Apply an update of any length that does not come from tokens of the rows, and count it as one chunk.

        For outer rules. An empty state is initialised by its own rule, which may carry more than ``rule`` writes.
        """
        self.tensors = self._start(self.rule, z_BNF, v_BND)
        self._update(list(range(self.rows)), rule, z_BNF, v_BND, slow)
        self.seen = tuple(n + self.chunk_size for n in self.seen)

    def adopt(self, other: "FastWeights") -> None:
        """Adopt, between two chunks, a dense state of the same rows that started from this one and has learned since.

        Its updates are counted, and cannot be rolled back.
        """
        if any(n % self.chunk_size for n in self.seen):
            raise ValueError("tokens are pending: close their chunk first")
        self.tensors, self.history, self.kept = other.tensors, {}, (0,) * self.rows
        self.seen = tuple(mine + more for mine, more in zip(self.seen, other.seen, strict=True))

    def close_chunk(self) -> None:
        """Close every row's pending chunk here: the next token begins one."""
        C = self.chunk_size
        self.seen = tuple(-(-n // C) * C for n in self.seen)

    # -- what a cache does to its rows ----------------------------------------------------------------------------

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Make row b the old row ``rows[b]`` (beam reorder, batch selection or repetition)."""
        index = rows if isinstance(rows, Tensor) else torch.tensor(rows, device=HOST)
        order: list[int] = index.tolist()
        self._map(lambda x: x.index_select(0, index.to(x.device)))
        self.real = None if self.real is None else self.real[order]
        for name in self.numbers:
            setattr(self, name, tuple(getattr(self, name)[b] for b in order))
        self.rows = len(order)
        self.tensors = self.tensors if any(self.updates) else None  # allocated for rows that are gone now
        self.history = self.history if any(self.kept) else {}

    @staticmethod
    def stack(parts: Sequence["FastWeights"]) -> "FastWeights":
        """Concatenate the rows of several states (copies); shorter rows are padded.

        Dense where one of them is. Raises ValueError for no states, or for states of different chunk size or rule.
        """
        first = next((x for x in parts if type(x) is FastWeights), parts[0] if parts else None)
        kinds = {part.chunk_size for part in parts}
        if first is None or len(kinds) != 1:
            raise ValueError(f"states side by side need one chunk size, got {sorted(kinds)}")
        if wrong := next((why for x in parts if (why := x.rule.difference(first.rule))), None):
            raise ValueError(f"states side by side need one rule: a state was made {wrong}")
        rows = [part.rows for part in parts]
        new = first.new(sum(rows))
        new._stack(parts, rows)
        for name in FastWeights.numbers:
            setattr(new, name, tuple(n for part in parts for n in getattr(part, name)))
        new.z, new.u = stacked([part.z for part in parts], rows), stacked([part.u for part in parts], rows)
        names = sorted({name for part in parts for name in part.history})
        found = {name: stacked([part.history.get(name) for part in parts], rows) for name in names}
        new.history = {name: x for name, x in found.items() if x is not None}
        new.fed = max(part.fed for part in parts)
        if any(part.real is not None or part.fed != new.fed for part in parts):
            reals = [
                torch.ones(x.rows, x.fed, dtype=torch.bool, device=HOST) if x.real is None else x.real for x in parts
            ]
            new.real = stacked(reals, rows, side="left")
        return new

    def _stack(self, parts: Sequence["FastWeights"], rows: Sequence[int]) -> None:
        """Copy the rows of ``parts`` into this state, dense."""
        states = [part.as_dense() for part in parts]
        known = next((state for state in states if state is not None), None)
        if known is None:
            return
        like = next(iter(known.values()))
        if "S" in known:
            D, F = known["S"].shape[1:]
        else:
            D, F = next((p.u.shape[-1], p.z.shape[-1]) for p in parts if p.z is not None and p.u is not None)
        start = [self.rule.init(n, D, F, like) if x is None else x for x, n in zip(states, rows, strict=True)]
        found = {name: stacked([x[name] for x in start], rows) for name in known}
        self.tensors = {name: x for name, x in found.items() if x is not None}

    def as_dense(self) -> State | None:
        """Return the rule's tensors; None while they are those of ``Rule.init``."""
        return self.tensors

    def reset(self) -> None:
        """Reset all rows: the next token begins a document."""
        self.__dict__.update(self.new(self.rows).__dict__)

    def fork(self) -> "FastWeights":
        twin = copy.copy(self)
        twin.slow = self.slow
        twin._map(torch.clone)
        return twin

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        for name in self.parts:
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))
        self.tensors = None if self.tensors is None else {name: function(x) for name, x in self.tensors.items()}
        self.history = {name: function(x) for name, x in self.history.items()}

    def detach(self) -> None:
        """Detach the state from its autograd graph (truncated backpropagation through time)."""
        self._map(torch.Tensor.detach)

    def rollback(self, tokens: int) -> None:
        """Undo the last ``tokens`` positions read by every row; padding among them is skipped.

        Raises ValueError, changing nothing, when that is further back than the kept chunks.
        """
        if tokens <= 0:
            return
        drop = self._real_tokens(tokens)
        C = self.chunk_size
        back = [-(-max(d - n % C, 0) // C) for d, n in zip(drop, self.seen, strict=True)]
        for b, (chunks, kept) in enumerate(zip(back, self.kept, strict=True)):
            if chunks > kept or drop[b] > self.seen[b]:
                reach = min(kept * C + self.seen[b] % C, self.seen[b])
                raise ValueError(
                    f"cannot take back {drop[b]} tokens of row {b}: its fast weights can go back {reach} "
                    f"(at least {ROLLBACK_TOKENS} within a document). Read the text again from an empty cache instead"
                )
        for b, chunks in enumerate(back):
            if chunks:
                self._reopen(b, chunks)
        self.seen = tuple(n - d for n, d in zip(self.seen, drop, strict=True))
        self.real = None if self.real is None else self.real[:, : self.real.shape[1] - tokens]
        self.fed = max(self.fed - tokens, 0)

    def _real_tokens(self, tokens: int) -> list[int]:
        if self.real is None:
            return [tokens] * self.rows
        if tokens > self.real.shape[1]:
            raise ValueError(f"cannot take back {tokens} positions of a padded batch, only {self.real.shape[1]}")
        counts: list[int] = self.real[:, self.real.shape[1] - tokens :].sum(1).tolist()
        return counts

    def last_chunk(self, b: int, n: int = 1) -> dict[str, Tensor]:
        """Return row b's n-th last completed chunk: z [1, C, F], u and, where kept, v [1, C, D]."""
        C = self.chunk_size
        found = {name: x for name, x in self.history.items() if not name.startswith("state.")}
        return {name: x[b : b + 1, x.shape[1] - n * C : x.shape[1] - (n - 1) * C] for name, x in found.items()}

    def before(self, b: int, chunks: int = 1) -> State | None:
        """Return row b's state before its last completed chunks, [1, ...]; None where it is unknown."""
        if self.snapshots:
            return {
                name.removeprefix("state."): x[b : b + 1, x.shape[1] - chunks]
                for name, x in self.history.items()
                if name.startswith("state.")
            }
        if self.tensors is None:
            return None
        S = self.tensors["S"][b : b + 1]
        for n in range(1, chunks + 1):
            chunk = self.last_chunk(b, n)
            z, v = chunk["z"], chunk["v"].to(chunk["z"].dtype)
            S = (S - (outer(v, z) if self.rule.outer else self.rule.write(z, v, self.slow))) / self.rule.keep
        return {"S": S}

    def _reopen(self, b: int, chunks: int) -> None:
        """Undo the updates of row b's last completed chunks and make their tokens pending again."""
        self._undo(b, chunks)
        first = self.last_chunk(b, chunks)
        if self.z is not None and self.u is not None:
            self.z, self.u = self.z.clone(), self.u.clone()
            self.z[b], self.u[b] = first["z"][0], first["u"][0]
        shifted = {}
        for name, x in self.history.items():
            x = x.clone()
            x[b] = x[b].roll(chunks * (1 if name.startswith("state.") else self.chunk_size), 0)
            shifted[name] = x
        self.history = shifted
        self.kept = tuple(k - chunks if row == b else k for row, k in enumerate(self.kept))

    def _undo(self, b: int, chunks: int) -> None:
        """Remove row b's last updates from the state."""
        old = self.before(b, chunks)
        if old is None or self.tensors is None:
            return
        index = torch.tensor([b], device=next(iter(old.values())).device)
        self.tensors = {name: x.index_copy(0, index, old[name].to(x.dtype)) for name, x in self.tensors.items()}


def completed(table: ChunkTable) -> list[list[int]]:
    """Return for each row the slots in which a call completes chunks of the row's current document."""
    if table.update is None or table.reset is None:
        return [list(range(table.updates))] * table.rows
    slots = []
    for update, reset, again in zip(table.update.tolist(), table.reset.tolist(), table.restarted, strict=True):
        begin = max((m for m, r in enumerate(reset) if r), default=0) if again else 0
        slots.append([m for m, u in enumerate(update[: table.updates]) if u and m >= begin])
    return slots


def stacked(parts: Sequence[Tensor | None], rows: Sequence[int], side: str = "right") -> Tensor | None:
    """Concatenate tensors [rows, n, ...] along the rows, zero where one is None or has a smaller n; None if all are."""
    known = [x for x in parts if x is not None]
    if not known:
        return None
    none, dtype = known[0][:1, :0], reduce(torch.promote_types, [x.dtype for x in known])
    whole = [none.expand(n, *none.shape[1:]) if x is None else x for x, n in zip(parts, rows, strict=True)]
    return pad_sequence([row.to(dtype) for x in whole for row in x], batch_first=True, padding_side=side)


def _tail(table: ChunkTable, x_BTW: Tensor, past_BPW: Tensor | None) -> Tensor:
    """Return the tokens left pending, [B, C, W], zero where there is none."""
    T, W = x_BTW.shape[1:]
    C, P = table.chunk_size, table.prefix
    if table.tail is None:
        n = table.pending[0] if table.rows else 0
        fresh = x_BTW[:, T - min(n, T) :]
        if n > T and past_BPW is not None:
            fresh = torch.cat([past_BPW[:, P - (n - T) :].to(x_BTW.dtype), fresh], 1)
        return torch.nn.functional.pad(fresh, (0, 0, 0, C - n))
    extended = x_BTW if past_BPW is None else torch.cat([past_BPW.to(x_BTW.dtype), x_BTW], 1)
    picked = extended.gather(1, table.tail.clamp(min=0)[..., None].expand(-1, -1, W))
    return torch.where((table.tail >= 0)[..., None], picked, 0)
