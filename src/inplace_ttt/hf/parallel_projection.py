"""The adapting projection on a rank's slice of a row."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core.layer import written
from ..core.targets import values_of
from ..errors import UserError
from ..fast.ranks import scan_slice
from .parallel_attention import RowSlices
from .settings import Settings


class SliceCall:
    """A call in which every rank reads its slice: its pieces are separate rows with an initial state."""

    def __init__(self, slices: RowSlices, rows: int, tokens: int, settings: Settings) -> None:
        self.slices, self.rows, self.tokens, self.settings = slices, rows, tokens, settings

    def project(self, site: Any, module: Any, z_BTF: Tensor, u: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the output for this rank's slice, [B, T / ranks, D]."""
        if getattr(module, "split", False):
            raise UserError("context parallelism together with tensor parallelism is not supported")
        table, rule = self.slices.table_on(z_BTF.device), self.settings.rule
        R, length = table.table.rows, table.table.tokens
        z, u = z_BTF.reshape(R, length, z_BTF.shape[-1]), u.reshape(R, length, u.shape[-1])
        v, keep = values_of(site.bound_target(), u, z, table.table, (None, None))
        if keep is not None:
            raise UserError("gates do not pass from process to process: leave them out with context parallelism")
        if v is None:
            kept: Tensor = site.anchored(plain(z_BTF))
            return kept
        slow = site.slow_weight(module, rule)
        v = written(rule, z, v, table.table, None, slow) if rule.outer else v
        keywords: dict[str, Any] = {"rule": rule, "width": site.width, "slow": slow}
        if site.fuses(module):
            keywords["bias"] = None if module.bias is None else module.bias.to(z.dtype)
            out = scan_slice(z, v, table, self.slices.group, weight=module.weight.to(z.dtype), **keywords)
        else:
            out = plain(z_BTF).reshape(R, length, -1) + scan_slice(z, v, table, self.slices.group, **keywords)
        return out.reshape(*z_BTF.shape[:-1], out.shape[-1])
