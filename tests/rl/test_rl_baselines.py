"""Baselines against loops over groups, rows and tokens that follow the formulas word by word."""

import importlib.metadata
import math

import pytest
import torch
from forked import run_fresh

from inplace_ttt.errors import UserError
from inplace_ttt.rl.baselines import (
    BASELINES,
    LONE_TAILS,
    energy_proxy,
    log_sum_of_squares,
    realised_energy,
    rewards_to_go,
    token_advantages,
)

T = 7


def by_loops(rewards, mask, w, n, baseline, leave_one_out, lone_tail, ratios=None):
    """A [R, T], B [R, T] and the lone tokens, one token at a time."""
    A, B = torch.zeros(mask.shape, dtype=torch.float64), torch.zeros(mask.shape, dtype=torch.float64)
    lone = torch.zeros(mask.shape, dtype=torch.bool)
    for first in range(0, len(mask), n):
        rows = {}
        for i in range(first, first + n):
            places = [t for t in range(mask.shape[1]) if mask[i, t]]
            each = [float(rewards[i, t]) for t in places] if rewards.ndim == 2 else None
            whole = float(rewards[i]) if each is None else sum(each)
            if math.isnan(whole):
                continue
            energy = [float(w[i, t]) * (1 if ratios is None else float(ratios[i, t]) ** 2) for t in places]
            rows[i] = {
                "places": places,
                "whole": whole,
                "G": [whole if each is None else sum(each[k:]) for k in range(len(places))],
                "w": energy,
                "W": [sum(energy[: k + 1]) for k in range(len(places))],
            }
        for i, row in rows.items():
            others = [j for j in rows if j != i] if leave_one_out else list(rows)
            mean = sum(rows[j]["whole"] for j in others) / max(len(others), 1)
            weights = {
                "optimal_trajectory": {j: sum(rows[j]["w"]) for j in others},
                "length": {j: len(rows[j]["places"]) for j in others},
            }
            for k, t in enumerate(row["places"]):
                alive = [j for j in others if len(rows[j]["places"]) > k]
                if baseline in ("otb", "instant"):
                    name = "W" if baseline == "otb" else "w"
                    total = sum(rows[j][name][k] for j in alive) + 1e-8
                    b = sum(rows[j][name][k] * rows[j]["G"][k] for j in alive) / total
                    if sum(len(other["places"]) > k for other in rows.values()) == 1:
                        lone[i, t] = True
                        b = {"reward": 0.0, "zero": row["G"][k], "mean": mean}[lone_tail]
                elif baseline in weights:
                    each = weights[baseline]
                    b = sum(each[j] * rows[j]["whole"] for j in others) / (sum(each.values()) + 1e-8)
                else:
                    b = {"mean": mean, "none": 0.0}[baseline]
                if len(rows) == 1:
                    b = 0.0
                A[i, t], B[i, t] = row["G"][k] - b, b
    return A, B, lone


def example(groups=3, n=4, holes=False, tokens=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = groups * n
    lengths = torch.randint(1, T + 1, (rows,), generator=generator)
    mask = torch.arange(T) < lengths[:, None]
    if holes:
        mask &= torch.rand(rows, T, generator=generator) < 0.6
    rewards = torch.randn((rows, T) if tokens else (rows,), generator=generator, dtype=torch.float64)
    w = 2 * torch.rand(rows, T, generator=generator, dtype=torch.float64)
    return rewards, mask, w


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize(("holes", "tokens"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("lone_tail", LONE_TAILS)
def test_equals_loops(baseline, leave_one_out, holes, tokens, lone_tail):
    for n, seed in ((1, 0), (2, 1), (4, 2)):
        rewards, mask, w = example(n=n, holes=holes, tokens=tokens, seed=seed)
        ratios = torch.rand(mask.shape, dtype=torch.float64) + 0.5
        settings = {"baseline": baseline, "leave_one_out": leave_one_out, "lone_tail": lone_tail}
        found = token_advantages(rewards, mask, w, group_size=n, ratios=ratios, **settings)
        A, B, lone = by_loops(rewards, mask, w, n, ratios=ratios, **settings)
        torch.testing.assert_close(found.values, A, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.baseline, B, rtol=1e-12, atol=1e-12)
        assert torch.equal(found.is_lone, lone)


@pytest.mark.parametrize("baseline", BASELINES)
def test_nan_rows_count_for_nobody(baseline):
    rewards, mask, w = example(holes=True)
    rewards[[1, 4, 5, 6]] = torch.nan  # the second group keeps one row
    found = token_advantages(rewards, mask, w, group_size=4, baseline=baseline)
    A, B, lone = by_loops(rewards, mask, w, 4, baseline, False, "reward")
    torch.testing.assert_close(found.values, A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.baseline, B, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.is_lone, lone)
    assert not found.values[[1, 4, 5, 6]].any()
    assert torch.equal(found.values[7], rewards[7] * mask[7])  # alone in its group: B = 0


def test_what_is_not_sampled_changes_nothing():
    rewards, mask, w = example(holes=True, tokens=True)
    clean = token_advantages(rewards, mask, w, group_size=4).values
    rewards[~mask], w[~mask] = torch.nan, torch.inf
    assert torch.equal(token_advantages(rewards, mask, w, group_size=4).values, clean)
    assert not clean[~mask].any()


@pytest.mark.parametrize("baseline", [b for b in BASELINES if b != "none"])
def test_equal_rewards_give_nothing(baseline):
    _, mask, w = example()
    mask[:, :2] = True  # so that every position up to the second has company
    values = token_advantages(
        torch.full((12,), 0.7), mask, w.float(), group_size=4, baseline=baseline, lone_tail="zero"
    )
    assert values.values.abs().max() < 1e-6


@pytest.mark.parametrize("baseline", ["otb", "instant", "optimal_trajectory"])
def test_certain_tokens_have_no_baseline(baseline):
    rewards, mask, w = example()
    found = token_advantages(rewards, mask, torch.zeros_like(w), group_size=4, baseline=baseline)
    assert torch.equal(found.values, rewards[:, None] * mask)


def test_leave_one_out_ignores_a_large_own_energy():
    """Sums of the others are not a total minus the own part, which float32 would round away."""
    rewards, mask = torch.tensor([1.0, 0.0, 1.0]), torch.ones(3, 1)
    w = torch.tensor([[1e8], [0.5], [1.5]])
    found = token_advantages(rewards, mask, w, group_size=3, leave_one_out=True)
    assert found.baseline[0, 0].item() == pytest.approx(0.75)


def test_half_precision_is_computed_in_float32():
    rewards, mask, w = example()
    found = token_advantages(rewards.bfloat16(), mask, w.bfloat16(), group_size=4)
    assert found.values.dtype == torch.float32
    full = token_advantages(rewards.bfloat16().double(), mask, w.bfloat16().double(), group_size=4)
    torch.testing.assert_close(found.values.double(), full.values, rtol=1e-5, atol=1e-5)


def test_proxy_is_the_norm_of_the_score():
    logits = 3 * torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    tokens = torch.arange(5)
    log_probs = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    (score,) = torch.autograd.grad(log_probs.sum(), logits)
    w = energy_proxy(log_probs, log_sum_of_squares(logits))
    torch.testing.assert_close(w, score.square().sum(-1), rtol=1e-12, atol=1e-12)


def test_proxy_of_a_certain_token_is_not_negative():
    logits = torch.full((1000, 9), -1.0)
    logits[:, 0] = torch.linspace(5, 60, 1000)
    w = energy_proxy(logits.log_softmax(-1)[:, 0], log_sum_of_squares(logits))
    assert w.min() >= 0
    assert w[-1] == 0


def test_realised_energy_and_returns_count_sampled_tokens():
    mask = torch.tensor([[1, 0, 1, 1, 0]])
    ones = torch.ones(1, 5)
    assert realised_energy(ones, mask).tolist() == [[1, 1, 2, 3, 3]]
    assert rewards_to_go(ones, mask).tolist() == [[3, 0, 2, 1, 0]]
    assert rewards_to_go(torch.tensor([2.0]), mask).tolist() == [[2, 0, 2, 2, 0]]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"baseline": "best"}, "baseline must be one of otb, instant"),
        ({"lone_tail": "drop"}, "lone_tail must be one of reward, zero, mean"),
        ({"group_size": 5}, "12 rows are not groups of 5"),
        ({"w": None}, 'baseline="otb" needs w'),
        ({"rewards": torch.zeros(3)}, "rewards must have the shape"),
        ({"w": torch.zeros(12, 1)}, "w must have the shape"),
        ({"ratios": torch.zeros(12)}, "ratios must have the shape"),
        ({"mask": torch.zeros(12)}, "mask must have the shape"),
    ],
)
def test_mistakes_are_named(changes, says):
    rewards, mask, w = example()
    arguments = {"rewards": rewards, "mask": mask, "w": w, "group_size": 4} | changes
    with pytest.raises(UserError, match=says):
        token_advantages(arguments.pop("rewards"), arguments.pop("mask"), arguments.pop("w"), **arguments)


def test_functions_need_neither_trl_nor_transformers():
    def work():
        from inplace_ttt.rl import baselines, noise

        print(baselines.__name__, noise.__name__)

    found = run_fresh(work, ["inplace_ttt"], missing=["trl", "transformers", "datasets"])
    assert found == (0, "inplace_ttt.rl.baselines inplace_ttt.rl.noise\n")


def test_a_missing_trl_is_said_plainly():
    def work():
        real = importlib.metadata.version

        def version(name):
            if name == "trl":
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name)

        importlib.metadata.version = version
        from inplace_ttt.errors import UserError

        try:
            from inplace_ttt.rl import OTBTrainer  # noqa: F401
        except UserError as error:
            print(error)

    said = "OTBTrainer needs trl 1.16, trl is not installed: pip install -e '.[rl]' in a clone\n"
    assert run_fresh(work, ["inplace_ttt", "trl"]) == (0, said)
