"""``walk`` as one Triton kernel: S stays in registers from slot to slot.

Every program owns a tile of S [BM, BN] of one row and goes through all tokens of the segment; at a slot's first tokens it
writes the tile of that slot's weight. Memory traffic per slot is one weight in half precision written, and x and z read
as in any matrix product; the order of all sums is fixed, so results are the same from run to run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load(pointers, token, tokens, mask_1W, EVEN_C: tl.constexpr, EVEN_W: tl.constexpr):
    if EVEN_C and EVEN_W:
        return tl.load(pointers)
    return tl.load(pointers, mask=mask_1W & (token < tokens)[:, None], other=0.0)


@triton.jit
def _write(fold, weight, acc, offsets, w_offsets, mask, lr, HAS_W: tl.constexpr, EVEN: tl.constexpr):
    value = acc * lr
    if EVEN:
        if HAS_W:
            value += tl.load(weight + w_offsets).to(tl.float32)
        tl.store(fold + offsets, value.to(fold.dtype.element_ty))
    else:
        if HAS_W:
            value += tl.load(weight + w_offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(fold + offsets, value.to(fold.dtype.element_ty), mask=mask)


@triton.jit
def _walk_kernel(
    S, folds, x, z, weight, update, reset,
    lr, keep, n, products, updates, c, D, F,
    fold_row, x_row, x_slot, x_token, z_row, z_slot, z_token, w_out, update_row, reset_row,
    HAS_W: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_RESET: tl.constexpr, DECAYS: tl.constexpr,
    REVERSE: tl.constexpr, EVEN_C: tl.constexpr, EVEN_D: tl.constexpr, EVEN_F: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = EVEN_D and EVEN_F
    tiles_d = tl.cdiv(D, BM)
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = (tile % tiles_d) * BM + tl.arange(0, BM)
    f = (tile // tiles_d) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    mask = (d < D)[:, None] & (f < F)[None, :]
    offsets = d.to(tl.int64)[:, None] * F + f[None, :]
    w_offsets = d.to(tl.int64)[:, None] * w_out + f[None, :]
    S += b * D * F
    folds += b * fold_row
    x += b * x_row
    z += b * z_row
    weight_size = D.to(tl.int64) * F

    if EVEN:
        acc = tl.load(S + offsets)
    else:
        acc = tl.load(S + offsets, mask=mask, other=0.0)

    blocks = tl.cdiv(c, BK)
    for i in range(0, products * blocks):
        j = i // blocks
        first = (i - j * blocks) * BK
        m = n - 1 - j if REVERSE else j
        acts = m < updates
        if HAS_UPDATE:
            acts = acts & (tl.load(update + b * update_row + m) != 0)
        if first == 0:
            if REVERSE:
                kept = tl.where(acts, lr, 0.0)
                _write(folds + m * weight_size, weight, acc, offsets, w_offsets, mask, kept, False, EVEN)
            else:
                if HAS_RESET:
                    acc = tl.where(tl.load(reset + b * reset_row + m) != 0, 0.0, acc)
                _write(folds + m * weight_size, weight, acc, offsets, w_offsets, mask, lr, HAS_W, EVEN)
            if DECAYS:
                acc = acc * tl.where(acts, keep, 1.0)
        tokens = c
        if HAS_UPDATE and not REVERSE:
            tokens = tl.where(acts, c, 0)
        token = first + k
        x_at = x + m.to(tl.int64) * x_slot + token.to(tl.int64)[:, None] * x_token + d[None, :]
        z_at = z + m.to(tl.int64) * z_slot + token.to(tl.int64)[:, None] * z_token + f[None, :]
        if HAS_UPDATE and not REVERSE:
            x_tile = _load(x_at, token, tokens, (d < D)[None, :], False, False)
        else:
            x_tile = _load(x_at, token, tokens, (d < D)[None, :], EVEN_C, EVEN_D)
        z_tile = _load(z_at, token, c, (f < F)[None, :], EVEN_C, EVEN_F)
        acc = tl.dot(tl.trans(x_tile), z_tile, acc)
        if HAS_RESET and REVERSE:
            if first + BK >= c:
                acc = tl.where(tl.load(reset + b * reset_row + m) != 0, 0.0, acc)

    for m in range(products, n):  # forward only: slots that only see S
        if HAS_RESET:
            acc = tl.where(tl.load(reset + b * reset_row + m) != 0, 0.0, acc)
        _write(folds + m * weight_size, weight, acc, offsets, w_offsets, mask, lr, HAS_W, EVEN)

    if EVEN:
        tl.store(S + offsets, acc)
    else:
        tl.store(S + offsets, acc, mask=mask)


def tiles(rows: int, D: int, F: int, c: int, multiprocessors: int = 132) -> dict[str, int]:
    """Tile sizes: the largest that give every multiprocessor work."""
    BK = 64 if c > 32 else 32
    for BM, BN, warps in ((128, 256, 8), (128, 128, 8), (64, 128, 4)):
        if rows * triton.cdiv(D, BM) * triton.cdiv(F, BN) >= multiprocessors:
            return {"BM": BM, "BN": BN, "BK": BK, "num_warps": warps, "num_stages": 3}
    return {"BM": 64, "BN": 64, "BK": BK, "num_warps": 4, "num_stages": 3}


def walk(
    S: Tensor,
    folds: Tensor,
    pairs: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    update: Tensor | None,
    reset: Tensor | None,
    lr: float,
    keep: float,
    updates: int,
    *,
    reverse: bool = False,
    **config: Any,
) -> None:
    """As ``walk.walk``; x and z half precision, S float32 and contiguous. ``config``: tile sizes instead of our choice."""
    B, n, D, F = folds.shape
    x, z = (folds[:, :, :1], folds[:, :, :1]) if pairs is None else pairs
    x, z = (y if y.stride(-1) == 1 else y.contiguous() for y in (x, z))
    weight = folds if weight is None else weight if weight.stride(1) == 1 else weight.contiguous()
    has_w = weight is not folds
    c = x.shape[2]
    products = n if reverse else updates
    config = config or tiles(B, D, F, c)
    flags = [folds if y is None else y.to(torch.int8) for y in (update, reset)]
    grid = (triton.cdiv(D, config["BM"]) * triton.cdiv(F, config["BN"]), B)
    with torch.cuda.device_of(S):
        _walk_kernel[grid](
            S, folds, x, z, weight, *flags,
            lr, keep, n, products, updates, c, D, F,
            folds.stride(0), *x.stride()[:3], *z.stride()[:3], weight.stride(-2), flags[0].stride(0), flags[1].stride(0),
            HAS_W=has_w and not reverse, HAS_UPDATE=update is not None, HAS_RESET=reset is not None, DECAYS=keep != 1.0,
            REVERSE=reverse, EVEN_C=c % config["BK"] == 0, EVEN_D=D % config["BM"] == 0, EVEN_F=F % config["BN"] == 0,
            **config,
        )  # fmt: skip
