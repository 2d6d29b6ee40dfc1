"""Attention of a slice of a row: its own queries against the whole row's keys and values, gathered from all ranks.

Three methods, of which the first that works on the device is taken: ``blocks`` (``block_attention.py``: the kernel for
whole rows, once for a piece's own keys and once for those before it; rows of one document without a window), ``varlen``
(PyTorch's flash attention for contiguous documents: supports causal offsets, windows and document bounds directly),
``mask`` (a dense mask, a piece at a time; anywhere).

Shapes: B rows, H heads, G of keys and values, k pieces of t tokens, T of a whole row, d the head's width.
"""

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from ..fast.ranks import Group, Slices, SliceTable
from .block_attention import attend_in_blocks
from .calls import CALL

GATHER = "inplace_ttt_gather"
logger = logging.getLogger(__name__)


class RowSlices:
    """A call's split of its rows, their documents, and the resulting chunk table.

    ``tokens``: T, of a whole row. ``documents``: int64 [B, T] on the CPU, -1 for padding; None: one document a row.
    A plain class: FSDP2's mixed precision copies and casts dataclasses among a layer's arguments.
    """

    def __init__(self, slices: Slices, group: Group, rows: int, tokens: int, documents: Tensor | None) -> None:
        self.slices, self.group, self.rows, self.tokens, self.documents = slices, group, rows, tokens, documents
        self.table: SliceTable | None = None
        self.native = False  # attention is PyTorch's own for slices
        self.methods: dict[tuple[torch.dtype, bool], str] = {}  # by dtype and "undivided rows, no window"
        self.attended = 0  # attention layers that have run
        self.begin: Any = None  # makes the adapting layers' call from the settings
        self._made: dict[Any, Any] = {}

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def table_on(self, device: torch.device) -> SliceTable:
        """Return the chunk table on a device, moved once."""
        table: SliceTable = self.table  # type: ignore[assignment]
        return self._once(("table", device), lambda: table.to(device))  # type: ignore[no-any-return]

    def documents_on(self, device: torch.device) -> Tensor | None:
        """Return the documents on a device, moved once."""
        documents = self.documents
        return None if documents is None else self._once(("documents", device), lambda: documents.to(device))

    def bounds(self, row: int, piece: int, device: torch.device) -> tuple[int, Tensor, Tensor]:
        """Return bounds for varlen attention of a piece: the start of its first document in the row, and the cumulative
        lengths of its documents' queries (in the piece) and keys (from that start on), int32."""

        def make() -> tuple[int, Tensor, Tensor]:
            length = self.tokens // self.slices.pieces
            begin, end = piece * length, (piece + 1) * length
            first, starts = 0, [begin]
            if self.documents is not None:
                ids = self.documents[row, :end]
                steps = (ids[1:] != ids[:-1]).nonzero().flatten() + 1
                first = int(steps[steps <= begin].max()) if bool((steps <= begin).any()) else 0
                starts += steps[steps > begin].tolist()
            queries = torch.tensor([s - begin for s in starts] + [length], dtype=torch.int32, device=device)
            keys = torch.tensor([0] + [s - first for s in starts[1:]] + [end - first], dtype=torch.int32, device=device)
            return first, queries, keys

        return self._once(("bounds", row, piece, device), make)  # type: ignore[no-any-return]


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Return None: a slice's positions jump, so a mask from them would be wrong; ``gather_attention`` knows the row."""
    return


class _Gather(torch.autograd.Function):
    """An autograd all-gather: x [...] to [ranks, ...]; backward sums all ranks' gradients of this rank's x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out.view(-1, *x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        out = g.new_empty(g.shape[1:])
        dist.reduce_scatter_tensor(out, g.flatten(0, 1).contiguous(), group=ctx.group)
        return out, None


def gather_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attend: query [B, H, k * t, d] of this rank's pieces, key and value [B, <= H, k * t, d] -> [B, k * t, H, d].

    Causal, inside documents, over the whole row. Raises NotImplementedError for dropout, capped logits, attention
    sinks, and outside a context-parallel call.
    """
    call: RowSlices | None = rest.get(CALL)
    if call is None:
        raise NotImplementedError("this attention needs a context-parallel call: call the whole model")
    refuse("attention over slices has no {}", dropout=dropout, **rest)
    call.attended += 1
    slices, dtype = call.slices, dtype_of(query.device, value.dtype)
    query, pair = query.to(dtype), torch.stack([key.to(dtype), value.to(dtype)])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if call.native:
        keys, values = (repeated(x, query.shape[1]) for x in pair)
        # By the name that torch's ``context_parallel`` replaces while it is on.
        native = nn.functional.scaled_dot_product_attention
        return native(query.contiguous(), keys, values, is_causal=True, scale=scale).transpose(1, 2), None
    gathered: Any = _Gather.apply(pair, call.group)  # type: ignore[no-untyped-call]
    keys, values = slices.join(list(gathered), 3)
    method = call.methods.get((dtype, sliding_window is None and call.documents is None), "mask")
    return attend(call, query, keys, values, scale, sliding_window, method), None


AttentionInterface.register(GATHER, gather_attention)
AttentionMaskInterface.register(GATHER, no_mask)


def refuse(message: str, **options: Any) -> None:
    """Raise NotImplementedError for options that flash attention lacks, by name: attention with one is another one."""
    for name in ("dropout", "softcap", "s_aux", "position_bias"):
        if isinstance(options.get(name), Tensor) or options.get(name):
            raise NotImplementedError(message.format(name))


def dtype_of(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that attention to values of ``dtype`` runs in: autocast's (it leaves queries in float32)."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def repeated(x_BGTd: Tensor, heads: int) -> Tensor:
    """Return keys or values for each query head: the flag for grouped heads is not in every supported PyTorch."""
    groups = heads // x_BGTd.shape[1]
    return x_BGTd if groups == 1 else x_BGTd.repeat_interleave(groups, 1)


def varlen(*tensors: Any, **settings: Any) -> Tensor:
    """Call `torch.nn.attention.varlen.varlen_attn`, which not every supported PyTorch has."""
    from torch.nn.attention.varlen import varlen_attn

    out: Any = varlen_attn(*tensors, **settings)
    return out  # type: ignore[no-any-return]


def attend(
    call: RowSlices, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None, method: str
) -> Tensor:
    """Attend: query [B, H, k * t, d] of this rank's pieces, keys, values [B, G, T, d] of rows -> [B, k * t, H, d]."""
    own = call.slices.of(call.slices.rank)
    if method == "blocks":
        return attend_in_blocks(query, keys, values, own, scale)
    keys, values = (repeated(x, query.shape[1]) for x in (keys, values))
    attend_piece = {"varlen": _by_documents, "mask": _by_mask}[method]
    outs = [
        attend_piece(call, piece, q, keys, values, scale, window)
        for piece, q in zip(own, query.chunk(len(own), 2), strict=True)
    ]
    return torch.cat(outs, 1)


def _by_documents(
    call: RowSlices, piece: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attend with varlen: query [B, H, t, d] of one piece, keys and values [B, H, T, d] of the row -> [B, t, H, d]."""
    t = query.shape[2]
    end, rows = (piece + 1) * t, []
    for b in range(query.shape[0]):
        first, q_bounds, k_bounds = call.bounds(b, piece, query.device)
        q, k, v = (x.transpose(0, 1) for x in (query[b], keys[b, :, first:end], values[b, :, first:end]))
        rows.append(_varlen(q, k, v, q_bounds, k_bounds, t, end - first, scale, window))
    return torch.stack(rows)


def _by_mask(
    call: RowSlices, piece: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attend with a dense mask; shapes as in ``_by_documents``."""
    t = query.shape[2]
    end = (piece + 1) * t
    back = torch.arange(end - t, end, device=query.device)[:, None] - torch.arange(end, device=query.device)[None]
    mask = back >= 0 if window is None else (back >= 0) & (back < window)
    documents = call.documents_on(query.device)
    if documents is not None:
        same = documents[:, end - t : end, None] == documents[:, None, :end]
        mask = (mask & same)[:, None]
    out = scaled_dot_product_attention(query, keys[:, :, :end], values[:, :, :end], attn_mask=mask, scale=scale)
    return out.transpose(1, 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, *lengths_scale_window: Any) -> Tensor:
    """Run varlen attention: q [t, H, d], k and v [n, H, d], contiguous documents, causal and aligned at their ends."""
    *lengths, scale, window = lengths_scale_window  # bounds of queries and of keys, the longest of both
    tensors, left = (x.contiguous() for x in (q, k, v)), -1 if window is None else window - 1
    return varlen(*tensors, *lengths, scale=scale, window_size=(left, 0))


@lru_cache(maxsize=64)
def choose_methods(device: str, heads: int, key_heads: int, width: int) -> dict[tuple[torch.dtype, bool], str]:
    """Return the method by dtype and simplicity (one document a row, no window); missing entries: the dense mask.

    It runs trials, so do not call it inside a layer: activation checkpointing would record them as the layer's own.
    """
    if device == "cpu":
        return {(d, True): "blocks" for d in (torch.float32, torch.float64, torch.bfloat16)}
    if device != "cuda":
        return {}
    half = (torch.bfloat16, torch.float16)
    return {
        (d, simple): choose_method(device, d, heads, key_heads, width, simple) for d in half for simple in (True, False)
    }


def choose_method(device: str, dtype: torch.dtype, heads: int, key_heads: int, width: int, simple: bool) -> str:
    """Return the first method that agrees with the dense mask for head-tail slices of a small row on two ranks."""
    T, window = 256, None if simple else 48
    documents = None if simple else (torch.arange(T) >= 100).long()[None]

    def run(method: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls = [RowSlices(Slices(2, rank), None, 1, T, documents) for rank in range(2)]
        outs = [attend(call, call.slices.cut(q, 2), k, v, width**-0.5, window, method) for call in calls]
        return calls[0].slices.join(outs)

    for method in ("blocks", "varlen") if simple else ("varlen",):
        shapes = [(1, count, T, width) for count in (heads, key_heads, key_heads)]
        found = fault(partial(run, method), partial(run, "mask"), shapes, torch.device(device), dtype)
        if found is None:
            return method
        logger.warning("attention over slices: %s %s", method, found)
    logger.warning("attention over slices: no fast kernel works here; a dense mask is used (slow, much memory)")
    return "mask"


def fault(
    attention: Callable[..., Tensor], reference: Callable[..., Tensor], shapes: Any, device: torch.device, dtype: Any
) -> str | None:
    """Say what is wrong with an attention, gradients included; None: it agrees with ``reference``.

    ``shapes``: of random queries, keys and values.
    """
    options: Any = {"generator": torch.Generator(device).manual_seed(0), "device": device, "dtype": dtype}
    inputs = [torch.randn(shape, **options).requires_grad_() for shape in shapes]

    def run(attend: Callable[..., Tensor]) -> list[Tensor]:
        out = attend(*inputs)
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            pairs = zip(run(attention), run(reference), strict=True)
            agrees = all(torch.allclose(a.float(), b.float(), atol=0.05, rtol=0.05) for a, b in pairs)
    except (RuntimeError, NotImplementedError, ImportError, TypeError) as error:
        return f"does not work here ({error})"
    return None if agrees else "is not right here"
