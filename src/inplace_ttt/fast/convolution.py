"""The target's convolution in one Triton kernel: each source read once from memory, each result written once.

Shapes: B rows, N tokens (whole chunks of C), D channels, K taps.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_D = 32, 128
SPAN, SPAN_T = 256, 8


@triton.jit
def _convolve_kernel(
    u, kappa, out, N, D, C, lead, u_row, u_token, out_row,
    K: tl.constexpr, SIGN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute ``out[t] = sum_k kappa[:, k] * u[t + SIGN * (k - lead)]`` within t's chunk."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside, channel = (t < N)[:, None], (d < D)[None, :]
    acc = tl.zeros((BT, BD), tl.float32)
    for k in tl.static_range(K):
        source = t + SIGN * (k - lead)
        same = (source >= 0) & (source < N) & (source // C == t // C)
        at = u + b * u_row + source.to(tl.int64)[:, None] * u_token + d[None, :]
        value = tl.load(at, mask=same[:, None] & inside & channel, other=0.0).to(tl.float32)
        tap = tl.load(kappa + d * K + k, mask=d < D, other=0.0).to(tl.float32)
        acc += value * tap[None, :]
    at = out + b * out_row + t.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside & channel)


@triton.jit
def _taps_kernel(
    u, g, part, N, D, C, lead, parts, u_row, u_token, g_row, g_token,
    K: tl.constexpr, TAPS: tl.constexpr, SPAN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute ``part[i, d, k] = sum_t g[t, d] * u[t + k - lead, d]`` over the i-th SPAN tokens, in a fixed order.

    TAPS: K rounded up to a power of two.
    """
    b = tl.program_id(2).to(tl.int64)
    d, k = tl.program_id(1) * BD + tl.arange(0, BD), tl.arange(0, TAPS)
    acc = tl.zeros((TAPS, BT, BD), tl.float32)
    for first in range(0, SPAN, BT):
        t = tl.program_id(0) * SPAN + first + tl.arange(0, BT)
        at = g + b * g_row + t.to(tl.int64)[:, None] * g_token + d[None, :]
        y = tl.load(at, mask=(t < N)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        source = t[None, :] + k[:, None] - lead
        same = (source >= 0) & (source < N) & (source // C == t[None, :] // C) & (t < N)[None, :] & (k < K)[:, None]
        at = u + b * u_row + source.to(tl.int64)[:, :, None] * u_token + d[None, None, :]
        x = tl.load(at, mask=same[:, :, None] & (d < D)[None, None, :], other=0.0).to(tl.float32)
        acc += x * y[None, :, :]
    at = part + ((b * parts + tl.program_id(0)) * D + d[None, :]) * K + k[:, None]
    tl.store(at, tl.sum(acc, 1), mask=(k < K)[:, None] & (d < D)[None, :])


def _run(u: Tensor, kappa: Tensor, C: int, lead: int, dtype: torch.dtype, sign: int) -> Tensor:
    B, N, D = u.shape
    u = u if u.stride(-1) == 1 else u.contiguous()
    out = u.new_empty(B, N, D, dtype=dtype)
    grid = (triton.cdiv(N, BLOCK_T), triton.cdiv(D, BLOCK_D), B)
    with torch.cuda.device_of(u):
        _convolve_kernel[grid](
            u, kappa.contiguous(), out, N, D, C, lead, u.stride(0), u.stride(1), out.stride(0),
            K=kappa.shape[1], SIGN=sign, BT=BLOCK_T, BD=BLOCK_D,
        )  # fmt: skip
    return out


@torch.library.custom_op("inplace_ttt::convolve", mutates_args=())
def convolve_op(u: Tensor, kappa: Tensor, chunk_size: int, lookahead: int, dtype: torch.dtype) -> Tensor:
    return _run(u, kappa, chunk_size, kappa.shape[1] - 1 - lookahead, dtype, 1)


@convolve_op.register_fake
def _(u: Tensor, kappa: Tensor, chunk_size: int, lookahead: int, dtype: torch.dtype) -> Tensor:
    return u.new_empty(u.shape, dtype=dtype)


@torch.library.custom_op("inplace_ttt::convolve_backward", mutates_args=())
def convolve_backward_op(g: Tensor, u: Tensor, kappa: Tensor, chunk_size: int, lookahead: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of the sources and of the taps."""
    B, N, D = u.shape
    K, lead = kappa.shape[1], kappa.shape[1] - 1 - lookahead
    du = _run(g, kappa, chunk_size, lead, u.dtype, -1)
    u, g = (x if x.stride(-1) == 1 else x.contiguous() for x in (u, g))
    parts = triton.cdiv(N, SPAN)
    part = u.new_empty(B, parts, D, K, dtype=torch.float32)
    with torch.cuda.device_of(u):
        _taps_kernel[(parts, triton.cdiv(D, BLOCK_D), B)](
            u, g, part, N, D, chunk_size, lead, parts, u.stride(0), u.stride(1), g.stride(0), g.stride(1),
            K=K, TAPS=triton.next_power_of_2(K), SPAN=SPAN, BT=SPAN_T, BD=BLOCK_D,
        )  # fmt: skip
    return du, part.sum((0, 1)).to(kappa.dtype)


@convolve_backward_op.register_fake
def _(g: Tensor, u: Tensor, kappa: Tensor, chunk_size: int, lookahead: int) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), kappa.new_empty(kappa.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    u, kappa, chunk_size, lookahead, _ = inputs
    ctx.save_for_backward(u, kappa)
    ctx.numbers = chunk_size, lookahead


def _backward(ctx: Any, g: Tensor) -> Any:
    du, dkappa = convolve_backward_op(g, *ctx.saved_tensors, *ctx.numbers)
    return du, dkappa, None, None, None


convolve_op.register_autograd(_backward, setup_context=_setup_context)


def convolve(u_BND: Tensor, kappa_DK: Tensor, chunk_size: int, lookahead: int, dtype: torch.dtype) -> Tensor:
    """Run ``core.targets.convolve`` on contiguous chunks: [B, N, D] in ``dtype``, summed in float32."""
    return convolve_op(u_BND, kappa_DK, chunk_size, lookahead, dtype)
