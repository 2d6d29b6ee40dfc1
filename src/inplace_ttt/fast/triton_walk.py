"""``walk`` as one Triton kernel: S, and the slow weight, stay in registers from slot to slot.

Every program owns a tile of S [BM, BN] of one row and loops over all tokens of the segment; before a slot's first
token it writes the tile of that slot's weight. Memory traffic per slot is one weight in half precision written, and x
and z read as in any matrix product. The order of all sums is fixed, so results are reproducible.
To unwind, the tile is stored negated: products can only be added to it.

Tiles are loaded and stored by Hopper's copy engine (tensor descriptors) where strides are multiples of 16 bytes, so
that writing a weight overlaps with the next slot's products; else by masked loads and stores.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _tile(
    x, b, m, first, w, tokens, width, x_row, x_slot, x_token,
    BULK: tl.constexpr, BK: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Load x[b, m, first : first + BK, w : w + BW], zero from ``tokens`` and ``width`` on."""
    if BULK:
        tile = x.load([b, m, first, w]).reshape(BK, BW)
    else:
        token, column = first + tl.arange(0, BK), w + tl.arange(0, BW)
        at = x + b.to(tl.int64) * x_row + tl.cast(m, tl.int64) * x_slot
        at = at + token.to(tl.int64)[:, None] * x_token + column[None, :]
        tile = tl.load(at, mask=(token < tokens)[:, None] & (column < width)[None, :], other=0.0)
    return tile


@triton.jit
def _write(
    folds, slow, acc, scale, b, m, d0, f0, D, F, fold_row, fold_slot,
    BULK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store the tile of slot m's weight: ``slow + scale * acc``."""
    value = acc * scale + slow
    if BULK:
        folds.store([b, m, d0, f0], value.to(folds.dtype).reshape(1, 1, BM, BN))
    else:
        d, f = d0 + tl.arange(0, BM), f0 + tl.arange(0, BN)
        mask = (d < D)[:, None] & (f < F)[None, :]
        at = folds + b.to(tl.int64) * fold_row + tl.cast(m, tl.int64) * fold_slot
        at = at + d.to(tl.int64)[:, None] * F + f[None, :]
        tl.store(at, value.to(folds.dtype.element_ty), mask=mask)


@triton.jit
def _walk_kernel(
    S, begin, folds, x, z, weight, update, reset,
    lr, keep, n, products, updates, c, D, F,
    fold_row, fold_slot, x_row, x_slot, x_token, z_row, z_slot, z_token, w_out, update_row, reset_row,
    BEGINS: tl.constexpr, HAS_W: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_RESET: tl.constexpr, DECAYS: tl.constexpr,
    REVERSE: tl.constexpr, UNWIND: tl.constexpr, BULK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tiles_d = tl.cdiv(D, BM)
    tile, b = tl.program_id(0), tl.program_id(1)
    d0, f0 = (tile % tiles_d) * BM, (tile // tiles_d) * BN
    d, f = d0 + tl.arange(0, BM), f0 + tl.arange(0, BN)
    mask = (d < D)[:, None] & (f < F)[None, :]
    offsets = d.to(tl.int64)[:, None] * F + f[None, :]
    offsets += b.to(tl.int64) * D * F

    acc = tl.zeros((BM, BN), tl.float32)
    if BEGINS:
        acc = tl.load(begin + offsets, mask=mask, other=0.0)
    if UNWIND:
        acc = -acc
    slow = 0.0
    if HAS_W:
        if BULK:
            slow = weight.load([d0, f0])
        else:
            slow = tl.load(weight + d.to(tl.int64)[:, None] * w_out + f[None, :], mask=mask, other=0.0)
    for j in range(0, n):
        m = n - 1 - j if REVERSE or UNWIND else j
        acts = m < updates
        if HAS_UPDATE:
            acts = acts & (tl.load(update + b * update_row + m) != 0)
        if HAS_RESET and not REVERSE:
            acc = tl.where(tl.load(reset + b * reset_row + m) != 0, 0.0, acc)
        if not UNWIND:
            scale = tl.where(acts, lr, 0.0) if REVERSE else lr
            _write(folds, slow, acc, scale, b, m, d0, f0, D, F, fold_row, fold_slot, BULK, BM, BN)
        if DECAYS:
            acc = acc * tl.where(acts, keep, 1.0)
        tokens = c
        if not REVERSE:
            tokens = tl.where(acts & (m < products), c, 0)
        for first in range(0, tokens, BK):
            x_tile = _tile(x, b, m, first, d0, c, D, x_row, x_slot, x_token, BULK, BK, BM)
            z_tile = _tile(z, b, m, first, f0, c, F, z_row, z_slot, z_token, BULK, BK, BN)
            acc = tl.dot(tl.trans(x_tile), z_tile, acc)
        if UNWIND:
            _write(folds, slow, acc, -lr, b, m, d0, f0, D, F, fold_row, fold_slot, BULK, BM, BN)
        if HAS_RESET and REVERSE:
            acc = tl.where(tl.load(reset + b * reset_row + m) != 0, 0.0, acc)
    tl.store(S + offsets, -acc if UNWIND else acc, mask=mask)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _has_copy_engine(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def tiles(rows: int, D: int, F: int, multiprocessors: int) -> dict[str, int]:
    """Choose tile sizes: the largest that give every multiprocessor work."""
    for BM, BN, warps in ((128, 256, 8), (128, 128, 8), (64, 128, 4)):
        if rows * triton.cdiv(D, BM) * triton.cdiv(F, BN) >= multiprocessors:
            return {"BM": BM, "BN": BN, "BK": 64, "num_warps": warps, "num_stages": 3}
    return {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}


def _aligned(*tensors: Tensor) -> bool:
    """Tell if the tensors meet the alignment that tensor descriptors require."""
    return all(x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1]) for x in tensors)


def walk(
    S: Tensor,
    begin: Tensor | None,
    folds: Tensor,
    pairs: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    update: Tensor | None,
    reset: Tensor | None,
    lr: float,
    keep: float,
    updates: int,
    *,
    mode: str = "forward",
    **config: Any,
) -> None:
    """Run ``walk.walk``; x and z in half precision, S and ``begin`` float32 and contiguous.

    ``config``: tile sizes in place of the automatic choice.
    """
    B, n, D, F = folds.shape
    x, z = (folds[:, :1, :1, :1], folds[:, :1, :1]) if pairs is None else pairs
    x, z = (y if y.stride(-1) == 1 else y.contiguous() for y in (x, z))
    reverse = mode == "reverse"
    has_w = weight is not None and not reverse
    weight = folds[0, 0] if weight is None else weight if weight.stride(1) == 1 else weight.contiguous()
    c = x.shape[2]
    config = config or tiles(B, D, F, _multiprocessors(S.device))
    bulk = _has_copy_engine(S.device) and pairs is not None and _aligned(x, z, folds, weight)
    flags = [folds[:, :, 0, 0] if y is None else y.to(torch.int8) for y in (update, reset)]
    strides = (*x.stride()[:3], *z.stride()[:3])
    tensors: tuple[Any, ...] = (folds, x, z, weight)
    if bulk:
        BM, BN, BK = (config[name] for name in ("BM", "BN", "BK"))
        blocks = ([1, 1, BM, BN], [1, 1, BK, BM], [1, 1, BK, BN], [BM, BN])
        tensors = tuple(
            TensorDescriptor(y, list(y.shape), list(y.stride()), block)
            for y, block in zip(tensors, blocks, strict=True)
        )
    grid = (triton.cdiv(D, config["BM"]) * triton.cdiv(F, config["BN"]), B)
    with torch.cuda.device_of(S):
        _walk_kernel[grid](
            S, S if begin is None else begin, *tensors, *flags,
            lr, keep, n, 0 if pairs is None else n if reverse else updates, updates, c, D, F,
            *folds.stride()[:2], *strides, weight.stride(0), flags[0].stride(0), flags[1].stride(0),
            BEGINS=begin is not None, HAS_W=has_w, HAS_UPDATE=update is not None, HAS_RESET=reset is not None,
            DECAYS=keep != 1.0, REVERSE=reverse, UNWIND=mode == "unwind", BULK=bulk, **config,
        )  # fmt: skip
