"""Walk over a segment's chunks: write the weight each chunk sees, then add its update to S.

Forward, slot m: reset (S = 0); write ``W0 + lr * S``; ``S <- keep * S + sum_t x_t z_t^T`` where it updates.
Reverse (H), slot m: write ``lr * S`` where the slot updates, else 0; ``S <- keep * S`` where it updates; add
``sum_t x_t z_t^T``; reset. That is the recurrence of H = dL/dS (``fast.outer``) with x = g, divided by lr.
Unwind, slot m, last one first: ``S <- S - sum_t x_t z_t^T`` where it updated; write ``W0 + lr * S``. With keep 1
and without resets this inverts forward.

``triton_walk`` does the same in one kernel, in half precision on CUDA.

Shapes: B rows, n slots of c tokens, D and F the widths of x and z.
"""

from importlib.util import find_spec

from torch import Tensor

from ..core.algebra import outer

Pairs = tuple[Tensor, Tensor]
_TRITON = find_spec("triton") is not None


def has_triton() -> bool:
    """Tell if Triton is installed (it comes with PyTorch's CUDA builds)."""
    return _TRITON


def walk(
    S: Tensor,
    begin: Tensor | None,
    folds: Tensor,
    pairs: Pairs | None,
    weight: Tensor | None,
    update: Tensor | None,
    reset: Tensor | None,
    lr: float,
    keep: float,
    updates: int,
    *,
    mode: str = "forward",
) -> None:
    """Set S [B, D, F] to its value after all slots, starting from ``begin``, and write ``folds`` [B, n, D, F].

    begin: may be S itself; None: zero.
    mode: "forward", "reverse" or "unwind".
    pairs: x [B, n', c, D] and z [B, n', c, F] of the first n' slots (reverse: all; else those that may update).
    weight: W0 [D, F]. updates: slots below it may update; ``update`` [B, n]: rows that do, None: all.
    reset [B, n]: rows whose slot begins a document.
    """
    n = folds.shape[1]
    if begin is None:
        S.zero_()
    elif begin is not S:
        S.copy_(begin)
    if mode == "unwind":
        for m in reversed(range(n)):
            if pairs is not None and m < updates:
                S -= outer(pairs[0][:, m], pairs[1][:, m])
            folds[:, m] = lr * S if weight is None else weight + lr * S
        return
    reverse = mode == "reverse"
    for m in reversed(range(n)) if reverse else range(n):
        acts = None if update is None else update[:, m, None, None]
        fresh = None if reset is None else reset[:, m, None, None]
        if fresh is not None and not reverse:
            S.masked_fill_(fresh, 0)
        value = S * lr
        if reverse:
            value = value * (m < updates) if acts is None or m >= updates else value.masked_fill_(~acts, 0)
        elif weight is not None:
            value += weight
        folds[:, m] = value
        if m < updates and keep != 1.0:
            S *= keep if acts is None else 1.0 - (1.0 - keep) * acts.to(S.dtype)
        if pairs is not None and (reverse or m < updates):
            dS = outer(pairs[0][:, m], pairs[1][:, m])
            S += dS if acts is None or reverse else dS.masked_fill_(~acts, 0)
        if fresh is not None and reverse:
            S.masked_fill_(fresh, 0)
