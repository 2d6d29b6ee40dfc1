"""Baselines of the policy gradient per sampled token, on plain tensors: the Optimal Token Baseline and related ones.

Optimal Token Baseline with the Logit-Gradient Proxy: Li et al., ICML 2026, arXiv 2602.07078. Needs torch alone.

Shapes: R rows in groups of N that share a prompt and lie next to each other, T token positions, V words.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError

BASELINES = ("otb", "instant", "optimal_trajectory", "length", "mean", "none")
"""``otb``: each position's returns, weighted by the energy up to it. ``instant``: weighted by the token's own energy.

One number per group, from all its rows: ``optimal_trajectory`` (weighted by the row's whole energy), ``length`` (by its
number of sampled tokens), ``mean``. ``none``: 0.
"""
LONE_TAILS = ("reward", "zero", "mean")
"""Treatments of tokens at which one row of its group is left: its return, no advantage, return minus mean."""
USES_ENERGY = ("otb", "instant", "optimal_trajectory")
_BY_POSITION = ("otb", "instant")
_TINY = 1e-8


@dataclass(frozen=True)
class Advantages:
    """All [R, T], 0 (False) where no token was sampled: ``values`` (A), ``baseline`` (B) and ``is_lone``.

    ``is_lone`` marks the tokens past the second longest row of their group, whose baseline ``lone_tail`` decided.
    """

    values: Tensor
    baseline: Tensor
    is_lone: Tensor


def log_sum_of_squares(logits: Tensor) -> Tensor:
    """Return log sum_v pi(v)^2 [...] of the distributions softmax(``logits`` [..., V])."""
    return (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)


def energy_proxy(log_probs: Tensor, log_sum_sq: Tensor) -> Tensor:
    """Return w, the squared norm of each token's score with respect to the logits: 1 - 2 pi + sum_v pi(v)^2, in [0, 2).

    ``log_probs``: log-probability of the sampled token; ``log_sum_sq``: `log_sum_of_squares` at the same place, both at
    the sampling temperature. Any shape.
    """
    return (1 - 2 * log_probs.exp() + log_sum_sq.exp()).clamp(min=0)


def realised_energy(w: Tensor, mask: Tensor) -> Tensor:
    """Return W [R, T]: the sum of ``w`` over a row's sampled tokens up to and including each position."""
    return torch.where(mask.bool(), w, 0).cumsum(1)


def rewards_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    """Return G [R, T], 0 where ``mask`` is: the sum of token rewards [R, T] from a sampled token on.

    ``rewards`` [R] are rewards of whole rows: G is the row's reward at all its sampled tokens.
    """
    mask = mask.bool()
    if rewards.ndim == 1:
        return torch.where(mask, rewards[:, None], 0)
    sampled = torch.where(mask, rewards, 0)
    return torch.where(mask, sampled.flip(1).cumsum(1).flip(1), 0)


def token_advantages(
    rewards: Tensor,
    mask: Tensor,
    w: Tensor | None = None,
    *,
    group_size: int,
    baseline: str = "otb",
    leave_one_out: bool = False,
    lone_tail: str = "reward",
    ratios: Tensor | None = None,
) -> Advantages:
    """Return the advantage A = G - B of every sampled token.

    ``rewards``: [R] for whole rows or [R, T] for tokens; a row with a NaN is left out of every baseline and gets A = 0.
    ``mask`` [R, T]: nonzero where a token was sampled (not padding, not the prompt, not a tool's output); rows are
    compared by their number of sampled tokens, wherever these stand. ``w`` [R, T]: `energy_proxy`, for the baselines in
    ``USES_ENERGY``. ``group_size``: N, rows [0, N) are the first group. ``ratios`` [R, T]: importance ratios; w is
    multiplied by their squares.

    A row is part of its own baseline unless ``leave_one_out``: without it the expected gradient is too small, by the
    factor (N - 1) / N for ``mean``; for weighted baselines by another one, and its direction changes a little. A group
    with a single row has B = 0.

    Advantages have the rewards' type, at least float32. Raises UserError on unknown names and shapes that do not fit.
    """
    _check(rewards, mask, w, ratios, group_size, baseline, lone_tail)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    # Each row's sampled tokens move to its front, in order, and back at the end.
    order = (~mask.bool()).to(torch.uint8).argsort(dim=1, stable=True)
    alive = mask.bool().gather(1, order)
    returns = rewards_to_go(rewards.to(dtype), mask)
    valid = ~(rewards.isnan() if rewards.ndim == 1 else torch.where(mask.bool(), rewards, 0).isnan().any(1))
    whole = rewards.to(dtype) if rewards.ndim == 1 else torch.where(mask.bool(), rewards, 0).to(dtype).sum(1)

    def grouped(x: Tensor) -> Tensor:
        return x.reshape(-1, group_size, *x.shape[1:])

    valid, whole = grouped(valid)[..., None], grouped(whole)[..., None]  # [P, N, 1]
    whole = torch.where(valid, whole, 0)
    alive = grouped(alive) & valid  # [P, N, T]
    G = torch.where(alive, grouped(returns.gather(1, order)), 0)
    if baseline in USES_ENERGY:
        assert w is not None
        energy = w.to(dtype) if ratios is None else w.to(dtype) * ratios.to(dtype) ** 2
        energy = torch.where(alive, grouped(energy.gather(1, order)), 0)
    else:
        energy = alive.to(dtype)  # so that a row's sum is its number of sampled tokens

    others = torch.ones(group_size, group_size, dtype=dtype, device=G.device)
    if leave_one_out:
        others.fill_diagonal_(0)

    def average(values: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted mean over the group for each row. Sums the others, never a total minus the own part."""
        return (others @ (weights * values)) / (others @ weights + _TINY)

    present = valid.to(dtype)
    mean = (others @ (present * whole)) / (others @ present).clamp(min=1)
    is_lone = torch.zeros_like(alive)
    if baseline in _BY_POSITION:
        is_lone = alive & (alive.sum(1, keepdim=True) == 1)
        B = average(G, energy.cumsum(2) * alive if baseline == "otb" else energy)
        B = torch.where(is_lone, {"reward": torch.zeros_like(G), "zero": G, "mean": mean}[lone_tail], B)
    elif baseline == "none":
        B = torch.zeros_like(G)
    else:
        B = mean if baseline == "mean" else average(whole, energy.sum(2, keepdim=True))
    B = torch.where(alive & (valid.sum(1, keepdim=True) > 1), B, 0)

    def back(x: Tensor) -> Tensor:
        return torch.zeros_like(x.flatten(0, 1)).scatter(1, order, x.flatten(0, 1))

    return Advantages(back((G - B) * alive), back(B), back(is_lone))


def _check(
    rewards: Tensor,
    mask: Tensor,
    w: Tensor | None,
    ratios: Tensor | None,
    group_size: int,
    baseline: str,
    lone_tail: str,
) -> None:
    check_names(baseline, lone_tail)
    if mask.ndim != 2:
        raise UserError(f"mask must have the shape [rows, tokens], got {list(mask.shape)}")
    if group_size < 1 or len(mask) % group_size:
        raise UserError(f"{len(mask)} rows are not groups of {group_size}: pass whole groups, one after the other")
    if rewards.shape not in (mask.shape, mask.shape[:1]):
        raise UserError(
            f"rewards must have the shape {list(mask.shape[:1])} or {list(mask.shape)}, got {list(rewards.shape)}"
        )
    if baseline in USES_ENERGY and w is None:
        raise UserError(f'baseline="{baseline}" needs w: pass energy_proxy(log_probs, log_sum_sq)')
    for name, value in (("w", w), ("ratios", ratios)):
        if value is not None and value.shape != mask.shape:
            raise UserError(f"{name} must have the shape {list(mask.shape)}, got {list(value.shape)}")


def check_names(baseline: str, lone_tail: str) -> None:
    """Raise UserError when a baseline or a treatment of lone tails does not exist."""
    if baseline not in BASELINES:
        raise UserError(f"baseline must be one of {', '.join(BASELINES)}, got {baseline!r}")
    if lone_tail not in LONE_TAILS:
        raise UserError(f"lone_tail must be one of {', '.join(LONE_TAILS)}, got {lone_tail!r}")
