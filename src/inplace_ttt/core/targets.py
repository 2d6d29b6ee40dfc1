"""Targets: the values v that a chunk writes. One class and one registration each.

A target is an ``nn.Module`` that owns its parameters in child modules; after attach these are beside the adapting
projection as ``mlp.ttt_NAME``. It gets complete chunks and sees nothing outside them. It may look at later tokens of
the same chunk, because a chunk's update is first used in the next one.

Shapes: B rows, U complete chunks of C tokens, D output width, F width of z, K taps.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from .chunks import ChunkTable
from .rules import options_of

TARGETS: dict[str, type["Target"]] = {}
"""Targets by name."""
Kind = TypeVar("Kind", bound="type[Target]")
Values = tuple[Tensor | None, Tensor | None]
"""Targets v [B, U * C, D] of the chunks that update, and the factors [B, U] by which they scale S first; or None."""


class Target(nn.Module):
    """A base class of all targets. Keywords of a subclass's ``__init__`` after ``width`` are ``objective_options``.

    A keyword that is named like a setting of ``InPlaceTTTConfig`` gets that setting's value unless the options give
    one. ``width``: D.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str | None] = None
    """Source of u: "input_embed" (token embeddings), "hidden_states" (the MLP's input), "both" (concatenated,
    [..., 2 D]), "loss" (the gradient of the next-token loss at the projection's output); None: the configuration's
    ``target``."""
    needs_keys: ClassVar[bool] = False
    """True if ``forward`` uses z."""
    gates: bool = False
    """True if ``forward`` also returns a decay factor of the state for each chunk."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, u: Tensor, z: Tensor | None) -> Any:
        """Return v [B, U, C, D] for u [B, U, C, D] and z [B, U, C, F] (None unless ``needs_keys``).

        With ``gates``: also the factors [B, U] by which the state shrinks before each chunk's update.
        """
        raise NotImplementedError(f"target {self.name!r} has no forward")

    def taught(self, u: Tensor, z: Tensor | None) -> Tensor:
        """Return the values [B, U, C, D] that are compared with ``-dL/do`` (core/teaching.py): those of ``forward``."""
        found = self.forward(u, z)
        v: Tensor = found[0] if isinstance(found, tuple) else found
        return v

    @property
    def is_trained(self) -> bool:
        """Tell if it writes anything; False for parameters whose initial values make every update zero."""
        return True


def register_target(name: str) -> Callable[[Kind], Kind]:
    """Register a subclass of ``Target`` for ``InPlaceTTTConfig(objective=name)``."""

    def register(cls: Kind) -> Kind:
        if not issubclass(cls, Target):
            raise UserError(f"{cls.__name__} must be a subclass of inplace_ttt.Target")
        cls.name = name
        TARGETS[name] = cls
        return cls

    return register


def target_options(name: str, options: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of target ``name``. UserError for a name or an option that does not exist."""
    if name not in TARGETS:
        raise UserError(
            f"objective must be one of {', '.join(sorted(TARGETS))}, got {name!r} (register_target adds one)"
        )
    parameters = list(inspect.signature(TARGETS[name].__init__).parameters.values())[2:]
    known = {p.name: None for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    options_of("objective", name, known, options)
    return {key: settings[key] for key in known if key in settings} | dict(options)


def make_target(name: str, width: int, options: Mapping[str, Any], settings: Mapping[str, Any]) -> Target:
    """Return the target ``name`` of a projection of output width ``width``, on the default device.

    ``settings``: values of the configuration, for keywords that the options leave out. UserError for a name or an
    option that does not exist, for values out of range, and for parameters that are not in child modules.
    """
    keywords = target_options(name, options, settings)
    target = TARGETS[name](width, **keywords)
    if own := [*target._parameters, *target._buffers]:
        raise UserError(f"target {name!r} holds {own[0]!r} itself: put parameters and buffers into a child module")
    return target


def values_of(
    target: Callable[..., Any], u_BTD: Tensor, z_BTF: Tensor, table: ChunkTable, past: "tuple[Tensor | None, ...]"
) -> Values:
    """Return targets and gates of the chunks of a call that update. ``past``: pending z and u.

    The result has the dtype of the target's output (autocast's, where it is on).
    """
    if not table.updates:
        return None, None
    C, U = table.chunk_size, table.updates
    past_z, past_u = past
    u = chunked(u_BTD, past_u, table).unflatten(1, (U, C))  # type: ignore[no-untyped-call]
    z = chunked(z_BTF, past_z, table).unflatten(1, (U, C)) if getattr(target, "needs_keys", False) else None  # type: ignore[no-untyped-call]
    found = target.forward(u, z) if isinstance(target, nn.Module) else target(u, z)  # not a submodule of the model
    v, keep = found if isinstance(found, tuple) else (found, None)
    return v.flatten(1, 2), keep


# -- the shipped targets -----------------------------------------------------------------------------------------------


def _assign(weight: Any, value: Tensor) -> None:
    """Copy a full tensor into a parameter; where it is sharded, all ranks use rank 0's value."""
    value = value.to(weight.dtype)
    if hasattr(weight, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
    weight.copy_(value)


class TargetConv(nn.Module):
    """A kernel kappa of a depthwise convolution over time: ``weight`` [D, 1, K], applied by ``convolve``.

    Zero at the start; with ``tap`` one at that tap.
    """

    def __init__(self, width: int, kernel: int, tap: int | None = None) -> None:
        super().__init__()
        self.tap = tap
        self.weight = nn.Parameter(torch.empty(width, 1, kernel))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set kappa to its initial value."""
        nn.init.zeros_(self.weight)
        if self.tap is not None:
            _assign(self.weight, torch.eye(self.weight.shape[2], device="cpu")[self.tap].expand(self.weight.shape))

    def forward(self) -> Tensor:
        """Return the weight, so that hooks (accelerate's, say) can load one that is offloaded."""
        return self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, kernel={self.weight.shape[2]}"


class TargetProjection(nn.Module):
    """A projection P: ``weight`` [D, D], diagonal at the start, used as ``c P`` (not as ``nn.Linear`` would)."""

    def __init__(self, width: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(width, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sample the diagonal again, with the CPU's random generator whatever the default device is."""
        _assign(self.weight, torch.diag(torch.randn(self.weight.shape[0], device="cpu") * self.std))

    def forward(self) -> Tensor:
        """Return the weight, as ``TargetConv`` does."""
        return self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}"


class TargetGates(nn.Module):
    """A token's gates: beta = 2 sigmoid(w.u + b) from 1, gamma = exp(-softplus(w.u + b)) from 1 to seven digits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(2, width)), nn.Parameter(torch.empty(2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set beta to 1 and gamma to almost 1."""
        nn.init.zeros_(self.weight)
        self.bias.copy_(torch.tensor([0.0, -16.0]))

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return beta [...] and log gamma [...] for u [..., D]."""
        write, forget = (u.to(self.weight.dtype) @ self.weight.mT + self.bias).unbind(-1)
        return 2 * torch.sigmoid(write), -torch.nn.functional.softplus(forget)


class Shaped(Target):
    """A base of the shipped targets: an optional projection P, centring, gates, and the ridge write.

    * ``center``: ``v_t`` less its mean over the chunk, so that what all tokens have in common does not add up.
    * ``gates``: ``S' = (prod_t gamma_t) S + sum_t beta_t (prod_{s>t} gamma_s) v_t z_t^T``, beta and gamma from u:
      exact as one factor per chunk and one per row of v (gated linear attention, Yang et al. 2023, in chunks).
    * ``ridge``: ``v' = (Z Z^T + l I)^-1 V`` with l = ridge * mean |z_t|^2: one ridge regression per chunk, so that keys
      with a shared direction do not add up (after TTT-NTP, arXiv 2606.21803).
    """

    std = 0.0
    """sigma of P's diagonal at the start."""

    def __init__(
        self,
        width: int,
        *,
        projection: bool = True,
        gates: bool = False,
        ridge: float | None = None,
        center: bool = False,
    ) -> None:
        super().__init__(width)
        if ridge is not None and not ridge > 0:
            raise UserError(f"ridge must be positive, got {ridge}")
        self.ridge, self.gates, self.center = ridge, gates, center
        self.needs_keys = ridge is not None  # type: ignore[misc]
        if projection:
            self.proj = TargetProjection(width, self.std)
        if gates:
            self.gate = TargetGates(2 * width if self.source == "both" else width)

    def forward(self, u: Tensor, z: Tensor | None) -> Any:
        v, keep = self.gated(u)
        if self.ridge is not None:
            assert z is not None
            v = ridge_values(z, v, self.ridge)
        return v if keep is None else (v, keep)

    def taught(self, u: Tensor, z: Tensor | None) -> Tensor:
        """Return the values before the ridge write, which stores them so that ``S z_t`` gives them back."""
        return self.gated(u)[0]

    def gated(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the values before the ridge write, and each chunk's decay factor of the state (None without gates)."""
        v = self.projected(u)
        if self.center:
            v = v - v.mean(-2, keepdim=True)
        if not self.gates:
            return v, None
        beta, log_gamma = self.gate(u)
        behind = log_gamma.flip(-1).cumsum(-1).flip(-1)  # of this token and all later ones
        return v * (beta * (behind - log_gamma).exp()).to(v.dtype)[..., None], behind[..., 0].exp()

    def projected(self, u: Tensor) -> Tensor:
        """Return the values [B, U, C, D] as they are, neither centred nor gated."""
        P = self.proj() if hasattr(self, "proj") else None
        v = self.mix(u, None if P is None else P.dtype)
        return v if P is None else v.to(P.dtype) @ P

    def mix(self, u: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Return c [B, U, C, D], the input of P; ``dtype``: P's, None without one."""
        raise NotImplementedError


@register_target("learned")
class Learned(Shaped):
    """A learned target, the paper's: ``c_t = sum_k kappa[:, k] u[t + k - (K-1-L)]`` inside the chunk, ``v_t = c_t P``.

    kappa is zero and P is diagonal N(0, std^2) at the start, so nothing changes before training. With
    ``start="next_token"`` kappa is one at the tap of the next token and P is zero, so nothing changes either, and v
    grows with P alone. Half-precision sources are convolved in float32. Section 2 of docs/method.md.
    """

    def __init__(
        self,
        width: int,
        *,
        conv_kernel: int = 5,
        lookahead: int = 2,
        projection: bool = True,
        init_std: float | None = None,
        gates: bool = False,
        ridge: float | None = None,
        center: bool = False,
        start: str = "zero",
    ) -> None:
        if start not in ("zero", "next_token"):
            raise UserError(f'start must be "zero" or "next_token", got {start!r}')
        has_tap = start == "next_token"
        if has_tap and not projection:
            raise UserError('start="next_token" begins with P at zero: it needs projection=True')
        if has_tap and lookahead < 1:
            raise UserError(f'start="next_token" needs a tap for the next token: lookahead at least 1, got {lookahead}')
        self.std = 0.0 if has_tap else 0.02 if init_std is None else init_std
        super().__init__(width, projection=projection, gates=gates, ridge=ridge, center=center)
        self.conv = TargetConv(width, conv_kernel, conv_kernel - lookahead if has_tap else None)
        self.lookahead = lookahead

    def mix(self, u: Tensor, dtype: torch.dtype | None) -> Tensor:
        return convolved(u, self.conv()[:, 0], self.lookahead, dtype)

    @property
    def is_trained(self) -> bool:
        return _has_values(self.conv) and (not hasattr(self, "proj") or _has_values(self.proj))


def _has_values(module: Any) -> bool:
    """Tell whether a module's weight is not all zero; a weight on the meta device counts as trained."""
    return module.weight.device.type == "meta" or bool(module.weight.any())


class Shift(Shaped):
    """A fixed target: ``v_t = u[t + shift] P`` inside the chunk, without a convolution; P is zero at the start."""

    shift: ClassVar[int]

    def mix(self, u: Tensor, dtype: torch.dtype | None) -> Tensor:
        return convolved(u, u.new_ones(u.shape[-1], 1), self.shift, dtype)

    @property
    def is_trained(self) -> bool:
        return not hasattr(self, "proj") or _has_values(self.proj)


@register_target("next_token")
class NextToken(Shift):
    """A target from the next token's source."""

    shift = 1


@register_target("reconstruction")
class Reconstruction(Shift):
    """A target from the same token's source."""

    shift = 0


@register_target("next_error")
class NextError(Shaped):
    """A prediction error: ``v_t = e[t + 1] P + h[t] Q``, e the embedding, h the MLP's input.

    Minus the gradient of a loss is the observed minus the predicted value, so a target that approximates it needs both.
    P and Q are zero at the start; a chunk's last token, whose next token is outside the chunk, has v = 0.
    """

    source = "both"

    def __init__(self, width: int, *, gates: bool = False, ridge: float | None = None, center: bool = False) -> None:
        super().__init__(width, gates=gates, ridge=ridge, center=center)
        self.input_proj = TargetProjection(width, 0.0)

    def projected(self, u: Tensor) -> Tensor:
        e, h = u.chunk(2, -1)
        P, Q = self.proj(), self.input_proj()
        v = torch.cat([e[..., 1:, :], h[..., :-1, :]], -1).to(P.dtype) @ torch.cat([P, Q])
        return torch.nn.functional.pad(v, (0, 0, 0, 1))

    @property
    def is_trained(self) -> bool:
        return _has_values(self.proj) or _has_values(self.input_proj)


@register_target("loss")
class Loss(Target):
    """A target without parameters: ``v_t = -dL/do_t``, L the next-token losses inside the chunk. See hf/loss.py.

    Mikolov et al. 2010; Krause et al. 2018 (dynamic evaluation); TTT-E2E, arXiv 2512.23675 (as a layer's update).
    """

    source = "loss"


# -- arithmetic --------------------------------------------------------------------------------------------------------


def chunked(x_BTW: Tensor, past_BPW: Tensor | None, table: ChunkTable) -> Tensor:
    """Return the tokens of the first ``table.updates`` chunk slots, [B, updates * C, W]; zero where a slot has none.

    A view of ``x`` where possible. ``past`` holds the pending tokens, at least ``table.prefix`` of them.
    """
    B, W = x_BTW.shape[0], x_BTW.shape[2]
    C, U, P = table.chunk_size, table.updates, table.prefix
    if P and past_BPW is None:
        raise ValueError(f"{P} pending tokens are missing: pass them as past")
    if table.index is None and not P:
        return x_BTW[:, : U * C]
    extended = x_BTW if not P or past_BPW is None else torch.cat([past_BPW[:, :P].to(x_BTW.dtype), x_BTW], 1)
    if table.index is None:
        return extended[:, : U * C]
    index = table.index[:, :U].reshape(B, U * C)
    picked = extended.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, W))
    return torch.where((index >= 0)[..., None], picked, 0)


def convolve(u_NCD: Tensor, kappa_DK: Tensor, lookahead: int) -> Tensor:
    """Compute ``c_t = sum_k kappa[:, k] * u[t + k - (K-1-L)]`` within each of N chunks; outside counts as zero."""
    C, K = u_NCD.shape[1], kappa_DK.shape[1]
    before = max(K - 1 - lookahead, 0)
    padded = torch.nn.functional.pad(u_NCD, (0, 0, before, max(lookahead, 0)))
    c = torch.zeros_like(u_NCD, dtype=torch.promote_types(u_NCD.dtype, kappa_DK.dtype))
    for k in range(K):
        first = before + k - (K - 1 - lookahead)
        c = torch.addcmul(c, padded[:, first : first + C], kappa_DK[:, k])
    return c


FUSED: list[Callable[[Tensor, Tensor, int, int, torch.dtype], Tensor | None]] = []
"""Faster convolutions of [B, U * C, D], tried in order; each returns None for inputs that it does not support."""


def convolved(u: Tensor, kappa_DK: Tensor, lookahead: int, dtype: torch.dtype | None) -> Tensor:
    """Return ``convolve`` of u [B, U, C, D]; ``dtype``: of the result (None: float32 at least)."""
    B, U, C, D = u.shape
    for fused in FUSED:
        found = fused(u.flatten(1, 2), kappa_DK, C, lookahead, torch.float32 if dtype is None else dtype)
        if found is not None:
            return found.view(B, U, C, D)
    if u.dtype in (torch.bfloat16, torch.float16):
        u, kappa_DK = u.float(), kappa_DK.float()
    return convolve(u.reshape(B * U, C, D), kappa_DK, lookahead).view(B, U, C, D)


def ridge_values(z: Tensor, v: Tensor, ridge: float) -> Tensor:
    """Return ``(Z Z^T + l I)^-1 V`` for z [..., C, F] and v [..., C, D], l = ridge * mean_t |z_t|^2; in v's dtype."""
    exact = torch.float64 if z.dtype == torch.float64 else torch.float32
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(exact)
        gram = z @ z.mT
        size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=torch.finfo(exact).tiny)
        eye = torch.eye(z.shape[-2], dtype=exact, device=z.device)
        factor = torch.linalg.cholesky(gram / size + ridge * eye)
        return (torch.cholesky_solve(v.to(exact), factor) / size).to(v.dtype)
