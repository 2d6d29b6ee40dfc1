"""Shared arithmetic: precision of the state, outer-product sums, norms without the update.

Shapes: B rows, N or C tokens, D output width, F width of z.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

SCORED_AT_ONCE = 1 << 26
"""Most logits converted to float32 at once."""


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of S: float32, float64 for float64 inputs. Half-precision sums lose small updates."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """Disable autocast inside an operator: the caller has chosen its precision."""

    @wraps(function)
    def run(first: Tensor, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return run


def outer(a_BCM: Tensor, b_BCN: Tensor) -> Tensor:
    """Compute ``sum_t a_t b_t^T`` per row, [B, M, N], in the state's precision. No autograd for halves on CUDA."""
    dtype = state_dtype(b_BCN.dtype)
    is_differentiable = torch.is_grad_enabled() and (a_BCM.requires_grad or b_BCN.requires_grad)
    if b_BCN.dtype != dtype and b_BCN.is_cuda and not is_differentiable:
        return torch.bmm(a_BCM.mT, b_BCN, out_dtype=dtype)
    return torch.bmm(a_BCM.to(dtype).mT, b_BCN.to(dtype))


def squared_norm(left_BND: Tensor, right_BNF: Tensor) -> Tensor:
    """Compute ``|sum_n left_n right_n^T|^2`` (Frobenius) per row [B] from N x N products, in the state's precision."""
    dtype = state_dtype(left_BND.dtype)
    left_BNN, right_BNN = torch.bmm(left_BND, left_BND.mT), torch.bmm(right_BNF, right_BNF.mT)
    return (left_BNN.to(dtype) * right_BNN.to(dtype)).sum((1, 2))


def norm_of(left_BND: Tensor, right_BNF: Tensor) -> Tensor:
    """Compute ``|sum_n left_n right_n^T|`` (Frobenius) per row [B]; next to 0, but above it, where the sum is 0."""
    squared = squared_norm(left_BND, right_BNF)
    return squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()


def size_of(v_BCD: Tensor, z_BCF: Tensor, norm_B: Tensor | None = None) -> Tensor:
    """Return ``norm_of``, infinite where the sum cancels down to rounding errors, which then scale to nothing.

    Those of the squared norm itself, and of values and keys that were rounded to their dtype. ``norm``: the sum's norm,
    where it is known.
    """
    norm = norm_of(v_BCD, z_BCF) if norm_B is None else norm_B
    v, z = v_BCD.to(norm.dtype), z_BCF.to(norm.dtype)
    terms = (v.square().sum(-1) * z.square().sum(-1)).sum(1)
    errors = max(torch.finfo(norm.dtype).eps, 16 * torch.finfo(z_BCF.dtype).eps ** 2)
    return torch.where(norm.square() > errors * terms, norm, torch.inf)


def shrink(norm: Tensor, longest: Tensor | float) -> Tensor:
    """Return the factors that scale lengths ``norm`` down to ``longest`` where they are longer."""
    return torch.where(norm > longest, longest / norm, 1.0)


def accumulate(S: Tensor | None, z: Tensor, v: Tensor, keep: float | Tensor) -> Tensor:
    """Compute ``S <- keep * S + sum_t v_t z_t^T`` (step 3 of the method), in place if S exists. Not differentiable."""
    if S is None:
        return outer(v, z)
    if isinstance(keep, Tensor) or keep != 1.0:
        S *= keep
    if z.dtype == S.dtype:
        return S.baddbmm_(v.mT, z)
    return S.add_(outer(v, z))


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log p in nats of ``targets`` [...] under ``logits`` [..., V], in float32, some tokens at a time."""
    flat = logits.reshape(-1, logits.shape[-1])
    tokens = max(1, SCORED_AT_ONCE // flat.shape[1])
    pairs = zip(torch.split(flat, tokens), torch.split(targets.reshape(-1), tokens), strict=True)
    return torch.cat([cross_entropy(part.float(), ids, reduction="none") for part, ids in pairs]).view(targets.shape)
