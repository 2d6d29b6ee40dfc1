"""S in factors: the pairs (v_t, z_t) themselves while they are smaller than S, or a truncation to rank r.

``S = left^T right`` per row, so ``S z = sum_n left_n (right_n . z)``. Factors are never modified in place, so copies
of a state may share them, and only ``dense`` allocates a tensor of S's size.

Shapes: B rows, N factors, D output width, F width of z, C tokens of a chunk, T new tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.algebra import exact, norm_of, state_dtype
from ..core.chunks import ChunkTable
from ..core.rules import Rule, State
from ..core.state import FastWeights, completed, stacked
from ..errors import UserError


@exact
def dense(left_BND: Tensor, right_BNF: Tensor) -> Tensor:
    """Compute S [B, D, F] in left's precision."""
    return torch.bmm(left_BND.mT, right_BNF.to(left_BND.dtype))


@exact
def apply(x_BTF: Tensor, left_BND: Tensor, right_BNF: Tensor, scale_BT: Tensor | None = None) -> Tensor:
    """Compute ``scale_t * S x_t``, [B, T, D] in left's precision: N * (D + F) multiply-adds a token. Differentiable."""
    dtype = left_BND.dtype
    if dtype != x_BTF.dtype == right_BNF.dtype and x_BTF.is_cuda and not torch.is_grad_enabled():
        scores_BTN = torch.bmm(x_BTF, right_BNF.mT, out_dtype=dtype)
    else:
        scores_BTN = torch.bmm(x_BTF.to(dtype), right_BNF.to(dtype).mT)
    return torch.bmm(scores_BTN if scale_BT is None else scores_BTN * scale_BT[..., None], left_BND)


@exact
def norm(left_BND: Tensor, right_BNF: Tensor) -> Tensor:
    """Compute the Frobenius norm of S [B] from N x N products; where S = 0, a tiny positive number."""
    return norm_of(left_BND, right_BNF.to(left_BND.dtype))


@exact
def truncate(left_BND: Tensor, right_BNF: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return at most ``rank`` factors that best approximate S, and the relative Frobenius error [B].

    A QR decomposition [F, N] and the eigenvectors of an N x N Gram matrix, in float64: about 2 N^2 (D + F) + 10 N^3
    multiply-adds; an error below 1e-8 is rounding.
    """
    basis_FN, R_NN = torch.linalg.qr(right_BNF.to(left_BND.dtype).mT)
    core_ND = R_NN.double() @ left_BND.double()
    squares, vectors = torch.linalg.eigh(core_ND @ core_ND.mT)
    squares, best = squares.clamp(min=0.0), vectors[..., -min(rank, left_BND.shape[-1]) :]
    error = (squares[:, : -best.shape[-1]].sum(1) / squares.sum(1).clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    return (best.mT @ core_ND).to(left_BND.dtype), (basis_FN @ best.to(basis_FN.dtype)).mT, error


def remaining(table: ChunkTable, keep: float, like: Tensor) -> Tensor | None:
    """Return the factor by which each new token's view of the incoming S has decayed, [1 or B, T]; None: 1 everywhere.

    ``keep^m`` after m updates of the row in the call, 0 in a later document (or in padding).
    """
    C, P, T = table.chunk_size, table.prefix, table.tokens
    if table.index is None or table.update is None or table.reset is None:
        if keep == 1.0 or not table.updates:
            return None
        return (keep ** ((torch.arange(T, device=like.device) + P) // C).to(like.dtype))[None]
    before = (table.update.cumsum(1) - table.update.long()).to(like.dtype)
    value = keep**before * (table.reset.cumsum(1) == 0)
    where = torch.where(table.index < P, T, table.index - P).flatten(1)  # column T: no new token
    return like.new_zeros(table.rows, T + 1).scatter(1, where, value.repeat_interleave(C, 1))[:, :T]


class FactoredWeights(FastWeights):
    """A state of an outer rule with S in factors; their number may differ between rows.

    ``form``: "auto": the pairs (v_t, z_t), ``left`` and ``right``, while they are fewer than D * F / (D + F), then
    dense until ``reset``. A number r: factors, truncated to rank r when a row has more than 2 * r, at most once in
    max(r, C) tokens: lossy (``truncation``), except that a call's later tokens see its own chunks exactly.
    """

    numbers = (*FastWeights.numbers, "count", "raw", "lost")
    parts = (*FastWeights.parts, "left", "right")

    def __init__(self, rows: int, chunk_size: int, rule: Rule | None = None, *, form: str | int = "auto") -> None:
        super().__init__(rows, chunk_size, rule)
        if form != "auto" and (type(form) is not int or form < 1):
            raise ValueError(f'form must be "dense", "auto" or a rank of at least 1, got {form!r}')
        self.rule.need("outer", f"a state of form {form!r}")
        self.form = form
        self.left: Tensor | None = None
        """[B, N, D] in S's precision, decay included; zero beyond a row's own factors."""
        self.right: Tensor | None = None
        """[B, N, F]; of pairs the unchanged z, in its dtype."""
        self.count: tuple[int, ...] = (0,) * rows
        """Number of each row's factors, which are the first ones."""
        self.raw: tuple[int, ...] = (0,) * rows
        """Number of these, the last ones, that are pairs of whole chunks and can be removed again."""
        self.lost: tuple[float, ...] = (0.0,) * rows
        """Frobenius norm of the parts that truncation discarded: root of the sum of squares."""

    def new(self, rows: int) -> "FactoredWeights":
        return FactoredWeights(rows, self.chunk_size, self.rule, form=self.form)

    @property
    def can_step(self) -> bool:
        return self.tensors is not None and super().can_step

    @property
    def truncation(self) -> tuple[float, ...]:
        """Return each row's truncation error ``|S - dense()| / |S|`` (Frobenius), 0 without truncations.

        Exact after one truncation; over several, the discarded parts count as orthogonal to each other and to the rest,
        so the true error is larger for a repetitive text, which loses the same part every time.
        """
        if not any(self.lost):
            return (0.0,) * self.rows
        S = norm(self.left, self.right) if self.S is None else torch.linalg.vector_norm(self.S, dim=(1, 2))
        return tuple(gone and gone / math.hypot(gone, left) for gone, left in zip(self.lost, S.tolist(), strict=True))

    def dense(self) -> Tensor | None:
        return self.S if self.left is None else dense(self.left, self.right)

    def as_dense(self) -> State | None:
        S = self.dense()
        return None if S is None else {"S": S}

    def begin(self, rule: Rule, table: ChunkTable, z_BTF: Tensor, v_BND: Tensor | None) -> ChunkTable:
        """Return the table to scan a call with: the given one, or one without a state afterwards.

        The latter where S is and stays in factors; then ``recall`` returns their part of the call's output. Converts to
        the dense form first if the call's chunks would exceed the limit of pairs.
        """
        self.rule = rule
        if self.tensors is not None:
            return table
        if self.form == "auto" and v_BND is not None:
            D, F, C = v_BND.shape[-1], z_BTF.shape[-1], self.chunk_size
            most = max(self.count) + table.updates * C
            if most * (D + F) >= D * F and table.index is not None:  # a bound that may be too high
                rows = zip(self.count, table.restarted, completed(table), strict=True)
                most = max((0 if again else n) + len(own) * C for n, again, own in rows)
            if most * (D + F) >= D * F:
                self.tensors, self.left, self.right = self.as_dense(), None, None
                self.count = self.raw = (0,) * self.rows
                return table
        return replace(table, updates=min(table.updates, max(table.steps - 1, 0)), keep_state=False)

    def recall(self, table: ChunkTable, z_BTF: Tensor) -> Tensor | None:
        """Compute ``S z_t`` [B, T, D], in S's precision, of the factors held before a call; None without factors."""
        if self.left is None:
            return None
        return apply(z_BTF, self.left, self.right, remaining(table, self.rule.keep, self.left))

    def _absorb_chunks(self, slots: list[list[int]], restarted: list[int], chunks: dict[str, Tensor] | None) -> None:
        """Append a call's chunks to the factors, by row and in order: ``S <- keep * S + sum_t v_t z_t^T``."""
        if restarted:
            self.clear(restarted)
        if self.tensors is not None or chunks is None:
            return
        C = self.chunk_size
        for m in sorted({m for own in slots for m in own}):
            rows = [b for b, own in enumerate(slots) if m in own]
            z, v = (x[:, m * C : (m + 1) * C] for x in (chunks["z"], chunks["v"]))
            self._join(rows, *((z, v) if len(rows) == self.rows else (z[rows], v[rows])), self.rule.keep)
            self._truncate()

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
        if self.tensors is None and learned:
            self.begin(rule, ChunkTable.build(self.rows, self.chunk_size, self.chunk_size, keep_state=True), z, v)
        if self.tensors is not None:
            return super()._update(rows, rule, z, v, slow, keep_R1, learned)
        self.rule, v = rule, v.to(z.dtype)
        if learned:
            with torch.autocast(z.device.type, enabled=False):
                v = rule.values(z, v, slow).to(z.dtype)
        self._join(rows, z, v, rule.keep)
        self._truncate()
        return v

    def output(self, rule: Rule, z_BTF: Tensor, width: int) -> Tensor | None:
        if self.left is None or self.right is None:
            return super().output(rule, z_BTF, width)
        return (rule.lr * apply(z_BTF, self.left, self.right)).to(z_BTF.dtype)

    def adopt(self, other: FastWeights) -> None:
        if self.form != "auto":
            raise UserError(f"a state of rank {self.form} cannot take this: use the dense form")
        super().adopt(other)
        self.left, self.right, self.count, self.raw = None, None, (0,) * self.rows, (0,) * self.rows

    def before(self, b: int, chunks: int = 1) -> State | None:
        if self.left is None or self.right is None:
            return super().before(b, chunks)
        n = chunks * self.chunk_size
        if self.raw[b] < n:  # a truncation has mixed them with the rest
            return None
        own = slice(self.count[b] - n)
        return {"S": dense(self.left[b : b + 1, own], self.right[b : b + 1, own]) / self.rule.keep**chunks}

    def _undo(self, b: int, chunks: int) -> None:
        if self.left is None:
            super()._undo(b, chunks)
            return
        for n in range(1, chunks + 1):
            chunk = self.last_chunk(b, n)
            self._take_back(b, chunk["z"], chunk["v"])

    def _take_back(self, b: int, z_1CF: Tensor, v_1CD: Tensor) -> None:
        """Undo row b's last update: drop its pairs, or subtract them where a truncation has mixed them with S."""
        C = self.chunk_size
        if self.raw[b] >= C:
            self._scale([b], 0.0, first=self.count[b] - C)
            self.count, self.raw = _add(self.count, [b], -C), _add(self.raw, [b], -C)
            self._trim()
        else:
            self._join([b], z_1CF, -v_1CD, 1.0)
            self.raw = _add(self.raw, [b], -self.raw[b])
            self._truncate()
        if self.rule.keep != 1.0:
            self._scale([b], 1 / self.rule.keep)

    def select(self, rows: Tensor | Sequence[int]) -> None:
        held = max((self.count[b] for b in torch.as_tensor(rows).tolist()), default=0)
        self.left, self.right = (None if x is None else x[:, :held] for x in (self.left, self.right))
        super().select(rows)

    def _stack(self, parts: Sequence[FastWeights], rows: Sequence[int]) -> None:
        factored: list[Any] = list(parts)
        forms = {x.form for x in factored}
        self.form = "auto" if "auto" in forms else max(forms)  # the least lossy one
        for name in ("count", "raw", "lost"):
            setattr(self, name, tuple(n for x in factored for n in getattr(x, name)))
        if any(x.tensors is not None for x in factored):
            super()._stack(parts, rows)
            self.count = self.raw = (0,) * self.rows
        else:
            self.left = stacked([x.left for x in factored], rows)
            self.right = stacked([x.right for x in factored], rows)

    def clear(self, rows: Sequence[int]) -> None:
        self._scale(rows, 0.0)
        self.count, self.raw = (tuple(0 if b in rows else n for b, n in enumerate(x)) for x in (self.count, self.raw))
        self._trim()

    def _join(self, rows: Sequence[int], z_RCF: Tensor, v_RCD: Tensor, keep: float) -> None:
        """Append one chunk's pairs to the factors of R rows."""
        C, device = z_RCF.shape[1], z_RCF.device
        v = v_RCD.to(z_RCF.dtype).to(state_dtype(z_RCF.dtype))
        if keep != 1.0:
            self._scale(rows, keep)
        left = v.new_zeros(self.rows, 0, v.shape[-1]) if self.left is None else self.left
        right = z_RCF.new_zeros(self.rows, 0, z_RCF.shape[-1]) if self.right is None else self.right
        first = torch.tensor([self.count[b] for b in rows], device=device)[:, None]
        where = (torch.tensor(rows, device=device)[:, None], first + torch.arange(C, device=device))
        self.count, self.raw = _add(self.count, rows, C), _add(self.raw, rows, C)
        more = (0, 0, 0, max(max(self.count) - left.shape[1], 0))
        right = right.to(torch.promote_types(right.dtype, z_RCF.dtype))
        self.left = pad(left, more).index_put(where, v)
        self.right = pad(right, more).index_put(where, z_RCF.to(right.dtype))

    def _truncate(self) -> None:
        """Truncate rows with more than twice the form's rank. Gradients stop there."""
        over = [b for b, n in enumerate(self.count) if isinstance(self.form, int) and n > 2 * self.form]
        if not over or self.left is None or self.right is None:
            return
        with torch.no_grad():
            left, right, error = truncate(self.left[over], self.right[over], self.form)
            gone = dict(zip(over, (error * norm(self.left[over], self.right[over])).tolist(), strict=True))
        self.count = tuple(left.shape[1] if b in gone else n for b, n in enumerate(self.count))
        self.raw = tuple(0 if b in gone else n for b, n in enumerate(self.raw))
        self.lost = tuple(math.hypot(x, gone.get(b, 0.0)) for b, x in enumerate(self.lost))
        N, index = max(self.count), torch.tensor(over, device=left.device)
        more = (0, 0, 0, N - left.shape[1])
        self.left = self.left[:, :N].index_copy(0, index, pad(left, more))
        self.right = self.right[:, :N].to(right.dtype).index_copy(0, index, pad(right, more))

    def _trim(self) -> None:
        """Drop trailing factors that no row uses."""
        N = max(self.count)
        if self.left is not None and self.right is not None and self.left.shape[1] > N:
            self.left, self.right = self.left[:, :N].clone(), self.right[:, :N].clone()

    def _scale(self, rows: Sequence[int], by: float, first: int = 0) -> None:
        """Scale some rows' factors from ``first`` on by ``by``; ``lost`` too if that is all of them."""
        if not first:
            self.lost = tuple(x * by if b in rows else x for b, x in enumerate(self.lost))
        if self.left is not None:
            scale = self.left.new_ones(self.rows).index_fill(0, torch.tensor(rows, device=self.left.device), by)
            part = torch.where(torch.arange(self.left.shape[1], device=scale.device) >= first, scale[:, None], 1.0)
            self.left = self.left * part[..., None]


def _add(numbers: tuple[int, ...], rows: Sequence[int], more: int) -> tuple[int, ...]:
    """Return ``numbers`` with those of some rows increased by ``more``."""
    return tuple(n + more if b in rows else n for b, n in enumerate(numbers))


def fast_weights(
    rows: int, chunk_size: int, rule: Rule, form: str | int = "dense", *, gates: bool = False
) -> FastWeights:
    """Return an empty state in this form. UserError if the rule does not support the form."""
    if form == "dense":
        return FastWeights(rows, chunk_size, rule, snapshots=gates)
    if gates:
        raise UserError(f"a state of form {form!r} cannot follow gates: use the dense form")
    return FactoredWeights(rows, chunk_size, rule, form=form)
