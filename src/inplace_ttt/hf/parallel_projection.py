"""The adapting projection on a rank's slice of a row."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core.ranks import scan_slice
from ..errors import UserError
from .parallel_attention import RowSlices


def project_slice(site: Any, module: Any, z_BTF: Tensor, plain: Callable[[Tensor], Tensor], call: RowSlices) -> Tensor:
    """The output for this rank's slice [B, T / ranks, F]: its pieces are rows of their own, with a first state."""
    if getattr(module, "split", False):
        raise UserError("context parallelism together with tensor parallelism is not supported")
    table = call.table_on(z_BTF.device)
    R, length = table.table.rows, table.table.tokens
    z, u = site.compute_dtype(z_BTF), site._source(site.context)
    z, u = z.reshape(R, length, z.shape[-1]), u.reshape(R, length, u.shape[-1])
    v = site.targets(u, None, table.table)
    if v is None:
        return plain(z_BTF)
    keywords = {"lr": site.context.lr, "decay": site.runtime.config.decay, "clip": site.clip(module)}
    if getattr(module, "fuses", False):
        bias = None if module.bias is None else module.bias.to(z.dtype)
        out = scan_slice(z, v, module.weight.to(z.dtype), table, call.group, bias_D=bias, **keywords)
    else:
        out = plain(z) + scan_slice(z, v, None, table, call.group, **keywords)
    return out.reshape(*z_BTF.shape[:-1], out.shape[-1])
