"""An auxiliary loss that pulls a target's values towards minus the loss gradient, in the same backward pass.

The next-token loss L decreases if the projection's output o changes along ``-dL/do_t``. Without teaching a target
learns that through the sum S only, chunks later; here each token of a chunk that updates trains it directly. The loss's
backward computes dL/do anyway, with the fast weights updated, so teaching costs one more product with the target's
parameters.

Shapes: B rows, T tokens of the call, N = U * C tokens of the chunks that update, D width of o and v.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .algebra import state_dtype
from .chunks import ChunkTable
from .targets import Target, chunked


class Teacher:
    """A teacher of one layer's target. ``weight``: of the auxiliary loss; 0: only cosines are measured.

    ``is_alone``: the target gets no gradient but the teacher's. ``measures``: backward adds up the cosines of v_t and
    ``-dL/do_t`` in ``total``, their sum and their number [2]; tokens where one of the two is zero are left out.
    """

    def __init__(self, weight: float = 0.0, is_alone: bool = False, measures: bool = False) -> None:
        self.weight, self.is_alone, self.measures = weight, is_alone, measures
        self.total: Tensor | None = None

    @property
    def is_needed(self) -> bool:
        return torch.is_grad_enabled() and (self.weight > 0 or self.measures)

    def gradient(self, g_BTD: Tensor, v_BND: Tensor, table: ChunkTable) -> Tensor:
        """Return the gradient of ``weight * mean_b mean_t |v_t| (1 - cos(v_t, -g_t))`` for v [B, N, D], |v_t| constant.

        The factor ``|v_t|`` removes the cosine's singularity at v = 0, where v is at the start; there the gradient
        is that of ``-<v_t, w_t>``, w_t the unit vector along ``-g_t``. The mean over t is over a row's tokens
        whose chunk updates, so that it does not matter which rows are read together. In float32 at least.
        """
        B, T, D = g_BTD.shape
        dtype, past = state_dtype(g_BTD.dtype), g_BTD.new_zeros(B, table.prefix, D) if table.prefix else None
        counts = chunked(g_BTD.new_ones(B, T, 1), None if past is None else past[..., :1], table)
        if table.update is not None:
            counts = counts * table.update[:, : table.updates].repeat_interleave(table.chunk_size, 1)[..., None]
        counts = counts.to(dtype)
        wanted, v = _unit(-chunked(g_BTD, past, table).to(dtype)) * counts, _unit(v_BND.to(dtype)) * counts
        cosines = (v * wanted).sum(-1, keepdim=True)
        if self.measures:
            found = torch.stack([cosines.sum(), (v.any(-1) & wanted.any(-1)).sum()])
            self.total = found if self.total is None else self.total + found.to(self.total)
        grad: Tensor = self.weight / (B * counts.sum(1, keepdim=True).clamp(min=1)) * (cosines * v - wanted)
        return grad.to(v_BND.dtype)


def _unit(x: Tensor) -> Tensor:
    """Normalise the rows of x to length 1, however small they are; zero rows stay zero."""
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(-1, keepdim=True).clamp(min=tiny)
    unit: Tensor = x / x.norm(dim=-1, keepdim=True).clamp(min=tiny)
    return unit


class Lesson:
    """A layer's target in one call, as ``read`` calls it; ``given`` then connects the output with the values."""

    def __init__(self, teacher: Teacher, target: Target) -> None:
        self.teacher, self.target, self.needs_keys = teacher, target, target.needs_keys
        self.v: Tensor | None = None

    def __call__(self, u: Tensor, z: Tensor | None) -> Any:
        v = self.target.taught(u.detach(), None if z is None else z.detach()).flatten(1, 2)
        self.v = v if self.teacher.weight > 0 else v.detach()
        found = self.target.forward(u, z)
        if not self.teacher.is_alone:
            return found
        return tuple(x.detach() for x in found) if isinstance(found, tuple) else found.detach()

    def given(self, out_BTD: Tensor | None, table: ChunkTable) -> Tensor | None:
        """Return the output unchanged; its gradient teaches the target."""
        if out_BTD is None or self.v is None:
            return out_BTD
        found: Tensor = _Taught.apply(out_BTD, self.v, self.teacher, table)  # type: ignore[no-untyped-call]
        return found


class _Taught(torch.autograd.Function):
    """An identity of the first argument; in backward the second gets the teacher's gradient."""

    @staticmethod
    def forward(ctx: Any, out_BTD: Tensor, v_BND: Tensor, teacher: Teacher, table: ChunkTable) -> Tensor:
        ctx.save_for_backward(v_BND)
        ctx.teacher, ctx.table = teacher, table
        return out_BTD.view_as(out_BTD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BTD: Tensor) -> Any:
        (v,) = ctx.saved_tensors
        grad = ctx.teacher.gradient(g_BTD, v, ctx.table)
        return g_BTD, grad if ctx.needs_input_grad[1] else None, None, None
