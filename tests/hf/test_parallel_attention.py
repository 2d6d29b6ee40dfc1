"""Attention of slices in its three ways. The CUDA kernel's documented meaning is written out here for the CPU."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from inplace_ttt.core.ranks import Slices
from inplace_ttt.hf import parallel_attention
from inplace_ttt.hf.parallel_attention import RowSlices, attend, working_ways

T = 48


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bounds: Tensor,
    k_bounds: Tensor,
    most_q: int,
    most_k: int,
    scale: float,
    window: Any,
) -> Tensor:
    """Documents end to end, each causal from its last query and last key, ``window`` keys at most."""
    outs = []
    for (a, b), (c, d) in zip(pairwise(q_bounds.tolist()), pairwise(k_bounds.tolist()), strict=True):
        assert b - a <= most_q
        assert d - c <= most_k
        back = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)[None]
        seen = (back >= 0) if window is None else (back >= 0) & (back < window)
        logits = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v[c:d]))
    return torch.cat(outs)


LENGTHS = (None, [T], [5, 20, 3, 20], [12, 12, 12, 12], [1] * 10 + [T - 10])
CASES = [("offset", None, None), *(("varlen", window, n) for window in (None, 1, 7) for n in LENGTHS)]


@pytest.mark.parametrize(("way", "window", "lengths"), CASES)
def test_every_way_equals_the_dense_mask(
    way: str, window: int | None, lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_attention, "_varlen", _kernel)
    documents = None
    if lengths is not None:
        documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).expand(2, T)
    slices = Slices(2, 0)
    query, keys, values = (torch.randn(2, 3, T, 8, dtype=torch.float64) for _ in range(3))
    for piece in range(slices.pieces):
        call = RowSlices(slices, None, 2, T, documents)
        q = query.chunk(slices.pieces, 2)[piece]
        expected = attend(call, piece, q, keys, values, 0.3, window, "mask")
        torch.testing.assert_close(attend(call, piece, q, keys, values, 0.3, window, way), expected)


def test_the_mask_is_the_way_on_a_cpu() -> None:
    assert working_ways("cpu", 4, 16) == {}


@pytest.mark.gpu
def test_a_fast_kernel_works_on_a_gpu() -> None:
    ways = working_ways("cuda", 16, 128)
    assert len(ways) == 4
    assert set(ways.values()) <= {"varlen", "offset"}, "only the dense mask works here"
