"""Access to the tokens of chunk slots in a call's tensors: slices when all rows agree, gathers otherwise.

Shapes: B rows, T new tokens, P pending ones, n slots of c tokens in a segment.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Segment(NamedTuple):
    """A range of slots ``first`` .. ``last - 1``. Regular calls: new tokens ``start`` .. ``stop - 1`` of every row."""

    first: int
    last: int
    start: int
    stop: int


class Slots:
    """A view of a call's chunk slots in segments of at most ``most``, with access to their tokens.

    *Applied* tokens are new; *absorbed* ones include the pending prefix. ``table``: a ``ChunkTable`` on z's device, or
    an object with its attributes.
    """

    def __init__(self, z_BTF: Tensor, past_BPF: Tensor | None, table: Any, most: int = 1) -> None:
        self.C, self.P = int(table.chunk_size), int(table.prefix)
        self.steps, self.updates = int(table.steps), int(table.updates)
        self.z, self.past = z_BTF, None if past_BPF is None else past_BPF[:, : self.P]
        self.B, self.T = z_BTF.shape[:2]
        self.most = most
        self.index: Tensor | None = table.index
        self.update: Tensor | None = table.update
        if self.index is not None:  # for all slots at once: small kernels in a loop over chunks would dominate it
            rows = torch.arange(self.B, device=z_BTF.device)[:, None, None] * self.T
            new = self.index >= self.P
            self.flat = torch.where(new, self.index - self.P + rows, self.B * self.T)  # last: an unused row
            self.new, self.old = new[..., None], ((self.index >= 0) & ~new)[..., None]
            self.source = torch.where(new, self.flat, 0)

    def segment(self, first: int, last: int) -> Segment:
        start, stop = (min(max(m * self.C - self.P, 0), self.T) for m in (first, last))
        return Segment(first, last, start, stop)

    def segments(self) -> list[Segment]:
        """Return the segments in order. Slots with few tokens (after pending ones, or at the end) are separate ones."""
        first, last = 0, self.steps
        if self.index is None:
            first, last = (1 if self.P else 0), min((self.P + self.T) // self.C, self.steps)
        cuts = [0] if first else []
        cuts += [*range(first, last, self.most), last] if last > first else [first]
        cuts += [self.steps] if cuts[-1] < self.steps else []
        return [self.segment(*pair) for pair in pairwise(cuts)]

    def updating(self, s: Segment) -> int:
        """Return the number of leading slots of the segment that may change S."""
        return max(min(s.last, self.updates) - s.first, 0)

    def chunks(self, v_BND: Tensor, s: Segment) -> Tensor:
        """Return a view of the updating slots' targets, [B, n, C, D]."""
        n = self.updating(s)
        return torch.unflatten(v_BND[:, s.first * self.C : (s.first + n) * self.C], 1, (n, self.C))

    def masked(self, x_BnXY: Tensor, s: Segment) -> Tensor:
        """Return ``x``, zero for rows whose slot does not update."""
        return x_BnXY if self.update is None else x_BnXY * self.update[:, s.first : s.last, None, None]

    def empty(self, width: int) -> Tensor:
        """Allocate [B * T (+ 1), width] for results of all new tokens; see ``view``."""
        return self.z.new_empty(self.B * self.T + (self.index is not None), width)

    def padded(self, x_BTW: Tensor) -> Tensor:
        """Return ``x`` in the form of ``empty``."""
        return x_BTW.flatten(0, 1) if self.index is None else pad(x_BTW.flatten(0, 1), (0, 0, 0, 1))

    def view(self, x: Tensor) -> Tensor:
        """Return a tensor of ``empty`` as [B, T, width]."""
        return x[: self.B * self.T].view(self.B, self.T, x.shape[-1])

    def applied(self, x_BTW: Tensor, s: Segment) -> Tensor:
        """Return ``x`` at the segment's new tokens, [B, n, c, W]; zero where a slot has none."""
        if self.index is None:
            return torch.unflatten(x_BTW[:, s.start : s.stop], 1, (s.last - s.first, -1))
        own = slice(s.first, s.last)
        return torch.where(self.new[:, own], x_BTW.reshape(-1, x_BTW.shape[-1])[self.source[:, own]], 0)

    def absorbed(self, s: Segment) -> Tensor:
        """Return z of the updating slots' tokens, pending ones included, [B, n, C, F]; zero where there is none."""
        n = self.updating(s)
        if self.index is None:
            if s.first == 0 and self.past is not None:
                return torch.cat([self.past.to(self.z.dtype), self.z[:, s.start : s.stop]], 1)[:, None]
            return torch.unflatten(self.z[:, s.start : s.start + n * self.C], 1, (n, self.C))
        s = s._replace(last=s.first + n)
        z = self.applied(self.z, s)
        if self.past is None:
            return z
        where = self.index[:, s.first : s.last].clamp(0, self.P - 1).flatten(1)[..., None]
        past = self.past.gather(1, where.expand(-1, -1, z.shape[-1])).view_as(z).to(z.dtype)
        return torch.where(self.old[:, s.first : s.last], past, z)

    def put(self, out: Tensor, s: Segment, x_BncK: Tensor, w_BnKN: Tensor, bias_N: Tensor | None = None) -> None:
        """Set ``out`` at the segment's new tokens to ``x @ w (+ bias)``."""
        if self.index is None:
            product(x_BncK, w_BnKN, self.applied(self.view(out), s), bias_N)
        else:
            y = x_BncK.new_empty(*x_BncK.shape[:3], w_BnKN.shape[-1])
            product(x_BncK, w_BnKN, y, bias_N)
            out.index_copy_(0, self.flat[:, s.first : s.last].flatten(), y.flatten(0, 2))

    def add(self, out: Tensor, s: Segment, x_BncK: Tensor, w_BnKN: Tensor, scale: float = 1.0) -> None:
        """Add ``scale * x @ w`` to ``out`` at the segment's new tokens, with one rounding."""
        if self.index is None:
            product(x_BncK, w_BnKN, self.applied(self.view(out), s), add=scale)
        else:
            flat = self.flat[:, s.first : s.last]
            y = out[flat]
            product(x_BncK, w_BnKN, y, add=scale)
            out.index_copy_(0, flat.flatten(), y.flatten(0, 2))

    def through_targets(
        self, write: Callable[..., None], dz: Tensor, dpast: Tensor | None, s: Segment, v_BnCD: Tensor, H_BnDF: Tensor
    ) -> None:
        """Write (``put`` or ``add``) ``H^T v`` of the updating slots to dz; set that of pending tokens in ``dpast``."""
        n = v_BnCD.shape[1]
        part = self.segment(s.first, s.first + n)
        if self.index is None:
            head = self.P if s.first == 0 and dpast is not None else 0
            write(dz, part, v_BnCD[:, :, head:], H_BnDF)
            if head and dpast is not None:
                dpast[:, :head] = torch.bmm(v_BnCD[:, 0, :head], H_BnDF[:, 0]).to(dpast.dtype)
            return
        write(dz, part, v_BnCD, H_BnDF)
        if dpast is not None:
            where = self.index[:, part.first : part.last].clamp(0, self.P - 1).flatten(1)[..., None]
            value = torch.where(self.old[:, part.first : part.last], v_BnCD @ H_BnDF, 0).flatten(1, 2).to(dpast.dtype)
            dpast.scatter_add_(1, where.expand(-1, -1, value.shape[-1]), value)

    def add_all(self, out_BTW: Tensor, parts: list[Tensor]) -> Tensor:
        """Return ``out`` plus the first slots' parts [B, <= C, W] at their new tokens. Differentiable."""
        if not parts:
            return out_BTW
        if self.index is None:
            joined = torch.cat(parts, 1)
            return out_BTW + pad(joined, (0, 0, 0, self.T - joined.shape[1]))
        flat = self.flat[:, : len(parts)].flatten()
        value = torch.stack(parts, 1).to(out_BTW.dtype).flatten(0, 2)
        return self.view(self.padded(out_BTW).index_add(0, flat, value))


def product(
    x_BncK: Tensor, w_BnKN: Tensor, out_BncN: Tensor, bias_N: Tensor | None = None, *, add: float | None = None
) -> None:
    """Compute ``out = x @ w (+ bias)``, or ``out += add * x @ w``, as one batched product where the strides allow."""
    flat = [_flat(x) for x in (x_BncK, w_BnKN, out_BncN)]
    if any(x is None for x in flat):
        for row in zip(x_BncK, w_BnKN, out_BncN, strict=True):
            _product(*row, bias_N, add)
    else:
        x, w, out = flat
        _product(x, w, out, bias_N, add)  # type: ignore[arg-type]


def _product(x: Tensor, w: Tensor, out: Tensor, bias: Tensor | None, add: float | None) -> None:
    if add is not None:
        out.baddbmm_(x, w, alpha=add)
    elif bias is not None:
        torch.baddbmm(bias, x, w, out=out)
    else:
        torch.bmm(x, w, out=out)


def _flat(x_BnXY: Tensor) -> Tensor | None:
    """Return a view [B * n, X, Y], None where the strides do not allow one."""
    B, n = x_BnXY.shape[:2]
    if B == 1 or n == 1:
        return x_BnXY.squeeze(0) if B == 1 else x_BnXY.squeeze(1)
    return x_BnXY.flatten(0, 1) if x_BnXY.stride(0) == n * x_BnXY.stride(1) else None
