"""One call, any pieces, token by token: the same outputs, the same state, also with gradients and after a rollback."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method import feed
from method import state as empty_state

from inplace_ttt.core import reference

D, F, K, C = 5, 8, 5, 4


def tensors(B, T):
    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    return make(B, T, F), make(B, T, D), make(D, F), make(D, K), make(D, D)


def assert_state_equal(state, references):
    for b, ref in enumerate(references):
        S = torch.zeros(D, F, dtype=torch.float64) if state.S is None else state.S[b]
        torch.testing.assert_close(S, ref.S, atol=1e-10, rtol=1e-8)
        n = state.seen[b] % C
        assert n == len(ref.pending)
        for t, (z, u) in enumerate(ref.pending):
            torch.testing.assert_close(state.z[b, t], z)
            torch.testing.assert_close(state.u[b, t], u)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 11), min_size=1, max_size=7), st.sampled_from([0.0, 0.25]))
def test_any_split_with_any_padding_equals_one_pass(seed, sizes, decay):
    """Random calls; in each, every row's tokens lie anywhere among padding. Equals the reference on the real tokens."""
    torch.manual_seed(seed)
    B = 3
    padded = bool(torch.rand(()) < 0.7)
    state, outs, masks, zs, us = empty_state(B, C, decay=decay), [], [], [], []
    weight, kappa, P = tensors(1, 1)[2:]
    for T in sizes:
        z, u, *_ = tensors(B, T)
        mask = torch.rand(B, T) < 0.7 if padded else torch.ones(B, T, dtype=torch.bool)
        documents = None if bool(mask.all()) else torch.where(mask, 0, -1)
        outs.append(feed(state, z, u, weight, kappa, P, documents))
        masks.append(mask), zs.append(z), us.append(u)
    z, u, mask, o = (torch.cat(x, 1) for x in (zs, us, masks, outs))
    want, refs = reference(
        z, u, weight, kappa, P, lr=0.5, chunk_size=C, documents_BT=torch.where(mask, 0, -1), decay=decay
    )
    torch.testing.assert_close(o, want)
    assert_state_equal(state, refs)
    assert state.seen == tuple(mask.sum(1).tolist())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans())
def test_rollback_equals_never_having_read(seed, sizes, padded):
    torch.manual_seed(seed)
    B, total = 2, sum(sizes)
    z, u, weight, kappa, P = tensors(B, total)
    mask = torch.rand(B, total) < 0.8 if padded else torch.ones(B, total, dtype=torch.bool)
    state, at = empty_state(B, C, decay=0.2), 0
    for T in sizes:
        s = slice(at, at + T)
        documents = None if bool(mask[:, s].all()) else torch.where(mask[:, s], 0, -1)
        feed(state, z[:, s], u[:, s], weight, kappa, P, documents)
        at += T
    drop = int(torch.randint(1, total + 1, ()))
    state.rollback(drop)
    left = total - drop
    kw = {"lr": 0.5, "chunk_size": C, "decay": 0.2}
    if left:
        docs = torch.where(mask[:, :left], 0, -1)
        _, refs = reference(z[:, :left], u[:, :left], weight, kappa, P, documents_BT=docs, **kw)
        assert_state_equal(state, refs)
    # And it reads on as if nothing had happened.
    z2, u2 = torch.cat([z[:, :left], z], 1), torch.cat([u[:, :left], u], 1)
    mask2 = torch.cat([mask[:, :left], torch.ones_like(mask)], 1)
    want, _ = reference(z2, u2, weight, kappa, P, documents_BT=torch.where(mask2, 0, -1), **kw)
    torch.testing.assert_close(feed(state, z, u, weight, kappa, P), want[:, left:])


def test_rollback_with_clipping():
    z, u, weight, kappa, P = tensors(1, 3 * C)
    tau = torch.tensor(3.0, dtype=torch.float64)
    state = empty_state(1, C)
    feed(state, z, u, weight, kappa, P, clip=tau)
    state.rollback(C + 1)
    _, refs = reference(z[:, : 2 * C - 1], u[:, : 2 * C - 1], weight, kappa, P, lr=0.5, chunk_size=C, clip=3.0)
    assert_state_equal(state, refs)


def test_rollback_too_far_is_refused_and_changes_nothing():
    z, u, weight, kappa, P = tensors(1, 200)
    state = empty_state(1, C)
    feed(state, z, u, weight, kappa, P)
    before = state.fork()
    with pytest.raises(ValueError, match="cannot take back 150 tokens of row 0"):
        state.rollback(150)
    assert state.seen == before.seen
    torch.testing.assert_close(state.S, before.S)


def test_select_fork_reset():
    z, u, weight, kappa, P = tensors(3, 2 * C + 1)
    state = empty_state(3, C)
    feed(state, z, u, weight, kappa, P)
    fork = state.fork()
    order = torch.tensor([2, 0, 0, 1])
    state.select(order)
    more_z, more_u, *_ = tensors(4, C)
    got = feed(state, more_z, more_u, weight, kappa, P)
    want, refs = reference(
        torch.cat([z[order], more_z], 1), torch.cat([u[order], more_u], 1), weight, kappa, P, lr=0.5, chunk_size=C
    )
    torch.testing.assert_close(got, want[:, -C:])
    assert_state_equal(state, refs)
    assert fork.seen == (9, 9, 9)
    _, refs = reference(z, u, weight, kappa, P, lr=0.5, chunk_size=C)
    assert_state_equal(fork, refs)
    state.reset()
    assert state.seen == (0, 0, 0, 0)
    torch.testing.assert_close(
        feed(state, more_z, more_u, weight, kappa, P),
        reference(more_z, more_u, weight, kappa, P, lr=0.5, chunk_size=C)[0],
    )


@pytest.mark.parametrize("sizes", [(3, 6), (4, 4, 1), (1,) * 9, (7, 2)])
def test_gradients_flow_through_pieces(sizes):
    """State, pending tokens and outputs stay differentiable: pieces give the gradient of one pass."""
    z, u, weight, kappa, P = inputs = [x.requires_grad_() for x in tensors(2, sum(sizes))]
    state, outs, at = empty_state(2, C), [], 0
    for T in sizes:
        outs.append(feed(state, z[:, at : at + T], u[:, at : at + T], weight, kappa, P))
        at += T
    g = torch.randn(2, sum(sizes), D, dtype=torch.float64)
    got = torch.autograd.grad(torch.cat(outs, 1), inputs, g)
    want = torch.autograd.grad(reference(z, u, weight, kappa, P, lr=0.5, chunk_size=C)[0], inputs, g)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_new_document_inside_a_continued_row():
    """A document that begins inside a later call starts from S = 0; rollback may not cross its start."""
    z, u, weight, kappa, P = tensors(2, 3 * C)
    state = empty_state(2, C)
    feed(state, z, u, weight, kappa, P)
    documents = torch.tensor([[0] * 3 + [1] * 6, [0] * 9])
    z2, u2, *_ = tensors(2, 9)
    got = feed(state, z2, u2, weight, kappa, P, documents)
    whole = torch.cat([torch.zeros(2, 3 * C, dtype=torch.int64), documents], 1)
    want, refs = reference(
        torch.cat([z, z2], 1), torch.cat([u, u2], 1), weight, kappa, P, lr=0.5, chunk_size=C, documents_BT=whole
    )
    torch.testing.assert_close(got, want[:, 3 * C :])
    assert_state_equal(state, refs)
    assert state.seen == (6, 21)
    with pytest.raises(ValueError, match="row 0"):
        state.rollback(7)
