"""Attention of slices in its three methods. The CUDA kernel's documented meaning is written out here for the CPU."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from inplace_ttt.fast.ranks import Slices
from inplace_ttt.hf import parallel_attention
from inplace_ttt.hf.parallel_attention import RowSlices, attend, choose_method, choose_methods

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
CASES = [("blocks", None, None), *(("varlen", window, n) for window in (None, 1, 7) for n in LENGTHS)]


@pytest.mark.parametrize("slices", [Slices(2, 0), Slices(2, 1), Slices(4, 2, head_tail=False)], ids=str)
@pytest.mark.parametrize(("method", "window", "lengths"), CASES)
def test_every_way_equals_the_dense_mask_gradients_too(
    method: str, window: int | None, lengths: list[int] | None, slices: Slices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_attention, "_varlen", _kernel)
    documents = None
    if lengths is not None:
        documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).expand(2, T)
    query, keys, values = (torch.randn(2, heads, T, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    found = []
    for chosen in (method, "mask"):
        call = RowSlices(slices, None, 2, T, documents)
        out = attend(call, slices.cut(query, 2), keys, values, 0.3, window, chosen)
        found.append([out, *torch.autograd.grad(out.pow(3).sum(), (query, keys, values))])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact)


def test_blocks_far_apart_in_size_merge_without_overflow() -> None:
    slices, (query, keys, values) = Slices(2, 1), (torch.randn(1, 2, T, 8, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        keys[:, :, : T // 4] *= 1e4
    call = RowSlices(slices, None, 1, T, None)
    found = []
    for method in ("blocks", "mask"):
        out = attend(call, slices.cut(query, 2), keys, values, 1.0, None, method)
        found.append([out, *torch.autograd.grad(out.square().sum(), (query, keys, values))])
    for ours, exact in zip(*found, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-3)


def test_a_cpu_goes_by_blocks_where_it_can() -> None:
    methods = choose_methods("cpu", 4, 2, 16)
    assert {method for (_, simple), method in methods.items() if simple} == {"blocks"}
    assert not any(not simple for _, simple in methods)


@pytest.mark.parametrize("simple", [True, False])
def test_a_method_is_chosen_when_it_agrees_with_the_dense_mask(simple: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = {True: "blocks", False: "varlen"}[simple]
    monkeypatch.setattr(parallel_attention, "_varlen", _kernel)
    assert choose_method("cpu", torch.bfloat16, 4, 2, 16, simple) == right
    wrong = lambda *tensors: _kernel(*tensors[:-1], tensors[-1] and tensors[-1] + 1)  # noqa: E731
    monkeypatch.setattr(parallel_attention, "_varlen", wrong)
    assert choose_method("cpu", torch.bfloat16, 4, 2, 16, simple) == ("blocks" if simple else "mask")
    monkeypatch.undo()
    monkeypatch.setattr(parallel_attention, "attend_in_blocks", lambda query, *_: query.transpose(1, 2))
    assert choose_method("cpu", torch.bfloat16, 4, 2, 16, simple) == "mask", "no varlen on the CPU"


@pytest.mark.gpu
@pytest.mark.parametrize("key_heads", [16, 8])
def test_fast_kernels_work_on_a_gpu(key_heads: int) -> None:
    methods = choose_methods("cuda", 16, key_heads, 128)
    assert {simple: method for (_, simple), method in methods.items()} == {True: "blocks", False: "varlen"}
