"""Noise, signal and shrinkage of a policy gradient, from its gradients on two halves of the prompts.

Let g1, g2 be the gradients on two halves and g their mean. g1 . g2 estimates the squared norm of the expected gradient
(the signal) without bias, |g1 - g2|^2 / 4 the trace of the covariance of g (the noise). With u1, u2 the gradients that
leave-one-out advantages give on the same rows, (g1 . u2 + g2 . u1) / 2 over u1 . u2 estimates the shrinkage: the part
of the unbiased gradient that is left when completions are part of their own baseline.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Gradients = Sequence[Tensor]


def half_gradients(
    score: Callable[[Tensor], Tensor],
    advantages: Sequence[Tensor],
    half: Tensor,
    parameters: Sequence[Tensor],
    batch_size: int,
    tokens: int,
) -> list[list[Tensor]]:
    """Return the gradients of -sum A log pi / ``tokens``: by half, then by kind of advantages; each one per parameter.

    ``score(rows)``: log-probabilities [len(rows), T] with gradients; ``advantages``: one [B, T] per kind, 0 where no
    token was sampled; ``half`` [B]: 0, 1, or -1 for rows to leave out. ``.grad`` of the parameters stays as it is.
    """
    found = [[torch.zeros_like(p) for p in parameters] for _ in range(2 * len(advantages))]
    for h in (0, 1):
        chosen = (half == h).nonzero().flatten()
        for start in range(0, len(chosen), batch_size):
            rows = chosen[start : start + batch_size]
            with torch.enable_grad():
                log_probs = score(rows)
                for k, values in enumerate(advantages):
                    loss = -(values[rows] * log_probs).sum() / tokens
                    last = k == len(advantages) - 1
                    gradients = torch.autograd.grad(loss, parameters, retain_graph=not last, allow_unused=True)
                    for total, gradient in zip(found[h * len(advantages) + k], gradients, strict=True):
                        if gradient is not None:
                            total += gradient
    return found


def noise_and_signal(g1: Gradients, u1: Gradients, g2: Gradients, u2: Gradients) -> dict[str, float]:
    """Return ``signal_sq``, ``noise_sq``, and for the shrinkage ``cross`` and ``unbiased_signal_sq``."""
    return {
        "signal_sq": _dot(g1, g2),
        "noise_sq": sum(float((a.double() - b.double()).square().sum()) for a, b in zip(g1, g2, strict=True)) / 4,
        "cross": (_dot(g1, u2) + _dot(g2, u1)) / 2,
        "unbiased_signal_sq": _dot(u1, u2),
    }


def shrinkage(cross: Sequence[float], unbiased_signal_sq: Sequence[float]) -> float:
    """Return the ratio of the sums; NaN where the unbiased signal is lost in noise (not above 0)."""
    signal = sum(unbiased_signal_sq)
    return sum(cross) / signal if signal > 0 else math.nan


def _dot(a: Gradients, b: Gradients) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
