"""The scan and the target against the reference: values and every gradient, in float64."""

import pytest
import torch
from method import scan, target

from inplace_ttt.core import ChunkTable, reference

D, F, K, C = 6, 10, 5, 4
ATOL = 1e-10


def tensors(B, T, dtype=torch.float64, proj=True):
    def make(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    return make(B, T, F), make(B, T, D), make(D, F), make(D, K), make(D, D) if proj else None


def fast(z, u, weight, kappa, proj, *, documents=None, lookahead=2, keep=False, **kw):
    table = ChunkTable.build(z.shape[0], z.shape[1], C, documents=documents, keep_state=keep)
    v = target(u, kappa, proj, table, lookahead=lookahead)
    return scan(z, v, weight, table, **kw)


def assert_same_with_gradients(inputs, run_fast, run_reference):
    used = [x for x in inputs if x is not None]
    got, want = run_fast(), run_reference()
    assert len(got) == len(want)
    loss = [(torch.randn_like(b) if b.is_floating_point() else None) for b in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=ATOL, rtol=1e-9)
    grads = [
        torch.autograd.grad(sum((o * w).sum() for o, w in zip(out, loss, strict=True)), used, allow_unused=True)
        for out in (got, want)
    ]
    for a, b in zip(*grads, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(a if a is not None else zero, b if b is not None else zero, atol=ATOL, rtol=1e-9)
    return grads[0]


def random_documents(B, T, kind, seed=0):
    g = torch.Generator().manual_seed(seed)
    if kind == "none":
        return None
    docs = torch.zeros(B, T, dtype=torch.int64)
    if "packed" in kind:
        docs = (torch.rand(B, T, generator=g) < 0.15).long().cumsum(1)
    for b in range(B):
        n = int(torch.randint(0, T // 2 + 1, (), generator=g))
        if "left" in kind:
            docs[b, :n] = -1
        if "right" in kind and n:
            docs[b, T - n :] = -1
        if "holes" in kind:
            docs[b, torch.rand(T, generator=g) < 0.3] = -1
    return docs


@pytest.mark.parametrize("T", [1, C - 1, C, C + 1, 2 * C + 3, 5 * C])
@pytest.mark.parametrize("proj", [True, False])
def test_plain(T, proj):
    z, u, weight, kappa, P = inputs = tensors(3, T, proj=proj)
    assert_same_with_gradients(
        inputs,
        lambda: fast(z, u, weight, kappa, P, lr=0.7)[:1],
        lambda: reference(z, u, weight, kappa, P, lr=0.7, chunk_size=C)[:1],
    )


@pytest.mark.parametrize("kind", ["left", "right", "packed", "holes", "left packed right", "packed holes"])
@pytest.mark.parametrize("seed", range(4))
def test_documents_and_padding(kind, seed):
    B, T = 4, 5 * C + 2
    torch.manual_seed(seed)
    documents = random_documents(B, T, kind, seed)
    z, u, weight, kappa, P = inputs = tensors(B, T)

    def slow():
        o, states = reference(z, u, weight, kappa, P, lr=0.7, chunk_size=C, documents_BT=documents, decay=0.2)
        return o, torch.stack([s.S for s in states])

    assert_same_with_gradients(
        inputs, lambda: fast(z, u, weight, kappa, P, documents=documents, lr=0.7, decay=0.2, keep=True), slow
    )


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("clip", [None, 5.0, 1e9])
def test_decay_clip_state(decay, clip):
    z, u, weight, kappa, P = inputs = tensors(2, 4 * C)
    tau = None if clip is None else torch.tensor(clip, dtype=torch.float64)

    def slow():
        o, states = reference(z, u, weight, kappa, P, lr=0.5, chunk_size=C, decay=decay, clip=clip)
        return o, torch.stack([s.S for s in states])

    assert_same_with_gradients(
        inputs, lambda: fast(z, u, weight, kappa, P, lr=0.5, decay=decay, clip=tau, keep=True), slow
    )


def test_initial_state_has_a_gradient():
    from inplace_ttt.core import ReferenceState

    z, u, weight, kappa, P = inputs = tensors(2, 2 * C + 1)
    S = torch.randn(2, D, F, dtype=torch.float64, requires_grad=True)
    table = ChunkTable.build(2, 2 * C + 1, C, seen=(8, 8), keep_state=True)

    def slow():
        o, states = reference(
            z, u, weight, kappa, P, lr=0.5, chunk_size=C, states=[ReferenceState(S[b]) for b in range(2)], decay=0.1
        )
        return o, torch.stack([s.S for s in states])

    assert_same_with_gradients(
        (*inputs, S),
        lambda: scan(z, target(u, kappa, P, table), weight, table, lr=0.5, state_BDF=S, decay=0.1),
        slow,
    )


@pytest.mark.parametrize(("kernel", "lookahead"), [(1, 0), (3, 0), (3, 2), (5, 4), (7, 3)])
def test_kernel_and_lookahead(kernel, lookahead):
    z, u, weight, _, P = tensors(2, 3 * C)
    kappa = torch.randn(D, kernel, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(
        (z, u, weight, kappa, P),
        lambda: fast(z, u, weight, kappa, P, lr=0.7, lookahead=lookahead)[:1],
        lambda: reference(z, u, weight, kappa, P, lr=0.7, chunk_size=C, lookahead=lookahead)[:1],
    )


@pytest.mark.parametrize("shift", [0, 1])
def test_fixed_targets_are_one_hot_taps(shift):
    z, u, weight, _, P = inputs = tensors(2, 3 * C)
    one_hot = torch.zeros(D, K, dtype=torch.float64)
    one_hot[:, K - 1 - 2 + shift] = 1

    def run():
        table = ChunkTable.build(2, 3 * C, C)
        return scan(z, target(u, None, P, table, shift=shift), weight, table, lr=0.7)[:1]

    assert_same_with_gradients(inputs, run, lambda: reference(z, u, weight, one_hot, P, lr=0.7, chunk_size=C)[:1])


def test_without_weight_gives_the_fast_part():
    z, u, weight, kappa, P = tensors(2, 3 * C)
    table = ChunkTable.build(2, 3 * C, C)
    v = target(u, kappa, P, table)
    bias = torch.randn(D, dtype=torch.float64, requires_grad=True)
    whole, _ = scan(z, v, weight, table, lr=0.7, bias_D=bias)
    part, _ = scan(z, v, None, table, lr=0.7, width=D)
    torch.testing.assert_close(part + torch.nn.functional.linear(z, weight, bias), whole)
    g = torch.randn_like(whole)
    (dbias,) = torch.autograd.grad(whole, bias, g)
    torch.testing.assert_close(dbias, g.sum((0, 1)))


@pytest.mark.parametrize("kind", ["none", "left packed"])
def test_operator_passes_opcheck(kind):
    z, u, weight, kappa, P = tensors(2, 3 * C)
    documents = random_documents(2, 3 * C, kind, 1)
    table = ChunkTable.build(2, 3 * C, C, documents=documents, keep_state=True)
    v = target(u, kappa, P, table).detach().requires_grad_()
    tensors_ = (z, v, weight, None, None, None, table.index, table.update, table.reset, table.outside_slots)
    for backend, keep in (("torch", 0.9), ("segments", 0.9), ("segments", 1.0)):
        numbers = (0.5, keep, C, table.prefix, table.steps, table.updates, backend, D, True)
        torch.library.opcheck(torch.ops.inplace_ttt.scan.default, (*tensors_, *numbers))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_state(dtype):
    """A state in half precision would lose most of these updates; ours stays near the float64 result."""
    steps = 64
    z, v = torch.randn(1, steps * C, F).to(dtype), (0.02 * torch.randn(1, steps * C, D)).to(dtype)
    table = ChunkTable.build(1, steps * C, C, keep_state=True)
    start = 10 * torch.randn(1, D, F)
    _, S = scan(z, v, torch.randn(D, F).to(dtype), table, lr=0.1, state_BDF=start)
    exact = start.double() + torch.einsum("btd,btf->bdf", v.double(), z.double())
    lossy = start.to(dtype)
    for m in range(steps):
        span = slice(m * C, (m + 1) * C)
        lossy = lossy + torch.einsum("btd,btf->bdf", v[:, span], z[:, span])
    assert S.dtype == torch.float32
    scale = (exact - start).norm()
    assert (S - exact).norm() < 1e-3 * scale
    assert (lossy - exact).norm() > 0.05 * scale


def test_unknown_backend_and_missing_past_are_refused():
    z, u, weight, kappa, P = tensors(1, C)
    with pytest.raises(ValueError, match="unknown scan backend 'fast'"):
        scan(z, None, weight, ChunkTable.build(1, C, C), lr=1.0, backend="fast")
    table = ChunkTable.build(1, C, C, seen=(2,))
    with pytest.raises(ValueError, match="2 pending tokens are missing"):
        target(u, kappa, P, table)
