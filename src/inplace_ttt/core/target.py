"""The LM-aligned target: a depthwise convolution over time that stays inside its chunk, then a projection."""

import torch
from torch import Tensor

from .chunks import ChunkTable

SHIFTS = {"next_token": 1, "reconstruction": 0}
"""Fixed targets: v_t comes from u at t + shift (inside the chunk), without a convolution."""


def chunked(x_BTW: Tensor, past_BPW: Tensor | None, table: ChunkTable) -> Tensor:
    """The tokens of the first ``table.updates`` chunk slots, [B, updates * C, W]; slots without a token are zero.

    A view of ``x`` where possible. ``past`` holds the pending tokens, at least ``table.prefix`` of them.
    """
    B, W = x_BTW.shape[0], x_BTW.shape[2]
    C, U, P = table.chunk_size, table.updates, table.prefix
    if P and past_BPW is None:
        raise ValueError(f"{P} pending tokens are missing: pass them as past")
    if table.index is None and not P:
        return x_BTW[:, : U * C]
    extended = x_BTW if not P or past_BPW is None else torch.cat([past_BPW[:, :P].to(x_BTW.dtype), x_BTW], 1)
    if table.index is None:
        return extended[:, : U * C]
    index = table.index[:, :U].reshape(B, U * C)
    picked = extended.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, W))
    return torch.where((index >= 0)[..., None], picked, 0)


def convolve(u_NCD: Tensor, kappa_DK: Tensor, lookahead: int) -> Tensor:
    """``c_t = sum_k kappa[:, k] * u[t + k - (K-1-L)]`` within each of N chunks; outside counts as zero."""
    C, K = u_NCD.shape[1], kappa_DK.shape[1]
    before = max(K - 1 - lookahead, 0)
    padded = torch.nn.functional.pad(u_NCD, (0, 0, before, max(lookahead, 0)))
    c = torch.zeros_like(u_NCD, dtype=torch.promote_types(u_NCD.dtype, kappa_DK.dtype))
    for k in range(K):
        first = before + k - (K - 1 - lookahead)
        c = torch.addcmul(c, padded[:, first : first + C], kappa_DK[:, k])
    return c


def target(
    u_BTD: Tensor,
    kappa_DK: Tensor | None,
    proj_DD: Tensor | None,
    table: ChunkTable,
    *,
    lookahead: int = 2,
    shift: int = 1,
    past_BPD: Tensor | None = None,
) -> Tensor | None:
    """Targets v [B, updates * C, D] of the chunks that update, in slot order; None when none does.

    ``kappa_DK`` [D, K]: learned taps, no bias; None takes the fixed ``shift`` instead (1: the next token, 0: the same
    token). ``proj_DD``: row vector times P; None leaves it out. Half-precision sources are convolved in float32. The
    result has the dtype of the projection's product (that of autocast, where it is on). Section 2 of docs/method.md.
    """
    if not table.updates:
        return None
    B, _, D = u_BTD.shape
    C, U = table.chunk_size, table.updates
    u = chunked(u_BTD, past_BPD, table)
    if kappa_DK is None:
        kappa_DK, lookahead = u.new_ones(D, 1), shift
    if fused_convolution(u, kappa_DK):
        from ..kernels.convolution import convolve as fused

        c = fused(u, kappa_DK, C, lookahead, torch.float32 if proj_DD is None else proj_DD.dtype)
    else:
        if u.dtype in (torch.bfloat16, torch.float16):
            u, kappa_DK = u.float(), kappa_DK.float()
        c = convolve(u.reshape(B * U, C, D), kappa_DK, lookahead).view(B, U * C, D)
    return c if proj_DD is None else c.to(proj_DD.dtype) @ proj_DD


def fused_convolution(u: Tensor, kappa: Tensor) -> bool:
    """Whether the convolution runs as one Triton kernel: on CUDA, below float64."""
    if not u.is_cuda or u.dtype == torch.float64 or kappa.dtype == torch.float64:
        return False
    from ..kernels import has_triton

    return has_triton()
