"""Further rules beside the paper's sum. Each implements its formula only; the generic scan does the rest."""

import torch
from torch import Tensor

from ..errors import UserError
from .algebra import outer, size_of
from .rules import Rule, State, register_rule, slow_norm


@register_rule("delta")
class Delta(Rule):
    """A delta rule with one step per chunk: ``S' = (1 - decay) S + (V - lr Z S^T)^T Z / C``.

    It writes the error of what S recalls for a key, so a repeated key overwrites its value instead of accumulating
    (Widrow & Hoff 1960; for sequence layers: Schlag et al. 2021, Yang et al. 2024, there token by token).
    """

    decay: float = 0.0
    linear = True
    needs_weight = False

    def update(self, state: State, z: Tensor, v: Tensor, W0: Tensor | None) -> State:
        error = v.to(z.dtype) - self.apply(state, z)
        return {"S": (1 - self.decay) * state["S"] + outer(error, z) / z.shape[1]}


@register_rule("momentum")
class Momentum(Rule):
    """A heavy-ball rule: ``M' = beta M + sum_t v_t z_t^T``, ``S' = (1 - decay) S + M'``.

    Polyak 1964; as test-time training: Titans, Behrouz et al. 2024.
    """

    decay: float = 0.0
    beta: float = 0.9
    linear = True
    needs_weight = False

    def init(self, B: int, D: int, F: int, like: Tensor) -> State:
        zero = super().init(B, D, F, like)["S"]
        return {"S": zero, "M": zero.clone()}

    def update(self, state: State, z: Tensor, v: Tensor, W0: Tensor | None) -> State:
        M = self.beta * state["M"] + outer(v.to(z.dtype), z)
        return {"S": (1 - self.decay) * state["S"] + M, "M": M}


@register_rule("muon")
class Muon(Rule):
    """A Muon rule, ``S' = (1 - decay) S + NS5(sum_t v_t z_t^T)``: all singular values of an update become about 1.

    Five Newton-Schulz steps with Jordan's coefficients (Muon, 2024; in test-time training: LaCT, Zhang et al. 2025).
    """

    decay: float = 0.0
    additive = True
    needs_weight = False

    @property
    def keep(self) -> float:
        return 1 - self.decay

    def write(self, z: Tensor, v: Tensor, W0: Tensor | None) -> Tensor:
        X: Tensor = outer(v.to(z.dtype), z)
        X = X / (size_of(v, z, torch.linalg.vector_norm(X, dim=(1, 2)))[:, None, None] + 1e-7)
        for _ in range(5):
            A = X @ X.mT
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        return X


@register_rule("norm_preserving")
class NormPreserving(Rule):
    """A rule whose weight keeps the norms of W0's rows.

    ``W = diag(|W0_r| / |(W0 + lr T)_r|) (W0 + lr T)``, ``T' = (1 - decay) T + sum v_t z_t^T``.

    T itself is never scaled; the state that is read is ``S = (W - W0) / lr``, so features that need a matrix work here.
    W is that of a DoRA adapter (Liu et al. 2024) with W0's magnitudes.
    """

    decay: float = 0.0
    linear = True
    dora = "T"
    free = ()

    def init(self, B: int, D: int, F: int, like: Tensor) -> State:
        zero = super().init(B, D, F, like)["S"]
        return {"S": zero, "T": zero.clone()}

    def update(self, state: State, z: Tensor, v: Tensor, W0: Tensor | None) -> State:
        if W0 is None:
            raise NotImplementedError("norm_preserving needs the whole weight, and it is split over ranks")
        T = (1 - self.decay) * state["T"] + outer(v.to(z.dtype), z)
        W0 = W0.to(T.dtype)
        lr, old = self.lr, W0.square().sum(-1)
        grown = (T * (2 * W0 + lr * T)).sum(-1)  # (|(W0 + lr T)_r|^2 - |W0_r|^2) / lr
        tiny = torch.finfo(T.dtype).tiny
        before, after = (x.clamp(min=tiny).sqrt() for x in (old, old + lr * grown))
        return {"S": (before / after)[..., None] * T - (grown / (after * (before + after)))[..., None] * W0, "T": T}


@register_rule("adaptive")
class Adaptive(Rule):
    """A sized write with an adaptive size r and decay of harmful updates, ``update_size="auto"``; v must be ``-dL/do``.

    With that target ``g = <V, lr S Z> / C`` is minus the derivative of the chunk's loss with respect to S's scale, in
    nats per token, at no extra cost. The loss is approximately convex along S, so g is also a lower bound of S's gain
    on the chunk. Before a chunk is written (hypergradient descent, Almeida et al. 1998, Baydin et al. 2018),

    * ``log r' = log r + rate * clip((g / d - aim) / width, -2, 1)``, d = ``lr r |W0| n / C``: the first-order
      decrease predicted for a write of this size. The first chunk of a document takes the r for which d = ``decrease``;
      ``largest`` is a bound;
    * ``S' = (1 - decay) S / (1 + max(0, -m - tolerance) / slope) + r |W0| dW / n``, m the running mean of g over some 4
      chunks, n the larger of |dW| and its running mean over 20: a harmful S shrinks, and a chunk with a small
      gradient (repeated text, say) writes little and changes r little.
    """

    decay: float = 0.0
    decrease: float = 0.1
    largest: float = 0.005
    aim: float = 0.0075
    width: float = 0.1
    rate: float = 0.1
    tolerance: float = 0.002
    slope: float = 0.02
    linear = True

    def need(self, promise: str, what: str) -> None:
        if not getattr(self, promise):
            raise UserError(f'{what} does not work with update_size="auto": give it a number (0.002, say)')

    def init(self, B: int, D: int, F: int, like: Tensor) -> State:
        S = super().init(B, D, F, like)["S"]
        return {"S": S, **{name: S.new_zeros(B) for name in ("size", "gain", "norm")}}

    def update(self, state: State, z: Tensor, v: Tensor, W0: Tensor | None) -> State:
        S, old, v = state["S"], state["size"], v.to(z.dtype)
        count = (v != 0).any(-1).sum(1).clamp(min=1)
        dW, norm, slow = outer(v, z), size_of(v, z), slow_norm(W0, "update_size")
        gain = (self.apply(state, z) * v).sum((1, 2), dtype=S.dtype) / count
        mean_norm = torch.where(old > 0, torch.lerp(state["norm"], norm, 0.05), norm)
        usual = torch.maximum(norm, mean_norm)
        promise = self.lr * slow * usual / count
        tiny = torch.finfo(S.dtype).tiny
        step = ((gain / (old * promise).clamp(min=tiny) - self.aim) / self.width).clamp(-2, 1)
        first = self.decrease / promise.clamp(min=tiny)
        size = torch.where(old > 0, old * (self.rate * step).exp(), first).clamp(max=self.largest)
        mean = torch.lerp(state["gain"], gain, 0.25)
        keep = (1 - self.decay) / (1 + (-mean - self.tolerance).clamp(min=0) / self.slope)
        factor = size * slow / usual
        S = keep[:, None, None] * S + factor[:, None, None] * dW
        return {"S": S, "size": size, "gain": mean, "norm": torch.where(norm.isfinite(), mean_norm, state["norm"])}
