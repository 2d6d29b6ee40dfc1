"""Eviction from a cache: a bounded window for layers that attend to everything, or the whole context.

Here and in ``relocate`` and ``rows``, only caches of ``DynamicLayer`` and ``DynamicSlidingWindowLayer`` are handled
(with or without fast weights), as ``DynamicCache(config=model.config)`` makes them for models of plain attention.
Everything else raises NotImplementedError with the reason.
"""

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .attach import unwrap
from .cache import FastDynamicLayer, FastDynamicSlidingWindowLayer

FULL: tuple[type, ...] = (DynamicLayer, FastDynamicLayer)
SLIDING: tuple[type, ...] = (DynamicSlidingWindowLayer, FastDynamicSlidingWindowLayer)

_REASONS = (
    ("LinearAttention", "a state of linear attention holds no single tokens"),
    ("Static", "a static cache has a fixed length: use a DynamicCache"),
    ("Quantized", "its keys are quantised: use a DynamicCache"),
    ("Indexed", "its tokens have a second index besides their keys"),
    ("Dummy", "it shares the keys of another layer"),
)


def plain_layers(cache: Cache) -> list[Any]:
    """Return the layers of ``cache``; NotImplementedError unless all are dynamic full or sliding attention layers."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise NotImplementedError(f"a {type(cache).__name__} cannot be edited: use a DynamicCache")
    if getattr(cache, "offloading", False):
        raise NotImplementedError("a cache with offloading cannot be edited: its keys move between devices")
    for i, layer in enumerate(layers):
        if type(layer) not in FULL + SLIDING:
            bases = " ".join(cls.__name__ for cls in type(layer).__mro__)
            reason = next((why for name, why in _REASONS if name in bases), "only DynamicCache's own kinds are known")
            raise NotImplementedError(f"layer {i} of this cache is a {type(layer).__name__}: {reason}")
    return list(layers)


def empty_cache(config: PretrainedConfig) -> DynamicCache:
    """Make a new cache for a model of this configuration; NotImplementedError if it could not be edited."""
    decoder = config.get_text_config(decoder=True)
    if "chunked_attention" in (getattr(decoder, "layer_types", None) or ()):
        raise NotImplementedError("layers that attend within fixed chunks of the text are not supported")
    cache = DynamicCache(config=config)
    plain_layers(cache)
    return cache


def sliding_windows(cache_or_model: Cache | nn.Module) -> list[int | None]:
    """Return the sliding window of each layer, None for a layer that attends to everything."""
    if isinstance(cache_or_model, nn.Module):
        cache_or_model = empty_cache(unwrap(cache_or_model).config)
    return [int(layer.sliding_window) if layer.is_sliding else None for layer in plain_layers(cache_or_model)]


def has_full_attention(cache_or_model: Cache | nn.Module) -> bool:
    """Tell if some layer attends to everything, so that memory grows with the text unless tokens are evicted."""
    windows = sliding_windows(cache_or_model)
    return not windows or None in windows  # a cache without layers yet makes full ones


def native_window(cache_or_model: Cache | nn.Module) -> int | None:
    """Return the largest sliding window if all layers slide, None if some layer attends to everything."""
    if has_full_attention(cache_or_model):
        return None
    return max(window or 0 for window in sliding_windows(cache_or_model))


def evict(cache: Cache, first: int, drop: int) -> None:
    """Drop the keys and values [first, first + drop) of every full-attention layer, in all rows.

    The kept ones are copied, so the memory of the rest is freed. Nothing is rotated: see ``relocate``. Sliding layers
    keep their keys; their count of tokens follows down to the window, so that all layers still agree about the length
    and a 2-D attention mask has one column per token that the full layers hold.

    Raises ValueError, changing nothing, when a full layer holds fewer than ``first + drop`` tokens.
    """
    if first < 0 or drop < 0:
        raise ValueError(f"first and drop must not be negative, got {first} and {drop}")
    layers = plain_layers(cache)
    full = [layer for layer in layers if not layer.is_sliding]
    for layer in full:
        if first + drop > layer.get_seq_length():
            raise ValueError(f"cannot drop tokens {first} to {first + drop} of {layer.get_seq_length()}")
    if not full or drop == 0:
        return
    for layer in full:
        layer.keys = _without(layer.keys, first, drop)
        layer.values = _without(layer.values, first, drop)
    for layer in layers:
        # Not below the window: a layer that has dropped tokens must still record that (a crop is then refused).
        if layer.is_sliding and layer.cumulative_length > layer.sliding_window:
            layer.cumulative_length = max(layer.cumulative_length - drop, layer.sliding_window)


def _without(x_BHLD: torch.Tensor, first: int, drop: int) -> torch.Tensor:
    return torch.cat([x_BHLD[:, :, :first], x_BHLD[:, :, first + drop :]], 2)


def clear(cache: Cache) -> None:
    """Drop all keys and values but keep the fast weights: the next token attends to nothing before it."""
    for layer in plain_layers(cache):
        layer.keys = layer.values = None
        layer.is_initialized = False
        if layer.is_sliding:
            layer.cumulative_length = 0


def cache_bytes(cache: Cache) -> int:
    """Return the bytes that the keys and values keep allocated, all rows: whole storages, each once."""
    tensors = [x for layer in plain_layers(cache) for x in (layer.keys, layer.values) if x is not None]
    storages = {(x.device, x.untyped_storage().data_ptr()): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())
