"""The chunk scan: every token of chunk i is projected by ``W0 + lr * S_i``, S_i the sum of earlier chunks' updates.

Differentiable through the whole prefix sum. Backward keeps z, v and W0 only and recomputes S, so memory does not grow
with the number of chunks. One entry point and one operator for torch.compile; the backend is a name: ``torch`` is the
loop over chunks below, ``segments`` (kernels/) batches them and is chosen on CUDA.

Shapes: B rows, T new tokens, P pending tokens, N = updates * C chunk tokens, F width of z, D output width.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .chunks import ChunkTable
from .layout import Layout
from .target import chunked

Tensors = tuple[Tensor, Tensor]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of S: float32, float64 for float64 inputs. Half-precision sums lose small updates."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def outer(a_BCM: Tensor, b_BCN: Tensor) -> Tensor:
    """``sum_t a_t b_t^T`` per row, [B, M, N], accumulated and returned in the state's precision."""
    dtype = state_dtype(b_BCN.dtype)
    if b_BCN.dtype != dtype and b_BCN.is_cuda:
        return torch.bmm(a_BCM.mT, b_BCN, out_dtype=dtype)
    return torch.bmm(a_BCM.to(dtype).mT, b_BCN.to(dtype))


def _exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps autocast out of an operator: the caller has chosen its precision."""

    @wraps(function)
    def run(first: Tensor, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return run


def shrink(norm: Tensor, clip: Tensor) -> Tensor:
    """What scales lengths ``norm`` down to ``clip`` where they are longer."""
    return torch.where(norm > clip, clip / norm, 1.0)


def clip_factor(dW_BDF: Tensor, clip: Tensor) -> Tensor:
    """Per-row factor [B, 1, 1] that scales dW to Frobenius norm ``clip`` where it is longer."""
    return shrink(torch.linalg.vector_norm(dW_BDF, dim=(1, 2), keepdim=True), clip)


def squared_norm(left_BND: Tensor, right_BNF: Tensor) -> Tensor:
    """``|sum_n left_n right_n^T|^2`` (Frobenius) per row [B], from N x N products, summed in the state's precision."""
    dtype = state_dtype(left_BND.dtype)
    left_BNN, right_BNN = torch.bmm(left_BND, left_BND.mT), torch.bmm(right_BNF, right_BNF.mT)
    return (left_BNN.to(dtype) * right_BNN.to(dtype)).sum((1, 2))


def keep_factor(layout: Layout, m: int, decay: float) -> float | Tensor:
    """What is left of S after slot m's decay: a number, or [B, 1, 1] where only some rows update."""
    if layout.update is None or not decay:
        return 1.0 - decay
    return 1.0 - decay * layout.update[:, m, None, None].to(state_dtype(layout.z.dtype))


def advance(S: Tensor | None, z: Tensor, v: Tensor, keep: float | Tensor, clip: Tensor | None) -> Tensor:
    """``S <- keep * S + clipped(sum_t v_t z_t^T)``, in place where S exists (step 3 of the method)."""
    if S is None:
        dW = outer(v, z)
        return dW if clip is None else dW.mul_(clip_factor(dW, clip))
    if isinstance(keep, Tensor) or keep != 1.0:
        S *= keep
    if clip is None and z.dtype == S.dtype:
        return S.baddbmm_(v.mT, z)
    dW = outer(v, z)
    return S.add_(dW if clip is None else dW.mul_(clip_factor(dW, clip)))


def sweep(
    layout: Layout,
    out: Tensor,
    x: Tensor,
    v: Tensor | None,
    state: Tensor | None,
    clip: Tensor | None,
    lr: float,
    decay: float,
    steps: int,
    updates: int,
    *,
    transposed: bool = False,
) -> Tensor | None:
    """Adds ``lr * S_m x_t`` (``lr * S_m^T x_t`` when transposed) to ``out``, slot by slot; S after the last one."""
    reset = layout.reset
    S = None if state is None else state.to(state_dtype(x.dtype), copy=updates > 0 or reset is not None)
    for m in range(steps):
        if reset is not None and S is not None:
            S *= ~reset[:, m, None, None]
        if S is not None:
            fast = S.to(x.dtype)
            layout.add_product(out, m, layout.applied(x, m), fast if transposed else fast.mT, lr)
        if m < updates and v is not None:
            S = advance(S, layout.absorbed(m), layout.targets(v, m), keep_factor(layout, m, decay), clip)
    return S


@torch.library.custom_op("inplace_ttt::scan", mutates_args=())
@_exact
def scan_op(
    z: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    state: Tensor | None,
    past: Tensor | None,
    clip: Tensor | None,
    index: Tensor | None,
    update: Tensor | None,
    reset: Tensor | None,
    rest: Tensor | None,
    lr: float,
    decay: float,
    chunk_size: int,
    prefix: int,
    steps: int,
    updates: int,
    backend: str,
    width: int,
    keep_state: bool,
) -> Tensors:
    """Outputs and, where it is kept, S after the last update."""
    B, T, F = z.shape
    dtype = state_dtype(z.dtype)
    S: Tensor | None
    if backend == "segments":
        from ..kernels.segments import forward

        tensors = (z, v, weight, bias, state, past, index, update, reset, rest)
        out, S = forward(*tensors, lr, decay, chunk_size, prefix, steps, updates, width)
        return out, S if keep_state else z.new_zeros(0, dtype=dtype)
    layout = Layout(z, past, chunk_size, prefix, index, update, reset)
    out = z.new_zeros(B, T, width) if weight is None else torch.nn.functional.linear(z, weight, bias)
    S = sweep(layout, out, z, v, state, clip, lr, decay, steps, updates)
    if not keep_state:
        return out, z.new_zeros(0, dtype=dtype)
    return out, z.new_zeros(B, width, F, dtype=dtype) if S is None else S


@scan_op.register_fake
def _(z: Tensor, *rest: Any) -> Tensors:
    width, keep_state = rest[-2:]
    B, T, F = z.shape
    dtype = state_dtype(z.dtype)
    return z.new_empty(B, T, width), z.new_empty(*((B, width, F) if keep_state else (0,)), dtype=dtype)


@torch.library.custom_op("inplace_ttt::scan_backward", mutates_args=())
@_exact
def scan_backward_op(
    g: Tensor,
    grad_state: Tensor | None,
    z: Tensor,
    v: Tensor | None,
    weight: Tensor | None,
    state: Tensor | None,
    past: Tensor | None,
    clip: Tensor | None,
    index: Tensor | None,
    update: Tensor | None,
    reset: Tensor | None,
    rest: Tensor | None,
    last: Tensor | None,
    lr: float,
    decay: float,
    chunk_size: int,
    prefix: int,
    steps: int,
    updates: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, v, state and past (empty where the input was None), and that of W0 where it is known already.

    ``last``: S after the last update, if forward kept it (the torch backend has no use for it).

    ``dL/dz_t = (W0 + lr S_i)^T g_t + H_i^T v_t`` and ``dL/dv_t = H_i z_t``, where H_i = dL/dS_{i+1} is the reverse
    prefix sum ``H_{i-1} = keep * H_i + lr * sum_t g_t z_t^T``.
    """
    if backend == "segments" and lr:
        from ..kernels.segments import backward

        tensors = (g, grad_state, z, v, weight, state, past, index, update, reset, rest, last)
        found = backward(*tensors, lr, decay, chunk_size, prefix, steps, updates)
        return tuple(z.new_zeros(0) if x is None else x for x in found)  # type: ignore[return-value]
    layout = Layout(z, past, chunk_size, prefix, index, update, reset)
    dtype = state_dtype(z.dtype)
    dz = z.new_zeros(z.shape) if weight is None else (g @ weight.to(g.dtype)).to(z.dtype)
    dv = None if v is None else v.new_zeros(v.shape)
    dpast = None if past is None else past.new_zeros(past.shape)

    sweep(layout, dz, g, v, state, clip, lr, decay, steps, updates, transposed=True)

    H = None if grad_state is None else grad_state.to(dtype, copy=True)
    for m in reversed(range(steps)):
        if m < updates and v is not None and dv is not None and H is not None:
            z_m, v_m = layout.absorbed(m), layout.targets(v, m)
            H_m = H if clip is None else _through_clip(H, outer(v_m, z_m), clip)
            H_m = H_m.to(z.dtype)
            layout.add_to_targets(dv, m, z_m, H_m.mT)
            layout.add_absorbed(dz, dpast, m, v_m, H_m)
            H = H.mul_(keep_factor(layout, m, decay)) if decay else H
        if m > 0 or state is not None:
            G = outer(layout.applied(g, m), layout.applied(z, m))
            H = G.mul_(lr) if H is None else H.add_(G, alpha=lr)
        if reset is not None and H is not None:
            H *= ~reset[:, m, None, None]

    dstate = z.new_zeros(0) if state is None else torch.zeros_like(state) if H is None else H.to(state.dtype)
    empty = z.new_zeros(0)
    dv, dpast = empty if dv is None else dv, empty.clone() if dpast is None else dpast
    return dz, dv, dstate, dpast, z.new_zeros(0)


@scan_backward_op.register_fake
def _(g: Tensor, grad_state: Tensor | None, z: Tensor, v: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    _weight, state, past = rest[:3]
    lr, decay, backend = rest[9], rest[10], rest[-1]
    known = backend == "segments" and lr and not decay and rest[4] is None and grad_state is None
    total = z.new_empty(*(g.shape[2], z.shape[2]) if known else (0,), dtype=state_dtype(z.dtype) if known else z.dtype)
    return (*(z.new_empty(0) if x is None else x.new_empty(x.shape) for x in (z, v, state, past)), total)


def _through_clip(H: Tensor, dW: Tensor, clip: Tensor) -> Tensor:
    """Gradient of the unclipped update: ``f * (H - dW <dW, H> / |dW|^2)`` where it was clipped by f, H elsewhere."""
    squared = (dW * dW).sum((1, 2), keepdim=True)
    along = (dW * H).sum((1, 2), keepdim=True) / squared.clamp(min=torch.finfo(dW.dtype).tiny)
    factor = clip_factor(dW, clip)
    return torch.where(factor < 1, factor * (H - dW * along), H)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    z, v, weight, bias, state, past, clip, index, update, reset, rest = inputs[:11]
    ctx.set_materialize_grads(False)
    last = output[1] if output[1].numel() else None
    ctx.save_for_backward(z, v, weight, state, past, clip, index, update, reset, rest, last)
    ctx.numbers = inputs[11:18]  # lr, decay, chunk_size, prefix, steps, updates, backend
    ctx.has_bias = bias is not None


def _backward(ctx, g, grad_state):  # type: ignore[no-untyped-def]
    z, v, weight, state, past, clip, index, update, reset, rest, last = ctx.saved_tensors
    if grad_state is not None and grad_state.numel() == 0:
        grad_state = None
    if g is None:
        width = grad_state.shape[1]
        g = z.new_zeros(*z.shape[:2], width)
    dz, dv, dstate, dpast, total = scan_backward_op(
        g, grad_state, z, v, weight, state, past, clip, index, update, reset, rest, last, *ctx.numbers
    )
    dweight = dbias = None
    if weight is not None and ctx.needs_input_grad[2]:
        dweight = total.to(weight.dtype) if total.numel() else (g.flatten(0, 1).mT @ z.flatten(0, 1)).to(weight.dtype)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        dbias = g.flatten(0, 1).sum(0)
    return (
        dz,
        None if v is None else dv,
        dweight,
        dbias,
        None if state is None else dstate,
        None if past is None else dpast,
        *(None,) * 14,
    )


scan_op.register_autograd(_backward, setup_context=_setup_context)

BACKENDS = ("torch", "segments")
"""Ways to compute the scan: a loop over chunks, or segments of chunks in batched products (kernels/segments.py)."""


def choose_backend(z: Tensor) -> str:
    """``segments`` on CUDA, ``torch`` elsewhere."""
    return "segments" if z.is_cuda else "torch"


def clip_targets(z_BTF: Tensor, v_BND: Tensor, table: ChunkTable, past_BPF: Tensor | None, clip: Tensor) -> Tensor:
    """v scaled so that no chunk's update is longer than ``clip``; differentiable, for backends that sum whole segments.

    No update is made for its norm (``squared_norm``): C * C * (D + F) multiply-adds a chunk where the update has
    C * D * F.
    """
    B, C, U = table.rows, table.chunk_size, table.updates
    z, v = (x.reshape(B * U, C, -1) for x in (chunked(z_BTF, past_BPF, table), v_BND.to(z_BTF.dtype)))
    squared = squared_norm(v, z)
    norm = squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()
    return (v * shrink(norm, clip)[:, None, None]).to(v.dtype).view(B, U * C, -1)


def scan(
    z_BTF: Tensor,
    v_BND: Tensor | None,
    weight_DF: Tensor | None,
    table: ChunkTable,
    *,
    lr: float,
    bias_D: Tensor | None = None,
    decay: float = 0.0,
    clip: Tensor | None = None,
    state_BDF: Tensor | None = None,
    past_BPF: Tensor | None = None,
    width: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Outputs ``(W0 + lr * S_i) z_t (+ bias)`` [B, T, D] and the state after the call.

    z_BTF: inputs of the projection, float64, float32, bfloat16 or float16.
    v_BND: targets, as ``core.target`` returns them; None when no chunk updates.
    weight_DF: slow weight of z's dtype; None for the fast weights' part alone (then ``width``, or state or v, gives D).
    table: the call's chunks, on z's device.
    lr: inner learning rate. decay, in [0, 1): S shrinks by ``1 - decay`` at every update.
    clip: 0-d tensor, the largest Frobenius norm of one chunk's update.
    state_BDF: S before the call (None: zero). past_BPF: z of the pending tokens, when ``table.prefix`` > 0.
    backend: a name in ``BACKENDS``, or "auto": ``segments`` on CUDA, else ``torch``.

    The second result is S after the call when ``table.keep_state``: [B, D, F] in float32 (float64 for float64 inputs),
    or None for zero. All tensors but clip get gradients; double backward is not supported. Work per token: D * F
    multiply-adds for the slow product and 2 * D * F for the fast ones, whatever the length. docs/method.md.

    Raises ValueError on an unknown backend or missing pending tokens.
    """
    backend = choose_backend(z_BTF) if backend == "auto" else backend
    if backend not in BACKENDS:
        raise ValueError(f"unknown scan backend {backend!r}: choose auto or one of {', '.join(BACKENDS)}")
    if table.prefix and table.updates and past_BPF is None:
        raise ValueError(f"{table.prefix} pending tokens are missing: pass them as past")
    if clip is not None and backend != "torch":
        v_BND, clip = None if v_BND is None else clip_targets(z_BTF, v_BND, table, past_BPF, clip), None
    sizes = [x.shape[d] for x, d in ((weight_DF, 0), (state_BDF, 1), (v_BND, -1)) if x is not None]
    D = sizes[0] if sizes else width
    if D is None:
        raise ValueError("the output width is unknown: pass weight, state, targets or width")
    keep = table.keep_state and table.changes_state
    inputs = (z_BTF, v_BND, weight_DF, bias_D, state_BDF, past_BPF)
    unwound = backend == "segments" and table.index is None and not decay and table.updates > 0
    unwound = unwound and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    out, state = scan_op(
        z_BTF,
        None if v_BND is None else v_BND.to(z_BTF.dtype),
        weight_DF,
        bias_D,
        state_BDF,
        past_BPF if table.prefix and table.updates else None,
        clip,
        table.index,
        table.update,
        table.reset,
        table.rest,
        lr,
        decay,
        table.chunk_size,
        table.prefix,
        table.steps,
        table.updates,
        backend,
        D,
        keep or unwound,
    )
    return out, state if keep else state_BDF if table.keep_state else None
