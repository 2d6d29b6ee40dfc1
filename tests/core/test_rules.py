"""Every shipped rule and target against a naive loop over tokens and chunks: values and all gradients, in float64."""

from dataclasses import dataclass, replace
from importlib import import_module
from typing import ClassVar

import pytest
import torch

from inplace_ttt import UserError
from inplace_ttt.core import RULES, ChunkTable, FastWeights, Rule, make_rule, make_target, read
from inplace_ttt.core.rules import largest_singular_value
from inplace_ttt.core.targets import ridge_values
from inplace_ttt.fast.factors import fast_weights

core_scan = import_module("inplace_ttt.core.scan")  # the package has a function of that name
D, F, C, K = 5, 7, 4, 3
LR, DECAY = 0.3, 0.1
EXACT = {"atol": 1e-9, "rtol": 1e-9}
RULE_CASES = {
    "plain": ("sum", {}),
    "decay": ("sum", {"decay": DECAY}),
    "clip": ("sum", {"decay": DECAY, "clip": 1.5}),
    "clip_relative": ("sum", {"clip": 0.4, "clip_relative": True}),
    "update_size": ("sum", {"decay": DECAY, "update_size": 0.2}),
    "soft_cap": ("sum", {"decay": DECAY, "soft_cap": 0.3}),
    "delta": ("delta", {"decay": DECAY}),
    "momentum": ("momentum", {"decay": DECAY, "beta": 0.7}),
    "muon": ("muon", {"decay": DECAY}),
}
TARGET_CASES = {
    f"{name} {extra or 'plain'}": (name, {} if not extra else {extra: 0.3 if extra == "ridge" else True})
    for name in ("learned", "next_token", "reconstruction")
    for extra in ("", "gates", "ridge")
}
LAYOUTS = ("whole", "packed", "left", "left and packed")


# -- the naive loop: one row, one token, one chunk after another --------------


def naive_write(name, options, W0, z, v):
    """dW [D, F] of one chunk of a rule whose write does not look at the state."""
    dW = sum(torch.outer(v[t], z[t]) for t in range(C))
    size, slow = dW.square().sum().sqrt(), W0.detach().square().sum().sqrt()
    if name == "muon":
        X = dW / (size + 1e-7)
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
        return X
    if "clip" in options:
        tau = options["clip"] * (slow if options.get("clip_relative") else 1.0)
        return dW * (tau / size) if size > tau else dW
    if "update_size" in options:
        return options["update_size"] * slow * dW / size
    if "soft_cap" in options:
        fixed = dW.detach()
        x = z.detach().sum(0) + 1e-3 * z.detach()[0]
        for _ in range(5):
            x = fixed.T @ (fixed @ (x / x.norm()))
        tau = options["soft_cap"] * slow
        return dW * tau / ((dW @ (x / x.norm())).norm() + tau)
    return dW


def naive_update(name, options, state, W0, z, v):
    keep, S = 1 - options.get("decay", 0.0), state["S"]
    if name == "delta":
        error = torch.stack([v[t] - LR * (S @ z[t]) for t in range(C)])
        return {"S": keep * S + error.T @ z / C}
    if name == "momentum":
        M = options["beta"] * state["M"] + v.T @ z
        return {"S": keep * S + M, "M": M}
    return {"S": keep * S + naive_write(name, options, W0, z, v)}


def naive_target(target, u, z):
    """v [C, D] and the gates beta, gamma [C] of one complete chunk."""
    rows = []
    for t in range(C):
        c = torch.zeros_like(u[0])
        if target.name == "learned":
            for k in range(K):
                source = t + k - (K - 1 - target.lookahead)
                if 0 <= source < C:
                    c = c + target.conv.weight[:, 0, k] * u[source]
        elif t + target.shift < C:
            c = u[t + target.shift]
        rows.append(c @ target.proj.weight)
    v = torch.stack(rows)
    if target.ridge is not None:
        gram = z @ z.T
        v = torch.linalg.solve(gram + target.ridge * gram.diagonal().mean() * torch.eye(C, dtype=z.dtype), v)
    if not target.gates:
        return v, None, None
    write, forget = (u @ target.gate.weight.T + target.gate.bias).T
    return v, 2 / (1 + torch.exp(-write)), torch.exp(-torch.log1p(torch.exp(forget)))


def naive(name, options, target, z, u, W0, documents=None):
    """Outputs [B, T, D] and each row's state after the last token: the specification, nothing batched."""
    out, after = torch.zeros(*z.shape[:2], D, dtype=z.dtype), []
    for b in range(z.shape[0]):
        zero = torch.zeros(D, F, dtype=z.dtype)
        start = {"S": zero, "M": zero} if name == "momentum" else {"S": zero}
        state, pending, document, rows = start, [], None, []
        for t in range(z.shape[1]):
            number = 0 if documents is None else int(documents[b, t])
            if number < 0:
                rows.append(W0 @ z[b, t])
                continue
            if document is not None and number != document:
                state, pending = start, []
            document = number
            rows.append((W0 + LR * state["S"]) @ z[b, t])
            pending.append(t)
            if len(pending) == C:
                zc, uc = z[b, pending], u[b, pending]
                v, beta, gamma = naive_target(target, uc, zc)
                if gamma is not None and name == "sum" and set(options) <= {"decay"}:  # token by token
                    S = (1 - options.get("decay", 0.0)) * state["S"]
                    for s in range(C):
                        S = gamma[s] * S + beta[s] * torch.outer(v[s], zc[s])
                    state = {"S": S}
                else:
                    if gamma is not None:
                        v = torch.stack([beta[s] * gamma[s + 1 :].prod() * v[s] for s in range(C)])
                        state = {key: gamma.prod() * x for key, x in state.items()}
                    state = naive_update(name, options, state, W0, zc, v)
                pending = []
        out[b] = torch.stack(rows)
        after.append(state)
    return out, {key: torch.stack([state[key] for state in after]) for key in after[0]}


# -- the library on the same tensors -----------------------------------------------------------------------------------


def inputs(B, T):
    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    return make(B, T, F), make(B, T, D), make(D, F)


def the_target(name="learned", options=None):
    target = make_target(name, D, options or {}, {"conv_kernel": K, "lookahead": 1}).double()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    return target


def the_rule(case):
    name, options = RULE_CASES[case]
    return make_rule(name, options, {"lr": LR})


def the_documents(layout, B, T):
    if layout == "whole":
        return None
    documents = torch.zeros(B, T, dtype=torch.int64)
    if "packed" in layout:
        for b in range(B):
            documents[b] = torch.arange(T) // (C + 3 + 4 * b)
    if "left" in layout:
        for b in range(B):
            documents[b, : 2 * b + 1] = -1
    return documents


def run(rule, target, z, u, W0, documents=None, state=None):
    """One call of a layer: its output and, with a state, nothing else, for the state is brought up to date."""
    seen = None if state is None else state.seen
    keep, zero = state is not None, rule.from_zero
    table = ChunkTable.build(*z.shape[:2], C, documents=documents, seen=seen, keep_state=keep, from_zero=zero)
    out = read(z, u, table, rule=rule, target=target, width=D, state=state, weight=W0, slow=W0)
    return torch.nn.functional.linear(z, W0) if out is None else out


def compare(got, want, tensors):
    """Values, and the gradients of every tensor, of two lists of results."""
    weights = [torch.randn_like(x) for x in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    grads = [
        torch.autograd.grad(
            sum((x * w).sum() for x, w in zip(xs, weights, strict=True)), tensors, allow_unused=True, retain_graph=True
        )
        for xs in (got, want)
    ]
    for a, b in zip(*grads, strict=True):
        assert (a is None or not a.any()) if b is None else a is not None
        if b is not None:
            torch.testing.assert_close(a, b, **EXACT)
    return grads[1]


# -- values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", RULE_CASES)
def test_rules_equal_the_loop(case, layout):
    z, u, W0 = inputs(2, 4 * C + 2)
    rule, target, documents = the_rule(case), the_target(), the_documents(layout, 2, 4 * C + 2)
    state = FastWeights(2, C, rule)
    out = run(rule, target, z, u, W0, documents, state)
    want, after = naive(*RULE_CASES[case], target, z, u, W0, documents)
    assert state.tensors.keys() == after.keys()
    found = compare(
        [out, *(state.tensors[key] for key in after)],
        [want, *after.values()],
        [z, u, W0, *target.parameters()],
    )
    assert all(g is not None and g.abs().max() > 1e-3 for g in found)
    compare([run(rule, target, z, u, W0, documents)], [want], [z, u, W0, *target.parameters()])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", TARGET_CASES)
def test_targets_equal_the_loop(case, layout):
    z, u, W0 = inputs(2, 4 * C + 2)
    rule, target, documents = the_rule("decay"), the_target(*TARGET_CASES[case]), the_documents(layout, 2, 4 * C + 2)
    state = FastWeights(2, C, rule, snapshots=target.gates)
    out = run(rule, target, z, u, W0, documents, state)
    want, after = naive("sum", {"decay": DECAY}, target, z, u, W0, documents)
    found = compare([out, state.S], [want, after["S"]], [z, u, W0, *target.parameters()])
    assert all(g is not None and g.abs().max() > 1e-4 for g in found)


@pytest.mark.parametrize("extra", ["gates", "ridge"])
@pytest.mark.parametrize("case", ["clip", "soft_cap", "delta", "momentum", "muon"])
def test_gates_and_ridge_under_other_rules(case, extra):
    z, u, W0 = inputs(2, 4 * C + 2)
    rule, target = the_rule(case), the_target(*TARGET_CASES[f"learned {extra}"])
    documents = the_documents("left and packed", 2, 4 * C + 2)
    out = run(rule, target, z, u, W0, documents)
    want, _ = naive(*RULE_CASES[case], target, z, u, W0, documents)
    compare([out], [want], [z, u, W0, *target.parameters()])


GATED = [("decay", "next_token gates"), ("soft_cap", "learned gates"), ("delta", "learned gates")]
ALL_STATES = [*((case, "learned plain") for case in RULE_CASES), *GATED]


@pytest.mark.parametrize("sizes", [(C - 1, C + 2, 3, 2 * C), (1,) * (4 * C), (2 * C + 1, 2 * C - 1)])
@pytest.mark.parametrize(("case", "target_case"), ALL_STATES)
def test_pieces_with_a_state(case, target_case, sizes):
    """Any pieces give the outputs, the state and the gradients of one pass, each row padded on the left as it likes."""
    z, u, W0 = inputs(2, sum(sizes))
    rule, target = the_rule(case), the_target(*TARGET_CASES[target_case])
    documents = the_documents("left", 2, sum(sizes))
    state, outs, at = FastWeights(2, C, rule, snapshots=target.gates), [], 0
    for n in sizes:
        s = slice(at, at + n)
        outs.append(run(rule, target, z[:, s], u[:, s], W0, documents[:, s], state))
        at += n
    want, after = naive(*RULE_CASES[case], target, z, u, W0, documents)
    got = [torch.cat(outs, 1), *(state.tensors[key] for key in after)]
    compare(got, [want, *after.values()], [z, u, W0, *target.parameters()])


@pytest.mark.parametrize("drop", [1, C, 2 * C + 1, 3 * C + 2])
@pytest.mark.parametrize(("case", "target_case"), ALL_STATES)
def test_rollback_equals_never_having_read(case, target_case, drop):
    total, sizes = 4 * C + 2, (C + 1, 1, 2 * C, C)
    rule, target = the_rule(case), the_target(*TARGET_CASES[target_case])
    with torch.no_grad():
        z, u, W0 = inputs(2, total)
        documents = the_documents("left", 2, total)
        state, at = FastWeights(2, C, rule, snapshots=target.gates), 0
        for n in sizes:
            s = slice(at, at + n)
            run(rule, target, z[:, s], u[:, s], W0, documents[:, s], state)
            at += n
        state.rollback(drop)
        more_z, more_u, _ = inputs(2, 2 * C + 1)
        got = run(rule, target, more_z, more_u, W0, None, state)
        left = total - drop
        zs, us = torch.cat([z[:, :left], more_z], 1), torch.cat([u[:, :left], more_u], 1)
        documents = torch.nn.functional.pad(documents[:, :left], (0, 2 * C + 1))
        want, after = naive(*RULE_CASES[case], target, zs, us, W0, documents)
        torch.testing.assert_close(got, want[:, left:], atol=1e-7, rtol=1e-7)
        for key, x in after.items():
            torch.testing.assert_close(state.tensors[key], x, atol=1e-7, rtol=1e-7)


def test_fork_and_select_keep_every_tensor_of_a_state():
    rule, target = the_rule("momentum"), the_target()
    with torch.no_grad():
        z, u, W0 = inputs(2, 2 * C + 1)
        state = FastWeights(2, C, rule)
        run(rule, target, z, u, W0, None, state)
        twin, order = state.fork(), torch.tensor([1, 1, 0])
        state.select(order)
        joined = FastWeights.stack([twin, state])
        more_z, more_u, _ = inputs(5, 2 * C)
        got = run(rule, target, more_z, more_u, W0, None, joined)
        zs = torch.cat([torch.cat([z, z[order]]), more_z], 1)
        us = torch.cat([torch.cat([u, u[order]]), more_u], 1)
        want, after = naive(*RULE_CASES["momentum"], target, zs, us, W0)
        torch.testing.assert_close(got, want[:, 2 * C + 1 :])
        torch.testing.assert_close(joined.tensors, after)


# -- writes ------------------------------------------------------------------------------------------------------------


def test_sizes_of_writes_are_what_they_say():
    """A sized write moves S by r |W0|_F, a soft cap stays below tau, and a clip at tau; a ridge write reads back v."""
    z, v, W0 = torch.randn(3, C, F).double(), torch.randn(3, C, D).double(), torch.randn(D, F).double()

    def write(**options):
        return make_rule("sum", options, {}).write(z, v, W0)

    slow = W0.norm()
    torch.testing.assert_close(write(update_size=0.01).norm(dim=(1, 2)), (0.01 * slow).expand(3))
    plain, capped, clipped = write(), write(soft_cap=0.1), write(clip=0.1, clip_relative=True)
    assert (torch.linalg.matrix_norm(plain, 2) > 0.2 * slow).all()
    assert (torch.linalg.matrix_norm(capped, 2) < 0.1 * slow).all()
    torch.testing.assert_close(clipped.norm(dim=(1, 2)), (0.1 * slow).expand(3))
    dW = ridge_values(z, v, 1e-9).mT @ z
    torch.testing.assert_close(z @ dW.mT, v, atol=1e-5, rtol=1e-5)


def test_the_power_iteration_finds_the_largest_singular_value():
    """From below, and to 1e-3 where the two largest are apart."""
    z, v = torch.randn(64, C, F).double(), torch.randn(64, C, D).double()
    values = torch.linalg.svdvals(v.mT @ z)
    found = largest_singular_value(v, z)
    assert (found <= values[:, 0] * (1 + 1e-12)).all()
    apart = values[:, 0] > 1.5 * values[:, 1]
    assert apart.sum() > 10
    assert (found > 0.99 * values[:, 0])[apart].all()


def test_a_soft_cap_has_a_finite_gradient_where_nothing_is_written():
    z, v, W0 = torch.randn(1, C, F), torch.zeros(1, C, D, requires_grad=True), torch.randn(D, F)
    written = make_rule("sum", {"soft_cap": 0.1}, {}).write(z, v, W0)
    (found,) = torch.autograd.grad(written.sum(), v)
    assert not written.any()
    torch.testing.assert_close(found, z.sum(-1, keepdim=True).expand(1, C, D))


# -- the generic scan --------------------------------------------------------------------------------------------------


@pytest.fixture
def generic_only(monkeypatch):
    monkeypatch.setattr(core_scan, "PATHS", [])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["plain", "decay", "clip", "update_size", "soft_cap"])
def test_the_generic_scan_equals_the_fast_path(case, layout, monkeypatch):
    z, u, W0 = inputs(2, 4 * C + 2)
    rule, target, documents = the_rule(case), the_target(), the_documents(layout, 2, 4 * C + 2)

    def both_calls():
        state = FastWeights(2, C, rule)
        outs = [
            run(rule, target, z[:, s], u[:, s], W0, None if documents is None else documents[:, s], state)
            for s in (slice(0, C + 3), slice(C + 3, None))
        ]
        return [*outs, state.S]

    paths, path_for = [], core_scan.path_for

    def watched(call):
        paths.append(path_for(call).name)
        return path_for(call)

    monkeypatch.setattr(core_scan, "path_for", watched)
    fast = both_calls()
    assert set(paths) == {"loop"}
    monkeypatch.setattr(core_scan, "PATHS", [])
    paths.clear()
    slow = both_calls()
    assert set(paths) == {"generic"}
    compare(slow, fast, [z, u, W0, *target.parameters()])


def test_the_path_that_ran_is_logged(caplog):
    z, u, W0 = inputs(1, 3 * C)
    with caplog.at_level("DEBUG", logger="inplace_ttt"):
        for case in ("plain", "delta"):
            run(the_rule(case), the_target(), z, u, W0)
    assert [record.getMessage() for record in caplog.records] == [
        "scan of rule 'sum': path 'loop', 3 chunks",
        "scan of rule 'delta': path 'generic', 3 chunks",
    ]


@pytest.mark.parametrize("case", ["momentum", "plain"])
def test_checkpointing_in_segments_changes_no_gradient(case, monkeypatch, generic_only):
    z, u, W0 = inputs(2, 9 * C + 1)
    rule, target, documents = the_rule(case), the_target(), the_documents("packed", 2, 9 * C + 1)
    calls, checkpoint = [], core_scan.checkpoint

    def counted(function, *args, **keywords):
        calls.append(function)
        return checkpoint(function, *args, **keywords)

    monkeypatch.setattr(core_scan, "checkpoint", counted)
    results = []
    for segment in (10**6, 2):
        monkeypatch.setattr(core_scan, "SEGMENT", segment)
        state = FastWeights(2, C, rule)
        results.append([run(rule, target, z, u, W0, documents, state), *state.tensors.values()])
        assert (len(calls) > 2) == (segment == 2)
    compare(results[1], results[0], [z, u, W0, *target.parameters()])


# -- a rule whose state is not zero at first ---------------------------------------------------------------------------


@pytest.fixture
def own_rules():
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@dataclass(frozen=True)
class Bottleneck(Rule):
    """``out = lr * A tanh(Z)`` with a state that is not zero at first: the mean of what a chunk writes enters A."""

    name: ClassVar[str] = "bottleneck"
    from_zero: ClassVar[bool] = False

    def init(self, B, D, F, like):
        return {"A": torch.linspace(-1, 1, D * F, dtype=like.dtype).view(1, D, F).repeat(B, 1, 1)}

    def apply(self, state, z):
        return self.lr * torch.bmm(z.tanh(), state["A"].mT)

    def update(self, state, z, v, W0):
        return {"A": 0.9 * state["A"] + torch.bmm(v.mT, z) / z.shape[1]}


@dataclass(frozen=True)
class Biased(Rule):
    """A linear rule whose S is not zero at first."""

    name: ClassVar[str] = "biased"
    linear: ClassVar[bool] = True
    from_zero: ClassVar[bool] = False

    def init(self, B, D, F, like):
        return {"S": torch.linspace(-1, 1, D * F, dtype=like.dtype).view(1, D, F).repeat(B, 1, 1)}

    def update(self, state, z, v, W0):
        return {"S": 0.9 * state["S"] + torch.bmm(v.mT, z) / z.shape[1]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(4 * C + 2,), (2, 1, C, 1, 3 * C - 2)])
@pytest.mark.parametrize("kind", [Bottleneck, Biased])
def test_a_state_that_is_not_zero_at_first(kind, sizes, layout):
    """Tokens of the first chunk are read with the initial state, in every document; padding is read with W0 alone."""
    T = sum(sizes)
    z, u, W0 = inputs(2, T)
    rule, target, documents = kind(lr=LR), the_target(), the_documents(layout, 2, T)
    if len(sizes) > 1 and documents is not None:
        documents = documents.clamp(max=0)
    rows, squash = [], torch.tanh if kind is Bottleneck else (lambda x: x)
    for b in range(2):
        start = torch.linspace(-1, 1, D * F, dtype=torch.float64).view(D, F)
        A, pending, document = start, [], None
        for t in range(T):
            number = 0 if documents is None else int(documents[b, t])
            if number < 0:
                rows.append(W0 @ z[b, t])
                continue
            if document is not None and number != document:
                A, pending = start, []
            document = number
            rows.append(W0 @ z[b, t] + LR * A @ squash(z[b, t]))
            pending.append(t)
            if len(pending) == C:
                v, *_ = naive_target(target, u[b, pending], z[b, pending])
                A, pending = 0.9 * A + v.T @ z[b, pending] / C, []
    want = torch.stack(rows).view(2, T, D)
    state, outs, at = FastWeights(2, C, rule), [], 0
    for n in sizes:
        s = slice(at, at + n)
        outs.append(run(rule, target, z[:, s], u[:, s], W0, None if documents is None else documents[:, s], state))
        at += n
    compare([torch.cat(outs, 1)], [want], [z, u, W0, *target.parameters()])
    if len(sizes) == 1:
        compare([run(rule, target, z, u, W0, documents)], [want], [z, u, W0, *target.parameters()])


# -- promises ----------------------------------------------------------------------------------------------------------


def test_promises_of_the_shipped_rules():
    promises = {name: (rule.linear, rule.additive, rule.outer) for name, rule in RULES.items()}
    assert promises == {
        "sum": (True, True, True),
        "delta": (True, False, False),
        "momentum": (True, False, False),
        "muon": (True, True, False),
    }


def test_promises_include_each_other(own_rules):
    from inplace_ttt.core import register_rule

    @register_rule("mine")
    class Mine(Rule):
        outer = True

    assert Mine.linear
    assert Mine.additive
    assert make_rule("mine", {}, {"lr": 3.0}).lr == 3.0
    with pytest.raises(UserError, match="'biased' is additive, so it must begin with S = 0"):
        register_rule("biased")(type("Wrong", (Biased,), {"additive": True}))


@pytest.mark.parametrize("form", ["auto", 8])
@pytest.mark.parametrize("case", ["delta", "momentum", "muon"])
def test_factored_states_refuse_rules_that_are_not_outer(case, form):
    with pytest.raises(UserError, match=rf"rule '{case}' is not outer, which a state of form '?{form}'? needs"):
        fast_weights(1, C, the_rule(case), form)


@pytest.mark.parametrize("case", ["delta", "momentum"])
def test_rows_over_processes_refuse_rules_that_are_not_additive(case):
    from inplace_ttt.fast.ranks import scan_slice

    with pytest.raises(UserError, match=f"rule '{case}' is not additive, which a row cut over processes needs"):
        scan_slice(torch.zeros(1, C, F), None, None, None, rule=the_rule(case), width=D)


@pytest.mark.parametrize("case", ["clip", "update_size", "soft_cap", "delta", "momentum", "muon"])
def test_split_projections_refuse_rules_that_need_whole_matrices(case):
    from inplace_ttt.hf.tensor_parallel import check_split

    check_split(the_rule("decay"))
    with pytest.raises(UserError, match=f"rule '{RULE_CASES[case][0]}'.*tensor parallelism splits"):
        check_split(the_rule(case))


def test_no_step_before_the_first_chunk_where_the_state_is_not_zero():
    """A step folds S into the slow weight, and there is no S yet."""
    for kind, can in ((Biased, [False, False, True]), (type(the_rule("delta")), [True, True, True])):
        rule, target, state = kind(lr=LR), the_target(), FastWeights(1, C, kind(lr=LR))
        for n, expected in zip((1, C - 2, 1), can, strict=True):
            z, u, W0 = inputs(1, n)
            run(rule, target, z, u, W0, None, state)
            assert state.can_step is expected


def test_a_matrix_is_refused_where_the_rule_has_none():
    state = FastWeights(1, C, Bottleneck())
    assert not state.can_step
    with pytest.raises(UserError, match="rule 'bottleneck' is not linear, which a matrix of fast weights needs"):
        state.dense()


def test_wrong_names_options_and_values_are_refused():
    for wrong, message in (
        (lambda: make_rule("sun", {}, {}), r"rule must be one of delta, momentum, muon, sum, got 'sun'"),
        (lambda: make_rule("delta", {"clip": 1.0}, {}), r"rule 'delta' has no option 'clip', only: decay, lr"),
        (lambda: make_rule("sum", {"soft_cap": 0.1, "clip": 1.0}, {}), "clip and soft_cap both set the size"),
        (lambda: make_rule("sum", {"update_size": -1}, {}), "update_size must be a positive number, got -1"),
        (lambda: make_target("lerned", D, {}, {}), "objective must be one of learned, loss, next_token, reconstr"),
        (lambda: make_target("next_token", D, {"shift": 2}, {}), "objective 'next_token' has no option 'shift'"),
        (lambda: make_target("learned", D, {"ridge": 0.0}, {}), "ridge must be positive, got 0.0"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()


def test_a_state_is_not_continued_under_another_rule():
    one, other = (replace(the_rule("momentum"), beta=beta) for beta in (0.5, 0.9))
    assert "with beta 0.5, this model reads with 0.9" in one.difference(other)
    with pytest.raises(ValueError, match="need one rule"):
        FastWeights.stack([FastWeights(1, C, one), FastWeights(1, C, other)])
