"""The scan in segments against the loop over chunks, which is tested against the reference: values and gradients."""

import pytest
import torch
from method import scan

from inplace_ttt.core import ChunkTable
from inplace_ttt.fast import outer, segments
from inplace_ttt.fast.ranks import Slices, SliceTable

D, F, C = 6, 10, 4


@pytest.fixture(autouse=True)
def nan_in_unset_memory(monkeypatch):
    """Elements that nobody writes are NaN, so that no result can depend on them unseen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def documents(kind, B, T, seed):
    g = torch.Generator().manual_seed(seed)
    if kind == "none":
        return None
    docs = torch.zeros(B, T, dtype=torch.int64)
    if "packed" in kind:
        docs = (torch.rand(B, T, generator=g) < 0.12).long().cumsum(1)
    if "left" in kind:
        docs[0, : T // 3] = -1
    if "holes" in kind:
        docs[torch.rand(B, T, generator=g) < 0.2] = -1
    return docs


def both(table, *, lr=0.7, decay=0.0, state=False, weight=True, bias=False, past=False, later=False, clip=None, seed=0):
    """Outputs and gradients by both backends; gradients are those of a random sum of all that comes out."""
    torch.manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    B, T = table.rows, table.tokens
    tensors = {
        "z": make(B, T, F),
        "v": make(B, table.updates * C, D) if table.updates else None,
        "weight": make(D, F) if weight else None,
        "bias": make(D) if bias else None,
        "state": make(B, D, F) if state else None,
        "past": make(B, table.prefix, F) if past and table.prefix else None,
    }
    if not weight and not state and not table.updates:
        pytest.skip("nothing to compute")
    used = {k: x for k, x in tensors.items() if x is not None}
    found = []
    for backend in ("torch", "segments"):
        out, S = scan(
            tensors["z"], tensors["v"], tensors["weight"], table, lr=lr, decay=decay, bias_D=tensors["bias"],
            state_BDF=tensors["state"], past_BPF=tensors["past"], width=D, backend=backend,
            clip=None if clip is None else torch.tensor(clip, dtype=torch.float64),
        )  # fmt: skip
        torch.manual_seed(seed + 1)
        loss = (out * torch.randn_like(out)).sum()
        if later and S is not None:
            loss = loss + (S * torch.randn_like(S)).sum()
        grads = torch.autograd.grad(loss, list(used.values()), allow_unused=True)
        found.append((out, S, dict(zip(used, grads, strict=True))))
    (out, S, grads), (out2, S2, grads2) = found
    torch.testing.assert_close(out2, out)
    if S is not None:
        torch.testing.assert_close(S2, S)
    for name in used:
        a, b = grads2[name], grads[name]
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(params=[1, 2, 1000], ids=lambda n: f"{n} slots a segment")
def most(request, monkeypatch):
    """Slots that fit in a segment of the two rows that these tests use."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", request.param * 2 * D * F * 8)


@pytest.mark.usefixtures("most")
class TestEqualsTheLoop:
    @pytest.mark.parametrize("T", [1, C - 1, C, C + 1, 2 * C + 3, 7 * C])
    @pytest.mark.parametrize("keep", [False, True])
    @pytest.mark.parametrize("decay", [0.0, 0.2])
    def test_lengths(self, T, keep, decay):
        both(ChunkTable.build(2, T, C, keep_state=keep), decay=decay, later=keep, bias=True)

    @pytest.mark.parametrize("seen", [(0, 0), (2, 6), (7, 3)])
    @pytest.mark.parametrize("T", [1, 2, C, 3 * C + 1])
    def test_state_and_pending_tokens(self, seen, T):
        table = ChunkTable.build(2, T, C, seen=seen, keep_state=True)
        both(table, state=True, past=True, later=True, decay=0.1)

    @pytest.mark.parametrize("kind", ["left", "packed", "packed holes", "left packed"])
    @pytest.mark.parametrize("seed", range(4))
    def test_documents(self, kind, seed):
        docs = documents(kind, 2, 6 * C + 1, seed)
        table = ChunkTable.build(2, 6 * C + 1, C, documents=docs, seen=(3, 1), keep_state=seed % 2 == 0)
        both(table, state=True, past=True, decay=0.3 * (seed % 2), later=seed % 2 == 0, seed=seed, bias=True)

    @pytest.mark.parametrize("kind", ["none", "packed holes"])
    def test_fast_part_alone(self, kind):
        both(ChunkTable.build(2, 5 * C, C, documents=documents(kind, 2, 5 * C, 1)), weight=False)

    @pytest.mark.parametrize("grad", [False, True])
    def test_without_inner_lr(self, grad):
        both(ChunkTable.build(2, 3 * C, C, keep_state=True), lr=0.0, later=grad, decay=0.1)


def test_the_weights_gradient_comes_with_the_scan(monkeypatch):
    """No product of its own: where the scan's total is known, it is what backward returns."""
    calls = []
    real = segments.backward
    monkeypatch.setattr(outer, "segments_backward", lambda *a: calls.append(real(*a)) or calls[-1])
    both(ChunkTable.build(2, 3 * C, C))
    both(ChunkTable.build(2, 3 * C, C), decay=0.1)
    assert calls[0][-1] is not None
    assert calls[1][-1] is None


@pytest.mark.parametrize("kind", ["none", "left", "packed", "left packed holes"])
@pytest.mark.parametrize("clip", [3.0, 40.0, 1e9])
def test_clipped_chunks(kind, clip, most):
    table = ChunkTable.build(2, 5 * C + 3, C, documents=documents(kind, 2, 5 * C + 3, 3), keep_state=True)
    both(table, state=True, later=True, clip=clip, decay=0.1)


def test_clipped_chunk_that_began_before_the_call(most):
    table = ChunkTable.build(2, 3 * C, C, seen=(C - 1, C - 1), keep_state=True)
    both(table, state=True, past=True, later=True, clip=10.0)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["packed", "packed holes", "left packed"])
def test_pieces_of_packed_rows(kind, rank, most):
    """Documents of less than a chunk are in no slot, and the rows' tables are those of a rank's pieces."""
    docs = documents(kind, 2, 16 * C, 0)
    docs[:, 1:] = torch.where(docs[:, 1:] < 0, docs[:, 1:], torch.arange(1, 16 * C) // 3)
    table = SliceTable.build(Slices(2, rank), 2, 16 * C, C, documents=docs, keep=1.0)
    both(table.table, seed=rank)
