"""Sizes of the fast weights in a forward call, relative to the slow ones: measured, logged, and used to choose the lr.

Hooks on the adapting projections measure the first row of a batch, without an extra call. Sizes are Frobenius
norms relative to that of W0, without the inner learning rate. Rows that context parallelism cuts give the updates of a
process's own slice (the state that it starts from is not known here); layers under tensor parallelism give nothing.
"""

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from inplace_ttt.core.algebra import squared_norm
from inplace_ttt.core.layer import written
from inplace_ttt.core.scan import Call, generic
from inplace_ttt.core.targets import chunked, values_of
from inplace_ttt.errors import UserError
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.sites import compute_dtype

FIRST_STEPS = 20
"""Steps whose updates are checked."""
TOO_LARGE = 2.0
"""||lr dW|| / ||W0|| of a chunk: between what trained well (up to 0.9) and what diverged (19), see docs/training.md."""
TOO_SMALL = 1e-5
"""Below it, a hundred chunks change the weight by less than a thousandth: the updates do next to nothing."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of one layer and row."""

    lr: float
    """The inner learning rate of the call."""
    updates: Tensor
    """``||dW||_F / ||W0||_F`` of each complete chunk, sized or soft-capped but before clipping, float32 [chunks]."""
    state: Tensor | None
    """The largest ``||S||_F / ||W0||_F`` that a token of the row was read with, float32 []; None: not measured."""
    is_probed: bool
    """True when the average tap replaced a convolution that is zero: the call's own updates were zero then."""


@contextmanager
def measuring(model: nn.Module, *, probe: bool = False, states: bool = True) -> Iterator[dict[int, Sizes]]:
    """Collect the `Sizes` of every adapting layer's first forward call in the mapping, by layer.

    ``probe``: a convolution that is zero still (a fresh model's) counts as the average tap, 1/K each. ``states=False``
    leaves S out, which costs a [D, F] buffer. Rows without a complete chunk leave nothing.
    """
    found: dict[int, Sizes] = {}

    def measure(site: Any, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if site.index not in found:  # else: activations are computed again, or another micro-batch
            sizes = _measure(site, module, compute_dtype(arguments[0]).detach(), probe, states)
            if sizes is not None:
                found[site.index] = sizes

    with ExitStack() as hooks:
        for site in runtime_of(model).sites:
            hooks.callback(site.projection().register_forward_pre_hook(partial(measure, site)).remove)
        yield found


def _measure(site: Any, module: Any, z: Tensor, probe: bool, states: bool) -> Sizes | None:
    context = site.context
    if context is None or context.call is None or site.index in context.settings.disabled_layers:
        return None
    if getattr(module, "split", False):  # norms are spread over processes
        return None
    u = site.source(context, context.call).detach()  # part of the call, so it has gradients
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        return _row_sizes(site, module, z, u, probe, states)


def _row_sizes(site: Any, module: Any, z: Tensor, u: Tensor, probe: bool, states: bool) -> Sizes | None:
    call, settings = site.context.call, site.context.settings
    table = getattr(call, "table", None)
    if table is None:  # rows that are cut over processes
        table, states = call.slices.table.table, False
        u = u.reshape(table.rows, table.tokens, -1)
    z, u = z.reshape(table.rows, table.tokens, -1)[:1].float(), u[:1].float()
    by_row = {} if table.index is None else {name: getattr(table, name) for name in ("index", "update", "reset")}
    table = replace(table, rows=1, **{name: x[:1] for name, x in by_row.items() if x is not None}).to(z.device)

    target = copy.deepcopy(site.bound_target()).float()
    conv = getattr(target, "conv", None)
    is_probed = probe and conv is not None and not bool(conv.weight.any())
    if is_probed:
        target.conv.weight.data.fill_(1 / target.conv.weight.shape[-1])
    v, keep = values_of(target, u, z, table, (None, None))
    if v is None or not settings.rule.outer:
        return None
    weight = site.slow_weight(module, settings.rule)
    slow = None if weight is None else weight.float()
    own = written(settings.rule, z, v, replace(table, prefix=0), None, slow)
    keys, updates = chunked(z, None, table), []
    sized = v if settings.config.clip is not None else own
    for m in range(table.updates):
        if table.update is None or table.update[0, m]:
            chunk = slice(m * table.chunk_size, (m + 1) * table.chunk_size)
            updates.append(squared_norm(sized[:, chunk], keys[:, chunk])[0].clamp(min=0).sqrt())
    if not updates:
        return None
    size = torch.linalg.vector_norm(module.weight.float())
    state = None
    if states:
        sizes, rows = [torch.zeros_like(size)], replace(table, keep_state=True, prefix=0)
        watch: Callable[..., None] = lambda m, S: sizes.append(torch.linalg.vector_norm(S["S"]))  # noqa: E731
        generic(Call(settings.rule, rows, z, own, v.shape[-1], keep, slow=slow, watch=watch))
        state = torch.stack(sizes).max() / size
    return Sizes(settings.config.lr, torch.stack(updates) / size, state, is_probed)


# -- an inner learning rate, so that one setting fits both targets, any width and any chunk size -----------------------
#
# The target's source u has unit RMS for ``hidden_states`` and about 0.02 for ``input_embed``, and an update sums over a
# chunk, so a good eta for one model is far off for another. Comparable between models is the size of one chunk's update
# relative to the weight that it changes, eta ||dW||_F / ||W0||_F. At the start kappa = 0 and so dW = 0: the probe
# measures with the average of the taps in kappa's place (every tap 1/K) and P as it is.


def update_sizes(model: nn.Module, row: Mapping[str, Tensor], *, probe: bool = False) -> dict[int, float]:
    """Measure ``||dW||_F / ||W0||_F`` of one chunk by layer, without eta: the median over the chunks of ``row``.

    ``row``: ``input_ids`` and ``position_ids`` [1, T]. ``probe`` takes the average tap where kappa is zero. One
    forward without gradients; the model stays as it is. UserError when no chunk of the row completes.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), measuring(model, probe=probe, states=False) as sizes:
        given = {n: row[n].to(device) for n in ("input_ids", "position_ids") if n in row}
        model(**given, use_cache=False, logits_to_keep=1)
    if not sizes:
        raise UserError("ttt_relative_update: no chunk completes in the first row: make ttt.chunk_size smaller")
    return {layer: statistics.median(found.updates.tolist()) for layer, found in sorted(sizes.items())}


def choose_lr(model: nn.Module, row: Mapping[str, Tensor], relative_update: float) -> float:
    """Return eta, of two digits, for which the probe's update is ``relative_update`` of W0 (geometric mean)."""
    sizes = [size for size in update_sizes(model, row, probe=True).values() if size > 0]
    if not sizes:
        raise UserError("ttt_relative_update: the probe's updates are zero: set ttt.lr instead")
    return two_digits(relative_update / math.exp(statistics.fmean(map(math.log, sizes))))


def two_digits(lr: float) -> float:
    """Round an inner learning rate, so that another machine's last bits do not change it."""
    return float(f"{lr:.1e}")


# -- the log -----------------------------------------------------------------------------------------------------------


class FastWeightMonitor(TrainerCallback):
    """A callback that measures the first row of every step that is logged, and of the first `FIRST_STEPS`.

    ``entries()`` are the log's: ``update_norm/layer_N``, ||lr dW|| / ||W0|| of the median chunk, and
    ``state_norm/layer_N``, the largest ||lr S|| / ||W0|| in the row, and ``ttt_cosine``, the mean cosine of v_t and
    -dL/do_t over this process's tokens whose chunk updates, and over the layers. ``say`` gets one line if the first
    updates are out of range; the first step counts a fresh model's convolution (zero) as the average tap, and
    ``ttt.lr`` in full.
    """

    def __init__(self, model: nn.Module, log_every: int, say: Callable[[str], None]) -> None:
        self.model, self.log_every, self.say = model, log_every, say
        self.lr = runtime_of(model).config.lr  # in full: a warm-up lowers it for a while
        self.warnings: list[str] = []
        self._has_adapted = False
        self._watching = ExitStack()
        self._sizes: dict[int, Sizes] = {}

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        step, self._sizes = state.global_step + 1, {}
        is_logged = step % self.log_every == 0
        for site in runtime_of(self.model).sites:
            if site.teacher is not None:
                site.teacher.measures, site.teacher.total = is_logged and site.target.source != "loss", None
        if is_logged or step <= FIRST_STEPS:
            self._sizes = self._watching.enter_context(measuring(self.model, probe=step == 1))

    def on_substep_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._watching.close()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._watching.close()
        self._has_adapted = self._has_adapted or bool(self._sizes)
        warning = None
        is_measured = runtime_of(self.model).settings.rule.outer
        if state.global_step == FIRST_STEPS and is_measured and not self._has_adapted:
            warning = (
                f"no document of the rows looked at in the first {FIRST_STEPS} steps reached chunk_size tokens, so no "
                "updates were made and nothing of the fast weights is trained: make ttt.chunk_size smaller"
            )
        elif self._sizes and state.global_step <= FIRST_STEPS and not self.warnings:
            warning = self._size_warning(is_first=state.global_step == 1)
        if warning is not None:
            self.warnings.append(warning)
            self.say(f"warning: {warning}")

    def entries(self) -> dict[str, float]:
        """Return the sizes of the step that just ended; nothing when it was not watched."""
        found: dict[str, float] = {}
        for layer, sizes in sorted(self._sizes.items()):
            lr = 0.0 if sizes.is_probed else sizes.lr  # log real updates only; the probe is for the check
            found[f"update_norm/layer_{layer}"] = lr * float(sizes.updates.median())
            if sizes.state is not None:
                found[f"state_norm/layer_{layer}"] = lr * float(sizes.state)
        teachers = [site.teacher for site in runtime_of(self.model).sites]
        totals = [t.total.tolist() for t in teachers if t is not None and t.total is not None]
        if count := sum(number for _, number in totals):  # of all layers' cosines
            found["ttt_cosine"] = sum(cosines for cosines, _ in totals) / count
        return found

    def _size_warning(self, is_first: bool) -> str | None:
        lr = self.lr
        values = torch.stack([sizes.updates.median() for sizes in self._sizes.values()]).tolist()
        sizes = [(lr * value, layer) for layer, value in zip(self._sizes, values, strict=True)]
        (small, low), (large, high) = min(sizes), max(sizes)
        if large > TOO_LARGE:
            return (
                f"one chunk's update of layer {high} is {large:.2g} of its slow weight (||lr dW|| / ||W0||, "
                f"more than {TOO_LARGE:g}): training may diverge, lower ttt.lr ({lr:g}) or set ttt_relative_update"
            )
        if is_first and lr and 0 < small < TOO_SMALL:  # a P that is zero at the start has written nothing yet
            return (
                f"one chunk's update of layer {low} is {small:.2g} of its slow weight (||lr dW|| / ||W0||, "
                f"less than {TOO_SMALL:g}): it will do next to nothing, raise ttt.lr ({lr:g}) or set "
                "ttt_relative_update"
            )
        return None
