"""One layer's part of a call, in five steps: past -> target -> scan -> recall -> absorb.

Prepend the pending tokens, compute the targets of complete chunks, scan (read and write), add the output of a state
held in another form, and update the state.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .chunks import ChunkTable
from .rules import Rule, State
from .scan import Call, scan
from .state import FastWeights
from .targets import chunked, values_of


def read(
    z_BTF: Tensor,
    u_BTD: Tensor,
    table: ChunkTable,
    *,
    rule: Rule,
    target: Callable[..., Any],
    width: int,
    state: FastWeights | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    slow: Tensor | None = None,
) -> Tensor | None:
    """Read new tokens; return the projection's output [B, T, D], or the fast weights' part of it.

    z_BTF: inputs of the projection. u_BTD: the target's source. table: the call's chunks, on z's device.
    target: a ``Target`` (or an object with its interface). width: D.
    state: of the tokens read before, updated in place; None: start from nothing and keep nothing.
    weight, bias: of the slow product, computed in the same pass, [D, F] of z's dtype; None: return the fast part alone.
    slow: W0 [D, F] for rules that use it; None where there is no dense one.

    Return None if the fast weights add nothing to any token; the slow product is not computed then.
    """
    past = (None, None) if state is None else state.past(table)
    v, keep = values_of(target, u_BTD, z_BTF, table, past)
    if v is not None and rule.outer:
        v = written(rule, z_BTF, v, table, past[0], slow)
    own = table if state is None else state.begin(rule, table, z_BTF, v)
    held = None if state is None else state.tensors
    snapshots = () if state is None else state.wanted_snapshots(table)
    out = new = None
    before: dict[int, State] = {}

    def watch(m: int, state: State) -> None:
        if m in snapshots:
            before[m] = state

    if own.updates or held is not None or not rule.from_zero:
        watching = watch if snapshots else None
        out, new = scan(Call(rule, own, z_BTF, v, width, keep, weight, bias, slow, held, past[0], watching))
    if state is not None:
        old = state.recall(table, z_BTF)
        if old is not None:
            if out is None and weight is not None:
                out = torch.nn.functional.linear(z_BTF, weight, bias)
            old = rule.lr * old
            out = old if out is None else (out + old).to(out.dtype)
        state.absorb(table, z_BTF, u_BTD, v, new, before, slow)
    return out


def written(
    rule: Rule, z_BTF: Tensor, v_BND: Tensor, table: ChunkTable, past_BPF: Tensor | None, slow: Tensor | None
) -> Tensor:
    """Return the targets of a call's chunks as an outer rule writes them, [B, U * C, D]."""
    if type(rule).values is Rule.values or not rule.whole:
        return v_BND.to(z_BTF.dtype)
    B, C, U = table.rows, table.chunk_size, table.updates
    z, v = (x.reshape(B * U, C, -1) for x in (chunked(z_BTF, past_BPF, table), v_BND))
    with torch.autocast(z.device.type, enabled=False):
        return rule.values(z, v.to(z.dtype), slow).to(z_BTF.dtype).view(B, U * C, -1)


def complete(
    state: FastWeights, rows: list[int], target: Callable[..., Any], rule: Rule, slow: Tensor | None = None
) -> None:
    """Apply the update of some rows' completed pending chunk (see ``FastWeights.end_step``)."""
    assert state.z is not None
    assert state.u is not None
    index = torch.tensor(rows, device=state.z.device)
    z, u = state.z.index_select(0, index), state.u.index_select(0, index)
    table = ChunkTable.build(len(rows), state.chunk_size, state.chunk_size, keep_state=True)
    v, keep = values_of(target, u, z, table, (None, None))
    assert v is not None
    state.complete(rows, rule, {"z": z, "u": u, "v": v}, slow, keep)
