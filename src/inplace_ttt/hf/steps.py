"""Decoding steps: one token a row, on a cache that was read into. Only numbers on the device change between them.

So compiled code and CUDA graphs of a step serve every token: the host counts, updates the fast weights when a chunk is
complete and folds them, outside of what is compiled.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..core import ChunkTable
from ..core.decoding import StepClock
from .cache import FastCacheLayer, fast_layers
from .masks import real_tokens
from .parallel_attention import SLICES
from .tensor_parallel import is_split

if TYPE_CHECKING:
    from .context import LayerSite, Runtime

CLOCK = "_inplace_ttt_clock"


def source_of(given: dict[str, Any]) -> Tensor | None:
    """A call's input_ids [B, T] or inputs_embeds [B, T, D]."""
    ids: Tensor | None = given.get("input_ids")
    return given.get("inputs_embeds") if ids is None else ids


def may_step(given: dict[str, Any]) -> bool:
    """Whether a call with these arguments looks like a step: one token behind others, nothing to differentiate."""
    source = source_of(given)
    if source is None or source.shape[1] != 1 or torch.is_grad_enabled():
        return False
    packed = (given.get(name) is not None for name in (SLICES, "seq_idx", "cu_seq_lens_q"))
    return isinstance(given.get("past_key_values"), Cache) and not any(packed)


class Step:
    """One step of one cache."""

    def __init__(self, sites: "dict[int, LayerSite]", slots: dict[int, FastCacheLayer], clock: StepClock) -> None:
        self.sites, self.slots, self.clock = sites, slots, clock
        fasts = [slot.fast for slot in slots.values()]
        C = fasts[0].chunk_size
        pending = tuple(n % C for n in fasts[0].seen)
        self.where = clock.set(pending, C, {fast.z.device for fast in fasts if fast.z is not None})

    # What changes from token to token must not be seen by compiled code, which would compile it anew: not traced.
    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(runtime: "Runtime", given: dict[str, Any], vouched: bool) -> "Step | None":
        """Makes everything ready for a step; None, having changed nothing, where the call must go the general way.

        ``vouched``: the token is known to be real in every row, so that no mask has to be read from the device.
        """
        cache, config = given["past_key_values"], runtime.config
        sites = {site.index: site for site in runtime.running_sites()}
        if not sites or max(sites) >= len(cache.layers):
            return None
        if not all(isinstance(cache.layers[i], FastCacheLayer) for i in sites):
            return None
        source = source_of(given)
        assert source is not None
        rows = source.shape[0]
        slots = fast_layers(cache, list(sites), rows, config.chunk_size, config.decay)
        seen = next(iter(slots.values())).fast.seen
        if not all(slot.fast.can_step and slot.fast.seen == seen and len(seen) == rows for slot in slots.values()):
            return None
        weights = {i: slow_weight(site, rows) for i, site in sites.items()}
        if any(weight is False for weight in weights.values()):
            return None
        if not vouched:
            real = real_tokens(given.get("attention_mask"), rows, 1, cache)
            if real is not None and not bool(real.all()):
                return None
        for i, slot in slots.items():
            slot.begin_step(weights[i], runtime.lr)
        return Step(sites, slots, cache.__dict__.setdefault(CLOCK, StepClock()))

    def project(
        self, index: int, module: Any, z_B1F: Tensor, u_B1D: Tensor, plain: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The projection's output [B, 1, D] in layer ``index``, which keeps z and u."""
        steps = self.slots[index].steps
        assert steps is not None
        bias = module.bias.to(z_B1F.dtype) if steps.fused and module.bias is not None else None
        return steps.step(z_B1F, u_B1D, self.where[z_B1F.device], plain, bias)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self) -> None:
        """Counts the token; chunks that it completed change the fast weights."""
        self.clock.tick()
        for i, site in self.sites.items():
            slot = self.slots[i]
            fast = slot.fast
            if not (rows := fast.end_step()):
                continue
            assert fast.u is not None
            C = fast.chunk_size
            v = site.targets(fast.u, None, ChunkTable.build(fast.rows, C, C, keep_state=True))
            slot.clip = site.clip(site.projection())
            assert v is not None
            fast.complete(rows, v, slot.clip)


def slow_weight(site: "LayerSite", rows: int) -> Any:
    """W0 [D, F] to fold the fast weights into; None where it stays apart, False where no step can be taken.

    Several rows share one slow product, which keeps their sums as they are without fast weights.
    """
    module = site.projection()
    if getattr(module, "split", False) or is_split(module.weight) or module.weight.is_meta:  # meta: offloaded
        return False
    return module.weight if rows == 1 and getattr(module, "fuses", False) else None
