"""Access to a chunk's tokens in a call's tensors: slices when all rows agree, gathers otherwise."""

from typing import Any

import torch
from torch import Tensor


class Layout:
    """A view of a call's tensors by chunk. *Applied* tokens are new; *absorbed* ones include the pending prefix."""

    def __init__(self, z_BTF: Tensor, past_BPF: Tensor | None, table: Any) -> None:
        """``table``: a ``ChunkTable`` on z's device, or an object with its attributes."""
        self.C, self.P, self.T = table.chunk_size, table.prefix, z_BTF.shape[1]
        self.z, self.past = z_BTF, None if past_BPF is None else past_BPF[:, : self.P]
        index: Tensor | None = table.index
        self.index, self.update, self.reset = index, table.update, table.reset
        if index is not None:  # for all slots at once: small kernels in the loop over chunks would dominate it
            t = index - self.P
            rows = torch.arange(t.shape[0], device=t.device)[:, None, None] * self.T
            self._flat, self._new = t.clamp(min=0) + rows, (t >= 0)[..., None]
            self._old = ((index >= 0) & (t < 0))[..., None]

    def _span(self, m: int) -> slice:
        return slice(max(m * self.C - self.P, 0), min((m + 1) * self.C - self.P, self.T))

    def applied(self, x_BTW: Tensor, m: int) -> Tensor:
        """Return ``x`` at slot m's new tokens, [B, <= C, W], zero where there is none."""
        if self.index is None:
            return x_BTW[:, self._span(m)]
        return torch.where(self._new[:, m], x_BTW.reshape(-1, x_BTW.shape[-1])[self._flat[:, m]], 0)

    def add_product(self, out_BTW: Tensor, m: int, a_BCM: Tensor, b_BMW: Tensor, scale: float = 1.0) -> None:
        """Add ``scale * a @ b`` to ``out`` at slot m's new tokens."""
        if self.index is None:
            out_BTW[:, self._span(m)].baddbmm_(a_BCM, b_BMW, alpha=scale)
            return
        value = torch.where(self._new[:, m], torch.bmm(a_BCM, b_BMW), 0)
        out_BTW.view(-1, out_BTW.shape[-1]).index_add_(0, self._flat[:, m].flatten(), value.flatten(0, 1), alpha=scale)

    def add_all(self, out_BTW: Tensor, parts: list[Tensor]) -> Tensor:
        """Return ``out`` plus each slot's part [B, <= C, W] at that slot's new tokens, in order. Differentiable."""
        if not parts:
            return out_BTW
        if self.index is None:
            joined = torch.cat(parts, 1)
            rest = out_BTW.shape[1] - joined.shape[1]
            return out_BTW + torch.nn.functional.pad(joined, (0, 0, 0, rest))
        new, flat = self._new[:, : len(parts)], self._flat[:, : len(parts)]
        value = torch.where(new, torch.stack(parts, 1).to(out_BTW.dtype), 0)
        return out_BTW.flatten(0, 1).index_add(0, flat.flatten(), value.flatten(0, 2)).view_as(out_BTW)

    def absorbed(self, m: int) -> Tensor:
        """Return z of slot m's tokens, pending ones included, [B, C, F]; zero where there is none."""
        z = self.applied(self.z, m)
        if self.past is None:
            return z
        if self.index is None:
            return z if m else torch.cat([self.past.to(z.dtype), z], 1)
        where = self.index[:, m].clamp(0, self.P - 1)[..., None]
        return torch.where(self._old[:, m], self.past.gather(1, where.expand_as(z)).to(z.dtype), z)

    def add_absorbed(self, dz_BTF: Tensor, dpast_BPF: Tensor | None, m: int, a_BCM: Tensor, b_BMF: Tensor) -> None:
        """Add ``a @ b`` to the gradients of z and of the pending z at slot m's tokens."""
        head = self.P if self.index is None and m == 0 else 0
        self.add_product(dz_BTF, m, a_BCM[:, head:], b_BMF)
        if dpast_BPF is None:
            return
        if self.index is None:
            dpast_BPF[:, :head] += torch.bmm(a_BCM[:, :head], b_BMF)
            return
        where = self.index[:, m].clamp(0, self.P - 1)[..., None]
        value = torch.where(self._old[:, m], torch.bmm(a_BCM, b_BMF), 0).to(dpast_BPF.dtype)
        dpast_BPF.scatter_add_(1, where.expand_as(value), value)

    def targets(self, v_BND: Tensor, m: int) -> Tensor:
        """Return v of slot m, [B, C, D]; zero for rows whose slot does not update."""
        v = v_BND[:, m * self.C : (m + 1) * self.C]
        return v if self.update is None else v * self.update[:, m, None, None]

    def add_to_targets(self, dv_BND: Tensor, m: int, a_BCF: Tensor, b_BFD: Tensor) -> None:
        """Add ``a @ b`` to the gradient of slot m's targets."""
        part = dv_BND[:, m * self.C : (m + 1) * self.C]
        if self.update is None:
            part.baddbmm_(a_BCF, b_BFD)
        else:
            part += torch.bmm(a_BCF, b_BFD) * self.update[:, m, None, None]
