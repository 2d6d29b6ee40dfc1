"""Which of a call's tokens are real, from any form of attention mask that transformers passes."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


def documents_of_mask(mask: Any, tokens: int, cache: Cache | None) -> Tensor | None:
    """Return document numbers [B, T] of a prepared mask [B, 1, T, T] of a fresh call; None where rows are undivided.

    A token that may not attend to the one before it begins a document. NotImplementedError for a mask that is neither
    causal (through a window or not) inside documents nor across them (a tree of drafts, say).
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.dim() != 4 or tokens < 2 or mask.shape[-2:] != (tokens, tokens):
        return None
    if cache is not None and int(cache.get_seq_length()):
        return None
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
    real = seen.diagonal(dim1=-2, dim2=-1)
    begins = ~seen.diagonal(offset=-1, dim1=-2, dim2=-1) & real[:, 1:] & real[:, :-1]
    numbers = torch.nn.functional.pad(begins.long().cumsum(1), (1, 0))
    at = torch.arange(tokens, device=seen.device)
    behind = at[:, None] - at
    # Each token sees the last n of its document, up to itself, and nothing else.
    allowed = (behind >= 0) & (numbers[:, :, None] == numbers[:, None, :]) & real[:, None, :] & real[:, :, None]
    reach = torch.where(seen & allowed, behind, -1).amax((1, 2), keepdim=True)
    if not bool((torch.where(real[:, :, None], seen, False) == (allowed & (behind <= reach))).all()):
        raise NotImplementedError(
            "this attention mask is neither causal nor that of documents end to end, so the fast weights cannot follow "
            "it: pass position_ids or seq_idx for documents, a 2-D mask for padding"
        )
    return numbers if bool(begins.any()) else None


def real_tokens(mask: Any, rows: int, tokens: int, cache: Cache | None) -> Tensor | None:
    """bool [rows, tokens], or None when all are real.

    Handles None, the 2-D mask, and the prepared 4-D mask (or a dict of them by layer type) that ``generate`` makes for
    static caches: there a real token is one that may attend to itself. NotImplementedError for other forms.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise NotImplementedError(f"cannot read padding from a {type(mask).__name__}: pass a 2-D attention_mask")
    if mask.dim() == 2:
        return mask[:, -tokens:] != 0
    if mask.dim() != 4:
        raise ValueError(f"attention_mask must have 2 or 4 dimensions, got {tuple(mask.shape)}")
    past, columns = int(cache.get_seq_length()) if cache is not None else 0, mask.shape[-1]
    if tokens > columns:
        raise NotImplementedError("cannot read padding from this prepared mask: pass a 2-D attention_mask")
    own = mask[:, 0].diagonal(offset=min(past, columns - tokens), dim1=-2, dim2=-1)  # the last columns in a full window
    real = own if own.dtype == torch.bool else own >= 0
    return real.expand(rows, tokens)
