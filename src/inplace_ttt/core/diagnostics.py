"""Diagnostics of one layer's fast weights in one row: size, effect, rank, and overlap of new keys with earlier ones.

On a continually trained model whose updates did harm, the harm per task went with the overlap of new keys with the
span of earlier ones (r = -0.73 with the gain) and with a low effective rank of S (r = +0.75). S adds ``v_t z_t^T``:
keys that come again along the same few directions pile up there, keys in new directions do not disturb each other.

Everything is computed in float64. Singular values come from the Gram matrix of S's smaller side: those below about 1e-8
of the largest are rounding, which moves an effective rank by less than 1e-3 for sides up to 4,096. A decomposition
costs about min(D, F)^2 * (10 * min(D, F) + F) multiply-adds: too much for every call.

Shapes: D output width, F width of z, N tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerDiagnostics:
    """A record of one layer and row. None: unknown (no dense weight, no completed chunk kept, or not finite).

    "The last chunk" is the newest completed one; while it was read, the fast weights were those before its own update.
    """

    layer: int
    updates: int
    """Chunks absorbed of the current document."""
    tokens: int
    """Tokens read of the current document."""
    relative_norm: float | None
    """``relative_norm`` of S."""
    output_change: float | None
    """``output_change`` on the last chunk, as it was read."""
    effective_rank: float | None
    """``effective_rank`` of S."""
    largest_rank: int
    """min(D, F)."""
    key_overlap: float | None
    """``key_overlap`` of the last chunk's keys with what S stored before it."""
    update_norm: float | None
    """lr * ||dW||_F / ||W0||_F of the last chunk, as it was written."""
    clipped: bool | None
    """True if that update has the largest norm that the clip allows; None also without clipping."""


def relative_norm(S_DF: Tensor, weight_DF: Tensor, lr: float) -> float | None:
    """Compute ``|lr| * ||S||_F / ||W0||_F``; None for a zero W0."""
    return _ratio(abs(lr) * _norm(S_DF), _norm(weight_DF))


def output_change(S_DF: Tensor, weight_DF: Tensor, z_NF: Tensor, lr: float) -> float | None:
    """Compute the root mean square over tokens of ``||lr S z_t||`` over that of ``||W0 z_t||``; None where that is 0.

    A ratio of two averages, so a single token with a tiny ``W0 z_t`` does not dominate it.
    """
    z = _double(z_NF)
    return _ratio(abs(lr) * _norm(z @ _double(S_DF).mT), _norm(z @ _double(weight_DF).mT))


def effective_rank(S_DF: Tensor) -> float:
    """Compute exp of the entropy of the normalised singular values: n for n equal ones, 1 for a single one.

    Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007. 0 for a zero S; NaN
    where S is not finite.
    """
    values = _gram_spectrum(S_DF)[0].sqrt()
    total = float(values.sum())
    return math.exp(float(torch.special.entr(values / total).sum())) if total else 0.0


def key_overlap(S_DF: Tensor, z_NF: Tensor, energy: float = 0.99) -> float:
    """Compute the share of the keys' squared norm, sum_t ||z_t||^2, in the span of the earlier keys that S stores.

    The span is that of the fewest leading right singular vectors that hold ``energy`` of ||S||_F^2, k of
    them. 0 for orthogonal keys, a zero S or zero keys, 1 for keys inside; isotropic keys give k / F. NaN where
    something is not finite.
    """
    S, z = _double(S_DF), _double(z_NF)
    squares, vectors = _gram_spectrum(S)
    total, length = float(squares.sum()), float(z.square().sum())
    if total == 0 or length == 0:
        return 0.0
    squares, vectors = squares.flip(0), vectors.flip(1)
    enough = squares.cumsum(0) >= min(energy, 1.0) * (1 - 1e-12) * total
    leading = int(enough.int().argmax()) + 1
    squares, vectors = squares[:leading], vectors[:, :leading]
    # Right singular vectors are S^T u / s where the Gram matrix is that of the rows.
    inside = z @ vectors if S.shape[0] > S.shape[1] else (z @ S.mT) @ vectors / squares.sqrt()
    return min(float(inside.square().sum()) / length, 1.0)


def update_norm(v_ND: Tensor, z_NF: Tensor) -> float:
    """Compute ``||sum_t v_t z_t^T||_F`` from two [N, N] Gram matrices: sum over t, s of ``(v_t . v_s) (z_t . z_s)``."""
    v, z = _double(v_ND), _double(z_NF)
    return math.sqrt(max(float(((v @ v.mT) * (z @ z.mT)).sum()), 0.0))


def _gram_spectrum(S_DF: Tensor) -> tuple[Tensor, Tensor]:
    """Return ascending eigenvalues and eigenvectors (columns) of S's Gram matrix, smaller side (rows if equal)."""
    S = _double(S_DF)
    gram = S @ S.mT if S.shape[0] <= S.shape[1] else S.mT @ S
    if not gram.isfinite().all():
        return torch.full_like(gram[0], math.nan), torch.full_like(gram, math.nan)
    squares, vectors = torch.linalg.eigh(gram)
    return squares.clamp(min=0), vectors


def _double(x: Tensor) -> Tensor:
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).double()  # no float64 there


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(_double(x)))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
