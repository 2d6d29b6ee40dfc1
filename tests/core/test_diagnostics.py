"""Diagnostics of one layer against their definitions, by SVD in float64."""

import math

import pytest
import torch

from inplace_ttt.core.diagnostics import (
    effective_rank,
    key_overlap,
    output_change,
    relative_norm,
    update_norm,
)

SHAPES = [(6, 10), (10, 6), (7, 7), (1, 5), (5, 1)]
exact = pytest.approx


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def orthonormal(n, k):
    """k orthonormal columns of length n."""
    return torch.linalg.qr(randn(n, k)).Q


def overlap_by_svd(S, z, energy):
    _, s, Vh = torch.linalg.svd(S, full_matrices=False)
    k = 1
    while float((s[:k] ** 2).sum()) < energy * float((s**2).sum()):
        k += 1
    inside = z @ Vh[:k].mT @ Vh[:k]
    return float((inside**2).sum() / (z**2).sum())


# -- norms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_norms_by_definition(shape):
    S, W, z, v = randn(*shape), randn(*shape), randn(9, shape[1]), randn(9, shape[0])
    assert relative_norm(S, W, -0.3) == exact(0.3 * math.sqrt((S**2).sum() / (W**2).sum()))
    fast = [float((0.3 * (S @ x) ** 2 * 0.3).sum()) for x in z]
    slow = [float(((W @ x) ** 2).sum()) for x in z]
    assert output_change(S, W, z, -0.3) == exact(math.sqrt(sum(fast) / sum(slow)))
    update = sum(torch.outer(v[t], z[t]) for t in range(9))
    assert update_norm(v, z) == exact(float((update**2).sum().sqrt()))


def test_output_change_of_equal_ratios_is_that_ratio():
    W, z = randn(6, 10), randn(9, 10) * torch.logspace(-3, 3, 9, dtype=torch.float64)[:, None]
    assert output_change(5 * W, W, z, 0.1) == exact(0.5)


def test_output_change_is_not_carried_by_a_token_that_w0_maps_to_nothing():
    S, W = randn(6, 10), randn(6, 10)
    null = torch.linalg.svd(W).Vh[-1]
    z = torch.cat([randn(9, 10), 1e-3 * null[None]])
    assert output_change(S, W, z, 1.0) == exact(output_change(S, W, z[:-1], 1.0), rel=1e-3)


def test_nothing_to_compare_with():
    S, zero, z = randn(6, 10), torch.zeros(6, 10), randn(3, 10)
    assert relative_norm(S, zero, 0.1) is None
    assert output_change(S, zero, z, 0.1) is None
    assert output_change(S, S, 0 * z, 0.1) is None
    assert relative_norm(zero, S, 0.1) == output_change(zero, S, z, 0.1) == 0


def test_updates_that_cancel_have_no_norm():
    for _ in range(20):  # rounding leaves squares of either sign
        v, z = randn(4, 6), randn(4, 10)
        assert update_norm(torch.cat([v, *[-v / 3] * 3]), torch.cat([z] * 4)) < 1e-6 * update_norm(v, z)


def test_half_precision_is_taken_exactly():
    v, z = randn(9, 6).bfloat16(), randn(9, 10).bfloat16()
    assert update_norm(v, z) == exact(float((v.double().mT @ z.double()).norm()), rel=1e-12)
    S, W = randn(6, 10).bfloat16(), randn(6, 10).bfloat16()
    assert relative_norm(S, W, 1) == exact(float(S.double().norm() / W.double().norm()), rel=1e-12)


# -- rank --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_effective_rank_is_that_of_the_singular_values(shape, dtype):
    S = randn(*shape).to(dtype)
    p = torch.linalg.svdvals(S.double())
    p = p / p.sum()
    assert effective_rank(S) == exact(math.exp(-float((p * p.log()).sum())), abs=1e-5)


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.eye(7)) == exact(7)
    assert effective_rank(torch.eye(12)[:5]) == exact(5)
    assert effective_rank(torch.outer(randn(40), randn(60))) == exact(1, abs=1e-5)
    p = [0.5, 0.25, 0.25]
    assert effective_rank(torch.diag(torch.tensor(p))) == exact(math.exp(-sum(x * math.log(x) for x in p)))
    assert effective_rank(torch.zeros(4, 6)) == 0


def test_effective_rank_does_not_depend_on_scale_or_basis():
    S = randn(6, 10)
    want = effective_rank(S)
    assert 1 < want < 6
    for other in (1e-6 * S, 1e6 * S, -S, S.mT, orthonormal(6, 6) @ S, S @ orthonormal(10, 10)):
        assert effective_rank(other) == exact(want, rel=1e-6)


def test_rounding_of_the_gram_matrix_adds_next_to_nothing_to_a_rank():
    S = orthonormal(600, 3) @ orthonormal(700, 3).mT
    assert effective_rank(S) == exact(3, abs=1e-3)


# -- overlap -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_overlap_by_definition(shape, energy):
    S, z = randn(*shape), randn(9, shape[1])
    assert key_overlap(S, z, energy) == exact(overlap_by_svd(S, z, energy * (1 - 1e-12)), rel=1e-6)


@pytest.mark.parametrize(("D", "F"), [(6, 20), (20, 12)])
def test_overlap_with_learned_keys_and_with_others(D, F):
    basis = orthonormal(F, 10)
    learned, other = basis[:, :4], basis[:, 4:]
    S = randn(9, D).mT @ (randn(9, 4) @ learned.mT)
    inside, outside = randn(5, 4) @ learned.mT, randn(5, 6) @ other.mT
    assert key_overlap(S, inside, 1.0) == exact(1)
    assert key_overlap(S, outside, 1.0) == exact(0, abs=1e-9)
    inside, outside = inside / inside.norm(), outside / outside.norm()
    assert key_overlap(S, math.sqrt(0.3) * inside + math.sqrt(0.7) * outside, 1.0) == exact(0.3)
    assert key_overlap(S, torch.cat([3 * inside, outside]), 1.0) == exact(0.9)


def test_overlap_counts_the_leading_directions_only():
    right = orthonormal(10, 3)
    S = orthonormal(6, 3) @ torch.diag(torch.tensor([10.0, 5.0, 1.0], dtype=torch.float64)) @ right.mT
    shares = [key_overlap(S, right[:, i : i + 1].mT) for i in range(3)]  # 100 + 25 of 126 are more than 99%
    assert shares == exact([1, 1, 0], abs=1e-9)
    assert key_overlap(S, right[:, 1:2].mT, energy=0.7) == exact(0, abs=1e-9)


def test_overlap_does_not_depend_on_scale():
    S, z = randn(6, 10), randn(9, 10)
    want = key_overlap(S, z)
    assert 0 < want < 1
    assert key_overlap(1e-5 * S, 1e4 * z) == exact(want)
    assert key_overlap(orthonormal(6, 6) @ S, z) == exact(want)


def test_overlap_of_nothing():
    assert key_overlap(torch.zeros(6, 10), randn(3, 10)) == 0
    assert key_overlap(randn(6, 10), torch.zeros(3, 10)) == 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_not_finite(bad):
    S, W, z = randn(6, 10), randn(6, 10), randn(3, 10)
    S[2, 3] = bad
    assert not math.isfinite(relative_norm(S, W, 0.1))
    assert not math.isfinite(output_change(S, W, z, 0.1))
    assert math.isnan(effective_rank(S))
    assert math.isnan(key_overlap(S, z))
    assert math.isnan(key_overlap(W, torch.cat([z, S])))
