"""Which of a call's tokens are real, from any form of attention mask that transformers passes."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


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
