"""What a rule promises and what refuses it; rules whose state is not zero at first."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from naive_rules import (
    LAYOUTS,
    LR,
    RULE_CASES,
    C,
    D,
    F,
    compare,
    inputs,
    naive_target,
    run,
    the_documents,
    the_rule,
    the_target,
)

from inplace_ttt import UserError
from inplace_ttt.core import RULES, FastWeights, Rule, make_rule, make_target
from inplace_ttt.fast.factors import fast_weights

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
        "adaptive": (True, False, False),
        "norm_preserving": (True, False, False),
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
@pytest.mark.parametrize("case", ["delta", "momentum", "muon", "norm_preserving"])
def test_factored_states_refuse_rules_that_are_not_outer(case, form):
    with pytest.raises(UserError, match=rf"rule '{case}' is not outer, which a state of form '?{form}'? needs"):
        fast_weights(1, C, the_rule(case), form)


@pytest.mark.parametrize("case", ["delta", "momentum", "norm_preserving"])
def test_rows_over_processes_refuse_rules_that_are_not_additive(case):
    from inplace_ttt.fast.ranks import scan_slice

    with pytest.raises(UserError, match=f"rule '{case}' is not additive, which a row cut over processes needs"):
        scan_slice(torch.zeros(1, C, F), None, None, None, rule=the_rule(case), width=D)


@pytest.mark.parametrize("case", ["clip", "update_size", "soft_cap", "delta", "momentum", "muon", "norm_preserving"])
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
        (
            lambda: make_rule("sun", {}, {}),
            r"rule must be one of adaptive, delta, momentum, muon, norm_preserving, sum, got 'sun'",
        ),
        (lambda: make_rule("delta", {"clip": 1.0}, {}), r"rule 'delta' has no option 'clip', only: decay, lr"),
        (lambda: make_rule("sum", {"soft_cap": 0.1, "clip": 1.0}, {}), "clip and soft_cap both set the size"),
        (lambda: make_rule("sum", {"update_size": -1}, {}), "update_size must be a positive number, got -1"),
        (lambda: make_target("lerned", D, {}, {}), "objective must be one of learned, loss, next_error, next_token"),
        (lambda: make_target("next_token", D, {"shift": 2}, {}), "objective 'next_token' has no option 'shift'"),
        (lambda: make_target("learned", D, {"ridge": 0.0}, {}), "ridge must be positive, got 0.0"),
        (lambda: make_target("learned", D, {"start": "next"}, {}), "start must be .zero. or .next_token., got 'next'"),
        (
            lambda: make_target("learned", D, {"start": "next_token"}, {"lookahead": 0}),
            "start=.next_token. needs a tap for the next token: lookahead at least 1, got 0",
        ),
        (
            lambda: make_target("learned", D, {"start": "next_token"}, {"projection": False}),
            "start=.next_token. begins with P at zero: it needs projection=True",
        ),
    ):
        with pytest.raises(UserError, match=message):
            wrong()


def test_a_state_is_not_continued_under_another_rule():
    one, other = (replace(the_rule("momentum"), beta=beta) for beta in (0.5, 0.9))
    assert "with beta 0.5, this model reads with 0.9" in one.difference(other)
    with pytest.raises(ValueError, match="need one rule"):
        FastWeights.stack([FastWeights(1, C, one), FastWeights(1, C, other)])


# -- a size that finds itself ------------------------------------------------------------------------------------------


def written(state, z, v, **options):
    rule = make_rule("adaptive", {"tolerance": 0.0, "decrease": 1e-4, **options}, {"lr": 1.0})
    return rule.update(state, z, v, torch.eye(D, F, dtype=torch.float64))


def test_an_adaptive_size_grows_where_the_loss_asks_for_more_and_shrinks_where_it_takes_back():
    """A state that agrees with a chunk's gradient stays and r grows; one that opposes it shrinks, with r."""
    z, v = torch.randn(2, C, F, dtype=torch.float64), torch.randn(2, C, D, dtype=torch.float64)
    rule = make_rule("adaptive", {}, {"lr": 1.0})
    first = written(rule.init(2, D, F, z), z, v)
    assert 0 < float(first["size"].min()) <= float(first["size"].max()) <= 0.005
    agree, oppose = written(first, z, v), written(first, z, -v)
    assert (agree["size"] > first["size"]).all()
    assert (oppose["size"] < first["size"]).all()
    unguarded = written(first, z, -v, slope=1e9)
    for b in range(2):
        shrunk = (oppose["S"] - unguarded["S"])[b].flatten() / first["S"][b].flatten()
        assert torch.allclose(shrunk, shrunk[:1])
        assert -1 < float(shrunk[0]) < -1e-4
    assert torch.allclose(agree["S"], written(first, z, v, slope=1e9)["S"])


def test_an_adaptive_size_stays_where_a_text_repeats_itself():
    """Its loss is gone and with it the gradient; what is left of it agrees with S. There is a bound as well."""
    z, v = torch.randn(1, C, F, dtype=torch.float64), torch.randn(1, C, D, dtype=torch.float64)
    state = first = written(make_rule("adaptive", {}, {"lr": 1.0}).init(1, D, F, z), z, v)
    for n in range(1, 40):
        state = written(state, z, v * 0.5**n)
    assert float(state["size"]) < 1.5 * float(first["size"])
    for _ in range(60):
        state = written(state, z, v)
    assert float(state["size"]) == 0.005


def test_an_adaptive_size_names_the_setting_where_it_cannot_serve():
    rule = make_rule("adaptive", {}, {"lr": 1.0})
    with pytest.raises(UserError, match=r"a state of form 'auto' does not work with update_size=.auto.: give it a num"):
        fast_weights(1, C, rule, "auto")


def test_an_adaptive_size_writes_little_for_a_chunk_that_asks_for_little():
    z, v = torch.randn(1, C, F, dtype=torch.float64), torch.randn(1, C, D, dtype=torch.float64)
    state = written(make_rule("adaptive", {}, {"lr": 1.0}).init(1, D, F, z), z, v)
    other = torch.randn(1, C, F, dtype=torch.float64)
    loud, quiet = (written(state, other, scale * v)["S"] - state["S"] for scale in (1.0, 1e-3))
    assert float(quiet.norm() / loud.norm()) < 0.01
