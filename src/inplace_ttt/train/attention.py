"""Attention over packed rows on CUDA: sliding window and document boundaries without a mask.

``varlen`` runs PyTorch's own flash attention for documents laid end to end (`torch.nn.attention.varlen`), which reads
the window and the document bounds directly; whole rows without a window go by sdpa. transformers' ``flex_attention``
builds a block mask in every forward instead, and its ``sdpa`` a dense [B, 1, T, T] one. Under autocast, rotary
embeddings return queries and keys in float32 beside half-precision values; both implementations here cast them back
first (flex_attention would otherwise fail, or run in float32, depending on the version of PyTorch).
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flex_attention_mask, sdpa_mask

from inplace_ttt.fast.ranks import Slices
from inplace_ttt.hf.parallel_attention import RowSlices, attend, dtype_of, fault, refuse, repeated
from inplace_ttt.hf.parallel_attention import varlen as _varlen

VARLEN = "inplace_ttt_varlen"
FLEX = "inplace_ttt_flex"


def register() -> None:
    """Make ``VARLEN`` and ``FLEX`` known to transformers as attention implementations."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, varlen_mask)
    AttentionInterface.register(FLEX, flex_attention)
    AttentionMaskInterface.register(FLEX, flex_attention_mask)


def choose_attention(wanted: str, device: torch.device) -> str:
    """Return transformers' name for a recipe's ``attn_implementation``; ``auto``: the fastest that works here."""
    register()
    if wanted == "auto":
        if device.type != "cuda":
            return "sdpa"
        return VARLEN if varlen_works(device) else FLEX
    return {"varlen": VARLEN, "flex_attention": FLEX}.get(wanted, wanted)


def varlen_works(device: torch.device) -> bool:
    """Tell whether ``varlen`` agrees with the dense mask here, on a small packed row, forward and backward."""
    shape, window = (2, 2, 96, 64), 16
    documents = (torch.arange(96) >= 50).long().expand(2, -1)
    positions = (torch.arange(96) - 50 * documents).to(device)
    row = RowSlices(Slices(1, 0), None, 2, 96, documents)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(nn.Identity(), q, k, v, None, sliding_window=window, position_ids=positions)[0]

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(row, q, k, v, shape[-1] ** -0.5, window, "mask")

    return fault(packed, masked, [shape] * 3, device, torch.bfloat16) is None


def varlen_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0, **rest: Any
) -> Tensor | None:
    """Return None where `varlen_attention` needs no mask: whole rows, no padding, no cache, half precision."""
    device, dtype = torch.device(rest.get("device", "cpu")), rest.get("dtype", torch.float32)
    whole = isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length
    if whole and rest.get("attention_mask") is None and _half(device, dtype):
        return None
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, **rest
    )


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Map query [B, H, T, d], key and value [B, H or fewer, T, d] to [B, T, H, d]; documents: ``position_ids`` [B, T].

    By transformers' sdpa where a mask is given, the numbers are float32, or no row is divided and there is no window.
    Raises NotImplementedError for what flash attention lacks (dropout, capped logits, attention sinks).
    """
    B, H, T, d = query.shape
    dtype = _half(query.device, value.dtype)
    if attention_mask is not None or dtype is None or key.shape[2] != T:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
    refuse("varlen attention has no {}: choose attn_implementation: flex_attention", **rest)
    is_compiling = torch.compiler.is_compiling()
    if position_ids is not None and is_compiling:
        bounds = _bounds_in_graph(position_ids, B, T)
    else:
        bounds = document_bounds(position_ids, B, T, query.device)
    # Compiled code cannot choose by the number of documents.
    is_whole = position_ids is None or (not is_compiling and bounds.numel() == B + 1)
    if is_whole and (sliding_window is None or sliding_window >= T):
        # Whole rows: PyTorch's kernel for them is about twice as fast on Hopper.
        query, key, value = (x.to(dtype) for x in (query, key, value))
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **rest)
    flat = [repeated(x.to(dtype), H).transpose(1, 2).reshape(B * T, H, d) for x in (query, key, value)]
    left = -1 if sliding_window is None else sliding_window - 1
    # T bounds the longest document without a device synchronisation.
    out = _varlen(*flat, bounds, bounds, T, T, scale=scaling, window_size=(left, 0))
    return out.view(B, T, H, d), None


def flex_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **rest: Any
) -> tuple[Tensor, Tensor | None]:
    """Call transformers' flex_attention in the dtype that autocast asks for."""
    dtype = _half(query.device, value.dtype)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return flex_attention_forward(module, query, key, value, attention_mask, **rest)


def document_bounds(position_ids: Tensor | None, rows: int, tokens: int, device: torch.device) -> Tensor:
    """Return where documents begin in the flattened rows, and their end: int32 [documents + 1].

    All layers of a forward get the same ``position_ids`` tensor: the last result is cached, so that there is one device
    synchronisation per forward.
    """
    if position_ids is None:
        return torch.arange(0, (rows + 1) * tokens, tokens, dtype=torch.int32, device=device)
    tracked = not position_ids.is_inference()
    version = position_ids._version if tracked else 0
    known = _last_bounds.get("positions") if tracked else None
    if known is not None and known[0]() is position_ids and known[1:3] == (version, rows):
        return known[3]
    positions = position_ids.expand(rows, tokens)
    starts = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    starts[:, 1:] = positions.diff(dim=-1) != 1
    bounds = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([rows * tokens], device=device)])
    bounds = bounds.to(torch.int32)
    _last_bounds["positions"] = (weakref.ref(position_ids), version, rows, bounds)
    return bounds


@torch.library.custom_op("inplace_ttt::document_bounds", mutates_args=())
def _bounds_in_graph(position_ids: Tensor, rows: int, tokens: int) -> Tensor:
    """Call `document_bounds` as one operator, whose result's length no graph is specialised on."""
    return document_bounds(position_ids, rows, tokens, position_ids.device)


@_bounds_in_graph.register_fake
def _(position_ids: Tensor, rows: int, tokens: int) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size(min=2)
    return position_ids.new_empty(size, dtype=torch.int32)


_last_bounds: dict[str, tuple[Any, int, int, Tensor]] = {}


def _half(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """Return the half-precision type that attention runs in, None for float32."""
    dtype = dtype_of(device, dtype)
    return dtype if dtype in (torch.bfloat16, torch.float16) else None
