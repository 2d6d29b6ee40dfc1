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
from ..core.layout import Segment, Slots, product
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
    index: Tensor | None  # type: ignore[assignment]
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


class FoldedSlots(Slots):
    """A call's slots, as many in a segment as ``SEGMENT_BYTES`` has room for ``matrices`` of W0's size for each."""

    def __init__(self, call: Inputs, matrices: int = 1) -> None:
        B, F = call.z.shape[0], call.z.shape[2]
        weight = matrices * B * call.width * F * call.z.element_size()
        super().__init__(call.z, call.past, call, max(SEGMENT_BYTES // weight, 1))
        self.shape = (call.width, F) if matrices == 1 else (matrices, call.width, F)
        self._buffer: Tensor | None = None

    def buffer(self, s: Segment) -> Tensor:
        """Return room for the matrices of a segment's slots, [B, n, D, F]; the next segment overwrites it."""
        n = s.last - s.first
        if self._buffer is None or self._buffer.shape[1] < n:
            self._buffer = None  # freed first
            self._buffer = self.z.new_empty(self.B, n, *self.shape)
        return self._buffer[:, :n]


class RunningSum:
    """A running sum over segments (S or H), [B, D, F]. The initial value is never modified."""

    def __init__(self, call: Inputs, begin: Tensor | None) -> None:
        dtype = state_dtype(call.z.dtype)
        self.call, self.begin = call, None if begin is None else begin.to(dtype).contiguous()
        self.S = call.z.new_empty(call.z.shape[0], call.width, call.z.shape[2], dtype=dtype)

    def walk(self, s: Segment, folds: Tensor, pairs: Pairs | None, updates: int, mode: str = "forward") -> None:
        call, run = self.call, walk
        if folds.is_cuda and folds.dtype in (torch.bfloat16, torch.float16) and has_triton():
            from .triton_walk import walk as run
        update, reset = (None if x is None else x[:, s.first : s.last] for x in (call.update, call.reset))
        weight = None if mode == "reverse" else call.weight
        run(self.S, self.begin, folds, pairs, weight, update, reset, call.lr, call.keep, updates, mode=mode)
        self.begin = self.S

    def value(self) -> Tensor:
        if self.begin is self.S:
            return self.S
        return self.S.zero_() if self.begin is None else self.S.copy_(self.begin)  # there was no segment


def folded(slots: FoldedSlots, S: RunningSum, v: Tensor | None) -> Iterator[tuple[Segment, Tensor]]:
    """Yield each segment with the weights ``W0 + lr * S_m`` [B, n, D, F] of its slots, and advance S.

    The weights are overwritten by the next segment.
    """
    for s in slots.segments():
        folds, u = slots.buffer(s), 0 if v is None else slots.updating(s)
        pairs = None if v is None or not u else (slots.chunks(v, s), slots.absorbed(s))
        S.walk(s, folds, pairs, u)
        yield s, folds


def forward(call: Inputs) -> tuple[Tensor, Tensor]:
    """Return outputs [B, T, D] and S [B, D, F] after the call."""
    z, weight, rest = call.z, call.weight, call.rest
    slots, S = FoldedSlots(call), RunningSum(call, call.state)
    out = slots.empty(call.width)
    if rest is not None and len(rest):  # tokens in no slot see W0 alone
        x = z.reshape(-1, z.shape[2])[rest]
        out[rest] = 0 if weight is None else torch.nn.functional.linear(x, weight, call.bias)
    for s, folds in folded(slots, S, call.v):
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
    slots = FoldedSlots(call)
    dz = slots.empty(z.shape[2]).zero_()
    if rest is not None and weight is not None:
        dz[rest] = g.reshape(-1, call.width)[rest] @ weight
    dv = None if v is None else v.new_zeros(v.shape)
    dpast = None if past is None else past.new_zeros(past.shape)

    for s in reversed(slots.segments()):
        folds, u = slots.buffer(s), slots.updating(s)
        H.walk(s, folds, (slots.applied(g, s), slots.applied(z, s)), u, mode="reverse")
        if u and v is not None and dv is not None:
            dv_s, v_s = slots.chunks(dv, s), slots.chunks(v, s)
            product(slots.absorbed(s), folds[:, :u].mT, dv_s)
            slots.through_targets(slots.put, dz, dpast, s, v_s, folds[:, :u])

    for s, folds in folded(slots, RunningSum(call, state), v):
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
    slots, S = FoldedSlots(call, matrices=2), RunningSum(call, state if last is None else last)
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
            dv_s, v_s = slots.chunks(dv, s), slots.chunks(v, s)
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
