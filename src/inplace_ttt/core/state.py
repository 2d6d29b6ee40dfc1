"""What a reader carries from call to call: the fast weights and the tokens whose chunk is not complete yet."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .chunks import ChunkTable
from .scan import clip_factor, outer
from .target import chunked

ROLLBACK_TOKENS = 128
"""Completed chunks are kept for at least this many tokens, so that rejected drafts can be taken back."""


class FastWeights:
    """State of one layer for B rows.

    S [B, D, F] float32 (float64 for float64 models), None while zero; pending inputs z [B, C, F] and u [B, C, D], of
    which row b's first ``seen[b] % C`` are filled; the last completed chunks (z, u, v) for ``rollback``.
    """

    def __init__(self, rows: int, chunk_size: int, *, decay: float = 0.0) -> None:
        self.rows, self.chunk_size, self.decay = rows, chunk_size, decay
        self.S: Tensor | None = None
        self.z: Tensor | None = None
        self.u: Tensor | None = None
        self.history: tuple[Tensor, Tensor, Tensor] | None = None
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
        tensors = [self.S, self.z, self.u, *(self.history or ())]
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)

    def past(self, table: ChunkTable) -> tuple[Tensor | None, Tensor | None]:
        """Pending z [B, P, F] and u [B, P, D] that the table's prefix speaks of."""
        if not table.prefix or self.z is None or self.u is None:
            return None, None
        return self.z[:, : table.prefix], self.u[:, : table.prefix]

    # -- after a call ---------------------------------------------------------------------------------------------

    def absorb(self, table: ChunkTable, z_BTF: Tensor, u_BTD: Tensor, v_BND: Tensor | None, S: Tensor | None) -> None:
        """Takes over what a call with ``table`` left: the new S, its pending tokens and its completed chunks."""
        if table.updates or any(table.restarted):
            self._remember(table, z_BTF, u_BTD, v_BND)
        if S is not None and (self.S is not None or table.updates):
            self.S = S
        self._set_pending(table, z_BTF, u_BTD)
        if table.real is not None or self.real is not None:
            old = torch.ones(self.rows, self.fed, dtype=torch.bool) if self.real is None else self.real
            new = torch.ones(self.rows, table.tokens, dtype=torch.bool) if table.real is None else table.real
            self.real = torch.cat([old, new], 1)[:, -(ROLLBACK_TOKENS + 2 * self.chunk_size) :]
        self.fed = min(self.fed + table.tokens, ROLLBACK_TOKENS + 2 * self.chunk_size)
        self.seen = table.seen

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

    def _remember(self, table: ChunkTable, z_BTF: Tensor, u_BTD: Tensor, v_BND: Tensor | None) -> None:
        """Keeps each row's last completed chunks of its current document, newest at the right."""
        C, R = self.chunk_size, -(-ROLLBACK_TOKENS // self.chunk_size)
        if v_BND is None:
            self.kept = tuple(0 if again else k for k, again in zip(self.kept, table.restarted, strict=True))
            return
        past_z, past_u = self.past(table)
        new = [chunked(z_BTF, past_z, table), chunked(u_BTD, past_u, table), v_BND]
        if table.update is None or table.reset is None:
            done = [table.updates] * self.rows
            stop = done
        else:
            done, stop = _completed(table.update, table.reset, table.updates, table.restarted)
        old = [0 if again else k for k, again in zip(self.kept, table.restarted, strict=True)]
        self.kept = tuple(min(k + n, R) for k, n in zip(old, done, strict=True))
        # Chunk numbers in [history | new slots]: the R that end at each row's last completed slot, skipping none.
        H = 0 if self.history is None else self.history[0].shape[1] // C
        pick = []
        for n, end in zip(done, stop, strict=True):
            chunks = [*range(H), *range(H + end - n, H + end)][-R:]
            pick.append([0] * (R - len(chunks)) + chunks)
        index = torch.tensor(pick, device=v_BND.device)[..., None] * C + torch.arange(C, device=v_BND.device)
        index = index.flatten(1)[..., None]
        both = (
            new
            if self.history is None
            else [torch.cat([a, b.to(a.dtype)], 1) for a, b in zip(self.history, new, strict=True)]
        )
        z, u, v = (x.gather(1, index.expand(-1, -1, x.shape[-1])) for x in both)
        self.history = (z, u, v)

    # -- what a cache does to its rows ----------------------------------------------------------------------------

    def select(self, rows: Tensor) -> None:
        """Row b becomes the old row ``rows[b]`` (beam reorder, batch selection or repetition)."""
        order = rows.tolist()
        self.S, self.z, self.u = (
            None if x is None else x.index_select(0, rows.to(x.device)) for x in (self.S, self.z, self.u)
        )
        if self.history is not None:
            z, u, v = (x.index_select(0, rows.to(x.device)) for x in self.history)
            self.history = (z, u, v)
        self.seen, self.kept = tuple(self.seen[b] for b in order), tuple(self.kept[b] for b in order)
        self.real = None if self.real is None else self.real[order]
        self.rows = len(order)

    def reset(self) -> None:
        """Forgets everything: the next token begins a document."""
        self.__init__(self.rows, self.chunk_size, decay=self.decay)  # type: ignore[misc]

    def fork(self) -> "FastWeights":
        """An independent copy."""
        copy = FastWeights(self.rows, self.chunk_size, decay=self.decay)
        copy.__dict__.update({k: v.clone() if isinstance(v, Tensor) else v for k, v in self.__dict__.items()})
        if self.history is not None:
            copy.history = (self.history[0].clone(), self.history[1].clone(), self.history[2].clone())
        return copy

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
        assert self.S is not None
        assert self.history is not None
        assert self.z is not None
        assert self.u is not None
        C = self.chunk_size
        z, u, v = (x[b : b + 1] for x in self.history)
        S = self.S[b : b + 1].clone()
        for n in range(1, chunks + 1):
            span = slice(z.shape[1] - n * C, z.shape[1] - (n - 1) * C)
            dW = outer(v[:, span], z[:, span])
            S = (S - (dW if clip is None else dW * clip_factor(dW, clip))) / (1 - self.decay)
        span = slice(z.shape[1] - chunks * C, z.shape[1] - (chunks - 1) * C)
        self.S, self.z, self.u = self.S.clone(), self.z.clone(), self.u.clone()
        self.S[b], self.z[b], self.u[b] = S[0], z[0, span], u[0, span]
        shifted = []
        for x in self.history:
            x = x.clone()
            x[b] = x[b].roll(chunks * C, 0)
            shifted.append(x)
        self.history = (shifted[0], shifted[1], shifted[2])
        self.kept = tuple(k - chunks if row == b else k for row, k in enumerate(self.kept))


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


def _completed(update: Tensor, reset: Tensor, updates: int, restarted: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Per row: how many slots its current document completed in a call, and the slot after the last of them."""
    done, stop = [], []
    for row_update, row_reset, again in zip(update.tolist(), reset.tolist(), restarted, strict=True):
        begin = max((m for m, r in enumerate(row_reset) if r), default=0) if again else 0
        slots = [m for m, u in enumerate(row_update[:updates]) if u and m >= begin]
        done.append(len(slots))
        stop.append(slots[-1] + 1 if slots else 0)
    return done, stop
