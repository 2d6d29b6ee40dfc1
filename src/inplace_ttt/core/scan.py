"""The scan: every token of a chunk is read with the state after the chunks before it.

``scan`` tries the registered fast paths first (``PATHS``) and otherwise runs ``generic``, a loop over the chunk table
for any rule, differentiable and checkpointed in segments.

Shapes: B rows, T new tokens, P pending tokens, U chunks that may update, C tokens of a chunk, F width of z, D output.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .chunks import ChunkTable
from .layout import Slots
from .rules import Rule, State

SEGMENT = 8
"""Chunk slots between two checkpoints of the generic scan."""
log = logging.getLogger("inplace_ttt")


@dataclass(frozen=True, eq=False)
class Call:
    """A call: the inputs of one layer's scan.

    z [B, T, F]; v [B, U * C, D] as written (``Rule.values`` is applied), None when no chunk updates; ``keep`` [B, U]:
    gates; ``weight`` [D, F] and ``bias`` [D] of a slow product to include, of z's dtype; ``slow``: W0 for the rule,
    None where there is no dense one; ``state`` before the call, None: that of ``Rule.init``; ``past``
    [B, P, F]: z of the pending tokens. ``width``: D. ``watch``: called with each slot's number and the state before it.
    """

    rule: Rule
    table: ChunkTable
    z: Tensor
    v: Tensor | None
    width: int
    keep: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    slow: Tensor | None = None
    state: State | None = None
    past: Tensor | None = None
    watch: Callable[[int, State], None] | None = None


class Result(NamedTuple):
    """A pair: outputs [B, T, D] and the state after the call (None: that of ``Rule.init``)."""

    out: Tensor
    state: State | None


class Path(NamedTuple):
    """A fast path. ``supports`` tells if ``run`` can compute a call, and must be cheap."""

    name: str
    supports: Callable[[Call], bool]
    run: Callable[[Call], Result]


PATHS: list[Path] = []
"""Registered fast paths; the first that supports a call runs it."""


def path_for(call: Call) -> Path:
    """Return the path that will run ``call``."""
    return next((path for path in PATHS if path.supports(call)), GENERIC)


def scan(call: Call) -> Result:
    """Run a call. Raises ValueError when pending tokens are missing."""
    if call.table.prefix and call.table.updates and call.past is None:
        raise ValueError(f"{call.table.prefix} pending tokens are missing: pass them as past")
    path = path_for(call)
    if not torch.compiler.is_compiling() and log.isEnabledFor(logging.DEBUG):
        log.debug("scan of rule %r: path %r, %d chunks", call.rule.name, path.name, call.table.steps)
    return path.run(call)


def generic(call: Call) -> Result:
    """Run a call of any rule, chunk by chunk. The rule determines work and memory; all tensors get gradients."""
    rule, table, z = call.rule, call.table, call.z
    B, T, F = z.shape
    with torch.autocast(z.device.type, enabled=False):
        out = (
            z.new_zeros(B, T, call.width)
            if call.weight is None
            else torch.nn.functional.linear(z, call.weight, call.bias)
        )
        start = rule.init(B, call.width, F, z)
        state = start if call.state is None else call.state
        past = call.past if table.prefix and table.updates else None
        slots = Slots(z, past, table)
        numbers: Any = range(table.steps)
        parts: list[Tensor] = []
        differentiable = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (z, call.v, call.keep, past, *state.values())
        )
        for first in range(0, table.steps, SEGMENT):
            some = numbers[first : first + SEGMENT]
            if differentiable and table.steps > SEGMENT:
                found, state = checkpoint(_segment, call, slots, start, state, some, use_reentrant=False)
            else:
                found, state = _segment(call, slots, start, state, some)
            parts += found
        out = slots.add_all(out, parts)
    changed = call.state is not None or table.changes_state
    return Result(out, state if table.keep_state and changed else None)


def _segment(call: Call, slots: Slots, start: State, state: State, numbers: Any) -> tuple[list[Tensor], State]:
    """Run some slots in order; return the state's part of their tokens' outputs, and the state after them."""
    rule, table, parts = call.rule, call.table, []
    for m in numbers:
        s = slots.segment(m, m + 1)
        if table.reset is not None:
            state = where(table.reset[:, m], start, state)
        parts.append(rule.apply(state, slots.applied(call.z, s)[:, 0]))
        if call.watch is not None:
            call.watch(m, state)
        if m < table.updates and call.v is not None:
            shrunk = state if call.keep is None else {k: scaled(x, call.keep[:, m]) for k, x in state.items()}
            z, v = slots.absorbed(s)[:, 0], slots.masked(slots.chunks(call.v, s), s)[:, 0]
            new = rule.update_as_written(shrunk, z, v, call.slow)
            state = new if table.update is None else where(table.update[:, m], new, state)
    return parts, state


def where(rows_B: Tensor, new: State, old: State) -> State:
    """Select per row between two states: ``new`` where ``rows_B``, else ``old``."""
    return {k: torch.where(rows_B.view(-1, *[1] * (old[k].dim() - 1)), new[k], old[k]) for k in old}


def scaled(x: Tensor, keep_B: Tensor) -> Tensor:
    """Multiply a state's tensor [B, ...] by one factor per row."""
    return x * keep_B.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


GENERIC = Path("generic", lambda call: True, generic)
