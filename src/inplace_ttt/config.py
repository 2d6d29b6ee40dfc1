"""Settings and their defaults."""

import json
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .core import Rule

FORMAT_VERSION = 1
TARGETS = ("input_embed", "hidden_states")
OBJECTIVES = ("learned", "loss", "next_error", "next_token", "reconstruction")
RULES = ("adaptive", "delta", "momentum", "muon", "norm_preserving", "sum")
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"layers": "0::6", "chunk_size": 1024, "lr": 0.1, "decay": 0.0, "update_size": None}
)
"""Defaults that depend on the objective: those of all but "loss"."""
LOSS_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"layers": "0::3", "chunk_size": 128, "lr": 1.0, "decay": 0.0, "update_size": "auto"}
)
"""Defaults of "loss": docs/reading.md has the measurements."""
_KINDS = (
    (("chunk_size", "conv_kernel", "lookahead"), Integral, "a whole number"),
    (("lr", "decay", "clip", "init_std", "update_size"), Real, "a number"),
    (("projection", "clip_relative", "first_order"), bool, "true or false"),
)


_LATER = ("first_order", "learn", "objective_options", "rule", "rule_options", "update_size")
"""Fields added after the first release: left out of files at their defaults, so that it can read them."""


def _is(value: Any, kind: type) -> bool:
    """Like ``isinstance``, but treats bool as not a number."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


@dataclass(frozen=True)
class InPlaceTTTConfig:
    """Settings of In-Place TTT. Raises UserError on a value out of range. Symbols: docs/method.md.

    Where a default is None, the objective decides (``DEFAULTS``, ``LOSS_DEFAULTS``), and the field holds its value. The
    last two fields describe a model whose ``model_type`` is not in the table of families.
    """

    layers: str | tuple[int, ...] = None  # type: ignore[assignment]
    """Which decoder layers adapt: a slice ("0::6", "2:10", ":"), or numbers (negative ones count from the end)."""
    chunk_size: int = None  # type: ignore[assignment]
    """C: tokens between updates. The paper finds 512 and 1024 best."""
    conv_kernel: int = 5
    """K: taps of the target's convolution."""
    lookahead: int = 2
    """L: how many of the taps look ahead."""
    target: str = "input_embed"
    """u: "input_embed" (token embeddings) or "hidden_states" (the MLP's own input, unit RMS: needs far less lr)."""
    objective: str = "learned"
    """The target: "learned" (convolution), a fixed shift ("next_token", "reconstruction"), "next_error" (next token and
    MLP's input together), "loss" (the gradient of the next-token loss itself: nothing to train), or a registered one's
    name."""
    objective_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Options of the target, checked by it: "gates", "ridge", "center" of the shipped ones, "start" of "learned"."""
    rule: str = "sum"
    """The rule of the fast weights: "sum" (the paper), "delta", "momentum", "muon", "norm_preserving", or a
    registered one."""
    rule_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Options of the rule, checked by it: "soft_cap" of "sum", "beta" of "momentum"."""
    projection: bool = True
    """True: use P, the target projection."""
    lr: float = None  # type: ignore[assignment]
    """eta: the inner learning rate. 1.0 made training from scratch fail at rows of 16,384 tokens (docs/log.md)."""
    decay: float = None  # type: ignore[assignment]
    """S shrinks by ``1 - decay`` at every update; 0 is the paper's plain sum."""
    clip: float | None = None
    """tau: largest Frobenius norm of one chunk's update; None: no clipping."""
    clip_relative: bool = False
    """True: ``clip`` is a fraction of the slow weight's norm."""
    update_size: float | str | None = None
    """r: every chunk's update of S is scaled to ``r * ||W0||_F``; "auto": set per layer (rule "adaptive");
    None: updates are not scaled."""
    learn: str = "read"
    """Tokens that objective "loss" learns: "read", the model's input, or "all", its own output as well."""
    first_order: bool = False
    """True: a model with objective "loss" may be trained; the gradient treats every S as a constant."""
    init_std: float | None = None
    """sigma of P's diagonal at the start; None: the model's ``initializer_range``."""
    layers_path: str | None = None
    """Path of the decoder layers, e.g. "model.layers"; None: from the table of families."""
    projection_path: str | None = None
    """Path of the last projection inside a decoder layer, e.g. "mlp.down_proj"; None: from the table of families."""

    def __post_init__(self) -> None:
        for name, value in (LOSS_DEFAULTS if self.objective == "loss" else DEFAULTS).items():
            taken = name == "update_size" and (
                self.rule != "sum" or self.clip is not None or "soft_cap" in self.rule_options
            )
            if getattr(self, name) is None and not taken:
                object.__setattr__(self, name, value)
        if isinstance(self.layers, str):
            self._slice()
        else:
            listed = isinstance(self.layers, Sequence) and all(_is(i, Integral) for i in self.layers)
            if not listed:
                raise UserError(f'layers must be a slice such as "0::6" or a list of numbers, got {self.layers!r}')
            object.__setattr__(self, "layers", tuple(int(i) for i in self.layers))
        for names, kind, word in _KINDS:
            for name in names:
                value = getattr(self, name)
                if value is None or (name, value) == ("update_size", "auto"):
                    continue
                if not _is(value, kind):
                    more = ' or "auto"' if name == "update_size" else ""
                    raise UserError(f"{name} must be {word}{more}, got {value!r}")
                if kind is Real and not math.isfinite(value):
                    raise UserError(f"{name} must be finite, got {value}")
        for wrong, say in (
            (self.chunk_size < 1, f"chunk_size must be at least 1, got {self.chunk_size}"),
            (self.conv_kernel < 1, f"conv_kernel must be at least 1, got {self.conv_kernel}"),
            (
                not 0 <= self.lookahead < self.conv_kernel,
                f"lookahead must be from 0 to conv_kernel - 1 = {self.conv_kernel - 1}, got {self.lookahead}",
            ),
            (self.target not in TARGETS, f"target must be one of {', '.join(TARGETS)}, got {self.target!r}"),
            (self.learn not in ("read", "all"), f'learn must be "read" or "all", got {self.learn!r}'),
            (not 0 <= self.decay < 1, f"decay must be in [0, 1), got {self.decay}"),
            (self.clip is not None and self.clip <= 0, f"clip must be positive or None, got {self.clip}"),
            (self.init_std is not None and self.init_std < 0, f"init_std must not be negative, got {self.init_std}"),
            (
                (self.layers_path is None) != (self.projection_path is None),
                "layers_path and projection_path describe a model together: give both or neither",
            ),
        ):
            if wrong:
                raise UserError(say)
        for name in ("objective_options", "rule_options"):
            if not isinstance(getattr(self, name), Mapping):
                raise UserError(f"{name} must be a mapping, got {getattr(self, name)!r}")
            object.__setattr__(self, name, dict(getattr(self, name)))
        for name, known in (("objective", OBJECTIVES), ("rule", RULES)):
            chosen = getattr(self, name)
            if chosen not in known and f"{__package__}.core" not in sys.modules:  # so none was registered
                more = f"(register_{'target' if name == 'objective' else name} adds one)"
                raise UserError(f"{name} must be one of {', '.join(known)}, got {chosen!r} {more}")
        if self.objective not in OBJECTIVES or self.objective_options:
            from .core import targets

            targets.target_options(self.objective, self.objective_options, self.settings)
        if self.objective != "loss" and (self.rule == "adaptive" or self.update_size == "auto"):
            raise UserError('update_size="auto" follows the gradient of the loss: it needs objective="loss"')
        if self.rule != "sum" and (own := [n for n in ("clip", "update_size") if getattr(self, n) is not None]):
            raise UserError(f"{own[0]} is a setting of rule 'sum', not of {self.rule!r}: use rule_options")
        # The rule of "auto" alone is always right: importing it takes seconds.
        if self.rule not in RULES or self.rule_options or self.clip or self.update_size not in (None, "auto"):
            self.make_rule()

    @property
    def settings(self) -> dict[str, Any]:
        """Return the fields by name, for rules and targets whose own are named alike."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def make_rule(self) -> "Rule":
        """Return the rule with its options. Raises UserError where they are wrong."""
        from .core import make_rule

        if self.update_size != "auto":
            return make_rule(self.rule, self.rule_options, self.settings)
        if self.clip is not None:
            raise UserError("clip and update_size both set the size of an update: give one of them")
        return make_rule("adaptive", self.rule_options, self.settings)

    def layer_indices(self, count: int) -> tuple[int, ...]:
        """Return the model's adapting layers of ``count``, ascending. UserError when one does not exist."""
        if isinstance(self.layers, str):
            parts = self._slice()
            bounds = [b for b in parts[:2] if b is not None]
            if any(b > count or b < -count for b in bounds) or (len(parts) == 3 and parts[2] == 0):
                raise UserError(f"layers {self.layers!r} reaches outside the model, which has {count} layers")
            chosen = list(range(count))[slice(*parts)]
        else:
            outside = [i for i in self.layers if not -count <= i < count]
            if outside:
                raise UserError(f"no layer {outside[0]}: the model has {count} layers, 0 to {count - 1}")
            chosen = [i % count for i in self.layers]
        if not chosen:
            raise UserError(f"layers {self.layers!r} chooses none of the model's {count} layers")
        return tuple(sorted(set(chosen)))

    def _slice(self) -> list[int | None]:
        """Return the parts of a slice of layers. Raises UserError where it is not one."""
        try:
            parts = [int(p) if p.strip() else None for p in str(self.layers).split(":")]
        except ValueError:
            parts = []
        if not 2 <= len(parts) <= 3:
            raise UserError(f'layers must be a slice such as "0::6" or a list of numbers, got {self.layers!r}')
        return parts

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping, with the format's version."""
        values = asdict(self)
        values["layers"] = self.layers if isinstance(self.layers, str) else list(self.layers)
        default: tuple[Any, ...] = (None, {}, "sum", "read", False)
        kept = {name: value for name, value in values.items() if name not in _LATER or value not in default}
        return {"format_version": FORMAT_VERSION, **kept}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "InPlaceTTTConfig":
        """Build settings from ``to_dict``'s result. Refuses a newer format; ignores unknown keys with a warning."""
        values = dict(values)
        version = values.pop("format_version", FORMAT_VERSION)
        if not _is(version, Integral) or version > FORMAT_VERSION:
            raise UserError(
                f"this file has format {version!r}, this version of inplace-ttt reads up to {FORMAT_VERSION}: "
                "update inplace-ttt"
            )
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            warnings.warn(f"ignored unknown settings of In-Place TTT: {', '.join(unknown)}", stacklevel=2)
        return cls(**{k: v for k, v in values.items() if k in known})

    @classmethod
    def from_json(cls, text: str) -> "InPlaceTTTConfig":
        """Build settings from the text of a JSON file. Raises UserError when it is damaged."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"this file is not the settings of In-Place TTT ({error})") from None
        if not isinstance(values, dict):
            raise UserError(f"this file is not the settings of In-Place TTT (it holds a {type(values).__name__})")
        return cls.from_dict(values)
