"""Every shipped rule and target against a naive loop over tokens and chunks: values and all gradients, in float64."""

from importlib import import_module

import pytest
import torch
from naive_rules import (
    DECAY,
    LAYOUTS,
    RULE_CASES,
    TARGET_CASES,
    C,
    D,
    F,
    K,
    compare,
    inputs,
    naive,
    run,
    the_documents,
    the_rule,
    the_target,
)

import inplace_ttt.fast  # noqa: F401 (registers the fast paths)
from inplace_ttt.core import FastWeights, make_rule, make_target
from inplace_ttt.core.rules import largest_singular_value
from inplace_ttt.core.targets import ridge_values

core_scan = import_module("inplace_ttt.core.scan")  # the package has a function of that name


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
    z, u, W0 = inputs(2, 4 * C + 2, 2 * D if "error" in case else D)
    rule, target, documents = the_rule("decay"), the_target(*TARGET_CASES[case]), the_documents(layout, 2, 4 * C + 2)
    state = FastWeights(2, C, rule, snapshots=target.gates)
    out = run(rule, target, z, u, W0, documents, state)
    want, after = naive("sum", {"decay": DECAY}, target, z, u, W0, documents)
    found = compare([out, state.S], [want, after["S"]], [z, u, W0, *target.parameters()])
    assert all(g is not None and g.abs().max() > 1e-4 for g in found)


@pytest.mark.parametrize("extra", ["gates", "ridge"])
@pytest.mark.parametrize("case", ["clip", "soft_cap", "delta", "momentum", "muon", "norm_preserving"])
def test_gates_and_ridge_under_other_rules(case, extra):
    z, u, W0 = inputs(2, 4 * C + 2)
    rule, target = the_rule(case), the_target(*TARGET_CASES[f"learned {extra}"])
    documents = the_documents("left and packed", 2, 4 * C + 2)
    out = run(rule, target, z, u, W0, documents)
    want, _ = naive(*RULE_CASES[case], target, z, u, W0, documents)
    compare([out], [want], [z, u, W0, *target.parameters()])


GATED = [("decay", "next_token gates"), ("soft_cap", "learned gates"), ("delta", "learned gates")]
GATED += [("norm_preserving", "learned gates"), ("decay", "next_error plain")]
ALL_STATES = [*((case, "learned plain") for case in RULE_CASES), *GATED]


@pytest.mark.parametrize("sizes", [(C - 1, C + 2, 3, 2 * C), (1,) * (4 * C), (2 * C + 1, 2 * C - 1)])
@pytest.mark.parametrize(("case", "target_case"), ALL_STATES)
def test_pieces_with_a_state(case, target_case, sizes):
    """Any pieces give the outputs, the state and the gradients of one pass, each row padded on the left as it likes."""
    z, u, W0 = inputs(2, sum(sizes), 2 * D if "error" in target_case else D)
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
        source = 2 * D if "error" in target_case else D
        z, u, W0 = inputs(2, total, source)
        documents = the_documents("left", 2, total)
        state, at = FastWeights(2, C, rule, snapshots=target.gates), 0
        for n in sizes:
            s = slice(at, at + n)
            run(rule, target, z[:, s], u[:, s], W0, documents[:, s], state)
            at += n
        state.rollback(drop)
        more_z, more_u, _ = inputs(2, 2 * C + 1, source)
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


# -- where targets begin -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lookahead", "tap"), [(1, 2), (2, 1)])
def test_a_target_that_starts_at_the_next_token(lookahead, tap):
    """v is zero, so nothing changes, and yet P has the gradient of the loop: the start is no saddle."""
    settings = {"conv_kernel": K, "lookahead": lookahead, "init_std": 0.5}
    target = make_target("learned", D, {"start": "next_token"}, settings).double()
    assert target.conv.weight[:, 0].eq(torch.nn.functional.one_hot(torch.tensor(tap), K)).all()
    assert not target.proj.weight.any()
    assert not target.is_trained
    z, u, W0 = inputs(2, 3 * C + 1)
    rule, documents = the_rule("plain"), the_documents("left and packed", 2, 3 * C + 1)
    out = run(rule, target, z, u, W0, documents)
    assert torch.equal(out, torch.nn.functional.linear(z, W0))
    *_, conv, proj = compare(
        [out], [naive("sum", {}, target, z, u, W0, documents)[0]], [z, u, W0, *target.parameters()]
    )
    gradients = {x.shape: x for x in (conv, proj)}
    assert gradients[target.proj.weight.shape].abs().max() > 1e-2
    assert not gradients[target.conv.weight.shape].any()
    with torch.no_grad():
        target.proj.weight[0, 1] = 1e-3
    assert target.is_trained
    shifted = make_target("next_token", D, {}, {}).double()
    shifted.proj.weight.data.copy_(target.proj.weight)
    chunks = u.detach()[:, : 3 * C].reshape(2, 3, C, D)
    torch.testing.assert_close(target(chunks, None), shifted(chunks, None))
    for parameter in target.parameters():
        torch.nn.init.normal_(parameter)
    for module in (target.conv, target.proj):
        module.reset_parameters()
    assert target.conv.weight[:, 0, tap].eq(1).all()
    assert float(target.conv.weight.sum()) == D
    assert not target.proj.weight.any()


def test_the_error_of_the_next_token_starts_at_zero_with_a_gradient():
    target = make_target("next_error", D, {}, {}).double()
    z, u, W0 = inputs(1, 3 * C, 2 * D)
    out = run(the_rule("plain"), target, z, u, W0)
    assert torch.equal(out, torch.nn.functional.linear(z, W0))
    assert not target.is_trained
    for found in torch.autograd.grad((out * torch.randn_like(out)).sum(), list(target.parameters())):
        assert found.abs().max() > 1e-2
    target.input_proj.weight.data[0, 0] = 1.0
    assert target.is_trained


def test_norms_are_preserved():
    rule, target = the_rule("norm_preserving"), the_target()
    z, u, W0 = inputs(2, 3 * C)
    state = FastWeights(2, C, rule)
    with torch.no_grad():
        run(rule, target, z, u, W0, None, state)
        weight = W0 + rule.lr * state.S
        torch.testing.assert_close(weight.norm(dim=-1), W0.norm(dim=-1).expand(2, -1))
        assert (rule.lr * state.S).norm() > 0.1 * W0.norm()
        unread = rule.update(rule.init(1, D, F, z), z[:1, :C], torch.zeros(1, C, D).double(), W0)
        assert not unread["S"].any()
        empty = rule.update(rule.init(1, D, F, z), z[:1, :C], torch.randn(1, C, D).double(), 0 * W0)
        assert empty["S"].abs().max() < 1e-100  # a row of zeros stays one
    with pytest.raises(NotImplementedError, match="norm_preserving"):
        rule.update(rule.init(1, D, F, z), z[:1, :C], torch.zeros(1, C, D).double(), None)


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


def cancelling(dtype, case):
    """v, z of two rows and W0: in the first row values of one key that cancel, or pairs of opposite values."""
    torch.manual_seed(0)
    n, half = 16, 8
    v, z, W0 = (torch.randn(*shape, dtype=dtype) for shape in ((2, n, D), (2, n, F), (D, F)))
    if case == "pairs":
        v, z = torch.cat([v[:, :half], -v[:, :half]], 1), torch.cat([z[:, :half]] * 2, 1)
    else:
        v, z = v - v.mean(1, keepdim=True), z[:, :1].repeat(1, n, 1)
    v[1], z[1] = torch.randn(n, D), torch.randn(n, F)
    return v, z, W0


@pytest.mark.parametrize("case", ["one key", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_muon_writes_no_rounding_errors(dtype, case):
    """Another row of the call writes as it does alone; gradients are finite."""
    v, z, _ = cancelling(dtype, case)
    v.requires_grad_()
    z.requires_grad_()
    rule = make_rule("muon", {}, {"lr": 0.1})
    written = rule.write(z, v, None)
    size = torch.linalg.matrix_norm(written, 2)
    assert size[0] == 0
    assert 0.5 < size[1] < 1.5
    torch.testing.assert_close(written[1:], rule.write(z[1:], v[1:], None))
    assert all(g.isfinite().all() and g[1].any() for g in torch.autograd.grad(written.square().sum(), (v, z)))


@pytest.mark.parametrize("case", ["one key", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), [("sum", {"update_size": 0.01}), ("adaptive", {})])
def test_a_sized_write_of_rounding_errors_alone_writes_nothing(name, options, dtype, case):
    """Another row of the call writes as ever."""
    v, z, W0 = cancelling(dtype, case)
    n = v.shape[1]
    rule = make_rule(name, options, {"lr": 0.1})
    state = rule.init(2, D, F, W0)
    state = rule.update(state, z, v, W0)
    size = state["S"].norm(dim=(1, 2)) / W0.float().norm()
    assert size[0] < 1e-4 < size[1] < 0.011
    state = rule.update(state, *(x[1:].expand(2, n, -1) for x in (z, v)), W0)
    assert all(x.isfinite().all() for x in state.values())
    assert (state["S"].norm(dim=(1, 2)) / W0.float().norm() > 1e-4).all()
