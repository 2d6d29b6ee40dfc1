"""Worked examples of rules beside the paper's sum. Each is its formula; the generic scan does the rest."""

import torch
from torch import Tensor

from .algebra import outer
from .rules import Rule, State, register_rule


@register_rule("delta")
class Delta(Rule):
    """Delta rule with one step per chunk: ``S' = (1 - decay) S + (V - lr Z S^T)^T Z / C``.

    What is written is the error of what S already recalls, so a key that comes again overwrites instead of piling up
    (Widrow & Hoff 1960; for sequence layers: Schlag et al. 2021, Yang et al. 2024, there token by token).
    """

    decay: float = 0.0
    linear = True

    def update(self, state: State, z: Tensor, v: Tensor, W0: Tensor | None) -> State:
        error = v.to(z.dtype) - self.apply(state, z)
        return {"S": (1 - self.decay) * state["S"] + outer(error, z) / z.shape[1]}


@register_rule("momentum")
class Momentum(Rule):
    """Heavy ball: ``M' = beta M + sum_t v_t z_t^T``, ``S' = (1 - decay) S + M'``.

    Polyak 1964; as test-time training: Titans, Behrouz et al. 2024.
    """

    decay: float = 0.0
    beta: float = 0.9
    linear = True

    def init(self, B: int, D: int, F: int, like: Tensor) -> State:
        zero = super().init(B, D, F, like)["S"]
        return {"S": zero, "M": zero.clone()}

    def update(self, state: State, z: Tensor, v: Tensor, W0: Tensor | None) -> State:
        M = self.beta * state["M"] + outer(v.to(z.dtype), z)
        return {"S": (1 - self.decay) * state["S"] + M, "M": M}


@register_rule("muon")
class Muon(Rule):
    """``S' = (1 - decay) S + NS5(sum_t v_t z_t^T)``: all singular values of a chunk's update become about 1.

    Five Newton-Schulz steps with Jordan's coefficients (Muon, 2024; in test-time training: LaCT, Zhang et al. 2025).
    """

    decay: float = 0.0
    additive = True

    @property
    def keep(self) -> float:
        return 1 - self.decay

    def write(self, z: Tensor, v: Tensor, W0: Tensor | None) -> Tensor:
        X: Tensor = outer(v.to(z.dtype), z)
        X = X / (torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            A = X @ X.mT
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        return X
