"""The scan of outer rules: every token of chunk i is projected by ``W0 + lr * S_i``, S_i the sum of earlier updates.

Differentiable through the whole prefix sum. Backward keeps z, v and W0 only and recomputes S, so memory does not grow
with the number of chunks. One operator for torch.compile; the backend is a name: ``torch`` is the loop over chunks
below, ``segments`` batches them and is chosen on CUDA.

Shapes: B rows, T new tokens, P pending tokens, N = updates * C chunk tokens, F width of z, D output width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..core.algebra import accumulate, exact, outer, state_dtype
from ..core.chunks import ChunkTable
from ..core.layout import Slots, product
from ..core.rules import Rule
from ..core.scan import PATHS, Call, Path, Result
from .segments import SCHEMA, Gradients, Inputs
from .segments import backward as segments_backward
from .segments import forward as segments_forward

Tensors = tuple[Tensor, Tensor]


def keep_factor(slots: Slots, m: int, keep: float) -> float | Tensor:
    """Return the factor by which slot m's update scales S: a number, or [B, 1, 1] where only some rows update."""
    if slots.update is None or keep == 1.0:
        return keep
    return 1.0 - (1.0 - keep) * slots.update[:, m, None, None].to(state_dtype(slots.z.dtype))


def sweep(call: Inputs, slots: Slots, out: Tensor, x: Tensor, *, transposed: bool = False) -> Tensor | None:
    """Add ``lr * S_m x_t`` (``lr * S_m^T x_t`` if transposed) to ``out``, slot by slot; return S after the last one."""
    reset, v = call.reset, call.v
    S = None
    if call.state is not None:
        S = call.state.to(state_dtype(x.dtype), copy=call.updates > 0 or reset is not None)
    for m in range(call.steps):
        s = slots.segment(m, m + 1)
        if reset is not None and S is not None:
            S *= ~reset[:, m, None, None]
        if S is not None:
            fast = S.to(x.dtype)
            slots.add(out, s, slots.applied(x, s), (fast if transposed else fast.mT)[:, None], call.lr)
        if m < call.updates and v is not None:
            z_m, v_m = slots.absorbed(s)[:, 0], slots.masked(slots.chunks(v, s), s)[:, 0]
            S = accumulate(S, z_m, v_m, keep_factor(slots, m, call.keep))
    return S


@torch.library.custom_op("inplace_ttt::scan", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)")
@exact
def scan_op(*inputs: Any) -> Tensors:
    """Return outputs and, if it is kept, S after the last update."""
    call = Inputs(*inputs)
    z, weight = call.z, call.weight
    S: Tensor | None
    if call.backend == "segments":
        out, S = segments_forward(call)
    else:
        slots = Slots(z, call.past, call)
        flat = slots.padded(z.new_zeros(*z.shape[:2], call.width) if weight is None else linear(z, weight, call.bias))
        S, out = sweep(call, slots, flat, z), slots.view(flat)
    if S is None or not call.keep_state:
        S = z.new_zeros(_state_shape(call), dtype=state_dtype(z.dtype))
    return out, S


def _state_shape(call: Inputs) -> tuple[int, ...]:
    return (call.z.shape[0], call.width, call.z.shape[2]) if call.keep_state else (0,)


@scan_op.register_fake
def _(*inputs: Any) -> Tensors:
    call = Inputs(*inputs)
    z = call.z
    return z.new_empty(*z.shape[:2], call.width), z.new_empty(_state_shape(call), dtype=state_dtype(z.dtype))


@torch.library.custom_op(
    "inplace_ttt::scan_backward",
    mutates_args=(),
    schema=f"(Tensor g, Tensor? grad_state, Tensor? last, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@exact
def scan_backward_op(g: Tensor, grad_state: Tensor | None, last: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    """Return gradients of z, v, state, past (empty for None inputs), and of W0 if the backend computes it here.

    ``last``: S after the last update, if forward kept it (the torch backend ignores it).

    ``dL/dz_t = (W0 + lr S_i)^T g_t + H_i^T v_t`` and ``dL/dv_t = H_i z_t``, where H_i = dL/dS_{i+1} is the reverse
    prefix sum ``H_{i-1} = keep * H_i + lr * sum_t g_t z_t^T``.
    """
    call = Inputs(*inputs)
    if call.backend == "segments" and call.lr:
        found = segments_backward(call, g, grad_state, last)
    else:
        found = _loop_backward(call, g, grad_state)
    return tuple(g.new_zeros(0) if x is None else x for x in found)


def _loop_backward(call: Inputs, g: Tensor, grad_state: Tensor | None) -> Gradients:
    z, v, weight, state, past, reset = call.z, call.v, call.weight, call.state, call.past, call.reset
    slots = Slots(z, past, call)
    dz = slots.padded(z.new_zeros(z.shape) if weight is None else (g @ weight.to(g.dtype)).to(z.dtype))
    dv = None if v is None else v.new_zeros(v.shape)
    dpast = None if past is None else past.new_zeros(past.shape)

    sweep(call, slots, dz, g, transposed=True)

    H = None if grad_state is None else grad_state.to(state_dtype(z.dtype), copy=True)
    for m in reversed(range(call.steps)):
        s = slots.segment(m, m + 1)
        if m < call.updates and v is not None and dv is not None and H is not None:
            H_m = slots.masked(H.to(z.dtype)[:, None], s)
            product(slots.absorbed(s), H_m.mT, slots.chunks(dv, s))
            slots.through_targets(slots.add, dz, dpast, s, slots.chunks(v, s), H_m)
            H = H.mul_(keep_factor(slots, m, call.keep)) if call.keep != 1.0 else H
        if m > 0 or state is not None:
            G = outer(slots.applied(g, s)[:, 0], slots.applied(z, s)[:, 0])
            H = G.mul_(call.lr) if H is None else H.add_(G, alpha=call.lr)
        if reset is not None and H is not None:
            H *= ~reset[:, m, None, None]

    dstate = None if state is None else torch.zeros_like(state) if H is None else H.to(state.dtype)
    return slots.view(dz), dv, dstate, dpast, None


@scan_backward_op.register_fake
def _(g: Tensor, grad_state: Tensor | None, last: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    call = Inputs(*inputs)
    known = call.backend == "segments" and call.lr and call.keep == 1.0 and call.index is None and grad_state is None
    shape, dtype = ((call.width, call.z.shape[2]), state_dtype(call.z.dtype)) if known else ((0,), g.dtype)
    same = (g.new_empty(0) if x is None else x.new_empty(x.shape) for x in (call.z, call.v, call.state, call.past))
    return (*same, g.new_empty(shape, dtype=dtype))


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    call = Inputs(*inputs)
    ctx.save_for_backward(output[1] if output[1].numel() else None, *call._replace(bias=None)[:10])
    ctx.numbers, ctx.has_bias = call[10:], call.bias is not None


def _backward(ctx, g, grad_state):
    last, *tensors = ctx.saved_tensors
    call = Inputs(*tensors, *ctx.numbers)
    z, weight = call.z, call.weight
    if grad_state is not None and grad_state.numel() == 0:
        grad_state = None
    if g is None:
        g = z.new_zeros(*z.shape[:2], call.width)
    dz, dv, dstate, dpast, total = scan_backward_op(g, grad_state, last, *call)
    dweight = dbias = None
    if weight is not None and ctx.needs_input_grad[2]:
        dweight = total.to(weight.dtype) if total.numel() else (g.flatten(0, 1).mT @ z.flatten(0, 1)).to(weight.dtype)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        dbias = g.flatten(0, 1).sum(0)
    dv, dstate, dpast = (
        None if x is None else dx for x, dx in ((call.v, dv), (call.state, dstate), (call.past, dpast))
    )
    return dz, dv, dweight, dbias, dstate, dpast, *(None,) * 13


scan_op.register_autograd(_backward, setup_context=_setup_context)

BACKENDS = ("torch", "segments")
"""Ways to compute the scan: a loop over chunks, or segments of chunks in batched products (segments.py)."""


def scan(
    z_BTF: Tensor,
    v_BND: Tensor | None,
    weight_DF: Tensor | None,
    table: ChunkTable,
    *,
    lr: float,
    bias_D: Tensor | None = None,
    keep: float = 1.0,
    state_BDF: Tensor | None = None,
    past_BPF: Tensor | None = None,
    width: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Return outputs ``(W0 + lr * S_i) z_t (+ bias)`` [B, T, D] and the state after the call.

    z_BTF: inputs of the projection, float64, float32, bfloat16 or float16.
    v_BND: targets as they are written; None when no chunk updates.
    weight_DF: slow weight of z's dtype; None for the fast weights' part alone (then ``width``, or state or v, gives D).
    table: the call's chunks, on z's device.
    lr: inner learning rate. keep, in (0, 1]: factor by which an update scales S.
    state_BDF: S before the call (None: zero). past_BPF: z of the pending tokens, when ``table.prefix`` > 0.
    backend: a name in ``BACKENDS``, or "auto": ``segments`` on CUDA, else ``torch``.

    The second result is S after the call when ``table.keep_state``: [B, D, F] in float32 (float64 for float64 inputs),
    or None for zero. All tensors get gradients; double backward is not supported. Work per token: D * F
    multiply-adds for the slow product and 2 * D * F for the fast ones, whatever the length. docs/method.md.

    Raises ValueError on an unknown backend or missing pending tokens.
    """
    if backend == "auto":
        backend = "segments" if z_BTF.is_cuda else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"unknown scan backend {backend!r}: choose auto or one of {', '.join(BACKENDS)}")
    if table.prefix and table.updates and past_BPF is None:
        raise ValueError(f"{table.prefix} pending tokens are missing: pass them as past")
    sizes = [x.shape[d] for x, d in ((weight_DF, 0), (state_BDF, 1), (v_BND, -1)) if x is not None]
    D = sizes[0] if sizes else width
    if D is None:
        raise ValueError("the output width is unknown: pass weight, state, targets or width")
    kept = table.keep_state and table.changes_state
    inputs = (z_BTF, v_BND, weight_DF, bias_D, state_BDF, past_BPF)
    # The backward of a regular call unwinds S from its last value.
    needs_last = backend == "segments" and table.index is None and keep == 1.0 and table.updates > 0
    needs_last = needs_last and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    out, state = scan_op(
        *(z_BTF, None if v_BND is None else v_BND.to(z_BTF.dtype), weight_DF, bias_D, state_BDF),
        *(past_BPF if table.prefix and table.updates else None, table.index, table.update, table.reset),
        *(table.outside_slots, lr, keep, table.chunk_size, table.prefix, table.steps, table.updates, backend, D),
        kept or needs_last,
    )
    return out, state if kept else state_BDF if table.keep_state else None


def supports(call: Call) -> bool:
    """Tell if the call is of an outer rule with the base class's read and write, without gates."""
    rule, kind = call.rule, type(call.rule)
    own = kind.apply is Rule.apply and kind.update is Rule.update and kind.init is Rule.init
    own = own and kind.write is Rule.write
    return rule.outer and rule.from_zero and own and call.keep is None and call.watch is None


def run(call: Call) -> Result:
    state = None if call.state is None else call.state["S"]
    out, S = scan(
        call.z, call.v, call.weight, call.table, lr=call.rule.lr, keep=call.rule.keep, bias_D=call.bias,
        state_BDF=state, past_BPF=call.past, width=call.width,
    )  # fmt: skip
    return Result(out, None if S is None else {"S": S})


PATHS.append(Path("segments", lambda call: call.z.is_cuda and supports(call), run))
PATHS.append(Path("loop", supports, run))
