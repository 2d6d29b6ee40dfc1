"""The scan in segments of chunks: batched products, and one ``walk`` that computes the weight each chunk sees.

A chunk takes two matrix products; a loop over chunks is slow because of the state's memory traffic and the kernel
launches. A *segment* is as many chunk slots as fit their folded weights ``W0 + lr * S_m``, in z's precision, into
``SEGMENT_BYTES``: ``walk`` loops over its slots with S in registers and writes those weights, then one batched product
applies them. Memory does not grow with the length.

Shapes: B rows, T new tokens, P pending ones, F width of z, D output width; n slots of c tokens in a segment.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.algebra import state_dtype
from .walk import walk

SEGMENT_BYTES = 400 * 2**20
"""Most bytes of folded weights at a time (at least one chunk's)."""


class Segment(NamedTuple):
    """A range of slots ``first`` .. ``last - 1``. Regular calls: new tokens ``start`` .. ``stop - 1`` of every row."""

    first: int
    last: int
    start: int
    stop: int


class Slots:
    """A view of a call's chunk slots in segments, with access to their tokens."""

    def __init__(
        self,
        z_BTF: Tensor,
        past_BPF: Tensor | None,
        chunk_size: int,
        prefix: int,
        index_BMC: Tensor | None,
        steps: int,
        updates: int,
        most: int,
    ) -> None:
        self.z, self.past, self.C, self.P = z_BTF, past_BPF, chunk_size, prefix
        self.B, self.T = z_BTF.shape[:2]
        self.index, self.steps, self.updates, self.most = index_BMC, steps, updates, most
        if index_BMC is not None:
            rows = torch.arange(self.B, device=z_BTF.device)[:, None, None] * self.T
            new = index_BMC >= prefix
            self.flat = torch.where(new, index_BMC - prefix + rows, self.B * self.T)  # last: an unused row
            self.old = (index_BMC >= 0) & ~new

    def segments(self) -> list[Segment]:
        """Return the segments in order. Slots with few tokens (after pending ones, or at the end) are separate ones."""
        most = self.most
        if self.index is not None:
            return [Segment(m, min(m + most, self.steps), 0, 0) for m in range(0, self.steps, most)]
        first, last = (1 if self.P else 0), min((self.P + self.T) // self.C, self.steps)
        cuts = [0] if self.P else []
        cuts += [*range(first, last, most), last] if last > first else [first]
        cuts += [self.steps] if cuts[-1] < self.steps else []
        bounds = [min(max(m * self.C - self.P, 0), self.T) for m in cuts]
        return [Segment(*cuts[i : i + 2], *bounds[i : i + 2]) for i in range(len(cuts) - 1)]

    def updating(self, s: Segment) -> int:
        """Return the number of leading slots of the segment that may change S."""
        return max(min(s.last, self.updates) - s.first, 0)

    def empty(self, width: int) -> Tensor:
        """Allocate [B * T (+ 1), width] for results of all new tokens; see ``view``."""
        return self.z.new_empty(self.B * self.T + (self.index is not None), width)

    def view(self, x: Tensor) -> Tensor:
        """Return a tensor of ``empty`` as [B, T, width]."""
        return x[: self.B * self.T].view(self.B, self.T, x.shape[-1])

    def applied(self, x_BTW: Tensor, s: Segment) -> Tensor:
        """Return ``x`` at the segment's new tokens, [B, n, c, W]; zero where a slot has none."""
        if self.index is None:
            return x_BTW[:, s.start : s.stop].unflatten(1, (s.last - s.first, -1))
        flat = self.flat[:, s.first : s.last]
        there = (flat < self.B * self.T)[..., None]
        return torch.where(there, x_BTW.reshape(-1, x_BTW.shape[-1])[flat.clamp(max=self.B * self.T - 1)], 0)

    def absorbed(self, s: Segment) -> Tensor:
        """Return z of the updating slots' tokens, pending ones included, [B, n, C, F]; zero where there is none."""
        n = self.updating(s)
        if self.index is None:
            if s.first == 0 and self.past is not None:
                return torch.cat([self.past.to(self.z.dtype), self.z[:, s.start : s.stop]], 1)[:, None]
            return self.z[:, s.start : s.start + n * self.C].unflatten(1, (n, self.C))
        s = s._replace(last=s.first + n)
        z = self.applied(self.z, s)
        if self.past is None:
            return z
        where = self.index[:, s.first : s.last].clamp(0, self.P - 1).flatten(1)[..., None]
        past = self.past.gather(1, where.expand(-1, -1, z.shape[-1])).view_as(z).to(z.dtype)
        return torch.where(self.old[:, s.first : s.last, :, None], past, z)

    def put(self, out: Tensor, s: Segment, x_BncK: Tensor, w_BnKN: Tensor, bias_N: Tensor | None = None) -> None:
        """Set ``out`` at the segment's new tokens to ``x @ w (+ bias)``."""
        if self.index is None:
            product(x_BncK, w_BnKN, self.applied(self.view(out), s), bias_N)
        else:
            y = x_BncK.new_empty(*x_BncK.shape[:3], w_BnKN.shape[-1])
            product(x_BncK, w_BnKN, y, bias_N)
            out.index_copy_(0, self.flat[:, s.first : s.last].flatten(), y.flatten(0, 2))

    def add(self, out: Tensor, s: Segment, x_BncK: Tensor, w_BnKN: Tensor) -> None:
        """Add ``x @ w`` to ``out`` at the segment's new tokens, with one rounding."""
        if self.index is None:
            product(x_BncK, w_BnKN, self.applied(self.view(out), s), add=True)
        else:
            flat = self.flat[:, s.first : s.last]
            y = out[flat]
            product(x_BncK, w_BnKN, y, add=True)
            out.index_copy_(0, flat.flatten(), y.flatten(0, 2))


def product(
    x_BncK: Tensor, w_BnKN: Tensor, out_BncN: Tensor, bias_N: Tensor | None = None, *, add: bool = False
) -> None:
    """Compute ``out (+)= x @ w (+ bias)`` in place, as one batched product where the strides allow."""
    flat = [_flat(x) for x in (x_BncK, w_BnKN, out_BncN)]
    if any(x is None for x in flat):
        for row in zip(x_BncK, w_BnKN, out_BncN, strict=True):
            _product(*row, bias_N, add)
    else:
        x, w, out = flat
        _product(x, w, out, bias_N, add)  # type: ignore[arg-type]


def _product(x: Tensor, w: Tensor, out: Tensor, bias: Tensor | None, add: bool) -> None:
    if add:
        out.baddbmm_(x, w)
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


def _slots(z: Tensor, past: Tensor | None, rest: Sequence[int | Tensor | None], width: int, weights: int = 1) -> Slots:
    """Make the slots of a call. ``weights``: matrices of W0's size that a slot needs."""
    chunk_size, prefix, index, steps, updates = rest
    weight = weights * z.shape[0] * width * z.shape[2] * z.element_size()
    return Slots(z, past, chunk_size, prefix, index, steps, updates, max(SEGMENT_BYTES // weight, 1))  # type: ignore[arg-type]


class RunningSum:
    """A running sum over segments (S or H), [B, D, F]. The initial value is never modified."""

    def __init__(self, z: Tensor, begin: Tensor | None, width: int) -> None:
        dtype = state_dtype(z.dtype)
        self.begin = None if begin is None else begin.to(dtype).contiguous()
        self.S = z.new_empty(z.shape[0], width, z.shape[2], dtype=dtype)

    def walk(self, folds: Tensor, *rest: Any, mode: str = "forward") -> None:
        walk(self.S, self.begin, folds, *rest, mode=mode)
        self.begin = self.S

    def value(self) -> Tensor:
        """Return the present sum."""
        if self.begin is self.S:
            return self.S
        return self.S.zero_() if self.begin is None else self.S.copy_(self.begin)  # there was no segment


def _flags(x_BM: Tensor | None, s: Segment) -> Tensor | None:
    return None if x_BM is None else x_BM[:, s.first : s.last]


def folded(
    slots: Slots,
    S: RunningSum,
    v: Tensor | None,
    weight: Tensor | None,
    update: Tensor | None,
    reset: Tensor | None,
    lr: float,
    keep: float,
) -> Iterator[tuple[Segment, Tensor]]:
    """Yield each segment with the weights ``W0 + lr * S_m`` [B, n, D, F] of its slots, and advance S.

    The weights are overwritten by the next segment.
    """
    B, D, F = S.S.shape
    buffer = None
    for s in slots.segments():
        n, u = s.last - s.first, slots.updating(s)
        if buffer is None or buffer.shape[1] < n:
            buffer = slots.z.new_empty(B, n, D, F)
        folds = buffer[:, :n]
        pairs = None
        if u and v is not None:
            pairs = v[:, s.first * slots.C : (s.first + u) * slots.C].unflatten(1, (u, slots.C)), slots.absorbed(s)
        S.walk(folds, pairs, weight, _flags(update, s), _flags(reset, s), lr, keep, u if pairs else 0)
        yield s, folds


def forward(
    z: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    state: Tensor | None,
    past: Tensor | None,
    index: Tensor | None,
    update: Tensor | None,
    reset: Tensor | None,
    rest: Tensor | None,
    lr: float,
    keep: float,
    chunk_size: int,
    prefix: int,
    steps: int,
    updates: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Return outputs [B, T, D] and S [B, D, F] after the call. ``rest``: tokens in no slot, which see W0 alone."""
    slots = _slots(z, past, (chunk_size, prefix, index, steps, updates), width)
    S, out = RunningSum(z, state, width), slots.empty(width)
    if rest is not None and len(rest):
        x = z.reshape(-1, z.shape[2])[rest]
        out[rest] = 0 if weight is None else torch.nn.functional.linear(x, weight, bias)
    for s, folds in folded(slots, S, v, weight, update, reset, lr, keep):
        slots.put(out, s, slots.applied(z, s), folds.mT, bias)
    return slots.view(out), S.value()


def backward(
    g: Tensor,
    grad_state: Tensor | None,
    z: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    state: Tensor | None,
    past: Tensor | None,
    index: Tensor | None,
    update: Tensor | None,
    reset: Tensor | None,
    rest: Tensor | None,
    last: Tensor | None,
    lr: float,
    keep: float,
    chunk_size: int,
    prefix: int,
    steps: int,
    updates: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return gradients of z, v, state, past and, where it costs nothing extra, W0 (in the state's precision).

    Two walks: backwards over the slots for H_m = dL/dS_{m+1}, which gives dv and v's part of dz, then forward for the
    weights, which give the rest of dz (rounded in between; ``_backward_at_once`` rounds once where S can be unwound).
    """
    if index is None and keep == 1.0 and (last is not None or not updates):
        numbers = (chunk_size, prefix, steps, updates)
        return _backward_at_once(g, grad_state, z, v, weight, state, past, last, lr, *numbers)
    B, F, D = z.shape[0], z.shape[2], g.shape[2]
    slots = _slots(z, past, (chunk_size, prefix, index, steps, updates), D)
    dz = slots.empty(F)
    if rest is not None and len(rest):
        dz[rest] = 0 if weight is None else g.reshape(-1, D)[rest] @ weight
    dv = None if v is None else v.new_zeros(v.shape)
    dpast = None if past is None else past.new_zeros(past.shape)

    # H is stored divided by lr, so that products need no factor.
    H = RunningSum(z, None if grad_state is None else grad_state / lr, D)
    buffer = None
    for s in reversed(slots.segments()):
        n, u = s.last - s.first, slots.updating(s)
        if buffer is None or buffer.shape[1] < n:
            buffer = z.new_empty(B, n, D, F)
        folds = buffer[:, :n]
        pairs = slots.applied(g, s), slots.applied(z, s)
        H.walk(folds, pairs, None, _flags(update, s), _flags(reset, s), lr, keep, u, mode="reverse")
        if u and v is not None and dv is not None:
            span = slice(s.first * chunk_size, (s.first + u) * chunk_size)
            product(slots.absorbed(s), folds[:, :u].mT, dv[:, span].unflatten(1, (u, chunk_size)))
            _through_targets(slots, dz, dpast, s, v[:, span].unflatten(1, (u, chunk_size)), folds[:, :u])
        _no_targets(slots, dz, s, u if v is not None else 0)
    del buffer

    for s, folds in folded(slots, RunningSum(z, state, D), v, weight, update, reset, lr, keep):
        slots.add(dz, s, slots.applied(g, s), folds)

    dstate = None if state is None else H.value().mul_(lr).to(state.dtype)
    return slots.view(dz), dv, dstate, dpast, None


def _backward_at_once(
    g: Tensor,
    grad_state: Tensor | None,
    z: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    state: Tensor | None,
    past: Tensor | None,
    last: Tensor | None,
    lr: float,
    chunk_size: int,
    prefix: int,
    steps: int,
    updates: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Run ``backward`` of a regular call with keep 1: S is unwound from ``last`` while H is built.

    ``dz = [g | v] @ [W_m; H_m]`` is one product with one rounding.
    """
    D, F, C = g.shape[2], z.shape[2], chunk_size
    slots = _slots(z, past, (chunk_size, prefix, None, steps, updates), D, weights=2)
    dz = slots.empty(F)
    dv = None if v is None else torch.empty_like(v)
    dpast = None if past is None else past.new_zeros(past.shape)
    H = RunningSum(z, None if grad_state is None else grad_state / lr, D)
    S = RunningSum(z, state if last is None else last, D)
    buffer = None
    for s in reversed(slots.segments()):
        n, u = s.last - s.first, slots.updating(s) if v is not None else 0
        if buffer is None or buffer.shape[1] < n:
            buffer = z.new_empty(slots.B, n, 2, D, F)
        both = buffer[:, :n]
        applied = slots.applied(g, s)
        H.walk(both[:, :, 1], (applied, slots.applied(z, s)), None, None, None, lr, 1.0, u, mode="reverse")
        pairs, left = None, applied.new_empty(*applied.shape[:3], 2 * D)  # [g | v]
        left[..., :D] = applied
        left[:, u:, :, D:] = 0
        if u and v is not None and dv is not None:
            span, head = slice(s.first * C, (s.first + u) * C), slots.P if s.first == 0 else 0
            pairs = v[:, span].unflatten(1, (u, C)), slots.absorbed(s)
            product(pairs[1], both[:, :u, 1].mT, dv[:, span].unflatten(1, (u, C)))
            left[:, :u, :, D:] = pairs[0][:, :, head:]
            if head and dpast is not None:
                dpast[:, :head] = torch.bmm(pairs[0][:, 0, :head], both[:, 0, 1]).to(dpast.dtype)
        S.walk(both[:, :, 0], pairs, weight, None, None, lr, 1.0, u, mode="unwind")
        slots.put(dz, s, left, both.flatten(2, 3))
    total = H.value().sum(0) if grad_state is None else None
    dstate = None if state is None else H.value().mul_(lr).to(state.dtype)
    return slots.view(dz), dv, dstate, dpast, total


def _through_targets(
    slots: Slots, dz: Tensor, dpast: Tensor | None, s: Segment, v_BnCD: Tensor, H_BnDF: Tensor
) -> None:
    """Set dz of the updating slots to ``H^T v``; add that of pending tokens to ``dpast``."""
    part = s._replace(last=s.first + v_BnCD.shape[1])
    if slots.index is None:
        head = slots.P if s.first == 0 and dpast is not None else 0
        part = part._replace(stop=s.start + v_BnCD.shape[1] * slots.C - head)
        slots.put(dz, part, v_BnCD[:, :, head:], H_BnDF)
        if head and dpast is not None:
            dpast[:, :head] = torch.bmm(v_BnCD[:, 0, :head], H_BnDF[:, 0]).to(dpast.dtype)
        return
    slots.put(dz, part, v_BnCD, H_BnDF)
    if dpast is not None:
        old = slots.old[:, part.first : part.last]
        where = slots.index[:, part.first : part.last].clamp(0, slots.P - 1).flatten(1)[..., None]
        value = torch.where(old[..., None], v_BnCD @ H_BnDF, 0).flatten(1, 2).to(dpast.dtype)
        dpast.scatter_add_(1, where.expand(-1, -1, value.shape[-1]), value)


def _no_targets(slots: Slots, dz: Tensor, s: Segment, updating: int) -> None:
    """Set dz of the slots that do not update to zero."""
    if s.first + updating == s.last:
        return
    if slots.index is None:
        slots.view(dz)[
            :, min(s.start + max(updating * slots.C - (slots.P if s.first == 0 else 0), 0), s.stop) : s.stop
        ] = 0
    else:
        dz[slots.flat[:, s.first + updating : s.last].flatten()] = 0
