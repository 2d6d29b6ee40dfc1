"""Baselines on a policy so small that every completion, and every group of completions, can be enumerated.

Up to four tokens of a vocabulary of three (0 ends), float64. Expectations are sums over all groups, so that what is
said of bias and variance holds to rounding.
"""

from functools import cache
from itertools import product

import pytest
import torch

from inplace_ttt.rl.baselines import BASELINES, energy_proxy, log_sum_of_squares, realised_energy, token_advantages

LENGTH, WORDS = 4, 3
SEEDS = (0, 1, 2)


class Policy:
    """``probability`` [K], ``mask``, ``w`` [K, T], ``scores`` [K, T, P] and ``rewards`` [K] of all K completions."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        ends = [c for c in product(range(WORDS), repeat=LENGTH) if self._is_whole(c)]
        tokens = torch.tensor(ends)
        stops = (tokens == 0).int()
        self.mask = (stops.cumsum(1) - stops == 0).double()
        before = torch.cat([torch.full((len(tokens), 1), WORDS), tokens[:, :-1]], 1)
        theta = [torch.randn(WORDS + 1, WORDS, generator=generator), torch.randn(LENGTH, WORDS, generator=generator)]
        shapes = [t.shape for t in theta]
        flat = torch.cat([t.flatten() for t in theta]).double()

        def logits(values):
            by_word, by_place = values.split([s.numel() for s in shapes])
            return by_word.view(shapes[0])[before] + by_place.view(shapes[1])

        def log_probs(values):
            return logits(values).log_softmax(-1).gather(-1, tokens[..., None])[..., 0] * self.mask

        self.scores = torch.autograd.functional.jacobian(log_probs, flat)
        self.probability = log_probs(flat).sum(1).exp()
        self.w = energy_proxy(log_probs(flat), log_sum_of_squares(logits(flat))) * self.mask
        self.rewards = (torch.rand(len(tokens), generator=generator) < 0.6).double()

    @staticmethod
    def _is_whole(tokens) -> bool:
        """Whether all tokens after the first 0 are 0: one spelling per completion."""
        return 0 not in tokens or not any(tokens[tokens.index(0) :])

    def expected(self, n: int, **settings):
        """Expected gradient [P] of a group of ``n`` and the trace of its covariance."""
        K = len(self.rewards)
        index = torch.tensor(list(product(range(K), repeat=n)))  # [groups, n]
        rows = index.flatten()
        found = token_advantages(self.rewards[rows], self.mask[rows], self.w[rows], group_size=n, **settings)
        each = torch.einsum("rt,rtp->rp", found.values, self.scores[rows]).view(len(index), n, -1).mean(1)
        weight = self.probability[index].prod(1)[:, None]
        mean = (weight * each).sum(0)
        return mean, float((weight * (each - mean).square()).sum())

    def noise_of(self, b):
        """Trace of the covariance of one completion's gradient when the baseline is the constant ``b`` [T]."""
        each = torch.einsum("kt,ktp->kp", (self.rewards[:, None] - b) * self.mask, self.scores)
        mean = (self.probability[:, None] * each).sum(0)
        return float((self.probability[:, None] * (each - mean).square()).sum())


@cache
def policy(seed: int) -> Policy:
    return Policy(seed)


@pytest.fixture(params=SEEDS)
def p(request) -> Policy:
    return policy(request.param)


def test_the_enumeration_is_complete(p):
    assert len(p.rewards) == 31
    assert float(p.probability.sum()) == pytest.approx(1, abs=1e-12)
    assert (p.probability[:, None, None] * p.scores).sum((0, 1)).abs().max() < 1e-12


def test_the_proxy_is_the_norm_of_a_score_that_is_not_shared(p):
    """Each token's logits move two parameters with the same gradient: ||s_t||^2 = 2 w_t."""
    torch.testing.assert_close(p.scores.square().sum(-1), 2 * p.w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [2, 3])
def test_the_mean_shrinks_the_gradient_by_one_nth(p, n):
    truth, _ = p.expected(n, baseline="none")
    mean, _ = p.expected(n, baseline="mean")
    torch.testing.assert_close(mean, (n - 1) / n * truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("lone_tail", ["reward", "mean"])
def test_leave_one_out_is_unbiased(p, baseline, lone_tail):
    truth, _ = p.expected(1, baseline="none")
    for n in (2, 3):
        found, _ = p.expected(n, baseline=baseline, leave_one_out=True, lone_tail=lone_tail)
        torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-9)  # the 1e-8 in the denominators


@pytest.mark.parametrize("baseline", ["otb", "instant"])
def test_energy_of_positions_shrinks_it_more_and_turns_it(p, baseline):
    truth, _ = p.expected(1, baseline="none")
    for n in (2, 3):
        found, _ = p.expected(n, baseline=baseline)
        assert 0.3 < float(found @ truth / (truth @ truth)) < (n - 1) / n - 0.02
        assert 0.9 < float(found @ truth / (found.norm() * truth.norm())) < 0.9985


def test_no_position_baseline_beats_the_minimiser(p):
    chance, R = p.probability[:, None], p.rewards[:, None]
    whole = p.scores.sum(1, keepdim=True)
    best = (chance * R * (p.scores * whole).sum(-1)).sum(0) / (chance * p.scores.square().sum(-1)).sum(0)
    noise = p.noise_of(best)
    energy = {
        "otb": realised_energy(p.w, p.mask) * p.mask,
        "instant": p.w,
        "optimal_trajectory": p.w.sum(1, keepdim=True) * p.mask,
        "length": p.mask.sum(1, keepdim=True) * p.mask,
        "mean": p.mask,
    }
    for name, weight in energy.items():
        assert noise <= p.noise_of((chance * weight * R).sum(0) / (chance * weight).sum(0)) + 1e-12, name
    assert noise < p.noise_of(torch.zeros(LENGTH, dtype=torch.float64))
    for t in range(LENGTH):
        step = torch.zeros(LENGTH, dtype=torch.float64)
        step[t] = 1e-3
        assert noise < min(p.noise_of(best + step), p.noise_of(best - step))


def test_a_large_group_tends_to_the_formula_s_baseline():
    """A group in which each completion comes as often as its probability says has the population's baseline."""
    p = policy(0)
    counts = (p.probability * 3000).round().long()
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    found = token_advantages(p.rewards[rows], p.mask[rows], p.w[rows], group_size=len(rows))
    weight = realised_energy(p.w, p.mask) * p.mask * counts[:, None]
    expected = (weight * p.rewards[:, None]).sum(0) / weight.sum(0)
    torch.testing.assert_close(found.baseline, expected * p.mask[rows], rtol=1e-9, atol=1e-9)
