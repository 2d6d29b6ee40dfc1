"""Fast weights inside the Hugging Face cache: each operation on a layer's keys also applies to its fast weights."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import cache_utils
from transformers.cache_utils import Cache

from ..core import FastWeights
from ..fast.decoding import StepBuffers
from ..fast.factors import fast_weights
from .settings import Settings


def cache_name(module: nn.Module) -> str:
    """Return the name of forward's cache argument: ``cache`` from transformers 5.24 on, in most families."""
    whole: Any = getattr(module, "_orig_mod", module)
    if hasattr(whole, "get_base_model"):
        whole = whole.get_base_model()
    return "cache" if "cache" in inspect.signature(whole.forward).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """Return the cache in a model's output, under either name."""
    found = getattr(output, "cache", None)
    return output.past_key_values if found is None else found


class FastCacheLayer:
    """A mixin for a cache layer that carries fast weights (``fast``)."""

    fast: FastWeights
    stale = False
    """Set when tokens were read with updates off: the fast weights no longer match the keys."""
    broken = False
    """Set when a call failed half way: keys and fast weights were updated in some layers only."""
    record: Any = None
    """``PendingColumns`` of a cache whose objective is the loss, in its first adapting layer."""
    steps: StepBuffers | None = None
    """Buffers of the pending tokens during single steps."""

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.fast.reset()
        self.stale, self.broken, self.record = False, False, None
        if not isinstance(self, cache_utils.StaticLayer):  # there, steps continue at the same addresses
            self.steps = None

    def begin_step(self, weight_DF: torch.Tensor | None, lr: float, width: int | None = None) -> StepBuffers:
        """Return the buffers of the next step, with the pending tokens and the folded weight."""
        fast = self.fast
        assert fast.z is not None
        assert fast.u is not None
        if self.steps is None or not self.steps.fit(fast, fast.z, fast.u):
            self.steps = StepBuffers(fast, fast.z, fast.u)
        elif fast.z is not self.steps.z or fast.u is not self.steps.u:
            self.steps.take(fast.z, fast.u)
        fast.z, fast.u = self.steps.z, self.steps.u
        self.steps.fold(fast.S, weight_DF, lr, isinstance(self, cache_utils.StaticLayer), width)
        return self.steps

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._base("batch_select_indices")(indices)
        rows = indices if isinstance(indices, torch.Tensor) else torch.tensor(indices, device="cpu")
        self._select(rows.nonzero().flatten() if rows.dtype == torch.bool else rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._base("batch_repeat_interleave")(repeats)
        self._select(torch.arange(self.fast.rows, device="cpu").repeat_interleave(repeats))

    def _select(self, rows: torch.Tensor) -> None:
        self.fast.select(rows)
        self.record = None if self.record is None else self.record.select(rows)

    def crop(self, tokens_to_remove: int) -> None:
        crop = self._base("crop")
        drop = -tokens_to_remove
        if tokens_to_remove > 0:  # the older meaning: length to keep
            drop = max(self.get_seq_length() - tokens_to_remove, 0)  # type: ignore[attr-defined]
        before = dict(self.fast.__dict__)  # a rollback replaces tensors and modifies none
        record = self.record
        try:
            self.fast.rollback(int(drop))
            if record is not None and drop:
                chunks = [n // self.fast.chunk_size for n in self.fast.seen]
                self.record = record.crop(int(drop), chunks)
            crop(tokens_to_remove)
        except Exception:
            self.fast.__dict__.update(before)
            self.record = record
            raise

    def _base(self, name: str) -> Any:
        method = getattr(super(), name, None)
        if method is None:
            raise NotImplementedError(f"{type(self).__mro__[2].__name__} has no {name}: use a DynamicCache")
        return method

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = object.__new__(type(self))
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            if key == "steps":  # made again when needed
                continue
            new.__dict__[key] = value.fork() if isinstance(value, FastWeights) else copy.deepcopy(value, memo)
        return new


# Static subclasses: classes made at run time could not be pickled and stop torch.compile.
class FastDynamicLayer(FastCacheLayer, cache_utils.DynamicLayer):  # type: ignore[no-untyped-call]
    pass


class FastDynamicSlidingWindowLayer(  # type: ignore[no-untyped-call]
    FastCacheLayer, cache_utils.DynamicSlidingWindowLayer
):
    pass


class FastStaticLayer(FastCacheLayer, cache_utils.StaticLayer):  # type: ignore[no-untyped-call]
    pass


class FastStaticSlidingWindowLayer(  # type: ignore[no-untyped-call]
    FastCacheLayer, cache_utils.StaticSlidingWindowLayer
):
    pass


class FastLinearAttentionLayer(FastCacheLayer, cache_utils.LinearAttentionLayer):
    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and any(self.is_recurrent_states_initialized.values()):  # transformers would not raise
            raise NotImplementedError("layers of linear attention cannot take tokens back: read the text again instead")
        super().crop(tokens_to_remove)


_CLASSES: dict[type, type] = {cls.__mro__[2]: cls for cls in FastCacheLayer.__subclasses__()}


def fast_layers(cache: Cache, layers: dict[int, bool], rows: int, settings: Settings) -> dict[int, FastCacheLayer]:
    """Return ``layers`` of ``cache`` with fast weights, installed on first use; others keep theirs.

    ``layers``: by number, True if the layer's target gates its state.

    Raises NotImplementedError for a kind of cache that cannot carry them, and ValueError for one that was filled
    without them or with other settings.
    """
    others = [i for i, layer in enumerate(cache.layers) if isinstance(layer, FastCacheLayer) and i not in layers]
    if others:
        raise ValueError(
            f"this cache carries fast weights of layer {others[0]}, which does not adapt in this model: "
            "start from an empty cache"
        )
    return {i: _fast_layer(cache, i, rows, settings, gates) for i, gates in layers.items()}


def _fast_layer(cache: Cache, index: int, rows: int, settings: Settings, gates: bool) -> FastCacheLayer:
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if index >= len(cache.layers):
        raise ValueError(f"the cache has {len(cache.layers)} layers, the model needs one for layer {index}")
    layer: Any = cache.layers[index]
    chunk_size, rule = settings.config.chunk_size, settings.rule
    if isinstance(layer, FastCacheLayer):
        if layer.broken:
            raise ValueError("a call on this cache broke off half way through the layers: start from an empty cache")
        if layer.stale:
            raise ValueError(
                "this cache read tokens with updates off: start from an empty cache, or leave the updates off"
            )
        if layer.fast.chunk_size != chunk_size:
            raise ValueError(
                f"this cache was filled in chunks of {layer.fast.chunk_size} tokens, this model reads in chunks of "
                f"{chunk_size}: start from an empty cache"
            )
        if (difference := layer.fast.rule.difference(rule)) is not None:
            raise ValueError(f"this cache was filled {difference}: start from an empty cache")
        if layer.fast.rows != rows and not any(layer.fast.seen):  # reset: another batch may follow
            layer.fast = layer.fast.new(rows)
        return layer
    if type(layer) in _CLASSES and _was_read(layer):
        raise ValueError(
            "this cache was filled without fast weights (before attach, with updates off, in a training forward, or by "
            "prefix tuning or a cartridge, whose keys and values come from no text): "
            "start from an empty cache"
        )
    return install(cache, index, fast_weights(rows, chunk_size, rule, settings.form, gates=gates))


def _was_read(layer: Any) -> bool:
    """Tell if a cache layer holds tokens already; one of linear attention does not count them."""
    if any(getattr(layer, "has_previous_state", {}).values()):
        return True
    return hasattr(layer, "get_seq_length") and layer.get_seq_length() > 0


def install(cache: Cache, index: int, fast: FastWeights) -> FastCacheLayer:
    """Put ``fast`` into layer ``index`` of ``cache``. NotImplementedError for a kind of layer that cannot."""
    layer: Any = cache.layers[index]
    cls = _CLASSES.get(type(layer))
    if cls is None:
        raise NotImplementedError(
            f"a cache of {type(layer).__name__} cannot carry fast weights: use a DynamicCache or a StaticCache"
        )
    new: Any = object.__new__(cls)
    new.__dict__ = layer.__dict__
    new.fast = fast
    cache.layers[index] = new
    return new  # type: ignore[no-any-return]


def detach_cache(cache: Cache) -> Cache:
    """Detach a cache from its autograd graph, in place: keys, values and fast weights. Return the cache.

    For truncated backpropagation through a long text: the next call continues from the present values, and its
    gradients stop here.
    """
    for layer in cache.layers:
        for name, value in layer.__dict__.items():
            if isinstance(value, FastWeights):
                value.detach()
            elif isinstance(value, torch.Tensor):
                layer.__dict__[name] = value.detach()
    return cache


def mark_broken(slots: Mapping[int, FastCacheLayer]) -> None:
    """Mark these layers after a failed call."""
    for slot in slots.values():
        slot.broken = True


def mark_stale(cache: Cache) -> None:
    """Mark a cache that reads tokens with updates off."""
    for layer in cache.layers:
        if isinstance(layer, FastCacheLayer):
            layer.stale = True
