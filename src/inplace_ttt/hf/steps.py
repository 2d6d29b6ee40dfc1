"""Decoding steps: one token a row, on a filled cache. Between steps only values on the device change.

So compiled code and CUDA graphs of a step work for every token: the host counts tokens, updates the fast weights when a
chunk is complete and folds them, outside of the compiled code.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..core import complete
from ..fast.decoding import StepPositions
from .cache import FastCacheLayer, fast_layers
from .calls import CALL
from .masks import read_mask
from .settings import Settings
from .sites import LayerSite
from .tensor_parallel import is_split

POSITIONS = "_inplace_ttt_step_positions"


def source_of(given: dict[str, Any]) -> Tensor | None:
    """Return a call's input_ids [B, T] or inputs_embeds [B, T, D]."""
    ids: Tensor | None = given.get("input_ids")
    return given.get("inputs_embeds") if ids is None else ids


def may_step(given: dict[str, Any]) -> bool:
    """Tell if a call with these arguments can be a step: one token after others, no gradients."""
    source = source_of(given)
    if source is None or source.shape[1] != 1 or torch.is_grad_enabled():
        return False
    packed = (given.get(name) is not None for name in (CALL, "seq_idx", "cu_seq_lens_q"))
    return isinstance(given.get("past_key_values"), Cache) and not any(packed)


class Step:
    """A step of one cache."""

    def __init__(
        self,
        sites: dict[int, LayerSite],
        slots: dict[int, FastCacheLayer],
        settings: Settings,
        positions: StepPositions,
    ) -> None:
        self.sites, self.slots, self.settings, self.positions = sites, slots, settings, positions
        fasts = [slot.fast for slot in slots.values()]
        self.rows, self.tokens = fasts[0].rows, 1
        C = fasts[0].chunk_size
        pending = tuple(n % C for n in fasts[0].seen)
        self.where = positions.set(pending, C, {fast.z.device for fast in fasts if fast.z is not None})

    @staticmethod
    def begin(
        running: list[LayerSite], settings: Settings, given: dict[str, Any], tokens_are_real: bool
    ) -> "Step | None":
        """Prepare a step; None, having changed nothing, if it must run as a general call.

        ``running``: the layers that adapt. ``tokens_are_real``: the token is known to be real in every row, so that no
        mask has to be read from the device.
        """
        cache = given["past_key_values"]
        sites = {site.index: site for site in running}
        if not sites or max(sites) >= len(cache.layers):
            return None
        if not all(isinstance(cache.layers[i], FastCacheLayer) for i in sites):
            return None
        source = source_of(given)
        assert source is not None
        rows = source.shape[0]
        slots = fast_layers(cache, {i: site.gates for i, site in sites.items()}, rows, settings)
        first = next(iter(slots.values())).fast
        if first.rows != rows or not all(s.fast.can_step and s.fast.seen == first.seen for s in slots.values()):
            return None
        weights = {i: slow_weight(site, rows) for i, site in sites.items()}
        if any(weight is False for weight in weights.values()):
            return None
        if not tokens_are_real:
            real, _ = read_mask(given.get("attention_mask"), rows, 1, cache, first)
            if real is not None and not bool(real.all()):
                return None
        for i, slot in slots.items():
            slot.begin_step(weights[i], settings.rule.lr, sites[i].width)
        return Step(sites, slots, settings, cache.__dict__.setdefault(POSITIONS, StepPositions()))

    def project(self, site: LayerSite, module: Any, z: Tensor, u: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the projection's output [B, 1, D] for z [B, 1, F] and u [B, 1, D], which the layer keeps."""
        steps = self.slots[site.index].steps
        assert steps is not None
        bias = module.bias.to(z.dtype) if steps.fused and module.bias is not None else None
        return steps.step(z, u, self.where[z.device], plain, bias)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self) -> None:
        """Count the token and update the fast weights by the chunks that it completed."""
        self.positions.advance()
        for i, site in self.sites.items():
            fast = self.slots[i].fast
            if rows := fast.end_step():
                slow = site.slow_weight(site.projection(), self.settings.rule)
                complete(fast, rows, site.bound_target(), self.settings.rule, slow)


def slow_weight(site: LayerSite, rows: int) -> Any:
    """Return W0 [D, F] to fold the fast weights into; None if it stays separate, False if no step is possible.

    Several rows share one slow product, whose sums are then the same as without fast weights.
    """
    module = site.projection()
    if getattr(module, "split", False) or is_split(module.weight) or module.weight.is_meta:  # meta: offloaded
        return False
    return module.weight if rows == 1 and site.fuses(module) else None
