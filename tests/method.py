"""The method on plain tensors, through the library's own pieces, in the shape that tests call it."""

import torch
from torch import Tensor

from inplace_ttt.core import ChunkTable, FastWeights, Sum, read
from inplace_ttt.core.layer import written
from inplace_ttt.core.targets import convolved, values_of
from inplace_ttt.fast import scan as outer_scan
from inplace_ttt.fast.factors import fast_weights


def learned(kappa, proj, lookahead=2, shift=1):
    """A target that is the paper's, of given tensors; ``kappa`` None: the fixed shift."""

    def values(u, z):
        taps, ahead = (u.new_ones(u.shape[-1], 1), shift) if kappa is None else (kappa, lookahead)
        c = convolved(u, taps, ahead, None if proj is None else proj.dtype)
        return c if proj is None else c.to(proj.dtype) @ proj

    return values


def target(u, kappa, proj, table, *, lookahead=2, shift=1, past_BPD=None):
    """Targets v [B, U * C, D] of a call."""
    return values_of(learned(kappa, proj, lookahead, shift), u, u, table, (past_BPD, past_BPD))[0]


def scan(z, v, weight, table, *, lr, decay=0.0, clip=None, past_BPF=None, **keywords):
    """The scan of the paper's rule, with targets as they come."""
    if clip is not None and v is not None:
        v = written(Sum(clip=float(clip)), z, v, table, past_BPF, None)
    return outer_scan(z, v, weight, table, lr=lr, keep=1 - decay, past_BPF=past_BPF, **keywords)


def state(rows, chunk_size, *, decay=0.0, form="dense") -> FastWeights:
    """An empty state of the paper's rule."""
    return fast_weights(rows, chunk_size, Sum(decay=decay), form)


def feed(held: FastWeights, z, u, weight, kappa, proj, documents=None, *, lr=0.5, clip=None) -> Tensor:
    """One call on a state, as a layer makes it; without a weight, the fast weights' part of the output."""
    table = ChunkTable.build(*z.shape[:2], held.chunk_size, documents=documents, seen=held.seen, keep_state=True)
    rule = Sum(lr=lr, decay=held.rule.decay, clip=None if clip is None else float(clip))
    width = u.shape[-1]
    out = read(z, u, table, rule=rule, target=learned(kappa, proj), width=width, state=held, weight=weight)
    if out is not None:
        return out if weight is None or out.dtype == z.dtype else out.to(z.dtype)
    return z.new_zeros(*z.shape[:2], width) if weight is None else torch.nn.functional.linear(z, weight)
