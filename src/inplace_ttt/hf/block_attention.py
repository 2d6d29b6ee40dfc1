"""Causal attention of pieces of a row: a full block of all keys before a piece and a causal block of its own, merged.

Both blocks call the kernel of PyTorch's attention for whole rows (cuDNN's on CUDA, the fused one on a CPU), through the
operators that also return the log-sum-exp. With these the blocks merge exactly, and with the merged output and
log-sum-exp each block's backward gives its share of the gradients, as in ring attention.

``PIECES`` names an attention for ``model.set_attn_implementation``: transformers' sdpa, except that pieces read
through a cache use PyTorch's causal attention aligned at the end. That needs no mask and no repeated key/value heads,
of which sdpa would keep a copy per layer for the backward pass.

Shapes: B rows, H query heads, G key heads (H is a multiple), k pieces of t tokens, T tokens of the row, d head width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

PIECES = "inplace_ttt_pieces"
_aten = torch.ops.aten


class _Block(NamedTuple):
    out: Tensor
    log_sum: Tensor
    """[B, H, t, 1], float32 or better."""
    rest: tuple[Any, ...]
    """Further inputs of the kernel's backward."""


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> _Block:
    if q.device.type == "cuda":
        out, log_sum, *rest, _ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return _Block(out, log_sum, tuple(rest))
    out, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return _Block(out, log_sum[..., None], ())


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, merged: _Block, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, log_sum, rest = merged
    grads: tuple[Tensor, Tensor, Tensor]
    if q.device.type == "cuda":
        *lengths, seed, offset = rest
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, log_sum, seed, offset, None, *lengths, 0.0, causal, scale=scale
        )
    else:
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, log_sum[..., 0], 0.0, causal, scale=scale
        )
    return grads


def _merge(own: _Block, before: _Block) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp over both blocks' keys."""
    share = torch.sigmoid(before.log_sum - own.log_sum)
    out = torch.lerp(own.out.to(share.dtype), before.out.to(share.dtype), share).to(own.out.dtype)
    return out, torch.logaddexp(own.log_sum, before.log_sum)


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, values: Tensor, pieces: Sequence[int], scale: float) -> Tensor:
        t = query.shape[2] // len(pieces)
        outs, saved, ctx.rests = [], [], []
        for piece, q in zip(pieces, query.chunk(len(pieces), 2), strict=True):
            begin, end = piece * t, (piece + 1) * t
            block = _forward(q, keys[:, :, begin:end], values[:, :, begin:end], True, scale)
            out, log_sum, rests = block.out, block.log_sum, [block.rest]
            if begin:
                before = _forward(q, keys[:, :, :begin], values[:, :, :begin], False, scale)
                out, log_sum = _merge(block, before)
                rests.append(before.rest)
            outs.append(out)
            saved += [out, log_sum]
            ctx.rests.append(rests)
        ctx.save_for_backward(query, keys, values, *saved)
        ctx.pieces, ctx.scale = pieces, scale
        return torch.cat(outs, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        query, keys, values, *saved = ctx.saved_tensors
        (grad,) = grads
        t = query.shape[2] // len(ctx.pieces)
        wide = torch.promote_types(keys.dtype, torch.float32)
        dk, dv = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
        dq = []
        split = (x.chunk(len(ctx.pieces), 2) for x in (query, grad))
        parts = zip(ctx.pieces, *split, saved[::2], saved[1::2], ctx.rests, strict=True)
        for piece, q, g, out, log_sum, rests in parts:
            begin, end = piece * t, (piece + 1) * t
            shares = []
            for span, causal, rest in zip((slice(begin, end), slice(0, begin)), (True, False), rests, strict=False):
                k, v = keys[:, :, span], values[:, :, span]
                q_part, k_part, v_part = _backward(g, q, k, v, _Block(out, log_sum, rest), causal, ctx.scale)
                shares.append(q_part)
                dk[:, :, span] += k_part
                dv[:, :, span] += v_part
            dq.append(shares[0] + shares[1] if begin else shares[0])
        return torch.cat(dq, 2), dk.to(keys.dtype), dv.to(values.dtype), None, None


def attend_in_blocks(query: Tensor, keys: Tensor, values: Tensor, pieces: Sequence[int], scale: float) -> Tensor:
    """Attend: query [B, H, k * t, d] of the row's ``pieces``, keys and values [B, G, T, d] of all -> [B, k * t, H, d].

    For rows of one document without a window or padding. Differentiable once. On CUDA in half precision only (cuDNN).
    """
    if query.device.type == "cpu" and keys.shape[1] < query.shape[1]:  # that kernel does not support grouped heads
        keys, values = (x.repeat_interleave(query.shape[1] // keys.shape[1], 1) for x in (keys, values))
    out: Tensor = _Pieces.apply(query, keys, values, tuple(pieces), scale)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)


def pieces_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0, **rest: Any
) -> Tensor | None:
    """Make sdpa's mask; None if ``pieces_attention`` needs none: causal attention to the whole cache, no padding.

    On CUDA None in half precision only: the kernel with grouped heads supports no other.
    """
    padding, device = rest.get("attention_mask"), torch.device(rest.get("device", "cpu"))
    half = rest.get("dtype") in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled(device.type)
    if (
        (half or device.type == "cpu")
        and rest.get("mask_function") is causal_mask_function
        and isinstance(q_offset, int)
        and kv_length == q_offset + q_length
        and (padding is None or bool(padding[:, :kv_length].all()))
    ):
        return None
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, **rest
    )


def pieces_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attend: query [B, H, n, d] of the last n of T tokens, key and value [B, G, T, d] -> [B, n, H, d]."""
    n, T = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None or n in (1, T) or not causal or rest.get("position_bias") is not None:
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **rest}
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    if rest.get("softcap") is not None:
        raise NotImplementedError(f"{PIECES} has no capped scores: choose attn_implementation eager")
    bias: Any = causal_lower_right(n, T)
    shared = query.shape[1] != key.shape[1]
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, bias, dropout_p=dropout, scale=scaling, enable_gqa=shared
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(PIECES, pieces_attention)
AttentionMaskInterface.register(PIECES, pieces_mask)
