"""How large the fast weights are in a forward call, relative to the slow weight that they change.

Hooks on the adapting projections measure the first row of a batch, in the call that happens anyway. Sizes are Frobenius
norms relative to that of W0, without the inner learning rate. Rows that context parallelism cuts give the updates of a
process's own slice (the state that it starts from is not known here); layers under tensor parallelism give nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inplace_ttt.core.chunks import ChunkTable
from inplace_ttt.core.scan import advance, squared_norm
from inplace_ttt.core.target import SHIFTS, chunked, target
from inplace_ttt.hf.attach import runtime_of


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
    if context is None or not context.enabled or site.index in site.runtime.silent:
        return None
    if getattr(module, "split", False):  # norms are spread over processes
        return None
    z, u = site.compute_dtype(z_BTF).detach(), site._source(context).detach()
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        return _row_sizes(site, module, z, u, probe, states)


def _row_sizes(site: Any, module: Any, z: Tensor, u: Tensor, probe: bool, states: bool) -> Sizes | None:
    context, config = site.context, site.runtime.config
    if context.slices is not None:
        table: ChunkTable = context.slices.table.table
        z, u = (x.reshape(table.rows, table.tokens, x.shape[-1]) for x in (z, u))
        states = False
    else:
        table = context.table
    table = _first_row(table)
    conv, proj = getattr(site.mlp, "ttt_conv", None), getattr(site.mlp, "ttt_proj", None)
    kappa = None if conv is None else conv.weight[:, 0].float()
    probed = False
    if probe and kappa is not None and not kappa.any():
        probed, kappa = True, torch.full_like(kappa, 1 / kappa.shape[1])
    there = table.to(z.device)
    v = target(
        u[:1].float(),
        kappa,
        None if proj is None else proj.weight.float(),
        there,
        lookahead=config.lookahead,
        shift=SHIFTS.get(config.objective, 1),
    )
    if v is None:
        return None
    keys, clip = chunked(z[:1], None, there), site.clip(module) if states else None
    weight = torch.linalg.vector_norm(module.weight.float())
    updates, sizes, S = [], [torch.zeros_like(weight)], None
    for m in range(table.updates):
        if table.reset is not None and table.reset[0, m]:
            S = None
        if table.update is not None and not table.update[0, m]:
            continue
        chunk = slice(m * table.chunk_size, (m + 1) * table.chunk_size)
        z_m, v_m = keys[:, chunk].float(), v[:, chunk]
        updates.append(squared_norm(v_m, z_m)[0].clamp(min=0).sqrt())
        if states:
            S = advance(S, z_m, v_m, 1 - config.decay, clip)
            sizes.append(torch.linalg.vector_norm(S))
    if not updates:
        return None
    state = torch.stack(sizes).max() / weight if states else None
    return Sizes(context.lr, torch.stack(updates) / weight, state, probed)


def _first_row(table: ChunkTable) -> ChunkTable:
    if table.index is None:
        return replace(table, rows=1)
    parts = {name: getattr(table, name) for name in ("index", "update", "reset")}
    return replace(table, rows=1, **{name: value[:1] for name, value in parts.items() if value is not None})
