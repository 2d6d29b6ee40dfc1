"""Merging caches of one row into one of many rows, splitting it again, and caches as plain tensors."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..core import FastWeights
from .cache import FastCacheLayer, install
from .window import empty_cache, plain_layers, sliding_windows


def merge(caches: Sequence[DynamicCache], config: PretrainedConfig) -> tuple[DynamicCache, Tensor]:
    """Merge B caches of one row into one of B rows; also return its token mask, int64 [B, L] (CPU), zeros at the left.

    L is the largest length of a row: the tokens in its full-attention layers, or at most W - 1 where all layers slide.
    The rows are copies. Continue with the same number of new tokens in every row, ``position_ids`` [B, T] as for each
    row alone, and as ``attention_mask`` the mask with ones appended for all new tokens; each row then attends to the
    same tokens as alone. Empty caches are allowed.

    Raises ValueError for rows that one mask cannot describe, namely where the full-attention layers hold fewer tokens
    than the sliding ones (evict no further than the sliding window), and for caches of different models or settings.
    """
    if not caches:
        raise ValueError("no caches to merge")
    merged: Any = empty_cache(config)
    rows = [plain_layers(cache) or empty_cache(config).layers for cache in caches]
    if any(cache.layers and sliding_windows(cache) != sliding_windows(merged) for cache in caches):
        raise ValueError("these caches are not of this model: make them with DynamicCache(config=model.config)")
    lengths = [_length(row) for row in rows]
    longest = max(lengths)
    for i, layer in enumerate(merged.layers):
        parts = [row[i] for row in rows]
        _fill(layer, parts, longest)
        if any(isinstance(part, FastCacheLayer) for part in parts):
            _side_by_side(merged, i, parts, lengths)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return merged, mask.to(torch.int64)


def split(cache: DynamicCache, lengths: Sequence[int] | Tensor, index: int) -> DynamicCache:
    """Return row ``index`` of a merged cache as a separate cache, without padding. It is a copy.

    ``lengths``: the tokens of each row [B], new ones included, or the present mask [B, L]. Where all layers slide, the
    count of all tokens that a row ever read is accepted too. ValueError when the cache holds fewer tokens.
    """
    n = int(torch.as_tensor(lengths[index]).sum())
    row: Any = DynamicCache()
    for i, layer in enumerate(plain_layers(cache)):
        row.layers.append(_row(layer, n, index))
        if isinstance(layer, FastCacheLayer):
            fast = copy.copy(layer.fast)  # select replaces tensors and modifies none
            fast.select([index])
            new = install(row, i, fast)
            new.stale = layer.stale
    return row  # type: ignore[no-any-return]


def _length(row: list[Any]) -> int:
    """Return the number of tokens for a row's mask; ValueError when no mask fits all its layers."""
    if any(layer.keys is not None and layer.keys.shape[0] != 1 for layer in row):
        raise ValueError("only caches of one row can be merged")
    full = {layer.get_seq_length() for layer in row if not layer.is_sliding}
    if len(full) > 1:
        raise ValueError(f"the full-attention layers of a row hold different numbers of tokens: {sorted(full)}")
    n = full.pop() if full else max(_held(layer) for layer in row)
    for i, layer in enumerate(row):
        if layer.is_sliding and _held(layer) != min(n, layer.sliding_window - 1):
            raise ValueError(
                f"layer {i} of a row slides and holds {_held(layer)} tokens, its full-attention layers {n}: one mask "
                f"cannot fit both. Keep at least the last {layer.sliding_window - 1} tokens when evicting"
            )
    return int(n)


def _held(layer: Any) -> int:
    """Return the number of tokens of a sliding layer that the next token may attend to."""
    return 0 if layer.keys is None else min(layer.keys.shape[2], layer.sliding_window - 1)


def _fill(new: Any, parts: list[Any], longest: int) -> None:
    """Fill the empty layer ``new`` with ``parts``, one per row, their newest tokens at the right."""
    like = next((part for part in parts if part.keys is not None), None)
    if like is not None:
        width = min(longest, new.sliding_window - 1) if new.is_sliding else longest
        new.lazy_initialization(like.keys, like.values)
        new.keys = _right_aligned([part.keys for part in parts], like.keys, width)
        new.values = _right_aligned([part.values for part in parts], like.values, width)
    if new.is_sliding:
        new.cumulative_length = longest


def _right_aligned(parts: list[Tensor | None], like: Tensor, width: int) -> Tensor:
    """Pad parts [1, H, n, D] to [B, H, width, D]: the last tokens of each, zeros before them."""
    out = like.new_zeros(len(parts), like.shape[1], width, like.shape[3])
    for b, part in enumerate(parts):
        if part is not None and (n := min(part.shape[2], width)):
            out[b, :, width - n :] = part[0, :, part.shape[2] - n :]
    return out


def _side_by_side(merged: DynamicCache, i: int, parts: list[Any], lengths: list[int]) -> None:
    """Put the fast weights of ``parts`` into layer i of ``merged``; a row that has read nothing gets empty ones."""
    first = next(part for part in parts if isinstance(part, FastCacheLayer))
    fasts = []
    for part, n in zip(parts, lengths, strict=True):
        if isinstance(part, FastCacheLayer):
            if part.stale != first.stale:
                raise ValueError("a row read tokens with updates off and another did not")
            fasts.append(part.fast)
        elif n:
            raise ValueError("a row was read with fast weights and another without")
        else:
            fasts.append(copy.copy(first.fast))
            fasts[-1].reset()
    new = install(merged, i, FastWeights.stack(fasts))
    new.stale = first.stale


def _row(layer: Any, n: int, index: int) -> Any:
    """Return the last n tokens of one row of a layer, or those that it still holds; without fast weights."""
    new: Any = DynamicSlidingWindowLayer(layer.sliding_window) if layer.is_sliding else DynamicLayer()  # type: ignore[no-untyped-call]
    held = min(n, layer.sliding_window - 1) if layer.is_sliding else n
    there = 0 if layer.keys is None else layer.keys.shape[2]
    if held > there:
        raise ValueError(f"row {index} should have {n} tokens, but the cache holds {there}")
    if held:
        new.lazy_initialization(layer.keys, layer.values)
        new.keys, new.values = (
            x[index : index + 1, :, there - held :].clone(memory_format=torch.contiguous_format)
            for x in (layer.keys, layer.values)
        )
    if layer.is_sliding:
        new.cumulative_length = n
    return new


# -- to disk and back --------------------------------------------------------------------------------------------------


def to_tensors(cache: DynamicCache) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return copies of keys and values by name, and a cache's other fields as JSON values; without fast weights."""
    tensors, layers = {}, []
    for i, layer in enumerate(plain_layers(cache)):
        layers.append(
            {"window": int(layer.sliding_window), "length": int(layer.cumulative_length)}
            if layer.is_sliding
            else {"window": None, "length": int(layer.get_seq_length())}
        )
        if layer.keys is not None:
            for name in ("keys", "values"):
                x = getattr(layer, name).detach()
                tensors[f"{i}.{name}"] = x.clone(memory_format=torch.contiguous_format)
    return tensors, {"layers": layers}


def from_tensors(tensors: dict[str, Tensor], info: dict[str, Any], config: PretrainedConfig) -> DynamicCache:
    """Rebuild a cache from the results of ``to_tensors``, on the tensors' device; ValueError if of another model."""
    cache = empty_cache(config)
    if info["layers"] and [layer["window"] for layer in info["layers"]] != sliding_windows(cache):
        raise ValueError("this cache is of another model, or was not made with DynamicCache(config=model.config)")
    for i, (layer, saved) in enumerate(zip(plain_layers(cache), info["layers"], strict=False)):
        if f"{i}.keys" in tensors:
            keys, values = tensors[f"{i}.keys"], tensors[f"{i}.values"]
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        if layer.is_sliding:
            layer.cumulative_length = saved["length"]
    return cache
