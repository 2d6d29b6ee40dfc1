"""The scan in segments of chunks: batched products, and one ``walk`` that computes the weight each chunk sees.

A chunk takes two matrix products; a loop over chunks is slow because of the state's memory traffic and the kernel
launches. A *segment* is as many chunk slots as fit their folded weights ``W0 + lr * S_m``, in z's precision, into
``SEGMENT_BYTES``: ``walk`` loops over its slots with S in registers and writes those weights, then one batched product
applies them. Memory does not grow with the length.

Shapes: B rows, T new tokens, P pending ones, F width of z, D output width; n slots of c tokens in a segment.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.algebra import state_dtype
from .walk import Pairs, has_triton, walk

SEGMENT_BYTES = 400 * 2**20
"""Most bytes of folded weights at a time (at least one chunk's)."""


class Inputs(NamedTuple):
    """The arguments of the scan operator, in the order of ``SCHEMA``; see ``outer.scan`` and ``ChunkTable``."""

    z: Tensor
    v: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    state: Tensor | None
    past: Tensor | None
    index: Tensor | None
    update: Tensor | None
    reset: Tensor | None
    rest: Tensor | None
    lr: float
    keep: float
    chunk_size: int
    prefix: int
    steps: int
    updates: int
    backend: str
    width: int
    keep_state: bool


SCHEMA = (
    "Tensor z, Tensor? v, Tensor? weight, Tensor? bias, Tensor? state, Tensor? past, Tensor? index, Tensor? update, "
    "Tensor? reset, Tensor? rest, float lr, float keep, SymInt chunk_size, SymInt prefix, SymInt steps, "
    "SymInt updates, str backend, SymInt width, bool keep_state"
)


class Segment(NamedTuple):
    """A range of slots ``first`` .. ``last - 1``. Regular calls: new tokens ``start`` .. ``stop - 1`` of every row."""

    first: int
    last: int
    start: int
    stop: int


class Slots:
    """A view of a call's chunk slots in segments, with access to their tokens.

    ``matrices``: matrices of W0's size that a slot needs.
    """

    def __init__(self, call: Inputs, matrices: int = 1) -> None:
        self.call, self.z, self.past = call, call.z, call.past
        self.B, self.T, F = call.z.shape
        self.C, self.P, self.index, self.steps = call.chunk_size, call.prefix, call.index, call.steps
        self.shape = (call.width, F) if matrices == 1 else (matrices, call.width, F)
        self.most = max(SEGMENT_BYTES // (matrices * self.B * call.width * F * call.z.element_size()), 1)
        self._buffer: Tensor | None = None
        if self.index is not None:
            rows = torch.arange(self.B, device=call.z.device)[:, None, None] * self.T
            new = self.index >= self.P
            self.flat = torch.where(new, self.index - self.P + rows, self.B * self.T)  # last: an unused row
            self.old = (self.index >= 0) & ~new

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
        return max(min(s.last, self.call.updates) - s.first, 0)

    def span(self, s: Segment) -> slice:
        """Return the target tokens of those slots."""
        return slice(s.first * self.C, (s.first + self.updating(s)) * self.C)

    def buffer(self, s: Segment) -> Tensor:
        """Return room for the matrices of a segment's slots, [B, n, D, F]; the next segment overwrites it."""
        n = s.last - s.first
        if self._buffer is None or self._buffer.shape[1] < n:
            self._buffer = None  # freed first
            self._buffer = self.z.new_empty(self.B, n, *self.shape)
        return self._buffer[:, :n]

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


class RunningSum:
    """A running sum over segments (S or H), [B, D, F]. The initial value is never modified."""

    def __init__(self, call: Inputs, begin: Tensor | None) -> None:
        dtype = state_dtype(call.z.dtype)
        self.call, self.begin = call, None if begin is None else begin.to(dtype).contiguous()
        self.S = call.z.new_empty(call.z.shape[0], call.width, call.z.shape[2], dtype=dtype)

    def walk(self, s: Segment, folds: Tensor, pairs: Pairs | None, updates: int, mode: str = "forward") -> None:
        """Run ``walk`` over a segment."""
        call, run = self.call, walk
        if folds.is_cuda and folds.dtype in (torch.bfloat16, torch.float16) and has_triton():
            from .triton_walk import walk as run  # type: ignore[assignment]
        update, reset = (None if x is None else x[:, s.first : s.last] for x in (call.update, call.reset))
        weight = None if mode == "reverse" else call.weight
        run(self.S, self.begin, folds, pairs, weight, update, reset, call.lr, call.keep, updates, mode=mode)
        self.begin = self.S

    def value(self) -> Tensor:
        """Return the present sum."""
        if self.begin is self.S:
            return self.S
        return self.S.zero_() if self.begin is None else self.S.copy_(self.begin)  # there was no segment


def folded(slots: Slots, S: RunningSum) -> Iterator[tuple[Segment, Tensor]]:
    """Yield each segment with the weights ``W0 + lr * S_m`` [B, n, D, F] of its slots, and advance S.

    The weights are overwritten by the next segment.
    """
    v = slots.call.v
    for s in slots.segments():
        folds, u = slots.buffer(s), 0 if v is None else slots.updating(s)
        pairs = None if v is None or not u else (v[:, slots.span(s)].unflatten(1, (u, slots.C)), slots.absorbed(s))
        S.walk(s, folds, pairs, u)
        yield s, folds


def forward(call: Inputs) -> tuple[Tensor, Tensor]:
    """Return outputs [B, T, D] and S [B, D, F] after the call."""
    z, weight, rest = call.z, call.weight, call.rest
    slots, S = Slots(call), RunningSum(call, call.state)
    out = slots.empty(call.width)
    if rest is not None and len(rest):  # tokens in no slot see W0 alone
        x = z.reshape(-1, z.shape[2])[rest]
        out[rest] = 0 if weight is None else torch.nn.functional.linear(x, weight, call.bias)
    for s, folds in folded(slots, S):
        slots.put(out, s, slots.applied(z, s), folds.mT, call.bias)
    return slots.view(out), S.value()


Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def backward(call: Inputs, g: Tensor, grad_state: Tensor | None, last: Tensor | None) -> Gradients:
    """Return gradients of z, v, state, past and, where it costs nothing extra, W0 (in the state's precision).

    Two walks: backwards over the slots for H_m = dL/dS_{m+1}, which gives dv and v's part of dz, then forward for the
    weights, which give the rest of dz (rounded in between; ``_backward_at_once`` rounds once where S can be unwound).
    """
    # H is stored divided by lr, so that products need no factor.
    H = RunningSum(call, None if grad_state is None else grad_state / call.lr)
    if call.index is None and call.keep == 1.0 and (last is not None or not call.updates):
        return _backward_at_once(call, g, grad_state, last, H)
    z, v, weight, state, past, rest = call.z, call.v, call.weight, call.state, call.past, call.rest
    slots = Slots(call)
    dz = slots.empty(z.shape[2]).zero_()
    if rest is not None and weight is not None:
        dz[rest] = g.reshape(-1, call.width)[rest] @ weight
    dv = None if v is None else v.new_zeros(v.shape)
    dpast = None if past is None else past.new_zeros(past.shape)

    for s in reversed(slots.segments()):
        folds, u = slots.buffer(s), slots.updating(s)
        H.walk(s, folds, (slots.applied(g, s), slots.applied(z, s)), u, mode="reverse")
        if u and v is not None and dv is not None:
            dv_s, v_s = (x[:, slots.span(s)].unflatten(1, (u, slots.C)) for x in (dv, v))
            product(slots.absorbed(s), folds[:, :u].mT, dv_s)
            _through_targets(slots, dz, dpast, s, v_s, folds[:, :u])

    for s, folds in folded(slots, RunningSum(call, state)):
        slots.add(dz, s, slots.applied(g, s), folds)

    dstate = None if state is None else H.value().mul_(call.lr).to(state.dtype)
    return slots.view(dz), dv, dstate, dpast, None


def _backward_at_once(
    call: Inputs, g: Tensor, grad_state: Tensor | None, last: Tensor | None, H: RunningSum
) -> Gradients:
    """Run ``backward`` of a regular call with keep 1: S is unwound from ``last`` while H is built.

    ``dz = [g | v] @ [W_m; H_m]`` is one product with one rounding.
    """
    z, v, state, past, D = call.z, call.v, call.state, call.past, call.width
    slots, S = Slots(call, matrices=2), RunningSum(call, state if last is None else last)
    dz = slots.empty(z.shape[2])
    dv = None if v is None else torch.empty_like(v)
    dpast = None if past is None else past.new_zeros(past.shape)
    for s in reversed(slots.segments()):
        both, u = slots.buffer(s), slots.updating(s) if v is not None else 0
        applied = slots.applied(g, s)
        H.walk(s, both[:, :, 1], (applied, slots.applied(z, s)), u, mode="reverse")
        pairs, left = None, applied.new_empty(*applied.shape[:3], 2 * D)  # [g | v]
        left[..., :D] = applied
        left[:, u:, :, D:] = 0
        if u and v is not None and dv is not None:
            dv_s, v_s = (x[:, slots.span(s)].unflatten(1, (u, slots.C)) for x in (dv, v))
            pairs, head = (v_s, slots.absorbed(s)), slots.P if s.first == 0 else 0
            product(pairs[1], both[:, :u, 1].mT, dv_s)
            left[:, :u, :, D:] = v_s[:, :, head:]
            if head and dpast is not None:
                dpast[:, :head] = torch.bmm(v_s[:, 0, :head], both[:, 0, 1]).to(dpast.dtype)
        S.walk(s, both[:, :, 0], pairs, u, mode="unwind")
        slots.put(dz, s, left, both.flatten(2, 3))
    total = H.value().sum(0) if grad_state is None else None
    dstate = None if state is None else H.value().mul_(call.lr).to(state.dtype)
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
