"""The specification: the method as a loop over tokens, any dtype, fully differentiable.

Slow on purpose. Every fast path is tested against this file, outputs and gradients.

Shapes: B rows, T tokens, F width of the projection's input (z), D its output width, K taps, C chunk size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class ReferenceState:
    """A state of one row between calls: S [D, F], the pending pairs (z [F], u [D]), tokens read."""

    S: Tensor
    pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def chunk_targets(u_CD: Tensor, kappa_DK: Tensor, proj_DD: Tensor | None, lookahead: int) -> Tensor:
    """Compute targets v [C, D] of a whole chunk: ``c_t = sum_k kappa[:, k] * u[t + k - (K-1-L)]``, ``v_t = c_t P``."""
    C, K = u_CD.shape[0], kappa_DK.shape[1]
    rows = []
    for t in range(C):
        c = torch.zeros_like(u_CD[0])
        for k in range(K):
            source = t + k - (K - 1 - lookahead)
            if 0 <= source < C:
                c = c + kappa_DK[:, k] * u_CD[source]
        rows.append(c)
    c_CD = torch.stack(rows)
    return c_CD if proj_DD is None else c_CD @ proj_DD


def clipped(dW: Tensor, clip: float | Tensor | None) -> Tensor:
    """Scale dW down to Frobenius norm ``clip`` where it is longer."""
    if clip is None:
        return dW
    norm = torch.linalg.vector_norm(dW)
    return dW * (clip / norm) if norm > clip else dW


def reference(
    z_BTF: Tensor,
    u_BTD: Tensor,
    weight_DF: Tensor,
    kappa_DK: Tensor,
    proj_DD: Tensor | None,
    *,
    lr: float,
    chunk_size: int,
    lookahead: int = 2,
    documents_BT: Tensor | None = None,
    decay: float = 0.0,
    clip: float | Tensor | None = None,
    states: Sequence[ReferenceState] | None = None,
) -> tuple[Tensor, list[ReferenceState]]:
    """Return outputs [B, T, D] of the adapting projection and each row's state after the last token.

    ``documents_BT`` numbers each token's document; -1 is padding, which gets the slow weight's output and does not
    change the state. A row's first document continues the one in ``states``; a change of number starts from S = 0.
    Section 2 of docs/method.md: apply, target, update, reset.
    """
    B, T, F = z_BTF.shape
    D = weight_DF.shape[0]
    if states is None:
        states = [ReferenceState(z_BTF.new_zeros(D, F)) for _ in range(B)]
    out: list[Tensor] = []
    after: list[ReferenceState] = []
    for b in range(B):
        S, pending, document = states[b].S, list(states[b].pending), None
        for t in range(T):
            z, number = z_BTF[b, t], 0 if documents_BT is None else int(documents_BT[b, t])
            if number < 0:
                out.append(weight_DF @ z)
                continue
            if document is not None and number != document:
                S, pending = torch.zeros_like(S), []
            document = number
            out.append((weight_DF + lr * S) @ z)
            pending.append((z, u_BTD[b, t]))
            if len(pending) == chunk_size:
                z_CF = torch.stack([pair[0] for pair in pending])
                v_CD = chunk_targets(torch.stack([pair[1] for pair in pending]), kappa_DK, proj_DD, lookahead)
                S = (1 - decay) * S + clipped(v_CD.T @ z_CF, clip)
                pending = []
        after.append(ReferenceState(S, pending))
    return torch.stack(out).view(B, T, D), after
