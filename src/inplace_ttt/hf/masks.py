"""Real tokens and document numbers of a call, from any attention mask that transformers accepts."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from ..core import FastWeights


def read_mask(
    mask: Any, rows: int, tokens: int, cache: Cache | None, state: FastWeights | None = None, *, divided: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Return masks of a call's real tokens, [rows, tokens], and document numbers; None: all real, one document a row.

    ``mask``: [B, L] with a column for each token so far or each slot of the cache, nonzero for real tokens; or a
    prepared one, bool or float [B, 1, T, L], or a dict of these by layer type. There a token is real if it may
    attend to itself, and begins a document if it may not attend to the token before it. ``state``: what was read
    into the cache. ``divided``: False: do not look for documents.

    NotImplementedError for other forms, and for a prepared mask that is neither causal (with or without a window)
    inside documents nor across them (a tree of drafts, say).
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        raise NotImplementedError(f"cannot read padding from a {type(mask).__name__}: pass a 2-D attention_mask")
    past = int(cache.get_seq_length()) if cache is not None and mask.shape[-1] > tokens else 0
    if mask.dim() == 2:
        start = min(past, max(mask.shape[1] - tokens, 0))
        return mask[:, start : start + tokens], None
    if mask.dim() != 4:
        raise ValueError(f"attention_mask must have 2 or 4 dimensions, got {tuple(mask.shape)}")
    fits = mask.shape[-2] == tokens <= mask.shape[-1]
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise NotImplementedError(
            f"cannot read padding from a prepared mask {tuple(mask.shape)} of {mask.dtype} for {tokens} tokens: pass a "
            "2-D attention_mask"
        )
    past = min(past, mask.shape[-1] - tokens)  # in a full window: the last columns
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
    real = seen.diagonal(offset=past, dim1=-2, dim2=-1)
    numbers = _documents(seen, real, past, state) if divided and tokens + past > 1 else None
    return real.expand(rows, tokens), None if numbers is None else numbers.expand(rows, tokens)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _documents(seen_BTK: Tensor, real_BT: Tensor, past: int, state: FastWeights | None) -> Tensor | None:
    """Return document numbers [B, T]; None if every row is one document.

    Column k of ``seen`` is position k of the cache, new tokens from ``past`` on. A token must see the last n real
    tokens of its document, up to itself, and no others; n is the same for all tokens of a row.
    """
    B, T, K = seen_BTK.shape
    column = torch.arange(K, device=seen_BTK.device)
    own = column[past : past + T]
    exists = pad(real_BT, (past, K - past - T))
    exists[:, :past] = (seen_BTK[:, :, :past] & real_BT[..., None]).any(1)
    if state is not None and (known := min(state.fed, past)):  # inside the window or not
        read = None if state.real is None else state.real[:, -known:].to(seen_BTK.device)
        exists[:, past - known : past] = True if read is None else read if len(read) == B else read.any(0)
    first = seen_BTK.to(torch.uint8).argmax(-1)
    run = (column >= first[..., None]) & (column <= own[:, None]) & exists[:, None]
    # The last real token before each one, -1 where there is none.
    before = torch.where(exists, column, -1).cummax(1).values[:, :-1]
    before = pad(before, (1, 0), value=-1)[:, past : past + T]
    begins = real_BT & (before >= 0) & (first > before)
    numbers = begins.long().cumsum(1)
    oldest = torch.where(real_BT & (numbers == 0), first, K).amin(1, keepdim=True)
    start = torch.where(numbers == 0, oldest, torch.where(begins, own, 0).cummax(1).values)
    reach = torch.where(real_BT, own - first, 0).amax(1, keepdim=True)
    # Real tokens up to each column: none may lie between the expected and the actual first visible column.
    count = pad(exists.long().cumsum(1), (1, 0))
    missed = count.gather(1, first) - count.gather(1, torch.maximum(start, own - reach))
    right = (seen_BTK == run).all(-1) & (first >= start) & (missed <= 0)
    if not bool((right | ~real_BT).all()):
        raise NotImplementedError(
            "this attention mask is neither causal nor that of documents end to end, so the fast weights cannot follow "
            "it: pass position_ids or seq_idx for documents, a 2-D mask for padding"
        )
    if bool((begins & (before < past)).any()):
        raise NotImplementedError(
            "this attention mask begins a document behind another one that the cache holds: start from an empty cache"
        )
    return numbers if bool(begins.any()) else None
