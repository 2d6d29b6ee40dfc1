"""How large the fast weights are in a forward call, relative to the slow weight that they change.

Hooks on the adapting projections measure the first row of a batch, in the call that happens anyway. Sizes are Frobenius
norms relative to that of W0, without the inner learning rate. Rows that context parallelism cuts give the updates of a
process's own slice (the state that it starts from is not known here); layers under tensor parallelism give nothing.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inplace_ttt.core.algebra import squared_norm
from inplace_ttt.core.chunks import ChunkTable
from inplace_ttt.core.layer import written
from inplace_ttt.core.scan import Call, generic
from inplace_ttt.core.targets import chunked, values_of
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.sites import compute_dtype


@dataclass(frozen=True)
class Sizes:
    """Of one layer and row."""

    lr: float
    """The inner learning rate of the call."""
    updates: Tensor
    """``||dW||_F / ||W0||_F`` of each complete chunk, before clipping, float32 [chunks]."""
    state: Tensor | None
    """The largest ``||S||_F / ||W0||_F`` that a token of the row was read with, float32 []; None: not measured."""
    probed: bool
    """Whether the average tap was taken for a convolution that is zero: the call's own updates were zero then."""


@contextmanager
def measuring(model: nn.Module, *, probe: bool = False, states: bool = True) -> Iterator[dict[int, Sizes]]:
    """Inside, the first forward call of every adapting layer leaves its `Sizes` in the mapping, by layer.

    ``probe``: a convolution that is zero still (a fresh model's) counts as the average tap, 1/K each. ``states=False``
    leaves S out, which costs a [D, F] buffer. Rows without a complete chunk leave nothing.
    """
    found: dict[int, Sizes] = {}

    def listener(site: Any) -> Callable[..., None]:
        def before(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if site.index not in found:  # else: activations are computed again, or another micro-batch
                sizes = _measure(site, module, arguments[0], probe, states)
                if sizes is not None:
                    found[site.index] = sizes

        return before

    handles = [site.projection().register_forward_pre_hook(listener(site)) for site in runtime_of(model).sites]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _measure(site: Any, module: Any, z_BTF: Tensor, probe: bool, states: bool) -> Sizes | None:
    context = site.context
    if context is None or context.call is None or site.index in context.settings.disabled_layers:
        return None
    if getattr(module, "split", False):  # norms are spread over processes
        return None
    call = context.call
    z, u = compute_dtype(z_BTF).detach(), site._source(context, call).detach()
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        return _row_sizes(site, module, z.view(call.rows, call.tokens, -1), u, probe, states)


def _row_sizes(site: Any, module: Any, z: Tensor, u: Tensor, probe: bool, states: bool) -> Sizes | None:
    settings = site.context.settings
    table = _table(site.context.call)
    if table is None:  # rows that are cut over processes
        table, states = site.context.call.slices.table.table, False
        z, u = (x.reshape(table.rows, table.tokens, x.shape[-1]) for x in (z, u))
    table = _first_row(table).to(z.device)
    conv = getattr(site.target, "conv", None)
    probed = probe and conv is not None and not bool(conv.weight.any())
    target = copy.deepcopy(site.bound_target()).float()
    if probed:
        target.conv.weight.data.fill_(1 / target.conv.weight.shape[-1])
    z, u = z[:1].float(), u[:1].float()
    weight = site.slow_weight(module)
    slow = None if weight is None else weight.float()
    size = torch.linalg.vector_norm(module.weight.float())
    v, keep = values_of(target, u, z, table, (None, None))
    if v is None or not settings.rule.outer:
        return None
    keys, updates, sizes = chunked(z, None, table), [], [torch.zeros_like(size)]
    for m in range(table.updates):
        if table.update is None or table.update[0, m]:
            chunk = slice(m * table.chunk_size, (m + 1) * table.chunk_size)
            updates.append(squared_norm(v[:, chunk], keys[:, chunk])[0].clamp(min=0).sqrt())
    if not updates:
        return None
    if states:
        rows = replace(table, keep_state=True, prefix=0)
        written_v = written(settings.rule, z, v, rows, None, slow)
        call = Call(
            settings.rule,
            rows,
            z,
            written_v,
            v.shape[-1],
            keep,
            slow=slow,
            watch=lambda m, state: sizes.append(torch.linalg.vector_norm(state["S"])),
        )
        generic(call)
    state = torch.stack(sizes).max() / size if states else None
    return Sizes(settings.config.lr, torch.stack(updates) / size, state, probed)


def _table(call: Any) -> ChunkTable | None:
    table: ChunkTable | None = getattr(call, "table", None)
    return table


def _first_row(table: ChunkTable) -> ChunkTable:
    if table.index is None:
        return replace(table, rows=1)
    parts = {name: getattr(table, name) for name in ("index", "update", "reset")}
    return replace(table, rows=1, **{name: value[:1] for name, value in parts.items() if value is not None})
