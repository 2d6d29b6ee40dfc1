"""Forward calls as the adapting layers see them.

A call knows the layout of its tokens and computes every layer's output (``project``). Here: calls of complete
rows. ``steps.Step`` is one token a row, ``parallel.SliceCall`` a slice of a row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import ChunkTable, Lesson, read
from ..errors import UserError
from .cache import FastCacheLayer
from .settings import Settings
from .sites import LayerSite
from .tensor_parallel import check_split, is_split, local_input, replicated, summand

CALL = "inplace_ttt_call"
"""Keyword argument by which a hook of a parallel mode passes its own call to the model."""


class WholeCall:
    """A call of complete rows, or of pieces of them after a cache."""

    def __init__(self, settings: Settings, table: ChunkTable, slots: dict[int, FastCacheLayer]) -> None:
        self.settings, self.table, self.slots = settings, table, slots
        self.rows, self.tokens = table.rows, table.tokens
        self._moved: dict[torch.device, ChunkTable] = {}

    def table_on(self, device: torch.device) -> ChunkTable:
        """Return the chunk table on a device, moved once."""
        if self.table.index is None:
            return self.table
        if device not in self._moved:
            self._moved[device] = self.table.to(device)
        return self._moved[device]

    def project(self, site: LayerSite, module: Any, z: Tensor, u: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        slot, rule = self.slots.get(site.index), self.settings.rule
        table = self.table_on(z.device)
        if slot is None and not table.updates and rule.from_zero:
            return site.anchored(plain(z))
        target: Any = site.bound_target()
        split = z if is_split(z) else None
        lesson = None if site.teacher is None or not site.teacher.is_needed else Lesson(site.teacher, target)
        if lesson is not None and split is not None:
            if lesson.teacher.weight > 0:
                raise UserError("a target cannot be taught by the loss under tensor parallelism: set teach to 0")
            lesson = None
        if split is not None:
            check_split(rule)
            z, target = local_input(split), SplitTarget(target, split)
        fuses = split is None and site.fuses(module)
        out = read(
            z, u, table, rule=rule, target=target if lesson is None else lesson, width=site.width,
            state=None if slot is None else slot.fast, weight=module.weight.to(z.dtype) if fuses else None,
            bias=None if not fuses or module.bias is None else module.bias.to(z.dtype),
            slow=site.slow_weight(module, rule),
        )  # fmt: skip
        if lesson is not None:
            out = lesson.given(out, table)
        if out is None:
            return site.anchored(plain(z if split is None else split))
        if split is not None:
            out = plain(split) + summand(out, split)
        elif not fuses:
            slow = plain(z)
            out = (slow + out).to(slow.dtype)
        return out if table.updates else site.anchored(out)


class SplitTarget:
    """A target whose values are the same on all ranks of a split projection; each rank has a share of the gradient."""

    def __init__(self, target: Any, z: Tensor) -> None:
        self.target, self.z, self.needs_keys = target, z, target.needs_keys

    def __call__(self, u: Tensor, z: Tensor | None) -> Any:
        found = self.target.forward(u, z)
        return (replicated(found[0], self.z), found[1]) if isinstance(found, tuple) else replicated(found, self.z)
