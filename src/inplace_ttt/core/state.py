"""What a reader carries from call to call: the fast weights and the tokens whose chunk is not complete yet."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .chunks import HOST, ChunkTable
from .factors import HeldState, completed
from .scan import advance, clip_factor, outer
from .target import chunked

Triple = tuple[Tensor, Tensor, Tensor]

ROLLBACK_TOKENS = 128
"""Completed chunks are kept for at least this many tokens, so that rejected drafts can be taken back."""

_NUMBERS = ("seen", "kept", "count", "raw", "lost")


class FastWeights(HeldState):
    """State of one layer for B rows.

    S [B, D, F] float32 (float64 for float64 models), None while zero; pending inputs z [B, C, F] and u [B, C, D], of
    which row b's first ``seen[b] % C`` are filled; the last completed chunks (z, u, v) for ``rollback``.

    ``form``: how S is held. "dense": as ``S``. "auto": as the pairs (v_t, z_t), ``left`` and ``right``, while they are
    fewer than D * F / (D + F), then dense until ``reset``. A number r: as factors, cut to the best r when a row has
    more than 2 * r, at most once in max(r, C) tokens: lossy (``truncation``), save for what a call's later tokens see
    of its own chunks. ``dense()`` gives S in every form.
    """

    def __init__(self, rows: int, chunk_size: int, *, decay: float = 0.0, form: str | int = "dense") -> None:
        super().__init__(rows, chunk_size, decay, form)
        self.z: Tensor | None = None
        self.u: Tensor | None = None
        self.history: Triple | None = None
        self.seen: tuple[int, ...] = (0,) * rows
        self.kept: tuple[int, ...] = (0,) * rows
        self.real: Tensor | None = None
        self.fed = 0

    @property
    def updates(self) -> tuple[int, ...]:
        """Chunks absorbed of each row's current document."""
        return tuple(n // self.chunk_size for n in self.seen)

    @property
    def nbytes(self) -> int:
        """Bytes held, all rows."""
        tensors = [self.S, self.left, self.right, self.z, self.u, *(self.history or ())]
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)

    def past(self, table: ChunkTable) -> tuple[Tensor | None, Tensor | None]:
        """Pending z [B, P, F] and u [B, P, D] that the table's prefix speaks of."""
        if not table.prefix or self.z is None or self.u is None:
            return None, None
        return self.z[:, : table.prefix], self.u[:, : table.prefix]

    # -- after a call ---------------------------------------------------------------------------------------------

    def absorb(
        self,
        table: ChunkTable,
        z_BTF: Tensor,
        u_BTD: Tensor,
        v_BND: Tensor | None,
        S: Tensor | None,
        clip: Tensor | None = None,
    ) -> None:
        """Takes over what a call with ``table`` left: the new S, its pending tokens and its completed chunks.

        Where S is held in factors ``S`` is None, and the chunks' updates join them, clipped to ``clip``.
        """
        if table.updates or any(table.restarted):
            past_z, past_u = self.past(table)
            slots, restarted = completed(table), [b for b, again in enumerate(table.restarted) if again]
            chunks: Triple | None = None
            if v_BND is not None:
                chunks = (chunked(z_BTF, past_z, table), chunked(u_BTD, past_u, table), v_BND)
            self._remember(slots, restarted, chunks)
            if restarted:
                self.clear(restarted)
            if S is None and self.S is None and self.form != "dense" and chunks is not None:
                self.extend(slots, chunks[0], chunks[2], clip)
        if S is not None and (self.S is not None or table.updates):
            self.S = S
        self._set_pending(table, z_BTF, u_BTD)
        self._count(table.tokens, table.real, table.seen)

    def _count(self, tokens: int, real: Tensor | None, seen: tuple[int, ...]) -> None:
        """Notes positions that were fed, and which of them are tokens (bool [B, tokens]; None: all)."""
        most = ROLLBACK_TOKENS + 2 * self.chunk_size
        if real is not None or self.real is not None:
            old = torch.ones(self.rows, self.fed, dtype=torch.bool, device=HOST) if self.real is None else self.real
            new = torch.ones(self.rows, tokens, dtype=torch.bool, device=HOST) if real is None else real
            self.real = torch.cat([old, new], 1)[:, -most:]
        self.fed = min(self.fed + tokens, most)
        self.seen = seen

    def _set_pending(self, table: ChunkTable, z_BTF: Tensor, u_BTD: Tensor) -> None:
        if table.appends:
            self.z, self.u = self._append(self.z, z_BTF), self._append(self.u, u_BTD)
        else:
            past_z, past_u = self.past(table)
            self.z, self.u = _tail(table, z_BTF, past_z), _tail(table, u_BTD, past_u)

    def _append(self, buffer: Tensor | None, x_BTW: Tensor) -> Tensor:
        """The pending buffer with ``x`` after each row's pending tokens; written in place where autograd allows."""
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

    def _remember(self, slots: list[list[int]], restarted: list[int], new: Triple | None) -> None:
        """Keeps each row's last completed chunks of its current document, newest at the right."""
        C, R = self.chunk_size, -(-ROLLBACK_TOKENS // self.chunk_size)
        old = [0 if b in restarted else k for b, k in enumerate(self.kept)]
        self.kept = tuple(min(k + len(own), R) for k, own in zip(old, slots, strict=True))
        if new is None:
            return
        # Chunk numbers in [history | new slots]: the last R of each row.
        H = 0 if self.history is None else self.history[0].shape[1] // C
        pick = []
        for own in slots:
            chunks = [*range(H), *(H + m for m in own)][-R:]
            pick.append([0] * (R - len(chunks)) + chunks)
        kept = []
        for old_BHW, new_BNW in zip(self.history or (None, None, None), new, strict=True):
            # Slices, not an index from the host, for which a GPU would wait.
            chunks = [_chunk(old_BHW, new_BNW, m, C)[b] for b, own in enumerate(pick) for m in own]
            kept.append(torch.cat(chunks).view(self.rows, R * C, -1))
        self.history = (kept[0], kept[1], kept[2])

    # -- one token at a time --------------------------------------------------------------------------------------

    @property
    def can_step(self) -> bool:
        """Whether the next token can be taken by a step: something was read, and S is dense."""
        dense = self.S is not None or self.form == "dense"
        return dense and self.z is not None and self.u is not None and self.z.shape[1] == self.chunk_size

    def end_step(self) -> list[int]:
        """Counts a step's token; the rows whose chunk it completed, for ``complete``."""
        self._count(1, None, tuple(n + 1 for n in self.seen))
        return [b for b, n in enumerate(self.seen) if n % self.chunk_size == 0]

    def complete(self, rows: list[int], v_BCD: Tensor, clip: Tensor | None) -> None:
        """The full pending chunks of some rows, with targets v, change S: ``S <- (1 - decay) * S + clipped(dW)``."""
        assert self.z is not None
        assert self.u is not None
        index = torch.tensor(rows, device=self.z.device)
        old = None if self.S is None else self.S.index_select(0, index)  # a copy: others may hold S
        z, v = (x.index_select(0, index) for x in (self.z, v_BCD.to(self.z.dtype)))
        new = advance(old, z, v, 1 - self.decay, clip)
        if len(rows) < self.rows:
            whole = new.new_zeros(self.rows, *new.shape[1:]) if self.S is None else self.S
            new = whole.index_copy(0, index, new)
        self.S = new
        self._remember([[0] if b in rows else [] for b in range(self.rows)], [], (self.z, self.u, v_BCD))

    # -- what a cache does to its rows ----------------------------------------------------------------------------

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Row b becomes the old row ``rows[b]`` (beam reorder, batch selection or repetition)."""
        index = rows if isinstance(rows, Tensor) else torch.tensor(rows, device=HOST)
        order: list[int] = index.tolist()
        held = max((self.count[b] for b in order), default=0)
        self.left, self.right = (None if x is None else x[:, :held] for x in (self.left, self.right))
        self._map(lambda x: x.index_select(0, index.to(x.device)))
        self.real = None if self.real is None else self.real[order]
        for name in _NUMBERS:
            setattr(self, name, tuple(getattr(self, name)[b] for b in order))
        self.rows = len(order)
        self.S = self.S if any(self.updates) else None  # what other rows made it hold
        self.history = self.history if any(self.kept) else None

    @classmethod
    def stack(cls, parts: Sequence["FastWeights"]) -> "FastWeights":
        """The rows of several states side by side, copied; positions a shorter row never had count as padding.

        Dense where one of them is. Raises ValueError for no states, or for states of different chunk size or decay.
        """
        kinds = {(part.chunk_size, part.decay) for part in parts}
        if len(kinds) != 1:
            raise ValueError(f"states side by side need one chunk size and decay, got {sorted(kinds)}")
        ((chunk_size, decay),) = kinds
        forms = {part.form for part in parts}
        form = next((x for x in ("dense", "auto") if x in forms), None) or max(forms)  # the one that loses least
        rows = [part.rows for part in parts]
        new = cls(sum(rows), chunk_size, decay=decay, form=form)
        for name in _NUMBERS:
            setattr(new, name, tuple(n for part in parts for n in getattr(part, name)))
        new.z, new.u = _stack([part.z for part in parts], rows), _stack([part.u for part in parts], rows)
        if form == "dense" or any(part.S is not None for part in parts):
            new.S, new.count, new.raw = _stack([part.dense() for part in parts], rows), (0,) * new.rows, (0,) * new.rows
        else:
            new.left, new.right = _stack([x.left for x in parts], rows), _stack([x.right for x in parts], rows)
        z, u, v = (_stack([x.history and x.history[i] for x in parts], rows) for i in range(3))
        new.history = None if z is None or u is None or v is None else (z, u, v)
        new.fed = max(part.fed for part in parts)
        if any(part.real is not None or part.fed != new.fed for part in parts):
            reals = [
                torch.ones(x.rows, x.fed, dtype=torch.bool, device=HOST) if x.real is None else x.real for x in parts
            ]
            new.real = _stack(reals, rows, side="left")
        return new

    def reset(self) -> None:
        """Forgets everything: the next token begins a document."""
        self.__init__(self.rows, self.chunk_size, decay=self.decay, form=self.form)  # type: ignore[misc]

    def fork(self) -> "FastWeights":
        """An independent copy."""
        copy = FastWeights(self.rows, self.chunk_size, decay=self.decay, form=self.form)
        copy.__dict__.update(self.__dict__)
        copy._map(torch.clone)
        return copy

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Every tensor of all rows goes through ``function``."""
        for name in ("S", "left", "right", "z", "u"):
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))
        if self.history is not None:
            z, u, v = self.history
            self.history = function(z), function(u), function(v)

    def rollback(self, tokens: int, clip: Tensor | None = None) -> None:
        """Takes back the last ``tokens`` positions fed to every row; padding among them is skipped.

        Raises ValueError, changing nothing, when they reach further back than the kept chunks.
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
                self._reopen(b, chunks, clip)
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

    def _reopen(self, b: int, chunks: int, clip: Tensor | None) -> None:
        """Row b's last completed chunks become pending again; their updates leave S."""
        assert self.history is not None
        assert self.z is not None
        assert self.u is not None
        C = self.chunk_size
        z, u, v = (x[b : b + 1] for x in self.history)
        S = None if self.S is None else self.S.clone()
        for n in range(1, chunks + 1):
            span = slice(z.shape[1] - n * C, z.shape[1] - (n - 1) * C)
            if S is None:
                self.take_back(b, z[:, span], v[:, span], clip)
            else:
                dW = outer(v[:, span].to(z.dtype), z[:, span])
                S[b : b + 1] = (S[b] - (dW if clip is None else dW * clip_factor(dW, clip))) / (1 - self.decay)
        span = slice(z.shape[1] - chunks * C, z.shape[1] - (chunks - 1) * C)
        self.S, self.z, self.u = S, self.z.clone(), self.u.clone()
        self.z[b], self.u[b] = z[0, span], u[0, span]
        shifted = []
        for x in self.history:
            x = x.clone()
            x[b] = x[b].roll(chunks * C, 0)
            shifted.append(x)
        self.history = (shifted[0], shifted[1], shifted[2])
        self.kept = tuple(k - chunks if row == b else k for row, k in enumerate(self.kept))


def _chunk(old_BHW: Tensor | None, new_BNW: Tensor, m: int, C: int) -> Tensor:
    """Chunk m of [old | new], [B, C, W], in old's dtype."""
    if old_BHW is None:
        return new_BNW[:, m * C : (m + 1) * C]
    H = old_BHW.shape[1] // C
    return old_BHW[:, m * C : (m + 1) * C] if m < H else new_BNW[:, (m - H) * C : (m - H + 1) * C].to(old_BHW.dtype)


def _stack(parts: Sequence[Tensor | None], rows: Sequence[int], side: str = "right") -> Tensor | None:
    """Tensors [rows, n, ...] joined along the rows, zero where one is None or has a smaller n; None where all are."""
    known = [x for x in parts if x is not None]
    if not known:
        return None
    none, dtype = known[0][:1, :0], reduce(torch.promote_types, [x.dtype for x in known])
    whole = [none.expand(n, *none.shape[1:]) if x is None else x for x, n in zip(parts, rows, strict=True)]
    return pad_sequence([row.to(dtype) for x in whole for row in x], batch_first=True, padding_side=side)


def _tail(table: ChunkTable, x_BTW: Tensor, past_BPW: Tensor | None) -> Tensor:
    """The tokens left pending, [B, C, W], zero where there is none."""
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
