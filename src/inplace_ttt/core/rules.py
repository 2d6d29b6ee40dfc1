"""Rules: the read and the update of a layer's fast weights. One class and one registration each.

A rule is a frozen dataclass of numbers; its state from chunk to chunk is a dict of tensors, [rows, ...] each:

* ``init`` returns the state at the beginning of a document,
* ``apply`` returns the fast weights' part of the projection's output,
* ``update`` returns the state after one complete chunk.

All three are pure: they return new tensors and modify none. What a rule *promises* (``linear``, ``additive``,
``outer``) decides which features support it; the others raise an error that names it. docs/extending.md has a worked
example.

Shapes: B rows, C tokens of a chunk, D output width, F width of z (the projection's input).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import UserError
from .algebra import norm_of, outer, shrink, size_of, state_dtype

State = dict[str, Tensor]
RULES: dict[str, type["Rule"]] = {}
"""Rules by name."""
Kind = TypeVar("Kind", bound="type[Rule]")


@dataclass(frozen=True)
class Rule:
    """A base class of all rules. The fields of a subclass are its ``rule_options``.

    A field that is named like a setting of ``InPlaceTTTConfig`` (``lr``, say) gets that setting's value unless the
    options give one.
    """

    lr: float = 0.1
    """Factor of the fast weights' output: the inner learning rate of a linear rule."""

    name: ClassVar[str] = ""
    linear: ClassVar[bool] = False
    """``apply`` is ``lr * S z`` with S = ``state["S"]`` [B, D, F]: can be folded into W0 and exported as LoRA."""
    additive: ClassVar[bool] = False
    """``S' = keep * S + write(z, v, W0)`` from S = 0, and nothing else is carried: ranks, undoing by subtraction."""
    outer: ClassVar[bool] = False
    """``write`` is ``sum_t v'_t z_t^T`` with v' = ``values(z, v, W0)``: the fast paths, pairs and factors of rank r."""
    from_zero: ClassVar[bool] = True
    """The initial state (``init``) adds nothing to the output, so chunks that see only that state are skipped."""
    dora: ClassVar[str | None] = None
    """Name of the state's tensor T for which W0 + lr S is W0 + lr T with rows scaled to W0's norms (a DoRA adapter)."""
    free: ClassVar[tuple[str, ...]] = ("lr",)
    """Fields that may change while a document is read."""
    needs_weight: ClassVar[bool] = True
    """True if ``update`` uses W0; False saves de-quantising the weight of a quantised model for every chunk."""

    def init(self, B: int, D: int, F: int, like: Tensor) -> State:
        """Return the state of B rows at the beginning of a document, on ``like``'s device."""
        return {"S": like.new_zeros(B, D, F, dtype=state_dtype(like.dtype))}

    def apply(self, state: State, z: Tensor) -> Tensor:
        """Return the fast weights' part of the output, [B, n, D], for inputs z [B, n, F]."""
        return self.lr * torch.bmm(z, state["S"].to(z.dtype).mT)

    def update(self, state: State, z: Tensor, v: Tensor, W0: Tensor | None) -> State:
        """Return the state after a chunk with inputs z [B, C, F] and targets v [B, C, D].

        ``W0``: the slow weight [D, F], treated as a constant; de-quantised where it is not dense (None in that case
        without ``needs_weight``); None where the weight is split over several ranks.
        """
        return {"S": self.keep * state["S"] + self.write(z, v, W0)}

    def update_as_written(self, state: State, z: Tensor, v: Tensor, W0: Tensor | None) -> State:
        """Return the state after a chunk, as ``update`` does; of an outer rule, ``values`` was applied to v before."""
        if not self.outer:
            return self.update(state, z, v, W0)
        return {"S": self.keep * state["S"] + outer(v, z)}

    def write(self, z: Tensor, v: Tensor, W0: Tensor | None) -> Tensor:
        """Return a chunk's update of S, [B, D, F] (additive rules)."""
        return outer(self.values(z, v, W0), z)

    def values(self, z: Tensor, v: Tensor, W0: Tensor | None) -> Tensor:
        """Return v' [B, C, D], the targets as written (outer rules). B may count the chunks of several rows."""
        return v

    @property
    def keep(self) -> float:
        """Return the factor by which an update scales S (additive rules)."""
        return 1.0

    @property
    def whole(self) -> bool:
        """Tell if an update needs all of F at once, which tensor parallelism splits."""
        return not self.outer or type(self).values is not Rule.values

    def difference(self, other: "Rule") -> str | None:
        """Return in words why a document cannot be continued with another rule; None where it can."""
        if type(self) is not type(other):
            return f"with rule {self.name!r}, this model reads with {other.name!r}"
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name not in self.free and mine != theirs:
                return f"with {field.name} {mine}, this model reads with {theirs}"
        return None

    def need(self, promise: str, what: str) -> None:
        """Raise UserError unless the rule promises ``promise``, which ``what`` needs."""
        if not getattr(self, promise):
            raise UserError(f"rule {self.name!r} is not {promise}, which {what} needs")


def register_rule(name: str) -> Callable[[Kind], Kind]:
    """Register a subclass of ``Rule`` for ``InPlaceTTTConfig(rule=name)``; it becomes a frozen dataclass."""

    def register(cls: Kind) -> Kind:
        if not issubclass(cls, Rule):
            raise UserError(f"{cls.__name__} must be a subclass of inplace_ttt.Rule")
        cls.name = name
        if cls.outer:
            cls.additive = True
        if cls.additive:
            cls.linear = True
        if cls.additive and not cls.from_zero:
            raise UserError(f"rule {name!r} is additive, so it must begin with S = 0: from_zero = True")
        RULES[name] = dataclass(frozen=True)(cls)
        return cls

    return register


def options_of(kind: str, name: str, known: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise UserError for options that a rule or target does not have."""
    if wrong := sorted(set(options) - set(known)):
        raise UserError(f"{kind} {name!r} has no option {wrong[0]!r}, only: {', '.join(sorted(known)) or 'none'}")


def make_rule(name: str, options: Mapping[str, Any], settings: Mapping[str, Any]) -> Rule:
    """Return the rule ``name``. ``settings``: values of the configuration, for fields that the options leave out.

    Raises UserError for a name or an option that does not exist, and for values out of range.
    """
    if name not in RULES:
        raise UserError(f"rule must be one of {', '.join(sorted(RULES))}, got {name!r} (register_rule adds one)")
    cls = RULES[name]
    known = {field.name: settings[field.name] for field in fields(cls) if field.name in settings}
    options_of("rule", name, {field.name: None for field in fields(cls)}, options)
    return cls(**(known | dict(options)))


@register_rule("sum")
class Sum(Rule):
    """A sum, the paper's rule: ``S' = (1 - decay) S + f * sum_t v_t z_t^T``, read as ``lr * S z``.

    f is 1 for the plain write, or depends on the chunk's ``dW = sum_t v_t z_t^T``; at most one of these is given:

    * ``clip`` (paper, appendix): ``f = min(1, tau / |dW|_F)``, tau = clip, or clip * |W0|_F with ``clip_relative``;
    * ``update_size``: ``f = r |W0|_F / |dW|_F``, so that every chunk moves the weight by the same share r;
    * ``soft_cap``: ``f = tau / (sigma_max(dW) + tau)``, tau = soft_cap * |W0|_F and sigma_max by power iteration on the
      factors (5 steps): bounded like a clip, with a gradient that stays finite where dW goes to 0.
    """

    decay: float = 0.0
    clip: float | None = None
    clip_relative: bool = False
    update_size: float | None = None
    soft_cap: float | None = None

    outer = True
    free = ("lr", "clip", "clip_relative", "update_size", "soft_cap")

    def __post_init__(self) -> None:
        given = [name for name in ("clip", "update_size", "soft_cap") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} both set the size of an update: give one of them")
        for name in given:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise UserError(f"{name} must be a positive number, got {value!r}")

    @property
    def keep(self) -> float:
        return 1 - self.decay

    @property
    def whole(self) -> bool:
        return self.clip is not None or self.update_size is not None or self.soft_cap is not None

    @property
    def needs_weight(self) -> bool:  # type: ignore[override]
        return self.clip_relative or self.update_size is not None or self.soft_cap is not None

    def values(self, z: Tensor, v: Tensor, W0: Tensor | None) -> Tensor:
        if not self.whole:
            return v
        v = v.to(z.dtype)
        if self.update_size is not None:
            factor = self.update_size * slow_norm(W0, "update_size") / size_of(v, z)
        elif self.soft_cap is not None:
            tau = self.soft_cap * slow_norm(W0, "soft_cap")
            factor = tau / (largest_singular_value(v, z) + tau)
        else:
            assert self.clip is not None
            factor = shrink(
                norm_of(v, z), self.clip * slow_norm(W0, "clip_relative") if self.clip_relative else self.clip
            )
        return (v * factor[:, None, None]).to(v.dtype)


def slow_norm(W0: Tensor | None, what: str) -> Tensor:
    """Return ``|W0|_F``, 0-d, not differentiable. NotImplementedError without a whole W0 (tensor parallelism)."""
    if W0 is None:
        raise NotImplementedError(f"{what} needs the norm of the whole weight, and this model's is split over ranks")
    norm: Tensor = torch.linalg.vector_norm(W0.detach(), dtype=state_dtype(W0.dtype))
    return norm


def largest_singular_value(v: Tensor, z: Tensor, steps: int = 5) -> Tensor:
    """Return sigma_max of ``sum_t v_t z_t^T`` per row [B], by power iteration on the factors [B, C, D] and [B, C, F].

    The vector is found without gradients; the value ``|dW x|`` has one. A lower bound that rises with ``steps``.
    """
    dtype = state_dtype(z.dtype)
    v, z = v.to(dtype), z.to(dtype)
    with torch.no_grad():
        x = z.sum(1, keepdim=True) + 1e-3 * z[:, :1]
        for _ in range(steps):
            x = (x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)) @ z.mT @ v  # dW x
            x = x @ v.mT @ z  # dW^T dW x
        x = x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    squared: Tensor = (x @ z.mT @ v).square().sum((1, 2))
    return squared.clamp(min=torch.finfo(dtype).tiny).sqrt()
