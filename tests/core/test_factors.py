"""S held as factors: the reference's outputs and state in every form, at less memory and at a known error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method import feed
from method import state as empty_state
from torch.utils._python_dispatch import TorchDispatchMode

from inplace_ttt.core import FastWeights as Held
from inplace_ttt.core import reference
from inplace_ttt.fast import factors as fc

D, F, K, C = 24, 40, 5, 4
LIMIT = D * F / (D + F)
"""15 pairs: "auto" holds three chunks as pairs and is dense from the fourth on."""
ALL = 10**6
"""A rank that nothing here exceeds: pairs for good."""
forms = pytest.mark.parametrize("form", ["auto", ALL, "dense"])


def tensors(B, T, dtype=torch.float64):
    def make(*shape):
        return torch.randn(*shape, dtype=dtype)

    return make(B, T, F), make(B, T, D)


def parameters(dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype) for shape in ((D, F), (D, K), (D, D))]


def assert_state_equal(state, references, **tolerance):
    """``references``: one state per row."""
    S = state.dense()
    for b, ref in enumerate(references):
        got = torch.zeros(D, F, dtype=torch.float64) if S is None else S[b]
        torch.testing.assert_close(got, ref.S, **(tolerance or {"atol": 1e-9, "rtol": 1e-8}))
        n = state.seen[b] % C
        assert n == len(ref.pending)
        for t, (z, u) in enumerate(ref.pending):
            torch.testing.assert_close(state.z[b, t], z)
            torch.testing.assert_close(state.u[b, t], u)


def random_calls(B, sizes, padded, packed):
    """Document numbers of each call, and of all tokens as one text; padding is -1."""
    calls, whole, base = [], [], torch.zeros(B, 1, dtype=torch.int64)
    for T in sizes:
        real = torch.rand(B, T) < (0.7 if padded else 2.0)
        ids = (torch.rand(B, T) < (0.12 if packed else -1.0)).long().cumsum(1)
        for b in range(B):
            if real[b].any():  # a call's first token goes on with the document of the call before
                ids[b] -= ids[b, real[b]][0].item()
        whole.append(torch.where(real, ids + base, -1))
        for b in range(B):
            if real[b].any():
                base[b] += ids[b, real[b]][-1]
        calls.append(None if not padded and not packed else torch.where(real, ids, -1))
    return calls, torch.cat(whole, 1)


def read(state, z, u, weights, calls, sizes, clip=None):
    out, at = [], 0
    for documents, T in zip(calls, sizes, strict=True):
        out.append(feed(state, z[:, at : at + T], u[:, at : at + T], *weights, documents, clip=clip))
        at += T
    return torch.cat(out, 1)


pieces = st.lists(st.integers(1, 11), min_size=1, max_size=6)
CLIP = 40.0
"""About the length of a chunk's update here: some are clipped, some are not."""


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10**6),
    pieces,
    st.sampled_from([0.0, 0.25]),
    st.sampled_from([None, CLIP]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["auto", ALL]),
)
def test_any_split_equals_the_reference(seed, sizes, decay, clip, padded, packed, form):
    torch.manual_seed(seed)
    state, weights, (z, u) = empty_state(3, C, decay=decay, form=form), parameters(), tensors(3, sum(sizes))
    calls, whole = random_calls(3, sizes, padded, packed)
    tau = None if clip is None else torch.tensor(clip, dtype=torch.float64)
    got = read(state, z, u, weights, calls, sizes, tau)
    want, refs = reference(z, u, *weights, lr=0.5, chunk_size=C, documents_BT=whole, decay=decay, clip=clip)
    torch.testing.assert_close(got, want)
    assert_state_equal(state, refs)
    if form == ALL:
        assert state.S is None
    assert state.left is None or state.left.shape[1] == state.right.shape[1] == max(state.count)
    assert state.truncation == (0.0,) * 3


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), pieces, st.booleans(), st.booleans(), st.sampled_from(["auto", ALL]))
def test_rollback_equals_never_having_read(seed, sizes, padded, clipped, form):
    torch.manual_seed(seed)
    B, total, clip = 2, sum(sizes), CLIP if clipped else None
    tau = torch.tensor(clip, dtype=torch.float64) if clipped else None
    state, weights, (z, u) = empty_state(B, C, decay=0.2, form=form), parameters(), tensors(B, total)
    calls, whole = random_calls(B, sizes, padded, False)
    read(state, z, u, weights, calls, sizes, tau)
    drop = int(torch.randint(1, total + 1, ()))
    state.rollback(drop)
    left = total - drop
    keywords = {"lr": 0.5, "chunk_size": C, "decay": 0.2, "clip": clip}
    if left:
        _, refs = reference(z[:, :left], u[:, :left], *weights, documents_BT=whole[:, :left], **keywords)
        assert_state_equal(state, refs)
        assert form == "auto" or state.count == tuple(n // C * C for n in state.seen)
        assert state.left is None or state.left.shape[1] == state.right.shape[1] == max(state.count)
    # And it reads on as if nothing had happened.
    again = torch.cat([whole[:, :left], torch.zeros_like(whole)], 1)
    want, refs = reference(
        torch.cat([z[:, :left], z], 1), torch.cat([u[:, :left], u], 1), *weights, documents_BT=again, **keywords
    )
    torch.testing.assert_close(feed(state, z, u, *weights, clip=tau), want[:, left:])
    assert_state_equal(state, refs)


def test_rollback_too_far_is_refused_and_changes_nothing():
    state, weights, (z, u) = empty_state(1, C, form=ALL), parameters(), tensors(1, 200)
    feed(state, z, u, *weights)
    before, S = dict(state.__dict__), state.dense()
    with pytest.raises(ValueError, match="cannot take back 150 tokens of row 0"):
        state.rollback(150)
    assert all(state.__dict__[name] is value for name, value in before.items())
    torch.testing.assert_close(state.dense(), S)


def test_auto_holds_pairs_while_they_are_fewer_then_dense_until_reset():
    state, weights, (z, u) = empty_state(2, C, form="auto"), parameters(), tensors(2, 5 * C)
    for _ in range(2):
        for n in range(1, 5):
            feed(state, z[:, :C], u[:, :C], *weights)
            assert (state.S is None) == (n * C < LIMIT)
            assert state.count == ((n * C,) * 2 if n * C < LIMIT else (0, 0))
        state.rollback(3 * C)
        assert state.S is not None
        state.reset()
        assert (state.form, state.S, state.left, state.count) == ("auto", None, None, (0, 0))
    feed(state, z, u, *weights)
    assert state.S is not None
    assert state.left is None


def test_a_short_history_takes_less_memory_than_dense():
    sizes = {}
    for form in ("dense", "auto", ALL):
        state, weights, (z, u) = empty_state(1, C, form=form), parameters(torch.float32), tensors(1, C, torch.float32)
        feed(state, z, u, *weights)
        sizes[form] = state.nbytes
    assert sizes["dense"] - sizes["auto"] == 4 * (D * F - C * (D + F))
    assert sizes[ALL] == sizes["auto"]


class Shapes(TorchDispatchMode):
    """Collects the shape of every tensor that an operator returns; the scan, which hides its own, makes dense ones."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen += [torch.Size((D, F))] * (func is torch.ops.inplace_ttt.scan.default)
        self.seen += [x.shape for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        return out


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("form", "decay"), [("auto", 0.0), (ALL, 0.1), (2, 0.1), ("dense", 0.0)])
def test_decoding_makes_no_tensor_of_the_size_of_the_state(form, decay, rows):
    """Steps that add to a chunk, steps that complete one, a rollback over them; the slow weight is left out."""
    state, (z, u), (_, kappa, P) = empty_state(rows, C, decay=decay, form=form), tensors(rows, 3 * C), parameters()
    clip = torch.tensor(CLIP, dtype=torch.float64)
    with Shapes() as shapes:
        for t in range(3 * C):
            out = feed(state, z[:, t : t + 1], u[:, t : t + 1], None, kappa, P, clip=clip)
            assert bool(out.any()) == (t >= C)
        state.rollback(C + 1)
    assert any(set(shape[-2:]) == {D, F} for shape in shapes.seen) == (form == "dense")
    assert form == "dense" or len(shapes.seen) > 100


@forms
def test_select_fork_and_stack(form):
    """Rows at different places and with different numbers of pairs: reordered, repeated, copied, joined, taken out."""
    weights, lengths = parameters(), (3 * C + 1, 2, C + 3)
    texts = [tensors(1, n) for n in lengths]
    parts = [empty_state(1, C, decay=0.1, form=form) for _ in texts]
    for part, (z, u) in zip(parts, texts, strict=True):
        feed(part, z, u, *weights)
    joined = Held.stack(parts)
    assert joined.form == form
    assert joined.seen == lengths
    if form == ALL:
        assert joined.count == (3 * C, 0, C)
    order = [2, 0, 0, 1]
    picked = joined.fork()
    picked.select(torch.tensor(order))
    again, shared = tensors(4, 2 * C + 1), parts[0].fork()
    keywords = {"lr": 0.5, "chunk_size": C, "decay": 0.1}

    def text(b, row):
        return [torch.cat([a, x[row : row + 1]], 1) for a, x in zip(texts[b], again, strict=True)]

    got = feed(picked, *again, *weights)
    for row, b in enumerate(order):
        want, refs = reference(*text(b, row), *weights, **keywords)
        torch.testing.assert_close(got[row : row + 1], want[:, lengths[b] :])
        one = picked.fork()
        one.select([row])
        assert_state_equal(one, refs)
        assert one.rows == 1
        assert (
            getattr(one, "left", None) is None or one.left.shape[1] == one.count[0] == (lengths[b] + 2 * C + 1) // C * C
        )
    # What was copied from stays as it was, and a row taken out goes on like the state it came from.
    assert joined.seen == lengths
    for b, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        one = joined.fork()
        one.select([b])
        for state in (one, part):
            state.rollback(min(length, C + 1))
        z, u = tensors(1, 3 * C)
        torch.testing.assert_close(feed(one, z, u, *weights), feed(part, z, u, *weights))
        torch.testing.assert_close(one.dense(), part.dense())
        assert one.nbytes == part.nbytes
    assert shared.seen == lengths[:1]
    _, refs = reference(*texts[0], *weights, **keywords)
    assert_state_equal(shared, refs)


def test_stack_of_different_forms():
    """Factors stay factors of the form that loses least; next to a dense state all are dense; zero states fit in."""
    weights, C2 = parameters(), 2 * C

    def made(form, n):
        state = empty_state(1, C, form=form)
        if n:
            feed(state, *tensors(1, n), *weights)
        return state

    for parts, form, dense in (
        ([made("auto", C), made("auto", 0), made("auto", C2)], "auto", False),
        ([made("auto", C), made("auto", 8 * C)], "auto", True),
        ([made(50, C2), made(60, C)], 60, False),
        ([made(50, C2), made("auto", 0)], "auto", False),
        ([made("dense", 0), made("auto", C), made(50, C2)], "dense", True),
        ([made("dense", 0), made("auto", 0)], "dense", None),
        ([made(50, 0), made(50, 2)], 50, None),
    ):
        joined = Held.stack(parts)
        assert joined.form == form
        assert (joined.S is not None, getattr(joined, "left", None) is not None) == {
            True: (1, 0),
            False: (0, 1),
            None: (0, 0),
        }[dense]
        for b, part in enumerate(parts):
            want = torch.zeros(D, F, dtype=torch.float64) if part.dense() is None else part.dense()[0]
            if dense is not None:
                torch.testing.assert_close(joined.dense()[b], want)
        z, u = tensors(len(parts), C + 1)
        got = feed(joined, z, u, *weights)
        for b, part in enumerate(parts):
            torch.testing.assert_close(got[b : b + 1], feed(part, z[b : b + 1], u[b : b + 1], *weights))


def test_a_stacked_row_takes_back_what_it_alone_would():
    """Different histories: kept chunks, none at all, padding inside, other numbers of positions."""
    weights, parts = parameters(), []
    for n, mask in ((150, None), (0, None), (3, None), (11, [1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 0])):
        state = empty_state(1, C, decay=0.1, form=ALL)
        if n:
            feed(state, *tensors(1, n), *weights, None if mask is None else torch.tensor([mask]) - 1)
        parts.append(state)
    more = tensors(4, C + 1)
    joined = Held.stack(parts)
    feed(joined, *more, *weights)
    for b, part in enumerate(parts):
        feed(part, *(x[b : b + 1] for x in more), *weights)
    for state in (joined, *parts):
        state.rollback(C + 2 if state is joined or state.fed >= C + 2 else C + 1)
    more = tensors(4, C + 1)
    got = feed(joined, *more, *weights)
    for b, part in enumerate(parts):
        torch.testing.assert_close(got[b : b + 1], feed(part, *(x[b : b + 1] for x in more), *weights))
        assert joined.seen[b] == part.seen[0]


def test_stack_refuses_states_that_read_differently():
    with pytest.raises(ValueError, match=r"need one (chunk size|rule)"):
        Held.stack([empty_state(1, 4), empty_state(1, 8)])
    with pytest.raises(ValueError, match=r"need one (chunk size|rule)"):
        Held.stack([empty_state(1, 4), empty_state(1, 4, decay=0.1)])
    with pytest.raises(ValueError, match=r"need one (chunk size|rule)"):
        Held.stack([])


@pytest.mark.parametrize("form", ["pairs", 0, -1, 2.0, True, None])
def test_unknown_forms_are_refused(form):
    with pytest.raises(ValueError, match="form must be"):
        empty_state(1, C, form=form)


# -- a rank that is exceeded --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, D, F, 100])
@pytest.mark.parametrize("N", [2, 17, 60])
def test_truncate_is_the_best_of_its_rank(rank, N):
    left, right = (torch.randn(2, N, W, dtype=torch.float64) for W in (D, F))
    left[1] = 0
    S = fc.dense(left, right)
    few_left, few_right, error = fc.truncate(left, right, rank)
    assert few_left.shape[1] == few_right.shape[1] == min(rank, N, D)
    U, values, Vh = torch.linalg.svd(S, full_matrices=False)
    best = (U[..., :rank] * values[:, None, :rank]) @ Vh[:, :rank]
    got = fc.dense(few_left, few_right)
    torch.testing.assert_close(got, best)
    measured = torch.linalg.vector_norm(S - got, dim=(1, 2))[0] / torch.linalg.vector_norm(S[0])
    torch.testing.assert_close(error, torch.stack([measured, torch.zeros_like(measured)]), atol=1e-7, rtol=1e-9)


def low_rank(rank, T, B=2):
    """Inputs whose S has at most this rank, however many tokens there are."""
    z, u = tensors(B, T)
    return z[..., :rank] @ torch.randn(rank, F, dtype=torch.float64), u


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), pieces, st.booleans(), st.booleans(), st.sampled_from([3, 6]))
def test_a_rank_that_suffices_is_exact(seed, sizes, padded, packed, rank):
    """Also after many cuts, and after a rollback over them, which subtracts."""
    torch.manual_seed(seed)
    sizes = [*sizes, 9]
    state, weights, (z, u) = empty_state(2, C, decay=0.1, form=rank), parameters(), low_rank(rank, sum(sizes))
    calls, whole = random_calls(2, sizes, padded, packed)
    got = read(state, z, u, weights, calls, sizes)
    keywords = {"lr": 0.5, "chunk_size": C, "decay": 0.1}
    want, refs = reference(z, u, *weights, documents_BT=whole, **keywords)
    torch.testing.assert_close(got, want)
    assert_state_equal(state, refs)
    assert max(state.count) <= 2 * rank
    assert state.left is None or state.left.shape[1] <= 2 * rank
    assert max(state.truncation) < 1e-7
    if packed:
        return
    state.rollback(C + 3)
    left = z.shape[1] - C - 3
    if left > 0:
        _, refs = reference(z[:, :left], u[:, :left], *weights, documents_BT=whole[:, :left], **keywords)
        assert_state_equal(state, refs)
    assert max(state.count) <= 2 * rank


def test_the_error_is_what_it_says():
    """Exact after one cut, through decay, later pairs, selection and rollback; near it after many."""
    weights, (z, u) = parameters(), tensors(3, 40 * C)
    state, exact = (empty_state(3, C, decay=0.1, form=form) for form in (6, ALL))

    def measured():
        size = torch.linalg.vector_norm(exact.dense(), dim=(1, 2))
        return (torch.linalg.vector_norm(exact.dense() - state.dense(), dim=(1, 2)) / size).tolist()

    chunks = list(zip(z.split(C, 1), u.split(C, 1), strict=True))
    for m, chunk in enumerate(chunks[:4]):
        for one in (state, exact):
            feed(one, *chunk, *weights)
        assert state.count == ((m + 1) * C if (m + 1) * C <= 12 else 6,) * 3
        assert state.truncation == pytest.approx(measured(), abs=1e-7, rel=1e-9)
    assert min(state.truncation) > 0.05
    for one in (state, exact):
        one.select([1, 0, 0])
    assert state.truncation == pytest.approx(measured(), rel=1e-9)
    for one in (state, exact):
        one.rollback(1)
    assert state.truncation == pytest.approx(measured(), rel=0.2)
    for chunk in chunks[4:]:
        for one in (state, exact):
            feed(one, *chunk, *weights)
    assert state.truncation == pytest.approx(measured(), rel=0.2)
    state.reset()
    assert state.truncation == (0.0,) * 3
    assert state.form == 6


def test_what_a_row_loses_does_not_depend_on_its_neighbours():
    """Cut when its own factors are too many, alone or in a batch, in one call or in many."""
    weights, (z, u) = parameters(), tensors(2, 12 * C)
    joined = empty_state(2, C, form=5)
    pad = torch.zeros(2, 12 * C, dtype=torch.int64)
    pad[1, : C + 1] = -1
    feed(joined, z, u, *weights, pad)
    for b, start in ((0, 0), (1, C + 1)):
        alone = empty_state(1, C, form=5)
        for t in range(start, 12 * C, 7):
            feed(alone, z[b : b + 1, t : t + 7], u[b : b + 1, t : t + 7], *weights)
        one = joined.fork()
        one.select([b])
        assert one.count == alone.count
        torch.testing.assert_close(one.dense(), alone.dense())
        assert one.truncation == pytest.approx(alone.truncation)
        assert one.nbytes == alone.nbytes


def test_pairs_newer_than_the_last_cut_come_out_as_they_went_in():
    weights, (z, u) = parameters(), tensors(1, 7 * C)
    state, held = empty_state(1, C, form=8), []
    for chunk in zip(z.split(C, 1), u.split(C, 1), strict=True):
        feed(state, *chunk, *weights)
        held.append((state.count[0], state.raw[0], state.dense()))
    assert [(n, raw) for n, raw, _ in held] == [(4, 4), (8, 8), (12, 12), (16, 16), (8, 0), (12, 4), (16, 8)]
    for n in (5, 4):
        state.rollback(C)
        assert torch.equal(state.dense(), held[n][2])
    state.rollback(C)
    assert state.count == (8 + C,)
    torch.testing.assert_close(state.dense() - held[3][2], held[4][2] - held[3][2] - update(z, u, weights, 4))


def update(z, u, weights, m):
    """The m-th chunk's own update."""
    state = empty_state(1, C)
    feed(state, z[:, m * C : (m + 1) * C], u[:, m * C : (m + 1) * C], *weights)
    return state.S


# -- precision and gradients --------------------------------------------------------------------------------------


def test_half_precision_is_no_worse_than_dense():
    """z stays in bfloat16 as it came, v with decay and clipping in float32."""
    weights, (z, u) = parameters(torch.bfloat16), tensors(2, 4 * C, torch.bfloat16)
    sizes, clip = [C] * 3 + [1] * (C - 1), torch.tensor(CLIP)
    z, u = z[:, : sum(sizes)], u[:, : sum(sizes)]
    exact = [x.double() for x in (z, u, *weights)]
    want, refs = reference(*exact, lr=0.5, chunk_size=C, decay=0.1, clip=CLIP)
    error = {}
    for form in ("auto", "dense"):
        state = empty_state(2, C, decay=0.1, form=form)
        out = read(state, z, u, weights, [None] * len(sizes), sizes, clip)
        assert out.dtype == torch.bfloat16
        S = torch.stack([ref.S for ref in refs])
        error[form] = [torch.linalg.vector_norm(a.double() - b) for a, b in ((out, want), (state.dense(), S))]
        if form == "auto":
            assert (state.left.dtype, state.right.dtype) == (torch.float32, torch.bfloat16)
    for pairs, dense in zip(*error.values(), strict=True):
        assert pairs <= 1.05 * dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuts_in_low_precision_add_rounding_of_single_precision_only(dtype):
    """z in two directions, exact in every dtype; four hundred cuts."""
    weights, (z, u) = parameters(dtype), tensors(1, 2 * C, dtype)
    z = torch.eye(F, dtype=dtype)[torch.randint(0, 2, (1, 2 * C))]
    state, exact = empty_state(1, C, decay=0.01, form=2), empty_state(1, C, decay=0.01)
    for _ in range(200):
        for one in (state, exact):
            feed(one, z, u, *weights)
    assert state.left.dtype == state.right.dtype == torch.float32
    assert state.truncation[0] < 1e-5
    torch.testing.assert_close(state.dense(), exact.S, atol=1e-4 * float(exact.S.abs().max()), rtol=0)


@pytest.mark.parametrize("sizes", [(3, 6), (C, C, 1), (1,) * 9, (7, 2, 7)])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_gradients_flow_through_pairs(sizes, clip):
    inputs = [x.requires_grad_() for x in (*tensors(2, sum(sizes)), *parameters())]
    z, u, *weights = inputs
    tau = None if clip is None else torch.tensor(clip, dtype=torch.float64)
    out = read(empty_state(2, C, decay=0.1, form="auto"), z, u, weights, [None] * len(sizes), sizes, tau)
    g = torch.randn_like(out)
    want = reference(z, u, *weights, lr=0.5, chunk_size=C, decay=0.1, clip=clip)[0]
    for a, b in zip(*(torch.autograd.grad(x, inputs, g) for x in (out, want)), strict=True):
        torch.testing.assert_close(a, b)
